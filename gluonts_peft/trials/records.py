"""What a search leaves on disk: its spec, what it proposed, how trials were scored, and their ranking."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..files import NewerFormat, as_integer, record, typed, write_atomically
from .reading import from_record, read_json, read_record
from .searchspec import SearchSpec, metric_columns
from .spec import TrialResult, TrialSpec, describe_adapter
from .strict import SpecError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "EVALUATIONS",
    "PROPOSALS",
    "SEARCH",
    "Entry",
    "Journal",
    "Record",
    "print_ranking",
    "ranking",
    "read_search",
]

SEARCH = "search.json"
PROPOSALS = "proposals.json"
EVALUATIONS = "evaluations.json"
RANKING = "ranking.csv"
BEST = "best"

FINISHED, STOPPED, FAILED, MISSING = "finished", "stopped", "failed", "missing"


def trial_folder(folder: Path, key: str) -> Path:
    return folder / "trials" / key


@dataclass
class Entry:
    """A trial that was proposed.

    ``stopped`` is the number of epochs after which the scheduler ended it, if it did. A trial of a population changes
    its values, and its key with them.
    """

    number: int
    values: dict[str, Any]
    key: str
    stopped: int | None = None

    def status(self, result: TrialResult | None) -> str:
        if result is not None and result.status == "finished":
            return FINISHED
        if self.stopped is not None:
            return STOPPED
        return MISSING if result is None else FAILED


class Journal:
    """What was proposed, on disk."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / PROPOSALS
        self.entries: list[Entry] = []
        if not self.path.exists():
            return
        # A bare list: its format is that of the search, which says it.
        trials = read_json(self.path)
        try:
            if not isinstance(trials, list):
                raise TypeError(f"it holds a {type(trials).__name__}, not a list")
            self.entries = [typed(Entry, entry, f"trial {number}") for number, entry in enumerate(trials)]
            for number, entry in enumerate(self.entries):
                if entry.number != number or not entry.key.isalnum():
                    raise ValueError(f"trial {number} has the number {entry.number} and the key {entry.key!r}")
        except NewerFormat as error:
            raise SpecError(f"'{self.path}'", [f"it was {error}"]) from None
        except (ValueError, TypeError) as error:
            raise SpecError(f"'{self.path}'", [f"it is damaged: {error}"]) from error

    def write(self) -> None:
        write_atomically(self.path, json.dumps([asdict(entry) for entry in self.entries], indent=1) + "\n")


@dataclass
class Record:
    """The scores of one trial on the validation windows, on disk.

    ``evaluations`` has the ``scores`` after so many ``epochs``, and on which node; ``final`` the scores of what was
    kept. ``attempts`` says where the trial was trained, and after how many epochs, those of earlier attempts included,
    each attempt came to its first evaluation.
    """

    folder: Path
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, float | None] | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Record:
        path = folder / EVALUATIONS
        if not path.exists():
            return cls(folder)
        content = read_json(path)
        try:
            found = typed(cls, {**content, "folder": folder}, "it")
            for each in (*found.evaluations, *found.attempts):
                as_integer(each["epochs"], "epochs", 0)
            for scores in (*(each["scores"] for each in found.evaluations), found.final or {}):
                for name, score in scores.items():
                    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
                        raise TypeError(f"score {name!r} is {score!r}, not a number")
        except NewerFormat as error:
            raise SpecError(f"'{path}'", [f"it was {error}"]) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SpecError(f"'{path}'", [f"it is damaged: {type(error).__name__}: {error}"]) from error
        return found

    def write(self) -> None:
        form = {"evaluations": self.evaluations, "final": self.final, "attempts": self.attempts}
        write_atomically(self.folder / EVALUATIONS, json.dumps(record(form), indent=1) + "\n")

    @property
    def last(self) -> int:
        """Epochs before the last evaluation."""
        return max([each["epochs"] for each in self.evaluations], default=0)

    def scores(self, objective: Sequence[str]) -> list[float | None]:
        """Return the final scores, or else the last ones, of some metrics."""
        columns = metric_columns()
        latest = self.final or (self.evaluations[-1]["scores"] if self.evaluations else {})
        return [latest.get(columns[name]) for name in objective]


def read_search(folder: str | Path) -> SearchSpec:
    """Read which search a folder holds.

    Raises
    ------
    SpecError
        If it holds none, or ``search.json`` is damaged.
    """
    content = read_record(folder, SEARCH, "search")
    path = Path(folder) / SEARCH
    if not isinstance(content.get("spec"), dict):
        raise SpecError(f"'{path}'", [f"spec is {content.get('spec')!r}, not a mapping"])
    return from_record(SearchSpec, path, content["spec"])


def ranking(folder: str | Path) -> pd.DataFrame:
    """Return a row a trial, the best first.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``rank``. Columns: ``trial``, the number in order of proposal; the word of the ``verdict`` of its
        training, the ``change %`` against zero-shot and its 90 % interval, ``low %`` to ``high %``, all on validation
        windows, which chose the best trial too, and missing where nothing trains or the trial is not finished;
        ``status``: ``finished``, ``stopped``
        by the scheduler, ``failed``, or ``missing``; ``pareto``, whether no other finished trial is better in one
        objective and no worse in all others; ``validation <metric>`` for each objective, which decides the order
        (several: front after front, then by the first), of a stopped trial the last one; what the trial has at each
        path of the space; ``test <metric>`` for all metrics of the report, which decide nothing; ``zero-shot
        loss`` and ``tuned loss`` on the validation windows of its training, whether its verdict ``handed over`` the
        tuned model, and that verdict as a ``sentence``; ``trainable parameters``, ``epochs``, ``seconds`` of training,
        ``folder`` of the trial, and ``error``.

    Raises
    ------
    SpecError
        If the folder holds no search, or a file of it is damaged.
    """
    from .report import METRICS

    folder = Path(folder)
    spec = read_search(folder)
    rows = []
    for entry in Journal(folder).entries:
        result = TrialResult.read(trial_folder(folder, entry.key))
        record = Record.read(trial_folder(folder, entry.key))
        status = entry.status(result)
        scores = record.scores(spec.objective)
        trial = spec.trial(entry.values)
        gate = (result.gate if result is not None else None) or {}
        verdict = None if result is None else result.verdict
        tests = result.scores if result is not None and status == FINISHED else {}
        rows.append(
            {
                "trial": entry.number,
                "verdict": verdict and verdict.word,
                "change %": verdict and verdict.change,
                "low %": verdict and verdict.low,
                "high %": verdict and verdict.high,
                "status": status,
                "pareto": False,
                **{f"validation {name}": score for name, score in zip(spec.objective, scores, strict=True)},
                **{path: value_at(trial, path) for path in spec.space},
                **{f"test {name}": tests.get(column) for name, column in METRICS.items()},
                "zero-shot loss": gate.get("zero_shot"),
                "tuned loss": gate.get("tuned"),
                "handed over": gate.get("passed"),
                "sentence": verdict and str(verdict),
                "trainable parameters": result.trainable_parameters if result else None,
                "epochs": result.epochs if status == FINISHED and result else record.last,
                "seconds": result.seconds if result else None,
                "folder": str(trial_folder(folder, entry.key).relative_to(folder)),
                "error": result.error if result else None,
            }
        )
    objectives = [f"validation {name}" for name in spec.objective]
    points = [[as_number(row[name]) for name in objectives] for row in rows]
    fronts = _fronts([point if row["status"] == FINISHED else None for row, point in zip(rows, points, strict=True)])
    order = [FINISHED, STOPPED, MISSING, FAILED]
    for row, front in zip(rows, fronts, strict=True):
        row["pareto"] = front == 0
    places = sorted(
        range(len(rows)), key=lambda i: (order.index(rows[i]["status"]), fronts[i], points[i], rows[i]["trial"])
    )
    frame: pd.DataFrame = pd.DataFrame([rows[i] for i in places])
    for name in ("trainable parameters", "epochs"):
        frame[name] = frame[name].astype("Int64") if len(frame) else None
    frame.index = pd.RangeIndex(1, len(frame) + 1, name="rank")
    return frame


def verdict_of(frame: pd.DataFrame) -> str | None:
    """Return the verdict on the best trial of a ranking in a sentence, which says whose choice the data were.

    None where no trial has finished, or the best one trains nothing.
    """
    best = frame[frame["status"] == FINISHED].head(1)
    if best.empty or best["handed over"].isna().any():
        return None
    row, count = best.iloc[0], int(frame["status"].isin([FINISHED, STOPPED]).sum())
    losses = f"no verdict: loss {cell(row['tuned loss'])}, zero-shot {cell(row['zero-shot loss'])}"
    chosen = f", which chose it among {count} trials too" if count > 1 else ""
    said = losses if pd.isna(row["sentence"]) else row["sentence"]
    return f"the best trial, {row['trial']}: {said}, on validation windows{chosen}"


def not_helped(frame: pd.DataFrame) -> str | None:
    """Return the verdict on the best trial of a ranking if zero-shot would be handed over in its place, else None."""
    best = frame[frame["status"] == FINISHED].head(1)
    return verdict_of(frame) if best["handed over"].eq(False).any() else None


def print_ranking(frame: pd.DataFrame, console: Console | None = None, limit: int = 20) -> None:
    """Print the best trials of a ranking.

    Parameters
    ----------
    frame
        What :func:`ranking` returns.
    console
        Where to print; standard output if None.
    limit
        Rows at most.
    """
    from rich.console import Console

    console = console or Console()
    if (sentence := verdict_of(frame)) is not None:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    console.print(_table(frame, limit))
    if len(frame) > limit:
        console.print(f"{len(frame) - limit} more in {RANKING}", highlight=False)


def _table(frame: pd.DataFrame, limit: int) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    from .tables import INTERVAL, judged

    objectives = [str(name).removeprefix("validation ") for name in frame if str(name).startswith("validation ")]
    hidden = {"folder", "error", "seconds", "sentence", *([] if len(objectives) > 1 else ["pareto"])}
    hidden |= {"change %", "low %", "high %"}
    # The other metrics are in the file; a terminal is not that wide.
    hidden |= {str(name) for name in frame if str(name).startswith("test ") and str(name)[5:] not in objectives}
    names = [name for name in frame if name not in hidden]
    # The verdict and what it rests on come first, behind the number of the trial.
    table = Table(box=SIMPLE)
    table.add_column("rank", justify="right")
    for name in names:
        left = name in ("status", "verdict")
        table.add_column(Text(str(name)), justify="left" if left else "right", overflow="fold")
        if name == "verdict":
            table.add_column("change", justify="right")
            table.add_column(INTERVAL, justify="right")
    for rank, row in frame.head(limit).iterrows():
        cells = []
        for name in names:
            cells += judged(row) if name == "verdict" else [cell(row[name])]
        table.add_row(str(rank), *map(Text, cells))
    return table


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict | list):
        return describe_adapter(value) if _is_adapter(value) else json.dumps(value)
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_adapter(value: Any) -> bool:
    parts = value if isinstance(value, list) else [value]
    return all(isinstance(part, str) or (isinstance(part, dict) and "name" in part) for part in parts)


def value_at(trial: TrialSpec, path: str) -> Any:
    place: Any = trial.normal_form()
    if path.startswith("adapter.") and isinstance(place["adapter"], str):
        place["adapter"] = {"name": place["adapter"]}
    for name in path.split("."):
        place = place.get(name) if isinstance(place, dict) else None
    return place


def as_number(score: float | None) -> float:
    return math.inf if score is None or not math.isfinite(score) else score


def _fronts(points: Sequence[Sequence[float] | None]) -> list[int]:
    """Return the number of the Pareto front that each point is on, counted from 0; those without a point are last."""
    fronts = [len(points)] * len(points)
    left = {i: point for i, point in enumerate(points) if point is not None}
    for number in range(len(points)):
        front = [i for i, point in left.items() if not any(_dominates(other, point) for other in left.values())]
        for i in front:
            fronts[i] = number
            del left[i]
    return fronts


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
