"""Synthetic series for pretraining, drawn from a seeded mixture of processes.

The recipe follows the spirit of KernelSynth (Ansari et al. 2024, arXiv 2403.07815), sums and products of random
components, but draws each component directly, a whole batch at a time, instead of factorising covariance matrices.
Components and weights are our choice. No real series enters.

    x = trend + seasons + smooth process + autoregression + noise,      then a pointwise map, faults and gaps
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

__all__ = ["sample_series"]

Array = NDArray[np.float64]

_PERIODS = np.array([4, 5, 6, 7, 10, 12, 12, 14, 24, 24, 24, 24, 28, 30, 48, 48, 52, 60, 96, 144, 168, 168, 288])


def sample_series(
    rng: np.random.Generator, batch_size: int, length: int, *, history: int | None = None, daily: float = 0.0
) -> NDArray[np.float32]:
    """Draw ``batch_size`` series.

    Parameters
    ----------
    rng
        Source of all randomness: the same state gives the same series.
    batch_size
        Number of series.
    length
        Number of time steps of each.
    history
        Gaps are put into the first ``history`` steps only (default: all), so that labels stay observed.
    daily
        Share of the seasonal series whose period is 24, beyond those of the general mixture.

    Returns
    -------
    NDArray[np.float32]
        Shape ``(batch_size, length)``; missing values are NaN.
    """
    time = np.arange(length, dtype=np.float64)
    parts = {
        "trend": (0.35, _trend(rng, batch_size, time)),
        "season": (0.62, _seasons(rng, batch_size, time, daily)),
        "smooth": (0.40, _smooth(rng, batch_size, length)),
        "autoregression": (0.50, _autoregression(rng, batch_size, length)),
    }
    values = np.zeros((batch_size, length))
    total = np.zeros((batch_size, 1))
    for probability, part in parts.values():
        weight = (rng.random((batch_size, 1)) < probability) * np.exp(rng.normal(0.0, 0.8, (batch_size, 1)))
        total += weight**2
        values += weight * part
    # Noise relative to the signal: from clean to dominated by noise, where the mean is the best forecast.
    scale = np.where(total > 0, np.sqrt(total), 1.0)
    values += scale * np.exp(rng.uniform(np.log(0.01), np.log(2.0), (batch_size, 1))) * _noise(rng, batch_size, length)
    values = _level_shift(rng, values)
    values = _pointwise(rng, _standardise(values))
    values = _faults(rng, values)
    # The level relative to the spread matters to models that scale by the mean.
    level = rng.choice([-1.0, 1.0], (batch_size, 1), p=[0.15, 0.85]) * np.exp(rng.uniform(-3.0, 3.2, (batch_size, 1)))
    values += level * (rng.random((batch_size, 1)) < 0.7)
    return _gaps(rng, values, length if history is None else history).astype(np.float32)


def _standardise(values: Array) -> Array:
    standardised: Array = (values - values.mean(1, keepdims=True)) / (values.std(1, keepdims=True) + 1e-8)
    return standardised


def _trend(rng: np.random.Generator, batch_size: int, time: Array) -> Array:
    unit = time / len(time)
    linear = rng.normal(0.0, 1.0, (batch_size, 1)) * unit
    rate = rng.uniform(-3.0, 3.0, (batch_size, 1))
    exponential = np.expm1(rate * unit) / np.expm1(np.abs(rate))
    knee = rng.random((batch_size, 1))
    bent = rng.normal(0.0, 1.0, (batch_size, 1)) * np.maximum(unit - knee, 0.0)
    logistic = 1.0 / (1.0 + np.exp(-(unit - knee) * rng.uniform(3.0, 40.0, (batch_size, 1))))
    kind = rng.integers(0, 4, (batch_size, 1))
    return 3.0 * np.choose(kind, [linear, exponential, linear + 2.0 * bent, logistic])


def _seasons(rng: np.random.Generator, batch_size: int, time: Array, daily: float) -> Array:
    common = rng.choice(_PERIODS, (batch_size, 1)).astype(np.float64)
    free = np.exp(rng.uniform(np.log(3.0), np.log(200.0), (batch_size, 1)))
    period = np.where(rng.random((batch_size, 1)) < 0.75, common, free)
    if daily:
        period = np.where(rng.random((batch_size, 1)) < daily, 24.0, period)
    values = _season(rng, batch_size, time, period)
    second = np.where(rng.random((batch_size, 1)) < 0.5, period * 7.0, rng.permutation(period))
    values += (
        (rng.random((batch_size, 1)) < 0.3)
        * rng.uniform(0.2, 1.0, (batch_size, 1))
        * _season(rng, batch_size, time, second)
    )
    # Amplitude that drifts slowly, and a shape that does: yesterday then tells more than last week, but not all.
    drift = np.exp(0.4 * _smooth(rng, batch_size, len(time)))
    values = np.where(rng.random((batch_size, 1)) < 0.3, values * drift, values)
    wander = (rng.random((batch_size, 1)) < 0.4) * np.exp(rng.normal(-0.7, 0.6, (batch_size, 1)))
    for _ in range(2):
        values += wander * _smooth(rng, batch_size, len(time)) * _season(rng, batch_size, time, period)
    return values


def _season(rng: np.random.Generator, batch_size: int, time: Array, period: Array) -> Array:
    turn = np.exp(2j * np.pi / period * time).astype(np.complex64)
    power = np.ones_like(turn)
    values = np.zeros(turn.shape, dtype=np.float32)
    decay = rng.uniform(0.2, 2.5, (batch_size, 1))
    norm = np.zeros((batch_size, 1))
    harmonics = np.where(rng.random((batch_size, 1)) < 0.3, 1, rng.integers(2, 11, (batch_size, 1)))
    for k in range(1, 11):
        power *= turn
        amplitude = np.where((2 * k <= period) & (k <= harmonics), rng.normal(0.0, 1.0, (batch_size, 1)) / k**decay, 0)
        if k == 1:
            amplitude = np.where(harmonics == 1, 1.0, amplitude)
        phase = np.exp(1j * rng.uniform(0.0, 2 * np.pi, (batch_size, 1)))
        values += ((amplitude * phase).astype(np.complex64) * power).imag
        norm += amplitude**2 / 2
    return values / np.sqrt(norm + 1e-6)


def _smooth(rng: np.random.Generator, batch_size: int, length: int) -> Array:
    """Gaussian process with a Matérn-like spectrum, drawn by the fast Fourier transform on twice the length."""
    frequency = np.fft.rfftfreq(2 * length)
    scale = np.exp(rng.uniform(np.log(2.0), np.log(length / 2), (batch_size, 1)))
    smoothness = rng.choice([0.5, 1.0, 1.5, 2.5, 4.0], (batch_size, 1))
    amplitude = (1.0 + (2 * np.pi * frequency * scale) ** 2) ** (-(smoothness + 0.5) / 2)
    spectrum = rng.normal(size=(batch_size, len(frequency))) + 1j * rng.normal(size=(batch_size, len(frequency)))
    return _standardise(np.fft.irfft(amplitude * spectrum, axis=1)[:, :length])


def _autoregression(rng: np.random.Generator, batch_size: int, length: int) -> Array:
    """AR(1) near and at the unit root, and AR(2) with a damped oscillation; a quarter is integrated once."""
    burn = 64
    shocks = _noise(rng, batch_size, length + burn)
    values = np.empty_like(shocks)
    for i in range(batch_size):
        if rng.random() < 0.6:
            poles = [1.0, -(1.0 - np.exp(rng.uniform(np.log(0.003), np.log(0.9))))]
        else:
            radius, angle = 1.0 - np.exp(rng.uniform(np.log(0.005), np.log(0.5))), 2 * np.pi / rng.uniform(3.0, 100.0)
            poles = [1.0, -2.0 * radius * np.cos(angle), radius**2]
        values[i] = lfilter([1.0], poles, shocks[i])
    walk = rng.random((batch_size, 1)) < 0.15
    return _standardise(np.where(walk, np.cumsum(shocks, 1), values)[:, burn:])


def _noise(rng: np.random.Generator, batch_size: int, length: int) -> Array:
    normal = rng.normal(size=(batch_size, length))
    heavy = np.clip(rng.standard_t(3.0, (batch_size, length)) / np.sqrt(3.0), -6.0, 6.0)
    return np.where(rng.random((batch_size, 1)) < 0.25, heavy, normal)


def _level_shift(rng: np.random.Generator, values: Array) -> Array:
    batch_size, length = values.shape
    at = rng.integers(0, length, (batch_size, 1))
    size = rng.normal(0.0, 2.0, (batch_size, 1)) * values.std(1, keepdims=True)
    shifted: Array = values + (rng.random((batch_size, 1)) < 0.12) * size * (np.arange(length) >= at)
    return shifted


def _pointwise(rng: np.random.Generator, values: Array) -> Array:
    kind = rng.choice(6, (len(values), 1), p=[0.66, 0.12, 0.06, 0.06, 0.05, 0.05])
    step = rng.uniform(0.05, 0.5, (len(values), 1))
    return np.choose(
        kind,
        [
            values,
            np.exp(np.clip(0.7 * values, -5.0, 3.0)),
            np.abs(values),
            np.maximum(values, 0.0),
            np.round(values / step) * step,
            np.tanh(values),
        ],
    )


def _faults(rng: np.random.Generator, values: Array) -> Array:
    where = rng.random(values.shape) < 0.01
    series = rng.random((len(values), 1)) < 0.15
    return values + where * series * rng.normal(0.0, 4.0, values.shape)


def _gaps(rng: np.random.Generator, values: Array, history: int) -> Array:
    batch_size, length = values.shape
    step = np.arange(length)
    missing = np.zeros(values.shape, dtype=bool)
    missing |= (rng.random((batch_size, 1)) < 0.25) & (rng.random(values.shape) < rng.uniform(0, 0.3, (batch_size, 1)))
    start = rng.integers(0, max(history, 1), (batch_size, 1))
    size = rng.integers(1, max(history // 4, 2), (batch_size, 1))
    missing |= (rng.random((batch_size, 1)) < 0.1) & (step >= start) & (step < start + size)
    # Missing starts: series younger than the context.
    young = rng.integers(0, max(history - 12, 1), (batch_size, 1))
    missing |= (rng.random((batch_size, 1)) < 0.2) & (step < young)
    missing &= step < history
    return np.where(missing, np.nan, values)
