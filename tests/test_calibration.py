"""Calibration: quantiles that hold what they say, learnt on units that chose nothing."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from gluonts.ev.metrics import Coverage
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import betabinom, norm
from typer.testing import CliRunner

from gluonts_peft import TuningDidNotHelp, estimator, get_estimator, preparation
from gluonts_peft.backtesting import backtest
from gluonts_peft.calibration import LEAST_UNITS, Calibration, Calibrator, learn, set_apart
from gluonts_peft.cli import app
from gluonts_peft.predictor import PeftPredictor, PredictorError
from gluonts_peft.series.store import SeriesStore
from gluonts_peft.series.windows import Windows
from gluonts_peft.trials import SpecError, TrialSpec, run_trial
from gluonts_peft.verdict import LEVELS, scale

Q = np.asarray(LEVELS)


def gaussian(units: int, steps: int = 1, spread: float = 2.0, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Forecasts that take labels for `1 / spread` as uncertain as they are, of series of very different sizes."""
    rng = np.random.default_rng(seed)
    size, level = np.exp(3 * rng.normal(size=(units, 1))), rng.normal(size=(units, steps))
    labels = size * (level + spread * rng.normal(size=(units, steps)))
    return size[:, None] * (level[:, None] + norm.ppf(Q)[:, None]), labels, size


def learnt(values: np.ndarray, labels: np.ndarray, size: np.ndarray, levels: Any = LEVELS) -> Calibration:
    return learn(values, levels, labels, np.ones_like(labels), size, range(len(labels)))


# What is learnt.


@pytest.mark.parametrize("paths", [False, True])
def test_a_wrong_law_comes_out_right(paths: bool) -> None:
    """With n units the share of labels below the k-th score follows a beta law, whatever the labels' own."""
    units, fresh = 399, 2000
    values, labels, size = gaussian(units + fresh)
    levels: Any = LEVELS
    if paths:
        # As many as make the levels ranks of their own.
        values, levels = size[:, None] * norm.ppf((np.arange(41) + 0.5) / 41)[:, None], None
        labels = 2 * size * np.random.default_rng(1).normal(size=labels.shape)
    found = learnt(values[:units], labels[:units], size[:units], levels)
    before, after = (
        np.quantile(each, Q, axis=1) if paths else np.moveaxis(each, 1, 0)
        for each in (values[units:], found.apply(values[units:], levels, size[units:]))
    )
    for number, level in enumerate(LEVELS):
        if level == 0.5:
            continue
        rank = round(level * (units + 1))
        low, high = betabinom.ppf([1e-5, 1 - 1e-5], fresh, rank, units + 1 - rank)
        assert low <= (labels[units:] < after[number]).sum() <= high
        if abs(level - 0.5) > 0.25:
            assert not low <= (labels[units:] < before[number]).sum() <= high
    assert found.before < 0.55
    assert abs(found.after - 0.8) < 0.01
    assert found.change < -4


@pytest.mark.parametrize("units", [20, 60, 400])
def test_few_units_take_in_neighbouring_steps(units: int) -> None:
    """Coverage is right over the horizon, and with many units each step has a shift of its own."""
    values, labels, size = gaussian(units + 1000, 12)
    found = learnt(values[:units], labels[:units], size[:units])
    after = found.apply(values[units:], LEVELS, size[units:])
    inside = ((after[:, 0] <= labels[units:]) & (labels[units:] <= after[:, -1])).mean()
    # The share of a level that n units x 12 independent steps leave uncertain, four times.
    assert abs(inside - 0.8) < 4 * 2 * np.sqrt(0.09 / (12 * units))
    assert (len(set(found.shifts[0])) == 12) == (units == 400)


def test_shifts_are_scores_at_their_rank() -> None:
    """Labels 3, 4, 6, 7 and a forecast of 0: with four scores the level k / 5 is the k-th one. The median stays."""
    labels = np.array([[3.0], [4.0], [6.0], [7.0]])
    levels = (0.2, 0.4, 0.5, 0.6, 0.8)
    found = learn(np.zeros((4, 5, 1)), levels, labels, np.ones((4, 1)), np.ones((4, 1)), "abcd")
    assert [row[0] for row in found.shifts] == pytest.approx([3, 4, 0, 6, 7])
    # In other units, on the whole: shifts do not know the size of a series.
    sizes = np.array([[1.0], [2.0], [4.0], [8.0]])
    again = learn(np.zeros((4, 5, 1)), levels, labels * sizes, np.ones((4, 1)), sizes, "abcd")
    assert again.shifts == found.shifts
    # A window that is there twice counts half each time, one without a label or a scale not at all.
    more = np.concatenate([labels, labels[:1], [[100.0]], [[100.0]]])
    observed, scales = np.ones((7, 1)), np.ones((7, 1))
    observed[5], scales[6] = 0, 0
    thrice = learn(np.zeros((7, 5, 1)), levels, more, observed, scales, "abcdaef")
    # The lower half of the first unit's weight lies at (1/4 + 1/2) / 5, the upper one at (3/4 + 1/2) / 5.
    assert thrice.shifts[0][0] == pytest.approx(3.0)
    assert (thrice.units, thrice.windows, thrice.left_out) == (4, 5, 2)


def test_the_interval_is_counted_by_units() -> None:
    """Three windows of one unit, all outside, and one of another, inside: half of the units' labels."""
    values = np.broadcast_to(norm.ppf(Q)[None, :, None], (4, 9, 1))
    labels = np.array([[5.0], [5.0], [5.0], [0.1]])
    found = learn(values, LEVELS, labels, np.ones((4, 1)), np.ones((4, 1)), "aaab")
    assert found.before == 0.5


def test_where_there_is_nothing_to_find_forecasts_stay() -> None:
    values, labels, size = gaussian(300, 12, spread=1.0)
    found = learnt(values, labels, size)
    assert found.empty
    assert found.apply(values, LEVELS, size) is values
    assert (found.after, found.change) == (found.before, 0.0)
    assert str(found).startswith("nothing to correct: the 80 % interval holds 80.0 % (300 series)")


def test_dimensions_count_in_their_own_units() -> None:
    """Two dimensions of sizes 1 and 1000 are corrected as one alone is."""
    values, labels, _ = gaussian(300, 2)
    one = np.ones((300, 1))
    alone = learnt(values, labels, one)
    factors = np.array([1.0, 1000.0])
    both = learn(
        values[..., None] * factors,
        LEVELS,
        labels[..., None] * factors,
        np.ones((300, 2, 2)),
        one * factors,
        range(300),
    )
    assert np.asarray(both.shifts) == pytest.approx(np.asarray(alone.shifts), rel=0.02, abs=0.02)
    moved = both.apply(values[..., None] * factors, LEVELS, one * factors)
    assert moved[..., 1] == pytest.approx(1000 * moved[..., 0])


# What it makes of forecasts.


def table(shifts: Any, levels: Any = LEVELS) -> Calibration:
    return Calibration(levels, shifts, 1, 0.7, 0.8, -1.0, 20, "series", 20, 0)


FLOATS = st.floats(-100, 100, width=32)


@given(
    values=arrays(np.float32, (3, 9, 2), elements=FLOATS),
    shifts=arrays(np.float64, (9, 2), elements=FLOATS),
    scales=arrays(np.float64, (3, 1), elements=st.sampled_from([0.0, 0.25, 1.0, 3.0])),
    count=st.integers(1, 9),
    power=st.integers(-20, 20),
)
@settings(max_examples=60, deadline=None)
def test_quantiles_rise_whatever_comes(
    values: np.ndarray, shifts: np.ndarray, scales: np.ndarray, count: int, power: int
) -> None:
    shifts[4] = 0.0
    found = table(shifts.tolist())
    after = found.apply(values, LEVELS, scales)
    assert after.dtype == values.dtype
    assert (after[:, 4] == values[:, 4]).all()
    some = scales[:, 0] > 0 if shifts.any() else np.zeros(3, bool)
    assert (np.diff(after[some], axis=1) >= 0).all()
    assert (after[~some] == values[~some]).all()
    # Paths keep their ranks, and their median.
    paths = values[:, :count]
    moved = found.apply(paths, None, scales)
    order = paths.argsort(axis=1, kind="stable")
    assert (np.diff(np.take_along_axis(moved, order, axis=1), axis=1) >= 0).all()
    assert (np.median(moved, axis=1) == np.median(paths, axis=1)).all()
    # In another unit all is as much larger.
    factor = 2.0**power
    assert (found.apply(values.astype(float) * factor, LEVELS, scales * factor) == factor * found.apply(
        values.astype(float), LEVELS, scales
    )).all()  # fmt: skip


def test_other_levels_lie_between() -> None:
    found = table([[-2.0], [0.0], [4.0]], (0.1, 0.5, 0.9))
    after = found.apply(np.zeros((1, 5, 1)), (0.05, 0.3, 0.5, 0.7, 0.95), np.ones((1, 1)))
    assert after[0, :, 0] == pytest.approx([-2, -1, 0, 2, 4])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"levels": (0.5, 0.1)}, "do not rise"),
        ({"shifts": ((0.0,), (1.0, 2.0))}, "a row for each"),
        ({"shifts": ((0.0,), (float("nan"),))}, "finite"),
        ({"season": 0}, "not positive"),
    ],
)
def test_a_table_that_is_none_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(table([[0.0], [1.0]], (0.1, 0.9)), **change)


# Which units learn, choose and calibrate.


def series(count: int, length: int = 60, dims: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Random walks whose last steps are much longer than all before, as no model can know."""
    rng = np.random.default_rng(seed)
    start = pd.Period("2024-01-01 00:00", freq="h")
    shape = (length,) if dims is None else (dims, length)
    size = np.where(np.arange(length) < length - 6, 1.0, 4.0)
    return [
        {
            "item_id": f"p{number // 2}/s{number}" if dims is None else f"p{number}",
            "start": start,
            "target": (2.0 ** (number % 5) * (20 + (size * rng.normal(size=shape)).cumsum(-1))).astype(np.float32),
        }
        for number in range(count)
    ]


def windows_of(data: Any, count: int = 1) -> Any:
    store = SeriesStore.from_dataset(data)
    return Windows(store, context_length=24, prediction_length=6).last(windows=count)


@pytest.mark.parametrize(
    ("count", "unit", "own", "apart"),
    [(60, "series", False, 30), (60, "series", True, 20), (150, "series", True, 30), (100, "patients", False, 25)],
)
def test_units_are_dealt_out_once(count: int, unit: str, own: bool, apart: int) -> None:
    last = windows_of(series(count, 40), 2)
    chooses, calibrates, untrained = set_apart(last, unit, own=own)
    names = [
        {(last.windows.store.item_ids[number].partition("/")[0] if unit == "patients" else number) for number in part}
        for part in (chooses.series, calibrates.series)
    ]
    assert not names[0] & names[1]
    assert len(names[1]) == apart
    assert len(chooses) + len(calibrates) == len(last)
    assert set(np.flatnonzero(untrained)) == (set(calibrates.series) if own else set())
    assert (set_apart(last, unit, own=own)[1].series == calibrates.series).all()


def test_a_single_series_calibrates_by_its_last_windows() -> None:
    last = windows_of(series(1, 300), 41)
    chooses, calibrates, untrained = set_apart(last, "series", own=True)
    assert (len(chooses), len(calibrates), untrained.any()) == (21, 20, False)
    assert chooses.cuts.max() < calibrates.cuts.min()
    assert Calibrator(calibrates, "series")._unit == "windows"


def make(family: str = "chronos", **options: Any) -> Any:
    defaults: dict[str, Any] = dict(
        prediction_length=6, context_length=24, max_epochs=1, num_batches_per_epoch=2, batch_size=8, device="cpu",
        progress=False, gate="keep", calibrate=True,
    )  # fmt: skip
    return get_estimator(family)(**{**defaults, **options})


@pytest.mark.parametrize("own", [True, False])
def test_calibrating_units_neither_train_nor_choose(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their labels, and without validation data all of them, may be anything: the same weights come out."""
    seen: dict[str, Any] = {}

    def fit(backbone: Any, adapter: Any, windows: Any, validation: Any, *_: Any, judge: Any, **__: Any) -> Any:
        seen.update(windows=windows, validation=validation, judge=judge)
        raise InterruptedError

    monkeypatch.setattr(estimator, "fit", fit)
    learns: list[Any] = []
    monkeypatch.setattr(preparation, "Calibrator", lambda windows, _: learns.append(windows))
    with pytest.raises(InterruptedError):
        make().train(series(60), None if own else series(60, seed=1))
    calibrating = set(learns[0].series.tolist())
    assert len(calibrating) == (20 if own else 30)
    assert not calibrating & set(seen["judge"]._series.tolist())
    assert sum(len(batch["past_target"]) for batch in seen["validation"]) == 60 - len(calibrating)
    trained = set(np.concatenate([seen["windows"].pairs(step, 64)[0] for step in range(20)]).tolist())
    assert trained == (set(range(60)) - calibrating if own else set(range(60)))


@pytest.mark.parametrize(
    ("data", "validation", "options", "message"),
    [
        (series(39), None, {}, "calibrate needs 20 series that neither train nor choose, and there are 19, half of 39"),
        (series(4), series(39, seed=1), {}, "give validation_data of 40 series or more"),
        (series(60), None, {"verdict_unit": "patients"}, "20 patients that neither .* 15, half of 30 patients"),
        (series(1, 200), None, {"validation_windows": 4}, "set validation_windows to 40 or more"),
        (series(60), series(60), {}, "same items as 60 of 60 training series: leave validation_data out"),
        (
            [{**entry, "target": np.zeros(60, np.float32)} for entry in series(60)],
            None,
            {},
            "20 series .* apart 0 have a history that differs from 0",
        ),
        (
            series(60),
            None,
            {"adapter": ["lora", {"name": "head", "kind": "pooling", "output": "point"}]},
            "no part in points, and the head forecasts these: give it output 'quantile'",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    data: Any, validation: Any, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimator, "fit", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match=message):
        make(**options).train(data, validation)


def test_reconstruction_has_no_quantiles() -> None:
    with pytest.raises(ValueError, match="calibrate has no part in task 'reconstruct'"):
        make("moment", task="reconstruct")


# With models.


@pytest.fixture(scope="module")
def tuned() -> PeftPredictor:
    return make().train(series(60))


def quantiles(predictor: PeftPredictor, data: Any) -> np.ndarray:
    return np.stack([[forecast.quantile(level) for level in LEVELS] for forecast in predictor.predict(data)])


def without(predictor: PeftPredictor) -> PeftPredictor:
    return PeftPredictor(predictor.backbone, device="cpu")


def test_forecasts_are_those_of_the_network_moved_by_their_series(tuned: PeftPredictor) -> None:
    data = series(6, seed=2)
    found, plain = quantiles(tuned, data), quantiles(without(tuned), data)
    own = tuned.calibration
    assert own is not None
    assert not own.empty
    assert (own.units, own.unit, own.season, own.steps) == (LEAST_UNITS, "series", 24, 6)
    units = np.array([scale(entry["target"], 24)[0] for entry in data])
    expected = plain + units[:, None, None] * np.asarray(own.shifts)
    assert (found[:, 4] == plain[:, 4]).all()
    for row in range(9):
        if np.asarray(own.shifts)[row].any():
            assert found[:, row] != pytest.approx(plain[:, row])
    rising = (np.diff(expected, axis=1) >= 0).all(axis=(1, 2))
    assert rising.any()
    assert found[rising] == pytest.approx(expected[rising], rel=1e-6)
    assert (quantiles(tuned.shorten(3), data) == found[:, :, :3]).all()
    # In a unit a thousand times as large, all is.
    large = [{**entry, "target": entry["target"] * np.float32(1024)} for entry in data]
    assert quantiles(tuned, large) == pytest.approx(1024 * found, rel=1e-4)


def test_it_is_stored_with_the_predictor_and_goes_with_it(tuned: PeftPredictor, tmp_path: Path) -> None:
    data = series(3, seed=2)
    tuned.serialize(tmp_path / "tuned")
    again = PeftPredictor.deserialize(tmp_path / "tuned", device="cpu")
    assert again.calibration == tuned.calibration
    assert (quantiles(again, data) == quantiles(tuned, data)).all()
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "tuned")])
    assert f"calibration:          {tuned.calibration}" in shown.output
    # A bare adapter has none, a predictor brings its own along.
    again.swap(tmp_path / "tuned" / "adapter")
    assert again.calibration is None
    assert (quantiles(again, data) == quantiles(without(tuned), data)).all()
    again.swap(tmp_path / "tuned")
    assert again.calibration == tuned.calibration
    with pytest.warns(UserWarning, match="without the calibration of this predictor .80 % interval holds"):
        again.export(tmp_path / "export")
    record = json.loads((tmp_path / "tuned" / "predictor.json").read_text())
    for change, reason in (({"levels": [0.9, 0.1]}, "rise"), ({"shifts": [[0.0]] * 9}, "1 steps"), ({"shifts": 1}, "")):
        damaged = {**record, "calibration": {**record["calibration"], **change}}
        (tmp_path / "tuned" / "predictor.json").write_text(json.dumps(damaged))
        with pytest.raises(PredictorError, match=f"is damaged: .*{reason}"):
            PeftPredictor.deserialize(tmp_path / "tuned", device="cpu")


def test_zero_shot_that_is_handed_over_is_calibrated_as_it_is() -> None:
    data, validation = series(8), series(50, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningDidNotHelp)
        fallen = make(gate="fallback", learning_rate=10.0, interpolate=False).train(data, validation)
    zero_shot = make(adapter="none").train(data, validation)
    assert fallen.backbone.adapter is None
    assert fallen.calibration == zero_shot.calibration
    assert fallen.freq == data[0]["start"].freqstr


@pytest.mark.parametrize(
    ("family", "options", "dims"),
    [("lag-llama", {}, None), ("chronos", {"checkpoint": "chronos2-nano"}, 2)],
)
def test_families_that_sample_and_several_dimensions(family: str, options: dict[str, Any], dims: int | None) -> None:
    """Intervals of other series hold about as many labels as they say, and more truly than before."""
    predictor = make(family, adapter="none", prediction_length=2, **options).train(
        series(2, 34, dims), series(80, 34, dims, seed=1)
    )
    own, test = predictor.calibration, series(40, 34, dims, seed=2)
    assert own is not None
    assert not own.empty
    scores = []
    for each in (predictor, without(predictor)):
        row = backtest(each, test, metrics=[Coverage(0.1), Coverage(0.9)]).iloc[0]
        scores.append(row["coverage[0.9]"] - row["coverage[0.1]"])
    # Four standard errors of 40 units on each side.
    assert abs(scores[0] - 0.8) < 4 * np.sqrt(0.16 / 40 + 0.16 / 40)
    assert scores[1] < scores[0] - 0.1


# In the other verbs.


def test_fit_says_what_it_did(tmp_path: Path) -> None:
    frame = pd.concat(
        pd.DataFrame(
            {
                "item_id": entry["item_id"],
                "timestamp": pd.date_range("2024-01-01", periods=60, freq="h"),
                "target": entry["target"],
            }
        )
        for entry in series(40)
    )
    frame.to_csv(tmp_path / "data.csv", index=False)
    arguments = ["fit", str(tmp_path / "data.csv"), "--out", str(tmp_path / "model"), "--horizon", "6", "--calibrate"]
    done = CliRunner().invoke(app, [*arguments, "--context", "24", "--epochs", "1", "--batches", "2", "--gate", "keep"])
    assert done.exit_code == 0, done.output
    assert PeftPredictor.deserialize(tmp_path / "model").calibration is not None
    assert "calibration:          80 % interval holds" in done.output


def test_trials_are_calibrated_and_say_so(tmp_path: Path) -> None:
    from gluonts_peft.trials.report import _calibrations

    spec: dict[str, Any] = dict(family="chronos", checkpoint="bolt-nano", prediction_length=6, context_length=24)
    training = {"max_epochs": 1, "num_batches_per_epoch": 2, "device": "cpu", "calibrate": True}
    data = {
        "source": "simulated",
        "patients": 100,
        "hours": 4,
        "vital": "hr",
        "fractions": (0.1, 0.6, 0.3),
        "windows": 1,
    }
    result = run_trial(TrialSpec(**spec, training=training, data=data), tmp_path)
    stored = PeftPredictor.deserialize(tmp_path / "predictor", device="cpu")
    assert result.calibration is not None
    assert result.calibration == stored.calibration
    assert result.calibration.unit == "patients"
    assert type(result).read(tmp_path) == result
    assert _calibrations([result]) == [
        f"Calibrated, on units that chose nothing: {result.spec.name()}: {result.calibration}."
    ]
    # Zero-shot is compared as it would be handed over; earlier trials are what they were.
    assert TrialSpec(**spec, adapter="none", training=training).training.calibrate
    assert "calibrate" not in TrialSpec(**spec).normal_form()["training"]
    with pytest.raises(SpecError, match="ensemble 0.5 averages quantiles, which undoes training.calibrate"):
        TrialSpec(**spec, training=training, ensemble=0.5)
