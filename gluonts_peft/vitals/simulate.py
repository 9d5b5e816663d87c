"""Simulated heart rate and mean arterial pressure of ICU patients: no patient ever had these values.

The data are for tests, examples and for showing what tuning can learn, not for clinical conclusions. Their structure
is shared by all patients, so a pretrained model that never saw it can learn it from some and use it on others.

    map = baseline + day + slow + fast + bolus + turn - fall
    hr  = baseline + day + slow + fast - bolus + turn + rise - gain * lowpass(slow MAP)
    observed = round(clip(value)), then artefacts, then gaps

Every number below is our choice, made to look like 5-minute bedside data; none is estimated from patients.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.signal import lfilter

__all__ = ["patient_of", "simulate_vitals"]

DataEntry = dict[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Vital:
    """One vital sign; values in beats/min (heart rate) or mmHg (pressure), all our choice."""

    baseline: float
    baseline_sd: float
    baseline_range: tuple[float, float]
    day: float  # amplitude of the daily rhythm
    slow_sd: float
    fast_sd: float
    noise_sd: float
    bolus: float  # effect of one fluid bolus at its height
    turn: float  # effect of one repositioning at its height
    sepsis: tuple[float, float]  # change at the depth of an episode, range over episodes
    clip: tuple[float, float]  # before artefacts
    artefacts: tuple[tuple[float, float], ...]  # ranges of wrong values, drawn with equal probability


_VITALS = {
    "hr": _Vital(
        baseline=82.0,
        baseline_sd=12.0,
        baseline_range=(55.0, 112.0),
        day=4.0,
        slow_sd=4.0,
        fast_sd=1.5,
        noise_sd=0.7,
        bolus=-7.0,
        turn=14.0,
        sepsis=(15.0, 32.0),
        clip=(40.0, 180.0),
        # Leads off; pacing spikes or T waves counted as beats.
        artefacts=((0.0, 0.0), (185.0, 280.0)),
    ),
    "map": _Vital(
        baseline=82.0,
        baseline_sd=8.0,
        baseline_range=(66.0, 102.0),
        day=3.0,
        slow_sd=4.0,
        fast_sd=2.0,
        noise_sd=0.8,
        bolus=10.0,
        turn=10.0,
        sepsis=(-30.0, -16.0),
        clip=(40.0, 140.0),
        # Transducer open to air; flush of the line; damped blood sampling.
        artefacts=((0.0, 3.0), (200.0, 300.0), (8.0, 28.0)),
    ),
}

_SLOW_MINUTES = 75.0  # back to the baseline within one to two hours
_FAST_MINUTES = 8.0
_REFLEX_GAIN = 0.5  # beats/min per mmHg
_REFLEX_MINUTES = 10.0
_DAY_PEAK_HOUR, _DAY_PEAK_SD = 15.0, 1.0

_TURN_EVERY_MINUTES = 120.0  # nurses reposition every two hours, at a time of its own for each patient
_TURN_DECAY_MINUTES = 25.0

_BOLUS_PER_HOUR = 1 / 9
_BOLUS_RISE_MINUTES, _BOLUS_DECAY_MINUTES = 15.0, 70.0

_SEPTIC_SHARE = 0.35
_EPISODES_PER_HOUR = 1 / 10
_FALL_MINUTES = (60.0, 120.0)
_HOLD_MINUTES = 30.0
# A vasopressor brings the pressure back with one damped overshoot.
_RECOVERY_MINUTES, _RECOVERY_PERIOD_MINUTES = 45.0, 200.0

_ARTEFACT_SHARE = 0.006
_ARTEFACT_AGAIN = 0.3  # probability that the next value is wrong as well
_GAP_SHARE = 0.012
_GAP_RUNS_PER_HOUR = 1 / 10
_GAP_RUN_STEPS = 6.0


def simulate_vitals(
    patients: int = 200,
    hours: int = 24,
    *,
    seed: int = 0,
    freq: str = "5min",
    vitals: Sequence[str] = ("hr", "map"),
) -> list[DataEntry]:
    """Simulate heart rate and mean arterial pressure of ICU patients.

    What a model can learn from some patients and use on others: deviations vanish with a time constant of 75 minutes;
    repositioning lifts both vital signs every two hours at a patient's own minute, an effect that decays with one of
    25; a fluid bolus has a fixed shape over about three hours; a septic episode (in about a third of the patients)
    falls for one to two hours, stays, and recovers with a damped overshoot; zeros, line flushes and double counts say
    nothing about what follows. Heart rate answers pressure with the opposite sign. The days are those of the clock.

    Parameters
    ----------
    patients
        Number of patients.
    hours
        Hours per patient.
    seed
        Same seed, same data.
    freq
        Step, 1 to 60 minutes, as pandas spells it. Time constants are in minutes, whatever the step.
    vitals
        Any of ``"hr"`` (beats/min) and ``"map"`` (mmHg). A series does not depend on which others are asked for.

    Returns
    -------
    list[DataEntry]
        One dictionary a patient and vital sign, patient by patient: ``start`` (``pd.Period``; the hour of the day
        differs between patients), ``target`` (float32, shape ``(hours * steps an hour,)``, whole numbers, NaN is
        missing) and ``item_id`` (``"<patient>/<vital>"``, as ``"sim-0007/hr"``).

    Raises
    ------
    ValueError
        If a number is below 1, the step is not 1 to 60 minutes, or a vital sign is unknown or asked for twice.

    Examples
    --------
    >>> entry = simulate_vitals(patients=1, hours=2, vitals=["map"])[0]
    >>> entry["item_id"], entry["start"].freqstr, entry["target"].shape
    ('sim-0000/map', '5min', (24,))
    """
    for argument, value in (("patients", patients), ("hours", hours)):
        if value < 1:
            raise ValueError(f"{argument} is {value}; give at least 1")
    minutes = _minutes(freq)
    for vital in vitals:
        if vital not in _VITALS:
            near = difflib.get_close_matches(vital, _VITALS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ValueError(f"vital {vital!r} is unknown{hint} known: {', '.join(_VITALS)}")
    if not vitals or len(set(vitals)) < len(vitals):
        raise ValueError(f"vitals {tuple(vitals)} must name each vital sign once; known: {', '.join(_VITALS)}")

    rng = np.random.default_rng(seed)
    steps = int(hours * 60 / minutes)
    time = np.arange(steps, dtype=np.float64) * minutes
    start_hour = rng.integers(0, 24, patients)
    values = _values(rng, time, minutes, start_hour)
    observed = {name: _observe(rng, values[name], minutes, _VITALS[name]) for name in _VITALS}
    starts = [pd.Period("2024-01-01 00:00", freq) + int(round(hour * 60 / minutes)) for hour in start_hour]
    return [
        {"start": starts[patient], "target": observed[vital][patient].copy(), "item_id": f"sim-{patient:04d}/{vital}"}
        for patient in range(patients)
        for vital in vitals
    ]


def patient_of(item_id: str) -> str:
    """Patient of an item id ``"<patient>/<vital>"`` or ``"<patient>/<stay>/<vital>"``, to split by patient.

    Raises
    ------
    ValueError
        If the item id has no ``/``.

    Examples
    --------
    >>> patient_of("sim-0007/hr"), patient_of("002-1039/141765/hr")
    ('sim-0007', '002-1039')
    """
    patient, slash, rest = item_id.partition("/")
    if not slash or not patient or not rest or rest.endswith("/"):
        raise ValueError(f"item_id {item_id!r} is not of the form '<patient>/<vital>', as 'sim-0007/hr' is")
    return patient


def _minutes(freq: str) -> float:
    try:
        step: Any = pd.Period("2024-01-01 00:00", freq).freq
        minutes = pd.Timedelta(step) / pd.Timedelta(minutes=1)
    except ValueError:
        minutes = 0.0
    # Whole steps an hour keep the hour of the day exact.
    if not 1 <= minutes <= 60 or 60 % minutes:
        raise ValueError(f"freq {freq!r} is not a step of 1 to 60 minutes that divides an hour; give one like '5min'")
    return float(minutes)


def _values(rng: np.random.Generator, time: Array, minutes: float, start_hour: NDArray[np.int64]) -> dict[str, Array]:
    """True values, shape ``(patients, time)`` each."""
    patients, hours = len(start_hour), (time[-1] + minutes) / 60
    column = (patients, 1)
    clock = start_hour[:, None] + time / 60
    peak = rng.normal(_DAY_PEAK_HOUR, _DAY_PEAK_SD, column)
    day = np.cos(2 * np.pi * (clock - peak) / 24)

    offset = rng.uniform(0.0, _TURN_EVERY_MINUTES, column)
    since_turn = (60 * clock - offset) % _TURN_EVERY_MINUTES
    turn = np.exp(-since_turn / _TURN_DECAY_MINUTES)

    bolus = np.zeros((patients, len(time)))
    for at, present in _events(rng, patients, hours, _BOLUS_PER_HOUR):
        since = np.maximum(time - at, 0.0)
        shape = np.exp(-since / _BOLUS_DECAY_MINUTES) - np.exp(-since / _BOLUS_RISE_MINUTES)
        bolus += present * shape / _peak(_BOLUS_RISE_MINUTES, _BOLUS_DECAY_MINUTES)

    depth = {name: np.zeros((patients, len(time))) for name in _VITALS}
    septic = rng.random(column) < _SEPTIC_SHARE
    for at, present in _events(rng, patients, hours, _EPISODES_PER_HOUR):
        shape = present * septic * _episode(time - at, rng.uniform(*_FALL_MINUTES, column))
        for name, vital in _VITALS.items():
            depth[name] += rng.uniform(*vital.sepsis, column) * shape

    slow = {
        name: vital.slow_sd * _relaxation(rng, patients, len(time), minutes, _SLOW_MINUTES)
        for name, vital in _VITALS.items()
    }
    keep = np.exp(-minutes / _REFLEX_MINUTES)
    slow["hr"] -= _REFLEX_GAIN * lfilter([1.0 - keep], [1.0, -keep], slow["map"], axis=1)
    values = {}
    for name, vital in _VITALS.items():
        baseline = np.clip(rng.normal(vital.baseline, vital.baseline_sd, column), *vital.baseline_range)
        fast = vital.fast_sd * _relaxation(rng, patients, len(time), minutes, _FAST_MINUTES)
        values[name] = (
            baseline + vital.day * day + slow[name] + fast + vital.bolus * bolus + vital.turn * turn + depth[name]
        )
    return values


def _events(rng: np.random.Generator, patients: int, hours: float, per_hour: float) -> list[tuple[Array, Array]]:
    """Times in minutes and presence, shape ``(patients, 1)`` each, of a Poisson process that began before the stay."""
    before = 4.0
    count = rng.poisson(per_hour * (hours + before), patients)
    times = rng.uniform(-60 * before, 60 * hours, (patients, max(int(count.max()), 1)))
    return [(times[:, [k]], (count[:, None] > k).astype(np.float64)) for k in range(times.shape[1])]


def _peak(rise: float, decay: float) -> float:
    """Largest value of exp(-t/decay) - exp(-t/rise)."""
    at = np.log(decay / rise) * decay * rise / (decay - rise)
    return float(np.exp(-at / decay) - np.exp(-at / rise))


def _episode(since: Array, fall: Array) -> Array:
    """Half a cosine down from 0 to 1 in `fall` minutes, a plateau, then a damped oscillation back to 0."""
    down = 0.5 - 0.5 * np.cos(np.pi * np.clip(since / fall, 0.0, 1.0))
    recovery = np.maximum(since - fall - _HOLD_MINUTES, 0.0)
    return down * np.exp(-recovery / _RECOVERY_MINUTES) * np.cos(2 * np.pi * recovery / _RECOVERY_PERIOD_MINUTES)


def _relaxation(rng: np.random.Generator, patients: int, steps: int, minutes: float, constant: float) -> Array:
    """Ornstein-Uhlenbeck process of unit variance, stationary from the first step, shape ``(patients, steps)``."""
    keep = np.exp(-minutes / constant)
    shocks = rng.normal(size=(patients, steps))
    shocks[:, 1:] *= np.sqrt(1.0 - keep**2)
    process: Array = lfilter([1.0], [1.0, -keep], shocks, axis=1)
    return process


def _observe(rng: np.random.Generator, values: Array, minutes: float, vital: _Vital) -> NDArray[np.float32]:
    observed = np.round(np.clip(values + rng.normal(0.0, vital.noise_sd, values.shape), *vital.clip))
    begins = rng.random(values.shape) < _ARTEFACT_SHARE
    wrong = begins.copy()
    wrong[:, 1:] |= begins[:, :-1] & (rng.random((len(values), values.shape[1] - 1)) < _ARTEFACT_AGAIN)
    ranges = np.array(vital.artefacts)[rng.integers(0, len(vital.artefacts), values.shape)]
    observed = np.where(wrong, np.round(rng.uniform(ranges[..., 0], ranges[..., 1])), observed)

    missing = rng.random(values.shape) < _GAP_SHARE
    runs = rng.random(values.shape) < _GAP_RUNS_PER_HOUR * minutes / 60
    ends = np.where(runs, np.arange(values.shape[1]) + rng.geometric(1 / _GAP_RUN_STEPS, values.shape), 0)
    missing |= np.maximum.accumulate(ends, axis=1) > np.arange(values.shape[1])
    return np.where(missing, np.nan, observed).astype(np.float32)
