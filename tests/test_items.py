"""Weights by item: the formula, its cross-fitting, and predictors that forecast each item by its own weight."""

from __future__ import annotations

import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom
from typer.testing import CliRunner

from gluonts_peft import PeftPredictor, get_adapter, get_estimator
from gluonts_peft.cli import app
from gluonts_peft.items import Items, choose_by_unit, cross_fit_by_unit, judge_items
from gluonts_peft.keeper import mixed
from gluonts_peft.predictor import PredictorError
from gluonts_peft.trials import TrialSpec, run_trial
from gluonts_peft.trials.spec import TrainingSpec
from gluonts_peft.trials.strict import SpecError

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def make_dataset(count: int, kind: str = "calm", length: int = 90, seed: int = 0) -> list[dict[str, Any]]:
    """Calm series come back to their level; the others go on as they go."""
    generator = np.random.default_rng(seed)
    start, entries = pd.Period("2024-01-01 00:00", freq="h"), []
    for i in range(count):
        values = generator.standard_normal(length)
        if kind != "calm":
            values = np.cumsum(values + generator.choice([-2.0, 2.0]))
        entries.append({"item_id": f"{kind}/{i}", "start": start, "target": (20 + values).astype(np.float32)})
    return entries


def make_estimator(**options: Any) -> Any:
    defaults: dict[str, Any] = dict(
        prediction_length=6, context_length=24, checkpoint="bolt-nano", max_epochs=2, num_batches_per_epoch=20,
        batch_size=16, learning_rate=5e-3, validation_windows=5, device="cpu", progress=False,
    )  # fmt: skip
    return get_estimator("chronos")(**{**defaults, **options})


def values_of(predictor: Any, data: Any) -> np.ndarray:
    return np.stack([forecast.forecast_array for forecast in predictor.predict(data)])


# The formula.


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_formula(seed: int) -> None:
    """Window by window, item by item, as the head of the module writes it."""
    rng = np.random.default_rng(seed)
    count, common = 8, 2
    sizes = rng.integers(1, 9, count)
    units = np.repeat(np.arange(count), sizes)
    effect = rng.normal(0, 0.5, (5, count))
    scores = 3 + effect[:, units] + rng.normal(0, 0.3, (5, len(units)))
    expected = []
    tables = []
    for row in scores:
        d = [[row[j] - scores[common, j] for j in np.flatnonzero(units == i)] for i in range(count)]
        every = [value for those in d for value in those]
        m, total = np.mean(every), len(every)
        s = sum((value - np.mean(those)) ** 2 for those in d for value in those) / (total - count)
        among = sum(len(those) * (np.mean(those) - m) ** 2 for those in d) / (count - 1)
        n0 = (total - sum(len(those) ** 2 for those in d) / total) / (count - 1)
        t = max((among - s) / n0, 0.0)
        share = [t / (t + s / len(those)) if t + s > 0 else 0.0 for those in d]
        tables.append([b * (np.mean(those) - m) + max(m, 0.0) for b, those in zip(share, d, strict=True)])
    for i in range(count):
        column = [table[i] for table in tables]
        best = int(np.argmin(column))
        expected.append(best if column[best] < 0 and sizes[i] >= 2 else common)
    assert choose_by_unit(scores, units, common, count).tolist() == expected
    assert len(set(expected)) > 1


def test_items_that_do_not_differ_take_the_common_weight() -> None:
    units = np.repeat(np.arange(6), 4)
    # Better for all alike by far: that is not for an item to say.
    alike = np.stack([np.full(24, 2.0), np.full(24, 5.0), np.full(24, 1.0)])
    assert choose_by_unit(alike, units, 1, 6).tolist() == [1] * 6
    # One window each: nothing says how sure it is.
    rng = np.random.default_rng(0)
    assert choose_by_unit(rng.normal(size=(3, 6)), np.arange(6), 1, 6).tolist() == [1] * 6
    # Means that differ as noise makes them differ.
    noise = np.tile([-1.0, 1.0], 12) + np.repeat([-0.1, 0.1, 0.0, 0.1, -0.1, 0.0], 4)
    assert choose_by_unit(np.stack([np.zeros(24), noise]), units, 0, 6).tolist() == [0] * 6


def test_more_windows_weigh_more() -> None:
    """Two items with the same mean difference; the one with few windows stays."""
    rng = np.random.default_rng(1)
    sizes = [2, 60, *[20] * 10]
    units = np.repeat(np.arange(12), sizes)
    effect = np.array([-0.2, -0.2, *rng.normal(0.4, 0.3, 10)])
    noise = rng.normal(0, 1.0, len(units))
    # Without noise in the means, so that the first two have the same.
    means = np.array([noise[units == unit].mean() for unit in range(12)])
    scores = np.stack([np.full(len(units), 5.0), 5.0 + effect[units] + noise - means[units]])
    assert choose_by_unit(scores, units, 0, 12)[:2].tolist() == [0, 1]


def test_an_item_is_not_judged_by_the_windows_that_chose() -> None:
    rng = np.random.default_rng(0)
    count, size = 6, 5
    units = np.repeat(np.arange(count), size)
    scores = 5.0 + rng.normal(0, 1, (3, count))[:, units] + rng.normal(0, 0.3, (3, len(units)))
    found = cross_fit_by_unit(scores, units, 0, count)
    # Of five windows an item has one in each fold; which one differs from item to item.
    folds = [[unit * size + (fold - unit) % 5 for unit in range(count)] for fold in range(5)]
    expected = np.zeros(count)
    for held in folds:
        rest = [window for window in range(len(units)) if window not in held]
        chosen = choose_by_unit(scores[:, rest], units[rest], 0, count)
        gain = np.minimum((scores[:, held] - scores[0, held]).mean(axis=1), 0.0)
        for window in held:
            best = chosen[units[window]]
            expected[units[window]] += (scores[best, window] - scores[0, window] - gain[best]) / size
    assert found == pytest.approx(expected)
    assert (found != 0).any()


def test_windows_of_one_time_are_in_one_fold() -> None:
    """Two series of a patient that say the same: neither may choose for the other."""
    rng = np.random.default_rng(0)
    count = 6
    units, times = np.tile(np.repeat(np.arange(count), 4), 2), np.tile(np.arange(4), 2 * count)
    scores = np.tile(5.0 + rng.normal(0, 1, (3, count))[:, units[:24]] + rng.normal(0, 0.5, (3, 24)), 2)
    expected = np.zeros(count)
    for fold in range(5):
        held = (times + units) % 5 == fold
        chosen = choose_by_unit(scores[:, ~held], units[~held], 0, count)
        gain = np.minimum((scores[:, held] - scores[0, held]).mean(axis=1), 0.0)
        for window in np.flatnonzero(held):
            best = chosen[units[window]]
            expected[units[window]] += (scores[best, window] - scores[0, window] - gain[best]) / 8
    assert cross_fit_by_unit(scores, units, 0, count, times) == pytest.approx(expected)
    # In the order in which they come they would choose for each other.
    assert cross_fit_by_unit(scores, units, 0, count).mean() < expected.mean()


def test_items_that_differ_are_found_and_said() -> None:
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(20), 8)
    gain = np.where(np.arange(20) < 10, -0.5, 0.5)
    scores = 5.0 + np.outer(WEIGHTS, gain[units]) + rng.normal(0, 0.2, 160)
    names = [f"s{unit}" for unit in units]
    verdict, chosen = judge_items(scores, names, WEIGHTS, 0.5, "item")
    assert chosen == {f"s{unit}": 1.0 if unit < 10 else 0.0 for unit in range(20)}
    assert (verdict.word, verdict.units, verdict.unseen) == ("proven", 20, 0)
    assert verdict.chosen == {"0": 10, "1": 10}
    # A quarter of a score of five.
    assert verdict.change == pytest.approx(-5.0, abs=0.5)
    said = f"by item: proven: score {verdict.change:+.2f} % against the common weight 0.5 (90 % interval "
    assert str(verdict).startswith(said)
    assert str(verdict).endswith(", 20 items); 10 chose 0, 10 chose 1")
    # Windows that have no score, and items that have too few, take no part.
    scores[:, :7] = np.nan
    again, chosen = judge_items(scores, names, WEIGHTS, 0.5, "item")
    assert (again.units, again.unseen) == (19, 1)
    assert "s0" not in chosen
    none, chosen = judge_items(scores[:, :8], names[:8], WEIGHTS, 0.5, "item")
    assert (none.word, none.change, chosen) == ("no evidence", None, {})
    assert str(none) == "by item: no history is long enough to choose by"


def test_noise_is_no_reason_for_weights_of_ones_own() -> None:
    proven = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        units = np.repeat(np.arange(15), 6)
        noise = rng.normal(0, 1, 90)
        scores = rng.gamma(4.0, 1.0, 90) + np.outer(WEIGHTS, 0.5 * noise) + rng.normal(0, 0.1, (5, 90))
        found, _ = judge_items(scores, [str(unit) for unit in units], WEIGHTS, 0.5, "item")
        proven += found.word == "proven"
    assert binom.sf(proven - 1, 100, 0.05) > 0.01, proven


# Predictors.


@pytest.fixture(scope="module")
def mixed_wards() -> tuple[Any, list[dict[str, Any]]]:
    """Tuned on calm series alone; of those that are to be forecast, half go on as they go."""
    data = make_dataset(8) + make_dataset(8, "moving", seed=1)
    histories = [{**entry, "target": entry["target"][:-6]} for entry in data]
    predictor = make_estimator(by="item").train(make_dataset(30, seed=2), make_dataset(12, seed=3), item_data=histories)
    return predictor, data


def test_items_choose_by_their_histories(mixed_wards: Any) -> None:
    predictor, data = mixed_wards
    found = predictor.verdict.items
    assert (found.by, found.units, found.unseen, found.helped) == ("item", 16, 0, True)
    assert predictor.verdict.helped
    assert found.common == predictor.items.common == predictor.verdict.weight
    assert str(predictor.verdict).endswith(str(found))
    weights = predictor.items.weights
    assert set(weights) == {entry["item_id"] for entry in data}
    mean = {kind: np.mean([w for name, w in weights.items() if name.startswith(kind)]) for kind in ("calm", "moving")}
    assert mean["moving"] < found.common <= mean["calm"] + 0.01


def at_weight(predictor: Any, weight: float, data: Any) -> np.ndarray:
    """Forecast all by one weight."""
    backbone = make_estimator().load_backbone()
    adapter = get_adapter(predictor.backbone.adapter.spec).attach(backbone)
    adapter.load_state_dict(mixed(predictor.items.start, predictor.items.end, weight))
    return values_of(PeftPredictor(backbone, device="cpu"), data)


@pytest.fixture(scope="module")
def routed(mixed_wards: Any) -> tuple[Any, list[dict[str, Any]], np.ndarray]:
    """Weights of our choice, in mixed order, and an item that none is known of."""
    predictor, data = mixed_wards
    own = {entry["item_id"]: WEIGHTS[number % 5] for number, entry in enumerate(data[:-1])}
    items = Items("item", own, predictor.items.common, predictor.items.start, predictor.items.end)
    found = PeftPredictor(predictor.backbone, fit=predictor.fit, device="cpu", items=items, batch_size=7)
    return found, data, values_of(found, data)


def test_each_item_is_forecast_by_its_weight_in_order(routed: Any) -> None:
    predictor, data, values = routed
    forecasts = list(predictor.predict(data))
    assert [forecast.item_id for forecast in forecasts] == [entry["item_id"] for entry in data]
    each = {weight: at_weight(predictor, weight, data) for weight in {*WEIGHTS, predictor.items.common}}
    zero_shot = values_of(PeftPredictor(make_estimator().load_backbone(), device="cpu"), data)
    for number, entry in enumerate(data):
        weight = predictor.items.weight(entry["item_id"])
        np.testing.assert_allclose(values[number], each[weight][number], rtol=1e-5)
        if weight == 0.0:
            np.testing.assert_allclose(values[number], zero_shot[number], rtol=1e-5)
    assert predictor.items.weight(data[-1]["item_id"]) == predictor.items.weight("unheard of") == predictor.items.common
    assert not np.allclose(each[0.0], each[1.0], rtol=1e-3)
    # Reading changed nothing of the adapter, and a second time gives the same.
    assert np.array_equal(values_of(predictor, data), values)
    short = predictor.shorten(2)
    assert np.array_equal(values_of(short, data), values[..., :2])


def test_threads_get_the_same(routed: Any) -> None:
    predictor, data, values = routed
    again = PeftPredictor(predictor.backbone, device="cpu", items=pickle.loads(pickle.dumps(predictor.items)))
    again.batch_size = 7
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: values_of(again, data), range(8)))
    assert all(np.array_equal(each, values) for each in found)


def test_weights_are_stored_with_the_predictor(routed: Any, tmp_path: Path) -> None:
    predictor, data, values = routed
    predictor.serialize(tmp_path / "model")
    content = json.loads((tmp_path / "model" / "predictor.json").read_text())["items"]
    assert (content["by"], content["common"]) == ("item", predictor.items.common)
    assert content["weights"] == predictor.items.weights
    loaded = PeftPredictor.deserialize(tmp_path / "model", device="cpu")
    loaded.batch_size = 7
    assert np.array_equal(values_of(loaded, data), values)
    assert loaded.verdict == predictor.verdict
    # Another adapter has no items, and that of a predictor those of its own.
    loaded.swap(tmp_path / "model" / "adapter")
    assert loaded.items is None
    np.testing.assert_allclose(values_of(loaded, data), at_weight(predictor, predictor.items.common, data), rtol=1e-5)
    loaded.swap(tmp_path / "model")
    assert np.array_equal(values_of(loaded, data), values)
    file = tmp_path / "model" / "items.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(PredictorError, match="items.safetensors is not what was saved"):
        PeftPredictor.deserialize(tmp_path / "model", device="cpu")


def test_what_has_one_set_of_weights_has_the_common_one(routed: Any, tmp_path: Path) -> None:
    predictor, data, _ = routed
    predictor.serialize(tmp_path / "model")
    common = at_weight(predictor, predictor.items.common, data)
    message = "items have weights of their own, by item: what was {} has the common weight 0"
    with pytest.warns(UserWarning, match=message.format("exported")):
        predictor.export(tmp_path / "export")
    exported = make_estimator(checkpoint=str(tmp_path / "export")).load_backbone()
    np.testing.assert_allclose(values_of(PeftPredictor(exported, device="cpu"), data), common, rtol=1e-4)
    loaded = PeftPredictor.deserialize(tmp_path / "model", device="cpu")
    with pytest.warns(UserWarning, match=message.format("merged")):
        loaded.merge()
    np.testing.assert_allclose(values_of(loaded, data), common, rtol=1e-4)


def test_patients_choose_with_all_their_series() -> None:
    items = Items("patients", {"p1": 1.0}, 0.5, {}, {})
    assert [items.weight(name) for name in ("p1/hr", "p1/map", "p1", "p10/hr", None, 7)] == [1, 1, 1, 0.5, 0.5, 0.5]


def test_zero_shot_for_all_and_tuned_for_some(recwarn: pytest.WarningsRecorder) -> None:
    """What harms the many is handed over for the few whom it helps; nobody is warned of what was not handed over."""
    many, few = make_dataset(16, "moving", seed=4), make_dataset(12, seed=5)
    predictor = make_estimator(by="item").train(make_dataset(30, seed=2), many, item_data=[*many, *few])
    assert predictor.verdict.word == "no evidence"
    assert predictor.items.common == 0.0
    assert not [each for each in recwarn if "TuningDidNotHelp" in str(each.category)]
    zero_shot = values_of(PeftPredictor(make_estimator().load_backbone(), device="cpu"), many[:1] + few)
    own = values_of(predictor, [{**many[0], "item_id": "unseen"}, *few])
    np.testing.assert_allclose(own[0], zero_shot[0], rtol=1e-5)
    assert not np.allclose(own[1:], zero_shot[1:], rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "ward"}, "by 'ward' is unknown; known: item, patients"),
        ({"by": "items"}, "by 'items' is unknown; did you mean 'item'"),
        ({"by": "item", "validation_windows": 2}, "by 'item' needs more than 2 windows of an item to choose by, and"),
        ({"by": "item", "interpolate": False}, "by 'item' needs weights to choose from; leave interpolate=False out"),
        ({"by": "item", "adapter": "trace"}, "changes its form while it trains, so that by has no weights to choose"),
        ({"by": "item", "adapter": {"name": "head", "kind": "linear"}}, "begins at random, so that by has no weights"),
    ],
)
def test_what_leaves_nothing_to_choose_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_estimator(**options)


def test_items_must_be_known_again() -> None:
    data = make_dataset(4)
    del data[2]["item_id"]
    with pytest.raises(ValueError, match="the series at position 2 has none; give each entry one"):
        make_estimator(by="item").train(data)
    with pytest.raises(ValueError, match="item_data is there to choose weights by item; name by='item' too"):
        make_estimator().train(make_dataset(4), item_data=make_dataset(4))
    with pytest.raises(ValueError, match="by 'item' chooses by forecasts and has no part in reconstruction"):
        get_estimator("moment")(prediction_length=1, by="item", validation_windows=3, task="reconstruct")


def test_items_from_the_command_line(tmp_path: Path) -> None:
    rows = [
        pd.DataFrame({"item_id": e["item_id"], "timestamp": pd.date_range("2024-01-01", periods=90, freq="h"),
                      "target": e["target"]})
        for e in make_dataset(4)
    ]  # fmt: skip
    pd.concat(rows).to_csv(tmp_path / "data.csv", index=False)
    fit = ["fit", tmp_path / "data.csv", "--out", tmp_path / "model", "--horizon", 6, "--context", 24]
    fit += ["--epochs", 1, "--batches", 2, "--device", "cpu", "--gate", "keep", "--by"]

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    assert "by 'ward' is unknown; known: item, patients" in run(*fit, "ward").stderr
    assert "name 3 or more" in run(*fit, "item").stderr
    assert not (tmp_path / "model").exists()
    result = run(*fit, "item", "--validation-windows", 3)
    assert result.exit_code == 0, result.output
    assert "; by item: " in result.stdout
    assert "; by item: " in run("show", tmp_path / "model").stdout


def test_test_series_of_a_trial_choose_by_what_comes_before_their_test_windows(tmp_path: Path) -> None:
    training = dict(num_batches_per_epoch=5, max_epochs=1, batch_size=8, device="cpu", by="item", validation_windows=4)
    spec = TrialSpec(
        family="chronos", checkpoint="bolt-nano", prediction_length=6, context_length=24, training=training,
        data=dict(source="simulated", patients=12, hours=48, vital="hr", windows=2, fractions=(0.5, 0.25, 0.25)),
    )  # fmt: skip
    result = run_trial(spec, tmp_path)
    found = result.verdict.items
    # Three test patients; 36 hours before their test windows.
    assert (found.by, found.units + found.unseen) == ("item", 3)
    assert result.verdict.units == 3
    with pytest.raises(SpecError, match="by 'item' needs validation_windows of 3 or more to choose by, not 1"):
        TrainingSpec(by="item")
    with pytest.raises(SpecError, match="leave interpolate false out"):
        TrainingSpec(by="item", validation_windows=3, interpolate=False)
