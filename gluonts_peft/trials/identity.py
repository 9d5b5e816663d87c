"""Where a trial lies: found again by what its spec says, whatever version gave its folder a name.

A folder is called by the hash of its spec, which spells all defaults out: an option that a new version adds changes the
hash of every trial. So a finished trial is known by its result, whose spec is read, filled with the defaults of today,
and compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from ..files import check_regular
from .baselinespec import BASELINE
from .spec import RESULT, TrialResult, TrialSpec
from .strict import SpecError

__all__ = ["base_fingerprint", "base_fingerprints", "read_scores", "trial_folder"]

# Results that were looked at: path -> when it was written, and the hash of its spec today, if it is finished.
_seen: dict[Path, tuple[int, str | None]] = {}


def trial_folder(folder: Path, trial: TrialSpec) -> Path:
    """Return where a trial of a study lies, or is to lie if it has not finished yet."""
    own = folder / "trials" / trial.hash()
    if (own / RESULT).exists():
        return own
    return next((path for path in _others(folder) if _finished(path / RESULT) == trial.hash()), own)


def base_fingerprint(family: str, checkpoint: str) -> str:
    """Return the fingerprint of pretrained weights."""
    from ..checkpoint import parse
    from ..registry import get_estimator

    backbone = get_estimator(family).backbone_class
    folder, _ = backbone.fetch(parse(checkpoint, bundled=backbone.bundled()))
    return str(backbone.fingerprint(folder))


def base_fingerprints(trials: Iterable[TrialSpec]) -> dict[str, str]:
    """Return the fingerprint of the pretrained weights of each family and checkpoint of some trials."""
    wanted = sorted({(trial.family, trial.checkpoint) for trial in trials if trial.family != BASELINE})
    return {f"{family} {name}": base_fingerprint(family, name) for family, name in wanted}


def read_scores(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """Read the scores of a trial's windows.

    Raises
    ------
    SpecError
        If the file is damaged.
    """
    try:
        check_regular(path)
        return pd.read_parquet(path, columns=columns)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SpecError(
            f"'{path}'", [f"it is damaged: {reason}; delete the result.json beside it to run the trial again"]
        ) from error


def _others(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"trials/*/{RESULT}"))


def _finished(path: Path) -> str | None:
    """Return the hash of the spec of a result, as it is today; None of one that failed or cannot be read."""
    try:
        written = path.stat().st_mtime_ns
        if path not in _seen or _seen[path][0] != written:
            result = TrialResult.read(path.parent)
            finished = result is not None and result.status == "finished"
            _seen[path] = (written, result.spec.hash() if finished and result is not None else None)
    except (OSError, SpecError):
        # Asking for that trial by name raises its error.
        return None
    return _seen[path][1]
