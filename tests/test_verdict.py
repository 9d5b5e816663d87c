"""Did tuning help: scores, cross-fitting, the sign-flip test, and the words."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from gluonts_peft import TuningDidNotHelp, get_adapter, get_estimator
from gluonts_peft.predictor import PeftPredictor
from gluonts_peft.series.store import SeriesStore
from gluonts_peft.series.windows import Windows
from gluonts_peft.training import Gate, to_device
from gluonts_peft.verdict import (
    LEVELS,
    Candidate,
    Judge,
    Verdict,
    choose,
    cross_fit,
    flip_test,
    judge,
    quantile_scores,
    scale,
)


def make_dataset(count: int, length: int = 90, seed: int = 0) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    entries = []
    for i in range(count):
        values = generator.standard_normal(length)
        for step in range(1, length):
            values[step] += 0.8 * values[step - 1]
        start = pd.Period("2024-01-01 00:00", freq="h")
        entries.append({"item_id": f"p{i // 2}/s{i}", "start": start, "target": (20 + values).astype(np.float32)})
    return entries


def make_estimator(**options: Any) -> Any:
    defaults: dict[str, Any] = dict(
        prediction_length=6, context_length=24, max_epochs=2, num_batches_per_epoch=5, batch_size=8, device="cpu",
        progress=False, gate="keep",
    )  # fmt: skip
    return get_estimator("chronos")(**{**defaults, **options})


def candidates(scores: np.ndarray, weights: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)) -> list[Candidate]:
    """Rows are epochs x weights."""
    return [Candidate(number // len(weights), weights[number % len(weights)], row) for number, row in enumerate(scores)]


# Scores.


def test_a_score_is_the_mean_of_pinball_losses_in_units_of_the_series() -> None:
    rng = np.random.default_rng(0)
    forecast, label = np.sort(rng.normal(size=(3, 9, 4)), axis=1), rng.normal(size=(3, 4))
    observed, scales = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]), np.array([[0.5], [2.0], [1.0]])
    found = quantile_scores(forecast, LEVELS, label, observed, scales)
    for window in range(2):
        losses = []
        for step in np.flatnonzero(observed[window]):
            for number, level in enumerate(LEVELS):
                error = label[window, step] - forecast[window, number, step]
                losses.append(2 * (level * error if error > 0 else (level - 1) * error) / scales[window, 0])
        assert found[window] == pytest.approx(np.mean(losses))
    assert math.isnan(found[2])


def test_a_point_scores_its_absolute_error_and_paths_their_quantiles() -> None:
    rng = np.random.default_rng(0)
    label, ones = rng.normal(size=(2, 5)), np.ones((2, 5))
    point = rng.normal(size=(2, 1, 5))
    found = quantile_scores(point, (0.5,), label, ones, np.full((2, 1), 3.0))
    assert found == pytest.approx(np.abs(point[:, 0] - label).mean(1) / 3.0)
    paths = rng.normal(size=(2, 20, 5))
    quantiles = np.moveaxis(np.quantile(paths, LEVELS, axis=1), 0, 1)
    scales = np.ones((2, 1))
    assert quantile_scores(paths, None, label, ones, scales) == pytest.approx(
        quantile_scores(quantiles, LEVELS, label, ones, scales)
    )
    # Other levels than those that are scored: on the line between neighbours.
    coarse = np.stack([np.full((2, 5), value) for value in (0.0, 4.0, 8.0)], axis=1)
    fine = np.stack([np.full((2, 5), value) for value in range(9)], axis=1)
    assert quantile_scores(coarse, (0.1, 0.5, 0.9), label, ones, scales) == pytest.approx(
        quantile_scores(fine, LEVELS, label, ones, scales)
    )


def test_dimensions_are_averaged_each_in_its_own_unit() -> None:
    rng = np.random.default_rng(0)
    forecast, label = rng.normal(size=(2, 9, 4, 3)), rng.normal(size=(2, 4, 3))
    seen, scales = np.ones((2, 4, 3)), np.array([[1.0, 10.0, 0.0], [2.0, 3.0, 4.0]])
    found = quantile_scores(forecast, LEVELS, label, seen, scales)
    each = [quantile_scores(forecast[..., d], LEVELS, label[..., d], seen[..., d], scales[:, [d]]) for d in range(3)]
    # A dimension without a scale has no part.
    assert found[0] == pytest.approx((each[0][0] + each[1][0]) / 2)
    assert found[1] == pytest.approx(np.mean([row[1] for row in each]))
    assert math.isnan(each[2][0])


@pytest.mark.parametrize(
    ("history", "season", "expected"),
    [
        ([1.0, 5.0, 2.0, 7.0], 2, [1.5]),
        ([1.0, 5.0, 2.0, 7.0], 9, [4.0]),
        ([1.0, 5.0, 1.0, 5.0], 2, [4.0]),  # The season repeats: neighbours.
        ([5.0, 5.0, 5.0], 2, [0.05]),  # A hundredth of the size.
        ([0.0, 0.0, 0.0], 1, [0.0]),
        ([math.nan, 4.0, math.nan, 6.0], 2, [2.0]),
        ([math.nan, math.nan], 1, [0.0]),
        ([3.0], 24, [0.03]),
        ([[1.0, 100.0], [2.0, 100.0]], 1, [1.0, 1.0]),
    ],
)
def test_the_unit_of_a_series(history: list[Any], season: int, expected: list[float]) -> None:
    assert scale(np.array(history), season) == pytest.approx(expected)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.floats(1e-6, 1e6), st.integers(0, 100))
def test_scores_do_not_depend_on_the_unit_of_the_data(factor: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    history, label, forecast = rng.normal(size=50), rng.normal(size=(1, 4)), rng.normal(size=(1, 9, 4))
    ones = np.ones((1, 4))
    before = quantile_scores(forecast, LEVELS, label, ones, scale(history, 24)[None])
    after = quantile_scores(factor * forecast, LEVELS, factor * label, ones, scale(factor * history, 24)[None])
    assert after == pytest.approx(before, rel=1e-9)


# The test.


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.lists(st.lists(st.integers(-5, 5), min_size=3, max_size=3), min_size=1, max_size=9))
def test_each_flip_chooses_anew(values: list[list[int]]) -> None:
    differences = np.array(values, dtype=float).T
    found = differences.mean(axis=1).min()
    flipped = [(differences * signs).mean(axis=1).min() for signs in itertools.product([-1, 1], repeat=len(values))]
    assert flip_test(differences)[0] == pytest.approx(np.mean([value <= found + 1e-9 for value in flipped]))


@pytest.mark.parametrize("seed", range(10))
def test_each_flip_makes_the_choice_that_is_made(seed: int) -> None:
    rng = np.random.default_rng(seed)
    differences, choices = rng.normal(-0.2, 1.0, (3, 8)), np.array([1, 2, 0])
    found = differences[choices[differences.mean(axis=1).argmin()]].mean()
    flipped = []
    for signs in itertools.product([-1, 1], repeat=8):
        means = (differences * signs).mean(axis=1)
        flipped.append(means[choices[means.argmin()]])
    assert flip_test(differences, choices)[0] == pytest.approx(np.mean([value <= found + 1e-12 for value in flipped]))


def test_many_units_are_tested_a_part_of_the_signs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(0).normal(-0.1, 1.0, (3, 60))
    whole = flip_test(differences)
    monkeypatch.setattr("gluonts_peft.verdict._AT_ONCE", 1000)
    parts = flip_test(differences)
    # As many assignments, if not the same ones.
    assert parts[0] * 10_000 == pytest.approx(round(parts[0] * 10_000))
    assert parts == pytest.approx(whole, abs=0.02)


@pytest.mark.parametrize("count", [6, 9, 13, 14, 40, 200])
def test_an_interval_lies_below_zero_exactly_if_the_test_rejects(count: int) -> None:
    seen = set()
    for seed in range(60):
        rng = np.random.default_rng([count, seed])
        differences = rng.normal(-0.04 * (seed % 40), 1.0, (3, count))
        p, low, high = flip_test(differences)
        assert (high < 0) == (p < 0.05)
        assert low <= differences.mean(axis=1).min() <= high
        seen.add(p < 0.05)
    assert seen == {True, False}


def test_an_interval_covers() -> None:
    """Nine times of ten: the sign-flip interval of a symmetric difference."""
    zero, hits = np.full(30, 10.0), 0
    for seed in range(300):
        difference = np.random.default_rng(seed).normal(-2.0, 1.0, 30)
        found = judge(zero, [Candidate(0, 1.0, zero + difference)])
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= -20.0 <= found.high
    assert binom.cdf(hits, 300, 0.9) > 0.005
    assert binom.sf(hits - 1, 300, 0.9) > 0.005


# Cross-fitting.


def test_no_unit_is_judged_by_what_it_chose() -> None:
    """Each candidate is best on one unit alone, by far: chosen by all, it is worse than zero-shot on the others."""
    count = 10
    zero = np.full(count, 5.0)
    scores = np.full((count, count), 6.0)
    np.fill_diagonal(scores, -90.0)
    found = cross_fit(zero, [Candidate(number, 1.0, row) for number, row in enumerate(scores)])
    assert (found == 1.0).all()
    assert judge(zero, [Candidate(n, 1.0, row) for n, row in enumerate(scores)]).word == "no evidence"


def test_folds_hold_all_units_once_and_the_choice_ignores_the_own_fold() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 17):
        zero, scores = rng.normal(5, 1, count), rng.normal(4.8, 1, (8, count))
        found = cross_fit(zero, candidates(scores))
        for unit in range(count):
            changed = scores.copy()
            changed[:, unit] = rng.normal(4.8, 1, 8)
            again = cross_fit(zero, candidates(changed))
            differences = {row[unit] - zero[unit] for row in scores} | {0.0}
            assert any(found[unit] == pytest.approx(value) for value in differences)
            # What was chosen for this unit does not depend on it.
            chosen = [number for number in range(8) if found[unit] == scores[number][unit] - zero[unit]]
            if chosen:
                assert again[unit] == changed[chosen[0]][unit] - zero[unit]
            else:
                assert again[unit] == 0.0


@pytest.mark.parametrize(
    ("units", "best", "weight"),
    [(60, 1.0, 0.75), (60, 0.75, 0.5), (60, 0.25, 0.25), (8, 1.0, 0.5), (8, 0.75, 0.25), (8, 0.25, 0.25)],
)
def test_the_choice_is_cautious(units: int, best: float, weight: float) -> None:
    weights = (1.0, 0.75, 0.5, 0.25)
    zero = np.full(units, 5.0)
    rows = [Candidate(0, w, zero - 0.1) for w in weights]
    rows += [Candidate(1, w, zero - (1.0 if w == best else 0.5)) for w in weights]
    number = choose(zero, rows)
    assert number is not None
    assert (rows[number].epoch, rows[number].weight) == (1, weight)
    assert choose(zero, [Candidate(0, 1.0, zero)]) is None
    assert choose(zero, [Candidate(3, 1.0, zero - 1)]) == 0


# The words.


def test_words_need_effect_and_units() -> None:
    rng = np.random.default_rng(0)
    zero = rng.gamma(4.0, 1.0, 30)

    def verdict(change: float, count: int = 30, noise: float = 0.0) -> Verdict:
        spread = 1 + noise * np.resize([-1.0, 1.0], count)
        return judge(zero[:count], [Candidate(2, 1.0, zero[:count] * (1 + change) * spread)])

    assert verdict(-0.02).word == "proven"
    assert verdict(-0.02, 6).word == "proven"
    assert verdict(-0.02, 5).word == "better, not proven"
    assert verdict(-0.004).word == "better, not proven"  # Too small an effect, however sure.
    assert verdict(-0.02, noise=0.06).word == "better, not proven"
    assert verdict(0.02).word == verdict(0.0).word == "no evidence"
    proven, some, none = verdict(-0.02), verdict(-0.02, 5), verdict(0.02)
    assert (proven.proven, proven.helped) == (True, True)
    assert (some.proven, some.helped) == (False, True)
    assert (none.proven, none.helped) == (False, False)
    assert proven.change == pytest.approx(-2.0)
    assert str(proven).startswith("proven: scaled quantile loss -2.00 % against zero-shot (90 % interval -2.")
    assert str(some) == (
        "better, not proven: scaled quantile loss -2.00 % against zero-shot (5 series, too few for a proof: it takes 6)"
    )
    assert str(none) == "no evidence: zero-shot is the best of all candidates in each fold (30 series)"


def test_nothing_to_compare_is_no_evidence() -> None:
    one = judge(np.array([2.0]), [Candidate(0, 1.0, np.array([1.0]))])
    assert (one.word, one.change, one.p, one.epoch) == ("no evidence", None, None, 0)
    assert str(one) == "no evidence: 1 series cannot tell; give more series, or more validation_windows"
    diverged = judge(np.ones(9), [Candidate(0, 1.0, np.full(9, math.nan)), Candidate(1, 1.0, np.full(9, math.inf))])
    assert (diverged.word, diverged.epoch) == ("no evidence", None)
    assert str(diverged) == "no evidence: the training left no model with finite scores"
    with pytest.raises(ValueError, match=r"^epoch 4 has scores of \(3,\) units, not \(2,\)$"):
        judge(np.ones(2), [Candidate(4, 1.0, np.ones(3))])


@pytest.mark.parametrize("units", [6, 20, 100])
def test_noise_is_proven_no_more_often_than_the_level_says(units: int) -> None:
    """Five epochs of four weights that differ from zero-shot by noise: so large that the least effect does not help."""
    proven = 0
    for seed in range(300):
        rng = np.random.default_rng([units, seed])
        zero = rng.gamma(3.0, 1.0, units)
        noise = rng.normal(size=(5, units)) + rng.normal(size=units)
        scores = [zero * (1 + 0.1 * weight * row) for row in noise for weight in (0.25, 0.5, 0.75, 1.0)]
        proven += judge(zero, candidates(np.array(scores))).proven
    assert binom.sf(proven - 1, 300, 0.05) > 0.01, proven


def test_tiny_random_adapters_are_not_proven() -> None:
    """Of a few hundred, each with five random states: random changes of LoRA on the bundled model mean nothing."""
    estimator = make_estimator(checkpoint="bolt-nano")
    backbone = estimator.load_backbone()
    last = Windows(SeriesStore.from_dataset(make_dataset(24)), context_length=24, prediction_length=6, min_context=6)
    judged = Judge(last.last())
    zero = judged.start(backbone)
    adapter = get_adapter({"name": "lora", "r": 1}).attach(backbone)
    start = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(100):
        adapter.load_state_dict(
            {name: t + 0.02 * torch.randn(t.shape, generator=generator) for name, t in start.items()}
        )
        rows.append(judged.score(backbone))
    scores, rng = np.array(rows), np.random.default_rng(0)
    words = []
    for _ in range(200):
        chosen = scores[rng.choice(len(scores), 5, replace=False)]
        units = rng.choice(24, rng.integers(6, 25), replace=False)
        words.append(judge(zero[units], candidates(chosen[:, units], (1.0,))).word)
    assert binom.sf(words.count("proven") - 1, 200, 0.05) > 0.01
    assert words.count("no evidence") > 60


# With models.


def test_a_judge_scores_units() -> None:
    data = make_dataset(6)
    backbone = make_estimator(checkpoint="bolt-nano").load_backbone()
    store = SeriesStore.from_dataset(data)
    windows = Windows(store, context_length=24, prediction_length=6, min_context=6)
    last = windows.last(windows=2)
    judged = Judge(last)
    found = judged.start(backbone)
    assert (judged.units, judged.unit, judged.windows, judged.left_out) == (6, "series", 12, 0)
    batch = windows.read(last.series, last.cuts)
    with backbone.inference():
        past = {name: value for name, value in batch.items() if not name.startswith("future_")}
        forecast = backbone.forecast(to_device(past, torch.device("cpu")))
    # The unit of a series is that of its history before the first of its windows.
    scales = np.stack([scale(entry["target"][:-12], 24) for entry in data for _ in range(2)])
    each = quantile_scores(
        forecast.values.numpy(), forecast.levels, batch["future_target"], batch["future_observed_values"], scales
    )
    assert found == pytest.approx(each.reshape(6, 2).mean(axis=1), rel=1e-5)
    assert judged.score(backbone) == pytest.approx(found, rel=1e-12)
    patients = Judge(last, unit="patients")
    assert patients.start(backbone) == pytest.approx(each.reshape(3, 4).mean(axis=1), rel=1e-5)
    assert (patients.units, patients.unit) == (3, "patients")
    single = Judge(Windows(SeriesStore.from_dataset(data[:1]), context_length=24, prediction_length=6).last(windows=3))
    assert single.start(backbone).shape == (3,)
    assert single.unit == "windows"


def test_windows_without_a_scale_are_left_out_and_counted() -> None:
    data = make_dataset(4)
    data[1]["target"][:] = 0.0
    backbone = make_estimator(checkpoint="bolt-nano").load_backbone()
    judged = Judge(Windows(SeriesStore.from_dataset(data), context_length=24, prediction_length=6).last())
    assert judged.start(backbone).shape == (3,)
    assert (judged.windows, judged.left_out, judged.units) == (3, 1, 3)


@pytest.mark.parametrize("adapter", ["lora", "ia3", "layernorm", "full", ["layernorm", {"name": "lora", "r": 2}]])
def test_the_weight_lies_in_the_tensors_that_are_stored(adapter: Any, tmp_path: Path) -> None:
    """A predictor with a weight below 1 is an ordinary one: stored, read, merged and exported as it forecasts."""
    data = make_dataset(12)
    options = dict(checkpoint="bolt-nano", adapter=adapter, learning_rate=1e-3, max_epochs=1)
    predictor = make_estimator(**options).train(data)
    verdict = predictor.verdict
    assert verdict is not None
    assert verdict.weight in (0.25, 0.5)
    whole = make_estimator(**options, interpolate=False).train(data)
    assert whole.verdict.weight == 1.0
    end = whole.backbone.adapter.state_dict()
    start = {}
    again = make_estimator(**options).load_backbone()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = {n: t.clone() for n, t in get_adapter(adapter).attach(again).state_dict().items()}
    for name, tensor in predictor.backbone.adapter.state_dict().items():
        assert torch.equal(tensor, torch.lerp(start[name], end[name], verdict.weight)), name
    values = np.stack([forecast.forecast_array for forecast in predictor.predict(data)])
    predictor.serialize(tmp_path / "model")
    loaded = PeftPredictor.deserialize(tmp_path / "model", device="cpu")
    assert loaded.verdict == verdict
    assert np.array_equal(values, np.stack([forecast.forecast_array for forecast in loaded.predict(data)]))
    loaded.merge()
    merged = np.stack([forecast.forecast_array for forecast in loaded.predict(data)])
    np.testing.assert_allclose(merged, values, rtol=1e-4, atol=1e-4)


def test_few_series_are_passed_over_as_often_as_there_are_epochs() -> None:
    few = make_estimator(max_epochs=3, num_batches_per_epoch=50, batch_size=32).train(make_dataset(1))
    # 90 steps less a label held out and one to learn, less the shortest context: 73 windows, 3 batches.
    assert few.fit.steps == 9
    many = make_estimator(max_epochs=1, num_batches_per_epoch=4, batch_size=32).train(make_dataset(20))
    assert many.fit.steps == 4


def test_a_single_series_has_its_windows_as_units() -> None:
    data = make_dataset(1, length=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningDidNotHelp)
        one = make_estimator(gate="fallback").train(data)
        several = make_estimator(validation_windows=8).train(data)
    assert (one.verdict.word, one.verdict.units) == ("no evidence", 1)
    assert one.backbone.adapter is None
    assert (several.verdict.units, several.verdict.unit) == (8, "windows")


def test_what_comes_without_a_zero_shot_forecast_has_no_verdict() -> None:
    predictor = get_estimator("moment")(
        prediction_length=6, context_length=64, max_epochs=1, num_batches_per_epoch=2, device="cpu", progress=False
    ).train(make_dataset(3))
    assert predictor.verdict is None
    assert predictor.gate.passed


def test_records_before_the_verdict_are_read() -> None:
    assert Gate(1.0, 0.9, 7).passed
    assert not Gate(1.0, 1.0, 7).passed
    assert not replace(Gate(1.0, 0.9, 7), verdict="no evidence").passed
    assert replace(Gate(1.0, 1.1, 7), verdict="better, not proven").passed


@pytest.mark.parametrize("family", ["t5-nano", "lag-llama"])
def test_families_that_sample_are_judged_by_fewer_windows_with_the_same_random_numbers(family: str) -> None:
    estimator = (
        make_estimator(checkpoint=family)
        if family == "t5-nano"
        else get_estimator(family)(prediction_length=6, context_length=24, device="cpu")
    )
    backbone = estimator.load_backbone()
    windows = Windows(
        SeriesStore.from_dataset(make_dataset(70)),
        context_length=backbone.past_length,
        prediction_length=6,
        min_context=6,
        time_features=backbone.time_features,
    )
    judged = Judge(windows.last())
    found = judged.start(backbone)
    assert judged.units == 64
    assert np.array_equal(judged.score(backbone), found)


def test_families_that_sample_have_fewer_weights() -> None:
    predictor = make_estimator(checkpoint="t5-nano", max_epochs=1, learning_rate=1e-3).train(make_dataset(12))
    assert predictor.verdict.weight in (0.5, 1.0)
