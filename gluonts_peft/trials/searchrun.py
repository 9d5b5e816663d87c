"""The state of a search while it runs: which trial is next, what is known of the others, and what must not change."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import record, write_atomically
from .cluster import code_versions
from .identity import base_fingerprints
from .proposer import Proposer
from .reading import read_record
from .records import FAILED, FINISHED, MISSING, SEARCH, STOPPED, Entry, Journal, Record, as_number, trial_folder
from .searchboard import Board
from .searchspec import SearchSpec, metric_columns
from .spec import TrialResult, TrialSpec
from .strict import SpecError

__all__ = ["Run", "trial_key"]

# Network file systems show what others wrote after a while.
_PATIENCE = 90.0


def trial_key(spec: TrialSpec, data: str, code: Mapping[str, str], *lineage: Any) -> str:
    """Return the name of a trial's folder: the hash of its spec, data and code, and of what else it goes on from."""
    form = [spec.normal_form(), data, dict(code), *lineage]
    return hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()


class Run:
    """A search while it runs: which trial is next, and what is known of the others."""

    def __init__(self, spec: SearchSpec, folder: Path, board: Board) -> None:
        from .data import load_data

        self.spec, self.folder, self.board = spec, folder, board
        self.started = time.monotonic()
        base = TrialSpec(**spec.base)
        self.data = load_data(base.data).fingerprint
        self.also = {name: load_data(other).fingerprint for name, other in base.also.items()}
        self.weights = base_fingerprints(self.bases())
        self.code = code_versions(self.bases())
        self._check_unchanged()
        self.journal = Journal(folder)
        self.proposer = Proposer(spec, [entry.values for entry in self.journal.entries])
        self.reported: set[int] = set()
        self._waiting = list(self.journal.entries)
        # A scheduler compares a trial with the earlier ones, so that it has to hear of them again.
        self.settled = {entry.number for entry in self.journal.entries if self._settled(entry)}
        if spec.scheduler.name not in ("asha", "hyperband"):
            self._waiting = [entry for entry in self._waiting if entry.number not in self.settled]
        for entry in self.journal.entries:
            if entry.number in self.settled:
                scores = Record.read(trial_folder(folder, entry.key)).scores(spec.objective)
                self.proposer.tell(entry.values, [as_number(score) for score in scores])
                board.know(entry, FINISHED if entry.stopped is None else STOPPED, as_number(scores[0]))

    def _check_unchanged(self) -> None:
        path = self.folder / SEARCH
        form = {
            "spec": self.spec.normal_form(),
            "data": self.data,
            "also": self.also,
            "weights": self.weights,
            "code": self.code,
        }
        if path.is_file():
            there = read_record(self.folder, SEARCH, "search")
            for name in ("also", "weights", "code"):
                if not isinstance(there.get(name) or {}, dict):
                    raise SpecError(f"'{path}'", [f"{name} is {there[name]!r}, not a mapping"])
            if there.get("data") != self.data:
                raise ValueError(
                    f"the data of the search in '{self.folder}' have changed; name another folder, or bring the earlier"
                    " data back"
                )
            for what, mine in (("also", self.also), ("weights", self.weights)):
                earlier = there.get(what) or {}
                changed = [name for name in sorted({*mine, *earlier}) if mine.get(name) != earlier.get(name)]
                if changed:
                    which = "data of also" if what == "also" else "pretrained weights"
                    raise ValueError(
                        f"the {which} of the search in '{self.folder}' have changed ({', '.join(changed)}); name"
                        " another folder, or bring the earlier ones back"
                    )
            if there.get("code") != self.code:
                raise ValueError(
                    f"the search in '{self.folder}' was run with {_words(there.get('code'))}, here is"
                    f" {_words(self.code)}; name another folder, or install the earlier versions"
                )
        write_atomically(path, json.dumps(record(form), indent=1) + "\n")

    def _settled(self, entry: Entry) -> bool:
        result = TrialResult.read(trial_folder(self.folder, entry.key))
        return entry.status(result) in (FINISHED, STOPPED)

    def bases(self) -> list[TrialSpec]:
        """Return trials with all checkpoints and adapters that can come."""
        return [TrialSpec(**self.spec.base), *map(self.spec.trial, self.spec.corners())]

    def is_done(self) -> bool:
        """Whether no trial is left to run."""
        if len(self.settled) < len(self.journal.entries):
            return False
        entry = self._new()
        if entry is not None:
            self._waiting.append(entry)
        return entry is None

    def next(self) -> Entry | None:
        """Return the next trial to run, or None after the last."""
        return self._waiting.pop(0) if self._waiting else self._new()

    def _new(self) -> Entry | None:
        entries, most = self.journal.entries, self.spec.num_samples
        if most is not None and len(entries) >= most:
            return None
        values = self.proposer.propose()
        if values is None:
            return None
        number = len(entries)
        member = [number] if self.spec.scheduler.name == "pbt" else []
        entry = Entry(number, values, trial_key(self.spec.trial(values), self.data, self.code, *member))
        entries.append(entry)
        self.journal.write()
        return entry

    def more(self) -> int:
        """Return how many trials can still come."""
        if self.spec.num_samples is None:
            return len(self._waiting) + len(list(self.spec.grid())) + 1
        return len(self._waiting) + max(0, self.spec.num_samples - len(self.journal.entries))

    def observe(self, number: int, report: Mapping[str, Any]) -> None:
        """Take notice of what a trial reports."""
        entry = self.journal.entries[number]
        values = json.loads(report["values"])
        if (entry.key, entry.values) != (report["key"], values):
            entry.key, entry.values = report["key"], values
            self.journal.write()
        status = "running" if not report["finished"] else FAILED if report.get("error") else FINISHED
        if status == FINISHED:
            self.reported.add(number)
        self.board.know(entry, status, report["score"], report["epochs"])

    def ended(self, number: int, report: Mapping[str, Any] | None, error: str | None = None) -> None:
        """Take notice of a trial's end; its last report tells whether that was its own."""
        entry = self.journal.entries[number]
        if error is not None:
            self.fail(entry, error)
        elif report is not None and number not in self.settled and (report["finished"] or not self.out_of_time()):
            self.settled.add(number)
            self.proposer.tell(entry.values, json.loads(report["scores"]))
            if not report["finished"]:
                entry.stopped = int(report["epochs"])
                self.journal.write()
        if report is not None and report["finished"]:
            return
        status = FAILED if error is not None else STOPPED if entry.stopped is not None else MISSING
        self.board.know(entry, status)

    def fail(self, entry: Entry, error: str) -> None:
        """Write a failed result, which the next run tries again."""
        result = TrialResult(spec=self.spec.trial(entry.values), status="failed", error=error)
        result.write(trial_folder(self.folder, entry.key))

    def out_of_time(self) -> bool:
        """Whether the time budget is spent."""
        return self.spec.time_budget is not None and time.monotonic() - self.started >= self.spec.time_budget

    def settings(self) -> dict[str, Any]:
        """Return what a trial on another node needs to know."""
        return {
            "folder": str(self.folder),
            "columns": [metric_columns()[name] for name in self.spec.objective],
            "every": self.spec.evaluate_every,
            "data": self.data,
            "code": self.code,
            "context": self.spec.shortest_context(),
            "cpus": self.spec.resources.cpu,
            "scheduler": self.spec.scheduler.name,
        }

    def wait_until_visible(self) -> None:
        """Wait for results that were reported: a network file system may hide them for a while."""
        deadline = time.monotonic() + _PATIENCE
        for number in self.reported:
            entry = self.journal.entries[number]
            while not self._settled(entry) and time.monotonic() < deadline:
                time.sleep(0.5)


def _words(versions: Mapping[str, str] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted((versions or {}).items()))
