"""Scores against loops, thresholds against known distributions, metrics against counts."""

from __future__ import annotations

import gzip
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from gluonts_peft import PeftPredictor, detect, get_adapter, load_backbone
from gluonts_peft.anomaly import (
    METHODS,
    Scores,
    adjusted_best_f1,
    best_f1,
    evaluate,
    find_events,
    score,
    smooth,
    threshold,
    window_hits,
    write_detections,
)
from gluonts_peft.backbone import Backbone

ROOT = Path(__file__).parents[1]
REAL = ROOT / ".." / "shared" / "data" / "anomaly"
START = pd.Period("2024-01-01", "h")


def daily(length: int, seed: int = 0) -> Any:
    noise = np.random.default_rng(seed).normal(0, 1.0, length)
    return (50 + 10 * np.sin(2 * np.pi * np.arange(length) / 24) + noise).astype(np.float32)


def shifted(length: int = 1200, begin: int = 900, steps: int = 24, seed: int = 0) -> tuple[Any, Any]:
    target, labels = daily(length, seed), np.zeros(length, bool)
    target[begin : begin + steps] += 15
    labels[begin : begin + steps] = True
    return target, labels


def entry(target: Any, name: str = "a") -> dict[str, Any]:
    return {"item_id": name, "start": START, "target": np.asarray(target)}


@pytest.fixture(scope="module")
def moment() -> Backbone:
    return load_backbone("moment", prediction_length=1)


@pytest.fixture(scope="module")
def bolt() -> Backbone:
    return load_backbone("chronos", prediction_length=8, checkpoint="bolt-nano", context_length=64)


def batch_of(window: Any, shown: Any) -> dict[str, torch.Tensor]:
    values = {"past_target": np.where(shown, window, 0)[None], "past_observed_values": np.asarray(shown)[None]}
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}


@pytest.mark.parametrize(("masks", "block"), [(4, 1), (2, 3)])
def test_reconstruction_scores_are_errors_where_a_point_was_hidden(moment: Backbone, masks: int, block: int) -> None:
    target = daily(700)
    target[300:303] = np.nan
    missing = np.isnan(target)
    total, count = np.zeros(700), np.zeros(700)
    for end in (512, 632, 700):
        window, seen = target[end - 512 : end], ~missing[end - 512 : end]
        turns = (np.arange(512)[::-1] // (8 * block)) % masks
        for turn in range(masks):
            hidden = (turns == turn) & seen
            with moment.inference():
                [found] = moment.reconstruct(batch_of(window, seen & ~hidden)).numpy()
            steps = np.flatnonzero(hidden)
            total[end - 512 + steps] += np.abs(found - window)[steps]
            count[end - 512 + steps] += 1
    expected = total / np.where(missing, np.nan, count) / np.nanstd(target.astype(float))

    [found] = score(moment, [entry(target)], stride=120, masks=masks, block=block)

    assert (found.item_id, found.start) == ("a", START)
    np.testing.assert_allclose(found.values, expected, rtol=1e-3, atol=1e-5)
    assert np.flatnonzero(np.isnan(found.values)).tolist() == [300, 301, 302]


def test_visible_scores_are_errors_where_a_point_was_seen(moment: Backbone) -> None:
    target = daily(100)
    with moment.inference():
        [found] = moment.reconstruct(batch_of(target, np.ones(100, bool))).numpy()
    expected = np.abs(found - target) / target.astype(float).std()
    [scores] = score(moment, [entry(target)], method="visible")
    np.testing.assert_allclose(scores.values, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["residual", "exceedance"])
def test_forecast_scores_are_distances_in_units_of_the_spread(bolt: Backbone, method: str) -> None:
    target = daily(60)
    target[50:52] = np.nan
    seen = ~np.isnan(target)
    total, count = np.zeros(60), np.zeros(60)
    least = 0.05 * np.nanstd(target.astype(float))
    for cut in (16, 20, 24, 28, 32, 36, 40, 44, 48, 52):
        with bolt.inference():
            result = bolt.forecast(batch_of(target[:cut], seen[:cut]))
        assert result.levels is not None
        low, middle, high = (result.values[0, result.levels.index(level)].double().numpy() for level in (0.2, 0.5, 0.9))
        label = target[cut : cut + 8].astype(float)
        outside = np.maximum(np.maximum(low - label, label - high), 0)
        distance = (np.abs(label - middle) if method == "residual" else outside) / np.maximum(high - low, least)
        total[cut : cut + 8] += distance
        count[cut : cut + 8] += 1
    with np.errstate(invalid="ignore"):
        expected = np.where(count > 0, total / count, np.nan)

    [found] = score(bolt, [entry(target)], method=method, stride=4, quantiles=(0.2, 0.9))

    np.testing.assert_allclose(found.values, expected, rtol=1e-3, atol=1e-4)
    assert np.flatnonzero(np.isnan(found.values)).tolist() == [*range(16), 50, 51]
    if method == "exceedance":
        assert (found.values[16:50] == 0).sum() > 5


def test_every_step_after_the_first_context_has_a_score_whatever_the_length(bolt: Backbone) -> None:
    dataset = [entry(daily(length, length), str(length)) for length in (24, 25, 31, 32, 33, 100)]
    for scores in score(bolt, dataset, batch_size=3):
        assert np.flatnonzero(np.isnan(scores.values)).tolist() == list(range(16))
    alone = score(bolt, dataset[-1:])[0].values
    np.testing.assert_allclose(score(bolt, dataset)[-1].values, alone, rtol=1e-4, atol=1e-5)


def test_families_that_sample_are_scored_by_quantiles_of_their_samples() -> None:
    lag_llama = load_backbone("lag-llama", prediction_length=4, context_length=32)
    target, labels = shifted(160, 120, 6)
    [first] = score(lag_llama, [entry(target)], num_samples=20)
    [second] = score(lag_llama, [entry(target)], num_samples=20)
    np.testing.assert_array_equal(first.values, second.values)
    [other] = score(lag_llama, [entry(target)], num_samples=20, seed=1)
    assert not np.array_equal(first.values, other.values, equal_nan=True)
    assert np.nanmean(first.values[labels]) > 2 * np.nanmean(first.values[~labels])


def test_a_shift_is_found_by_both_kinds_of_model_and_quality_is_measured(moment: Backbone) -> None:
    target, labels = shifted()
    chronos = load_backbone("chronos", prediction_length=12, checkpoint="bolt-nano")
    for model, method in ((moment, "reconstruction"), (chronos, "residual"), (chronos, "exceedance")):
        [found] = score(model, [entry(target)], method=method, smoothing=4)
        quality = evaluate(found.values, labels)
        assert quality["roc_auc"] > 0.95
        assert quality["average_precision"] > 0.6
        assert labels[np.nanargmax(found.values)]
    assert "auto" not in METHODS
    [auto], [named] = score(chronos, [entry(target)]), score(chronos, [entry(target)], method="residual")
    np.testing.assert_array_equal(auto.values, named.values)


def test_an_adapter_changes_the_scores_and_folding_does_not(moment: Backbone) -> None:
    backbone = load_backbone("moment", prediction_length=1)
    before = score(backbone, [entry(daily(200))])[0].values
    adapter = get_adapter("lora").attach(backbone)
    generator = torch.Generator().manual_seed(0)
    adapter.load_state_dict(
        {name: 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in adapter.state_dict().items()}
    )
    after = score(PeftPredictor(backbone, device="cpu"), [entry(daily(200))])[0].values
    assert np.abs(after - before).max() > 1e-2
    adapter.merge()
    np.testing.assert_allclose(score(backbone, [entry(daily(200))])[0].values, after, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("calibration", [600, 0.5, np.int64(600)])
def test_events_come_after_the_calibration_part(moment: Backbone, calibration: Any) -> None:
    target, labels = shifted()
    # An anomaly in the part that is called clean raises the threshold and is no event.
    target[100:102] += 30
    [found] = detect(moment, [entry(target)], calibration=calibration, threshold={"name": "quantile", "level": 0.99})
    assert found.threshold == np.quantile(found.scores.values[:600], 0.99)
    assert found.events
    assert all(event.first >= 600 for event in found.events)
    best = max(found.events, key=lambda event: event.peak)
    assert labels[best.first : best.last + 1].any()
    assert (best.start, best.end) == (START + best.first, START + best.last)
    assert best.peak == np.nanmax(found.scores.values[600:])


@pytest.mark.parametrize("smoothing", [1, 25])
def test_what_follows_the_calibration_part_does_not_move_the_threshold(bolt: Backbone, smoothing: int) -> None:
    values = daily(800).copy()
    later = values.copy()
    later[400:430] += 40.0
    common: dict[str, Any] = dict(calibration=400, method="residual", smoothing=smoothing)
    [clean], [strange] = (detect(bolt, [entry(each)], **common) for each in (values, later))
    assert strange.begin == 400
    # The deviation of the whole series is the least spread; the rest of a score is of its own steps.
    assert strange.threshold <= clean.threshold
    assert strange.events[0].first >= 400
    np.testing.assert_array_equal(strange.scores.values, smooth(score(bolt, [entry(later)])[0].values, smoothing))


def test_a_clean_dataset_calibrates_all_series_alike(moment: Backbone) -> None:
    clean = [entry(daily(300, seed), str(seed)) for seed in range(2)]
    dataset = [entry(shifted(400, 200, 12, seed)[0], str(seed)) for seed in range(3)]
    found = detect(moment, dataset, calibration=clean, smoothing=3, merge=5, min_length=3)
    pooled = np.concatenate([scores.values for scores in score(moment, clean, smoothing=3)])
    assert [each.threshold for each in found] == [np.quantile(pooled, 0.995)] * 3
    for each in found:
        assert any(event.first <= 211 and event.last >= 200 for event in each.events)


def test_smoothing_is_a_centred_mean_that_passes_over_what_is_missing() -> None:
    values = np.random.default_rng(0).normal(size=50)
    values[[0, 7, 8, 49]] = np.nan
    for width in (1, 2, 5):
        found = smooth(values, width)
        for i in range(50):
            # As pandas centres a window of even width.
            first = i - width // 2
            own = values[max(first, 0) : first + width]
            expected = np.nan if np.isnan(values[i]) else np.nanmean(own)
            assert found[i] == pytest.approx(expected, nan_ok=True)


def test_thresholds() -> None:
    scores = np.random.default_rng(0).exponential(size=20_000)
    with_gaps = np.append(scores, [np.nan] * 5)
    assert threshold(with_gaps) == np.quantile(scores, 0.995)
    assert threshold(scores, {"name": "quantile", "level": 0.9}) == np.quantile(scores, 0.9)
    assert threshold(scores, "deviations") == pytest.approx(scores.mean() + 3 * scores.std())
    assert threshold(scores, {"name": "deviations", "k": 5}) == pytest.approx(scores.mean() + 5 * scores.std())
    # An exponential clean score exceeds -log(risk) with probability `risk`, also far beyond what was seen.
    for risk in (1e-3, 1e-4, 1e-6):
        found = threshold(scores, {"name": "extreme", "risk": risk})
        assert found == pytest.approx(-np.log(risk), rel=0.1)


@pytest.mark.parametrize(
    ("scores", "spec", "sentence"),
    [
        (np.arange(49.0), "quantile", "the calibration part has 49 scores, a threshold needs 50; give a longer one"),
        (np.full(99, np.nan), "quantile", "the calibration part has 0 scores, a threshold needs 50; give a longer one"),
        (np.full(99, 2.5), "quantile", "the calibration part is constant: all its scores are 2.5, which says nothing"),
        (np.arange(99.0), "quantil", "threshold 'quantil' is unknown; did you mean 'quantile'?"),
        (np.arange(99.0), {"name": "deviations", "level": 1}, "threshold 'deviations': option 'level' is unknown;"),
        (np.arange(99.0), {"name": "quantile", "level": 1.0}, "level 1.0 is not between 0 and 1"),
        (
            np.arange(99.0),
            "extreme",
            "level 0.95 leaves 5 of 99 clean scores above it, a tail is fitted to 20 or more;",
        ),
        (
            np.arange(999.0),
            {"name": "extreme", "risk": 0.2},
            "risk 0.2 is not below 0.05005, the share of scores above the level 0.95",
        ),
    ],
)
def test_a_threshold_that_rests_on_nothing_is_refused(scores: Any, spec: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        threshold(scores, spec)


def test_events_are_merged_and_short_ones_dropped() -> None:
    nan = np.nan
    scores = Scores("a", START, np.array([0, 5, 5, 0, 0, 6, 1, 0, nan, 7, 5, 5.0]))

    def spans(**options: int) -> list[tuple[int, int, float]]:
        return [(event.first, event.last, event.peak) for event in find_events(scores, 4.0, **options)]

    assert spans() == [(1, 2, 5.0), (5, 5, 6.0), (9, 11, 7.0)]
    assert spans(merge=1) == spans()
    assert spans(merge=2) == [(1, 5, 6.0), (9, 11, 7.0)]
    assert spans(merge=3) == [(1, 11, 7.0)]
    assert spans(min_length=2) == [(1, 2, 5.0), (9, 11, 7.0)]
    assert find_events(scores, 7.0) == []
    first = find_events(scores, 4.0)[0]
    assert (str(first.start), str(first.end)) == ("2024-01-01 01:00", "2024-01-01 02:00")
    with pytest.raises(ValueError, match=r"^merge -1 and min_length 1: give merge >= 0 and min_length >= 1$"):
        spans(merge=-1)


def test_hits_are_counted() -> None:
    events = find_events(Scores("a", START, np.array([0, 5, 5, 0, 5, 0, 0, 5, 0.0])), 1.0)
    assert window_hits(events, [(2, 4), (6, 6), (7, 8)]) == {"hit": 2, "missed": 1, "false": 0}
    assert window_hits(events, [(0, 0)]) == {"hit": 0, "missed": 1, "false": 3}


def f1_by_hand(scores: Any, labels: Any, adjust: bool) -> float:
    best = 0.0
    for level in np.unique(scores):
        found = scores >= level
        if adjust:
            for begin in np.flatnonzero(labels & ~np.append(False, labels[:-1])):
                end = begin
                while end < len(labels) and labels[end]:
                    end += 1
                found[begin:end] |= found[begin:end].any()
        hits = (found & labels).sum()
        best = max(best, 2 * hits / (found.sum() + labels.sum()))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_stretches_that_only_points_without_a_score_part_are_two(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 20, 60).astype(float), rng.random(60) < 0.6
    labels[:2] = [True, False]
    scores[rng.random(60) < 0.3] = np.nan
    scores[0] = 5.0
    kept = ~np.isnan(scores)
    found = np.where(kept, scores, -1.0)
    best = 0.0
    for level in np.unique(scores[kept]):
        above = found >= level
        for begin in np.flatnonzero(labels & ~np.append(False, labels[:-1])):
            end = begin + int(np.append(labels[begin:], False).argmin())
            above[begin:end] |= above[begin:end].any()
        above, truth = above[kept], labels[kept]
        best = max(best, 2 * (above & truth).sum() / (above.sum() + truth.sum()))
    assert adjusted_best_f1(scores, labels) == pytest.approx(best)
    assert evaluate(scores, labels)["adjusted_best_f1"] == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_f1_is_that_of_the_best_threshold_of_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 20, 60).astype(float), np.repeat(rng.random(12) < 0.3, 5)
    labels[:2] = [True, False]
    assert best_f1(scores, labels) == pytest.approx(f1_by_hand(scores, labels, False))
    assert adjusted_best_f1(scores, labels) == pytest.approx(f1_by_hand(scores, labels, True))


def test_point_adjustment_flatters_random_scores_and_the_other_metrics_do_not() -> None:
    labels = np.zeros(20_000, bool)
    labels[4000:4600] = labels[15_000:15_500] = True
    quality = evaluate(np.random.default_rng(0).random(20_000), labels)
    assert quality["adjusted_best_f1"] > 0.7
    assert quality["best_f1"] < 0.15
    assert quality["average_precision"] < 0.1
    assert abs(quality["roc_auc"] - 0.5) < 0.05


def test_perfect_scores_are_perfect_and_points_without_a_score_do_not_count() -> None:
    labels = np.zeros(100, bool)
    labels[40:50] = True
    scores = labels.astype(float)
    assert set(evaluate(scores, labels).values()) == {1.0}
    assert set(evaluate(-scores, labels).values()) != {1.0}
    scores[:20] = np.nan
    labels[:20] = True
    assert set(evaluate(scores, labels.astype(int)).values()) == {1.0}


@pytest.mark.parametrize(
    ("scores", "labels", "sentence"),
    [
        ([0.1, 0.2, 0.3], [0, 1], "labels have shape (2,), scores (3,): give one label a point of the series"),
        ([[0.1, 0.2]], [[0, 1]], "labels have shape (1, 2), scores (1, 2): give one label a point of the series"),
        ([0.1, 0.2], [0, 2], "labels hold 2; give 1 for an anomaly and 0 else"),
        (
            [0.1, 0.2],
            [0, 0],
            "of the 2 points with a score 0 are labelled as anomalies: there is nothing to tell apart",
        ),
        ([np.nan, 0.2], [0, 1], "of the 1 points with a score 1 are labelled as anomalies: there is nothing to tell"),
    ],
)
def test_labels_that_do_not_fit_are_refused(scores: Any, labels: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        evaluate(scores, labels)


@pytest.mark.parametrize(
    ("target", "options", "sentence"),
    [
        (
            np.full(99, np.nan),
            {},
            "1 of 1 series cannot be scored: item_id 'a' (no observed value); leave them out, or",
        ),
        (daily(20), {}, "1 of 1 series cannot be scored: item_id 'a' (20 steps, method 'residual' needs 24); leave"),
        (daily(99), {"mask": 3}, "method 'residual': option 'mask' is unknown; known: num_samples, quantiles, seed"),
        (daily(99), {"method": "residuals"}, "method 'residuals' is unknown; did you mean 'residual'?"),
        (daily(99), {"method": "visible"}, "family 'chronos' does not reconstruct its input; use one with"),
        (daily(99), {"stride": 0}, "stride 0 is not positive"),
        (daily(99), {"stride": 9}, "stride 9 exceeds the 8 steps of a forecast: points between have no score"),
        (daily(99), {"smoothing": 0}, "smoothing 0 is not positive; 1 means none"),
        (daily(99), {"batch_size": -1}, "batch_size -1 is not positive"),
        (daily(99), {"quantiles": (0.6, 0.9)}, "quantiles (0.6, 0.9) do not lie on both sides of 0.5"),
        (daily(99), {"quantiles": (0.01, 0.9)}, "quantiles 0.01 to 0.9 exceed what the family forecasts, 0.1 to 0.9"),
    ],
)
def test_what_cannot_be_scored_is_refused(bolt: Backbone, target: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        score(bolt, [entry(target)], **options)


def test_one_short_series_among_long_ones_is_named(bolt: Backbone) -> None:
    sentence = r"^1 of 2 series cannot be scored: item_id 'b' \(20 steps, method 'residual' needs 24\)"
    with pytest.raises(ValueError, match=sentence):
        score(bolt, [entry(daily(99)), entry(daily(20), "b")])


def test_masks_that_hide_everything_are_refused(moment: Backbone) -> None:
    with pytest.raises(ValueError, match="^masks 1 and block 1 hide everything or nothing; give masks >= 2 and"):
        score(moment, [entry(daily(99))], masks=1)
    with pytest.raises(ValueError, match="^stride 100 exceeds the 99 steps of a window"):
        score(moment, [entry(daily(99))], stride=100)


def test_a_model_without_a_trained_head_does_not_forecast(moment: Backbone) -> None:
    with pytest.raises(ValueError, match="^the forecasting head on checkpoint 'moment-nano' is not trained"):
        score(moment, [entry(daily(99))], method="residual")


@pytest.mark.parametrize(
    ("calibration", "sentence"),
    [
        (None, "calibration is missing: a threshold needs a part without anomalies; name its steps, its share of each"),
        (0, "calibration 0 is neither a share between 0 and 1 nor a number of steps"),
        (1.0, "calibration 1.0 is neither a share between 0 and 1 nor a number of steps"),
        (-0.5, "calibration -0.5 is neither a share between 0 and 1 nor a number of steps"),
        (200, "1 of 1 series cannot be scored: item_id 'a' (calibration 200 leaves nothing of its 200 steps)"),
        (
            40,
            "1 of 1 series cannot be scored: item_id 'a' (40 observed values in its calibration part, a threshold",
        ),
    ],
)
def test_detection_needs_a_clean_part(moment: Backbone, calibration: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        detect(moment, [entry(daily(200))], calibration=calibration)


def test_a_folder_with_scores_events_and_plot_is_written(moment: Backbone, tmp_path: Path) -> None:
    dataset = [entry(shifted(400, 200, 12, seed)[0], str(seed)) for seed in range(2)]
    found = detect(moment, dataset, calibration=150)
    write_detections(found, dataset, tmp_path / "out")
    scores = pd.read_csv(tmp_path / "out" / "scores.csv", dtype={"item_id": str}, parse_dates=["timestamp"])
    events = pd.read_csv(tmp_path / "out" / "events.csv", dtype={"item_id": str}, parse_dates=["start", "end"])
    assert list(scores) == ["item_id", "timestamp", "target", "score", "threshold", "event"]
    assert list(events) == ["item_id", "start", "end", "steps", "peak", "threshold"]
    assert len(scores) == 800
    assert len(events) == sum(len(each.events) for each in found)
    np.testing.assert_allclose(scores["score"][:400], found[0].scores.values)
    assert scores["event"].sum() == events["steps"].sum()
    inside = scores[scores["event"] & (scores["item_id"] == "1")]
    first = events[events["item_id"] == "1"].iloc[0]
    assert inside["timestamp"].iloc[0] == first["start"]
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileExistsError, match="is in use; name a new one$"):
        write_detections(found, dataset, tmp_path / "out")


def compare(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> pd.DataFrame:
    """Run the example in this process, which has loaded what it needs."""
    program = ROOT / "examples" / "anomaly" / "compare.py"
    monkeypatch.setattr(sys, "argv", [str(program), "--out", str(out), *arguments])
    runpy.run_path(str(program), run_name="__main__")
    return pd.read_csv(out / "scores.csv")


def test_the_example_compares_models_with_baselines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On files in the layouts of the two archives."""
    target, labels = shifted(1000, 700, 40)
    ucr = tmp_path / "007_UCR_Anomaly_wave_400_701_740.out.gz"
    lines = [f"{value},{int(label)}" for value, label in zip(target, labels, strict=True)]
    ucr.write_bytes(gzip.compress("\n".join(lines).encode()))
    nab = tmp_path / "nab"
    nab.mkdir()
    times = pd.date_range("2014-01-01", periods=1800, freq="5min")
    pd.DataFrame({"timestamp": times, "value": shifted(1800, 600, 50, 1)[0]}).to_csv(nab / "taxi.csv", index=False)
    windows = {"taxi.csv": [[str(times[590]) + ".000000", str(times[655]) + ".000000"]]}
    (nab / "windows.json").write_text(json.dumps(windows))

    files = ["--ucr", str(ucr), "--nab", str(nab)]
    frame = compare(monkeypatch, tmp_path / "out", *files, "--epochs", "1", "--batches", "2")

    assert frame["series"].unique().tolist() == ["wave", "taxi"]
    methods = ["rolling z-score", "isolation forest"]
    methods += [f"{model}, {kind}" for model in ("MOMENT", "Chronos-Bolt") for kind in ("zero-shot", "LoRA")]
    assert frame["method"].tolist() == 2 * methods
    assert frame[["roc_auc", "average_precision", "best_f1", "adjusted_best_f1"]].gt(0).all(axis=None)
    assert ((frame["hit"] + frame["missed"]) == 1).all()
    zero_shot = frame[frame["method"].str.endswith("zero-shot")]
    assert zero_shot["roc_auc"].min() > 0.8
    assert set(frame[frame["method"].str.endswith("LoRA")]["adapter"]) <= {"tuned", "no evidence"}
    assert capsys.readouterr().out.count("| MOMENT, LoRA |") == 3


def test_the_example_runs_on_simulated_series(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = compare(monkeypatch, tmp_path / "out", "--epochs", "0", "--rows", "900")
    assert frame["series"].unique().tolist() == ["spikes", "shift", "flat", "frequency"]
    assert "Means and sums over 4 series:" in capsys.readouterr().out
    best = frame.groupby("series")["roc_auc"].max()
    assert (best > 0.9).all()


@pytest.mark.skipif(not REAL.is_dir(), reason="the real series, ../shared/data/anomaly, are not on this machine")
def test_the_example_reads_the_real_archives() -> None:
    example = runpy.run_path(str(ROOT / "examples" / "anomaly" / "compare.py"))
    [path] = REAL.glob("198_UCR_*")
    pressure = example["read_ucr"](path, None)
    labels = pd.read_csv(path, header=None)[1].to_numpy() > 0
    assert (pressure.clean, pressure.windows) == (50_000, [(124_159, 124_984)])
    assert np.array_equal(pressure.labels, labels)
    series = list(example["read_nab"](REAL / "nab"))
    assert [len(each.windows) for each in series] == [2, 1, 3, 4, 5, 2, 2]
    for each in series:
        # No window touches the probationary part.
        assert each.clean < each.windows[0][0]
        assert np.isfinite(each.entry["target"]).all()
