"""The words for whether a model is better than another: the same in ``fit``, ``show``, backtests, studies and searches.

``"proven"``, ``"better, not proven"``, ``"no evidence"``, and of finished models on test data ``"proven worse"``.
"""

from __future__ import annotations

__all__ = [
    "BETTER",
    "LEAST_CHANGE",
    "LEAST_UNITS",
    "LEVEL",
    "NO_EVIDENCE",
    "PROVEN",
    "WORDS",
    "WORSE",
    "counted",
    "evidence",
    "word_of",
]

PROVEN, BETTER, NO_EVIDENCE = "proven", "better, not proven", "no evidence"
#: Of finished models on test data alone: where a verdict decides what is handed over, that is zero-shot then.
WORSE = "proven worse"
#: From best to worst.
WORDS = (PROVEN, BETTER, NO_EVIDENCE, WORSE)

#: One-sided level of a proof, its least change in per cent and its least number of units.
LEVEL, LEAST_CHANGE, LEAST_UNITS = 0.05, -0.5, 6


def word_of(change: float, p: float, units: int) -> str:
    """Return what may be said about a change, in one of the words that are used everywhere.

    Parameters
    ----------
    change
        Of the mean score, in per cent of the reference's; below 0 is better.
    p
        One-sided, in the direction of the change; with a correction where several were tested.
    units
        How many were compared.

    Returns
    -------
    str
        ``"proven"``: p below 0.05, at most -0.5 %, at least 6 units. ``"better, not proven"``: below 0.
        ``"proven worse"``: above 0, p below 0.05, at least 6 units; for worse models, any size counts.
        ``"no evidence"``: none of these.

    Examples
    --------
    >>> word_of(-1.6, 0.01, 117), word_of(-0.4, 0.01, 117), word_of(2.0, 0.2, 117), word_of(2.0, 0.01, 117)
    ('proven', 'better, not proven', 'no evidence', 'proven worse')
    """
    certain = p < LEVEL and units >= LEAST_UNITS
    if change < 0:
        return PROVEN if certain and change <= LEAST_CHANGE else BETTER
    return WORSE if change > 0 and certain else NO_EVIDENCE


def evidence(
    score: str,
    change: float,
    interval: tuple[float, float] | None,
    units: int,
    unit: str,
    reference: str = "zero-shot",
    note: str = "",
) -> str:
    """Return what a word rests on, as it is printed everywhere.

    Parameters
    ----------
    score
        What was scored.
    change, interval
        In per cent of the reference's mean, and its 90 % interval; None with fewer than 6 units.
    units, unit
        How many were compared, and what they are, in the plural.
    reference
        What they were compared with.
    note
        What else must be known.

    Examples
    --------
    >>> evidence("MAE", -1.6, (-2.4, -0.8), 117, "patients")
    'MAE -1.60 % against zero-shot (90 % interval -2.40 to -0.80 %, 117 patients)'
    """
    parts = [] if interval is None else [f"90 % interval {interval[0]:+.2f} to {interval[1]:+.2f} %"]
    parts.append(counted(units, unit))
    if units < LEAST_UNITS:
        parts.append(f"too few for a proof: it takes {LEAST_UNITS}")
    elif interval is not None and interval[1] < 0 and change > LEAST_CHANGE:
        parts.append(f"too small for a proof: it takes {LEAST_CHANGE:g} %")
    parts += [note] if note else []
    return f"{score} {change:+.2f} % against {reference} ({', '.join(parts)})"


def counted(units: int, unit: str) -> str:
    """Return a number of units in words: 1 patient, 2 patients, 1 series."""
    return f"{units} {unit.removesuffix('s') if units == 1 and unit != 'series' else unit}"
