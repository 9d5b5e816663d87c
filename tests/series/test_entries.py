"""One check of entries at the door of every verb, one policy for unusable series."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from gluonts.dataset.common import FileDataset, ListDataset
from gluonts.dataset.jsonl import JsonLinesWriter
from gluonts.dataset.pandas import PandasDataset
from gluonts.dataset.split import split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gluonts_peft import PeftPredictor, backtest, get_estimator
from gluonts_peft.anomaly import detect, score
from gluonts_peft.backbone import Backbone, load_backbone
from gluonts_peft.imputation import impute, train_reconstruction
from gluonts_peft.series.entries import Door, DroppedWarning, EntryError, UnusableWarning, as_array, in_step

START = pd.Period("2024-01-01 00:00", "h")
NAN = float("nan")


def entry(name: Any = "a", steps: int = 160, seed: int = 0, **changes: Any) -> dict[str, Any]:
    values = np.random.default_rng(seed).normal(10, 1, steps) + np.sin(np.arange(steps) / 4)
    return {"item_id": name, "start": START, "target": values.astype(np.float32), **changes}


GOOD = [entry(name, seed=seed) for seed, name in enumerate("abcd")]


@cache
def zero_shot(family: str = "chronos", checkpoint: str | None = None, horizon: int = 6) -> PeftPredictor:
    return PeftPredictor(load_backbone(family, prediction_length=horizon, checkpoint=checkpoint), device="cpu")


def estimator(family: str = "chronos", **options: Any) -> Any:
    small = dict(prediction_length=6, max_epochs=1, num_batches_per_epoch=1, batch_size=4, device="cpu", progress=False)
    return get_estimator(family)(**{**small, "gate": "keep", **options})


# Each takes a dataset and, as a rule, options of the policy.
VERBS: dict[str, Callable[..., Any]] = {
    "train": lambda data, **options: estimator(**options).train(data),
    "validate": lambda data, **options: estimator(**options).train([entry("z", seed=9)], data),
    "train_reconstruction": lambda data, **options: train_reconstruction(
        estimator("moment", **options), data, held_out=0.5
    ),
    "predict": lambda data, **options: list(zero_shot().predict(data, **options)),
    "impute": lambda data, **options: impute(zero_shot("moment", None, 1), data, **options),
    "score": lambda data, **options: score(zero_shot(), data, **options),
    "detect": lambda data, **options: detect(zero_shot("moment", None, 1), data, calibration=0.5, **options),
    "calibrate": lambda data, **options: detect(zero_shot("moment", None, 1), GOOD, calibration=data, **options),
    "backtest": lambda data, **options: backtest(zero_shot(), data, **options),
}
TRAINING = [VERBS[name] for name in ("train", "validate", "train_reconstruction")]


@pytest.fixture(params=VERBS)
def verb(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    return VERBS[request.param]


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a network is asked anything."""

    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed before the check")

    for family, checkpoint in (("chronos", "bolt-nano"), ("moment", "moment-nano")):
        kind = type(load_backbone(family, prediction_length=6, checkpoint=checkpoint))
        for name in ("forecast", "loss", "reconstruct"):
            if name in vars(kind):
                monkeypatch.setattr(kind, name, asked)


FRAME = pd.DataFrame({"target": np.arange(50.0)}, index=pd.date_range("2024-01-01", periods=50, freq="h"))
NOT_DATASETS: dict[str, tuple[Any, str]] = {
    "one entry": (GOOD[0], "dataset is a dict, not a dataset; give [entry] if it is one entry"),
    "dict of frames": ({"a": FRAME}, "dataset is a dict, not a dataset; give PandasDataset(frames) if of frames"),
    "frame": (FRAME, "dataset is a pandas DataFrame; give gluonts.dataset.pandas.PandasDataset.from_long_dataframe("),
    "series": (FRAME["target"], "dataset is a pandas Series; give gluonts.dataset.pandas.PandasDataset"),
    "text": ("data.csv", "dataset is 'data.csv', the name of one; give gluonts_peft.data.read_dataset(path)"),
    "path": (Path("data.csv"), "dataset is PosixPath('data.csv'), the name of one; give"),
    "array": (np.zeros((3, 50)), "dataset is a ndarray, not a dataset; give a list of entries like {'item_id': 'a'"),
    "none": (None, "dataset is a NoneType, not a dataset; give a list of entries like"),
    "number": (3, "dataset is a int, not a dataset; give a list of entries like"),
    "nested lists": ([[1.0, 2.0], [3.0]], "entry 0 of the dataset is a list, not a mapping with 'start' and 'target'"),
    "numbers": ([1.0, 2.0], "entry 0 of the dataset is a float, not a mapping with 'start' and 'target'"),
    "texts": (["a", "b"], "entry 0 of the dataset is a str, not a mapping with 'start' and 'target'"),
    "pairs": (
        list(split(GOOD, offset=-6)[1].generate_instances(6)),
        "entry 0 of the dataset is a pair of history and label; give test_data.input, or the dataset",
    ),
    "mixed": ([GOOD[0], 5], "entry 1 of the dataset is a int, not a mapping with 'start' and 'target'"),
}


@pytest.mark.parametrize("kind", NOT_DATASETS)
@pytest.mark.usefixtures("nothing_computed")
def test_what_is_no_dataset_is_refused_alike_in_every_verb(verb: Callable[..., Any], kind: str) -> None:
    data, message = NOT_DATASETS[kind]
    if verb is VERBS["validate"] and data is None:
        pytest.skip("None means that there is no validation data")
    if verb is VERBS["calibrate"] and (data is None or isinstance(data, int)):
        pytest.skip("a number is a part of each series")
    if kind == "frame" and verb in TRAINING:
        # Training reads frames, and asks for their columns.
        with pytest.raises(ValueError, match="^item_id 'item_id' is not a column of 'data frame'"):
            verb(data)
        return
    with pytest.raises(EntryError, match=f"^{re.escape(message)}"):
        verb(data)


@pytest.mark.usefixtures("nothing_computed")
def test_a_generator_that_is_used_up_is_refused_in_every_verb(verb: Callable[..., Any]) -> None:
    used = (each for each in GOOD)
    list(used)
    with pytest.raises(EntryError, match=r"^dataset is a generator(, which can be read only once| that is empty)"):
        verb(used)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD[1].items() if key != name}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "timestamp": (
        {**GOOD[1], "start": pd.Timestamp("2024-01-01")},
        "start of item_id 'b' is Timestamp('2024-01-01 00:00:00'), a Timestamp; a pandas.Period says the frequency too",
    ),
    "text": ({**GOOD[1], "start": "2024-01-01"}, "start of item_id 'b' is '2024-01-01', a str; a pandas.Period says"),
    "NaT": ({**GOOD[1], "start": pd.NaT}, "start of item_id 'b' is NaT, a NaTType; a pandas.Period says"),
    "no start": (without("start"), "item_id 'b' has no start; a pandas.Period says the frequency too: give pd.Period("),
    "no start, no name": ({"target": np.ones(99)}, "entry 1 has no start; a pandas.Period says the frequency too"),
    "no target": (without("target"), "item_id 'b' has no 'target', only ['item_id', 'start']"),
    "target None": ({**GOOD[1], "target": None}, "target of item_id 'b' is None, without a dimension"),
    "target number": ({**GOOD[1], "target": 3.0}, "target of item_id 'b' is 3.0, without a dimension"),
    "target text": ({**GOOD[1], "target": ["1", "2"]}, "target of item_id 'b' has type <U1 with the value '1': give"),
    "target None in list": ({**GOOD[1], "target": [1.0, None]}, "target of item_id 'b' has type object with the value"),
    "target ragged": ({**GOOD[1], "target": [[1.0], [2.0, 3.0]]}, "target of item_id 'b' is not an array"),
    "target dates": ({**GOOD[1], "target": np.array(["2024"], "M8[D]")}, "target of item_id 'b' has type datetime64"),
    "infinite": ({**GOOD[1], "target": np.array([1.0, np.inf])}, "target of item_id 'b' has the value inf at step 1"),
    "name": ({**GOOD[1], "item_id": ["x"]}, "item_id of entry 1 is a list; give text or a number"),
    "other frequency": (
        {**GOOD[1], "start": pd.Period("2024-01-01", "D")},
        "item_id 'b' has the frequency 'D', item_id 'a' has 'h'; give data of one frequency at a time",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("lazy", [False, True], ids=["list", "lazy"])
@pytest.mark.usefixtures("nothing_computed")
def test_a_wrong_entry_is_named_before_anything_is_computed(verb: Callable[..., Any], kind: str, lazy: bool) -> None:
    wrong, message = WRONG[kind]
    data: Any = [GOOD[0], wrong, GOOD[2]]
    if verb is VERBS["backtest"] and kind == "infinite":
        message = "target of item_id 'b' has the value inf at step 1"
    with pytest.raises(EntryError) as caught:
        verb(_Lazy(data) if lazy else data)
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, TypeError)


class _Lazy:
    """A dataset that is read anew each time, and is no list."""

    def __init__(self, data: list[Any]) -> None:
        self.data = data
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        for each in self.data:
            self.read += 1
            yield each


EMPTY = entry("none", target=np.full(160, NAN, np.float32))


def test_series_without_values_are_named_or_left_out_in_every_verb(verb: Callable[..., Any]) -> None:
    if verb is VERBS["calibrate"]:
        pytest.skip("what is left out there is left out of a pool")
    data = [GOOD[0], EMPTY, GOOD[1], {**EMPTY, "item_id": 7}, GOOD[2]]
    message = r"^2 of 5 series cannot be [\w ]+: item_id 'none' \(no observed value.*\), item_id 7 \(no obs.*\); leave"
    with pytest.raises(ValueError, match=message):
        verb(data)
    with pytest.warns(UnusableWarning, match=r"^2 of 5 series are left out, they cannot be [\w ]+: item_id 'none'"):
        found = verb(data, unusable="skip")
    if isinstance(found, list):
        assert len(found) == 3
    with pytest.raises(ValueError, match=r"^unusable 'ignore' is unknown; known: raise, skip$"):
        verb(data, unusable="ignore")


def test_skipped_series_leave_no_trace_in_what_is_forecast() -> None:
    data = [EMPTY, GOOD[0], {**EMPTY, "item_id": None}, GOOD[1]]
    with pytest.warns(UnusableWarning, match=r"item_id 'none' \(no.*\), entry 2 \(no observed value in its last"):
        found = list(zero_shot().predict(data, unusable="skip"))
    assert [each.item_id for each in found] == ["a", "b"]
    for one, other in zip(found, zero_shot().predict(GOOD[:2]), strict=True):
        np.testing.assert_array_equal(one.forecast_array, other.forecast_array)
        assert one.start_date == other.start_date


@pytest.mark.parametrize("value", [0.0, 7.5, -3e6])
def test_a_constant_series_is_usable_in_every_verb(verb: Callable[..., Any], value: float) -> None:
    data = [GOOD[0], entry("flat", target=np.full(160, value, np.float32)), GOOD[1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusableWarning)
        found = verb(data)
    if isinstance(found, list):
        assert len(found) == (3 if verb is not VERBS["calibrate"] else 4)


def test_a_constant_series_has_scores_of_zero_and_no_events() -> None:
    [found] = detect(zero_shot("moment", None, 1), [entry(target=np.full(160, 5.0))], calibration=0.5)
    np.testing.assert_array_equal(found.scores.values, np.zeros(160))
    assert (found.threshold, found.events) == (0.0, [])


def test_names_beyond_the_first_five_are_counted() -> None:
    data = [*GOOD, *({**EMPTY, "item_id": number} for number in range(8))]
    with pytest.raises(ValueError, match=r"^8 of 12 series.*item_id 4 \(.*\) and 3 more; leave them out"):
        list(zero_shot().predict(data))


@pytest.mark.parametrize("names", [[3, 1, 2], ["3", "1", "2"], [np.int64(3), "x", None], [("a", 1), 2, "b"]])
def test_names_come_out_as_they_went_in(names: list[Any]) -> None:
    data = [entry(name, seed=seed) for seed, name in enumerate(names)]
    for predictor in (zero_shot(), zero_shot("chronos", "t5-nano")):
        found = [each.item_id for each in predictor.predict(data, num_samples=2)]
        assert found == names
        assert list(map(type, found)) == list(map(type, names))
    named = [str(position) if name is None else name for position, name in enumerate(names)]
    assert [each.item_id for each in score(zero_shot(), data)] == named
    assert [each["item_id"] for each in impute(zero_shot("moment", None, 1), data)] == names


def test_a_lazy_dataset_stays_lazy_and_is_checked_before_its_batch() -> None:
    predictor = PeftPredictor(zero_shot().backbone, batch_size=2, device="cpu")
    data = _Lazy([*GOOD, {**GOOD[0], "start": "2024-01-01"}])
    found = predictor.predict(data)
    assert data.read == 0
    next(found)
    assert data.read == 2
    assert [each.item_id for each in (next(found), next(found), next(found))] == ["b", "c", "d"]
    with pytest.raises(EntryError, match="^start of item_id 'a' is '2024-01-01'"):
        next(found)


def test_series_left_out_of_a_lazy_dataset_are_named_at_its_end_or_where_the_reader_stops() -> None:
    predictor = PeftPredictor(zero_shot().backbone, batch_size=1, device="cpu")
    with pytest.warns(UnusableWarning, match="^1 of 3 series are left out"):
        assert len(list(predictor.predict(_Lazy([GOOD[0], EMPTY, GOOD[1]]), unusable="skip"))) == 2
    reader = predictor.predict(_Lazy([EMPTY, GOOD[0], GOOD[1]]), unusable="skip")
    next(reader)
    with pytest.warns(UnusableWarning, match="^1 of 2 series are left out"):
        reader.close()


@pytest.mark.parametrize("kind", ["list", "pandas", "file", "generator", "tuple"])
def test_every_kind_of_dataset_passes(kind: str, tmp_path: Path) -> None:
    JsonLinesWriter(use_gzip=False).write_to_folder(GOOD, tmp_path)
    index = pd.period_range(START, periods=160, freq="h")
    frames = {each["item_id"]: pd.DataFrame({"target": each["target"]}, index=index) for each in GOOD}
    data: Any = {
        "list": lambda: ListDataset(GOOD, freq="h"),
        "pandas": lambda: PandasDataset(frames, target="target"),
        "file": lambda: FileDataset(tmp_path, freq="h"),
        "generator": lambda: (each for each in GOOD),
        "tuple": lambda: tuple(GOOD),
    }[kind]()
    found = list(zero_shot().predict(data))
    for one, other in zip(found, zero_shot().predict(GOOD), strict=True):
        np.testing.assert_allclose(one.forecast_array, other.forecast_array, rtol=1e-6)


def test_masked_and_nullable_values_are_missing_and_nothing_else() -> None:
    values = GOOD[0]["target"].astype(np.float64)
    gaps = values.copy()
    gaps[100:120] = NAN
    masked = np.ma.masked_invalid(gaps)
    masked.data[100:120] = 999.0
    nullable = pd.array([None if np.isnan(value) else value for value in gaps], dtype="Float64")
    [expected] = zero_shot().predict([entry(target=gaps)])
    for given_values in (masked, nullable, pd.Series(nullable), gaps.tolist(), pd.Series(gaps)):
        [found] = zero_shot().predict([entry(target=given_values)])
        np.testing.assert_array_equal(found.forecast_array, expected.forecast_array)
    assert as_array(np.ma.array([1, 2], mask=[False, True])).tolist()[0] == 1.0
    features = np.where(np.arange(166) < 40, NAN, 1.0)[None]
    hidden = np.ma.masked_invalid(features)
    hidden.data[:, :40] = 999.0
    one, other = ([entry(feat_dynamic_real=each)] for each in (features, hidden))
    [expected], [found] = (with_features().predict(data) for data in (one, other))
    np.testing.assert_array_equal(found.forecast_array, expected.forecast_array)


FEATURES = np.ones((2, 166), np.float32)


@cache
def with_features() -> PeftPredictor:
    return zero_shot("chronos", "chronos2-nano")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{}, {"feat_dynamic_real": FEATURES}], "item_id 'b' has feat_dynamic_real, item_id 'a' has none; give it to"),
        ([{"feat_dynamic_real": FEATURES}, {}], "item_id 'a' has feat_dynamic_real, item_id 'b' has none; give it to"),
        ([{}, {"past_feat_dynamic_real": FEATURES}], "item_id 'b' has past_feat_dynamic_real, item_id 'a' has none"),
        (
            [{"feat_dynamic_real": FEATURES}, {"feat_dynamic_real": FEATURES[:1]}],
            "feat_dynamic_real of item_id 'b' has 1 rows, that of the first entry 2: give all entries the same",
        ),
        (
            [{"feat_dynamic_real": FEATURES}, {"feat_dynamic_real": FEATURES[:, :160]}],
            "feat_dynamic_real of item_id 'b' has 160 steps, needed are 166: the target's 160 and the 6 to forecast",
        ),
        (
            [{"past_feat_dynamic_real": FEATURES}, {"past_feat_dynamic_real": FEATURES[:, :9]}],
            "past_feat_dynamic_real of item_id 'b' has 9 steps, needed are 160: the target's 160",
        ),
        (
            [{"feat_dynamic_real": FEATURES}, {"feat_dynamic_real": FEATURES * np.inf}],
            "feat_dynamic_real of item_id 'b' has the value inf at step 0: give NaN for missing values",
        ),
        (
            [{"feat_dynamic_real": FEATURES}, {"feat_dynamic_real": [["x"] * 166, ["y"] * 166]}],
            "feat_dynamic_real of item_id 'b' has type <U1 with the value 'x': give numbers",
        ),
    ],
)
@pytest.mark.parametrize("lazy", [False, True], ids=["list", "lazy"])
def test_features_are_complete_or_refused_by_name(
    changes: list[dict[str, Any]], message: str, lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(with_features().backbone), "forecast", lambda *_, **__: pytest.fail("computed"))
    data: Any = [entry(name, **each) for name, each in zip("ab", changes, strict=True)]
    with pytest.raises(EntryError, match=f"^{re.escape(message)}"):
        list(with_features().predict(_Lazy(data) if lazy else data))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"feat_dynamic_real": FEATURES}, "feat_dynamic_real"),
        ({"feat_static_cat": [3], "feat_static_real": [1.0, 2.0]}, "feat_static_cat, feat_static_real"),
        ({"past_feat_dynamic_real": FEATURES}, "past_feat_dynamic_real"),
        ({"promo": np.ones(160)}, "promo"),
        ({"past_covariates": {"promo": np.ones(160)}}, "past_covariates"),
        ({"holiday": [0] * 166, "info": {"x": 1}, "source": "file", "unit": "mmHg"}, "holiday"),
    ],
)
def test_fields_that_a_family_does_not_use_are_named_once(
    verb: Callable[..., Any], fields: dict[str, Any], named: str
) -> None:
    data = [{**each, **fields} for each in GOOD]
    if verb in (VERBS["backtest"], VERBS["calibrate"], VERBS["train_reconstruction"]):
        pytest.skip("reads the entries of several datasets")
    with pytest.warns(DroppedWarning) as caught:
        verb(data)
    [warning] = [str(each.message) for each in caught if each.category is DroppedWarning]
    assert re.match(rf"'\w+-nano' of family '\w+' does not use {re.escape(named)} of the entries \(first: ", warning)


def test_a_misspelt_feature_is_named_by_the_family_that_takes_features() -> None:
    data = [{**each, "feat_dynamic_reals": FEATURES} for each in GOOD]
    message = "does not use feat_dynamic_reals of the entries .* it uses target, feat_dynamic_real, past_feat_dynamic_"
    with pytest.warns(DroppedWarning, match=message):
        list(with_features().predict(data))


def test_entries_without_further_fields_warn_of_nothing() -> None:
    data = [{**each, "info": {"a": 1}, "source": "x", "feat_dynamic_real": None} for each in GOOD]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        list(zero_shot().predict(data))


DENSE = np.random.default_rng(0).normal(10, 1, 100)


@pytest.mark.parametrize(
    ("freq", "every", "meant"), [("5min", 288, "'D'"), ("h", 24, "'D'"), ("min", 5, "'5min'"), ("M", 3, "'3 x M'")]
)
def test_a_grid_that_is_finer_than_the_data_is_refused_with_their_frequency(freq: str, every: int, meant: str) -> None:
    target = np.full(99 * every + 1, NAN)
    target[::every] = DENSE
    data = [entry(start=pd.Period("2024-01-01", freq), target=target)]
    message = (
        rf"^of the {len(target)} steps of frequency '{freq}' 100 are observed.*: the data are of frequency {meant};"
    )
    for run in (
        lambda **options: list(zero_shot().predict(data, **options)),
        lambda **options: estimator(**options).train(data),
        lambda **options: estimator(**options).train(_Lazy(data)),
        lambda **options: backtest(zero_shot(), data, **options),
    ):
        with pytest.raises(EntryError, match=message):
            run()
    assert len(list(zero_shot().predict(data, any_freq=True))) == 1


def test_a_grid_that_one_series_needs_is_no_mistake() -> None:
    sparse = np.full(160, NAN)
    sparse[::4] = 1.0
    assert len(list(zero_shot().predict([entry("sparse", target=sparse), GOOD[0]]))) == 2
    # Filling gaps is what imputation is for.
    [filled] = impute(zero_shot("moment", None, 1), [entry("sparse", target=sparse)])
    assert np.isfinite(filled["target"]).all()


def daily(count: int = 6, freq: str = "D") -> list[dict[str, Any]]:
    return [entry(f"d{i}", 120, i, start=pd.Period("2024-01-01", freq)) for i in range(count)]


@pytest.fixture(scope="module")
def tuned() -> PeftPredictor:
    found: PeftPredictor = estimator().train(daily())
    return found


def test_a_tuned_model_refuses_data_of_another_frequency(tuned: PeftPredictor, tmp_path: Path) -> None:
    assert tuned.freq == "D"
    tuned.serialize(tmp_path / "model")
    again = PeftPredictor.deserialize(tmp_path / "model", device="cpu")
    minutes = daily(freq="5min")
    message = "^item_id 'd0' has the frequency '5min', and the model was tuned on data of 'D'; give data of that freq"
    for model in (tuned, again, again.shorten(3)):
        assert model.freq == "D"
        assert len(list(model.predict(daily(2)))) == 2
        for run in (
            lambda model=model, **options: list(model.predict(minutes, **options)),
            lambda model=model, **options: backtest(model, minutes, **options),
            lambda model=model, **options: score(model, minutes, **options),
        ):
            with pytest.raises(EntryError, match=message):
                run()
        assert len(list(model.predict(minutes, any_freq=True))) == 6
    assert backtest(tuned, minutes, any_freq=True).attrs["series"] == 6


@pytest.mark.parametrize(("freq", "other"), [("D", "24h"), ("W-MON", "W-THU"), ("M", "M"), ("Q-DEC", "Q-JAN")])
def test_a_frequency_is_the_same_in_another_spelling_or_phase(tuned: PeftPredictor, freq: str, other: str) -> None:
    model = PeftPredictor(tuned.backbone, freq=freq, device="cpu")
    assert len(list(model.predict(daily(2, other)))) == 2


def test_pretrained_models_and_those_handed_back_untuned_take_any_frequency(tmp_path: Path) -> None:
    assert zero_shot().freq is None
    with pytest.warns(UserWarning, match="the zero-shot predictor is returned"):
        back = estimator(gate="fallback", learning_rate=3.0).train(daily())
    assert back.freq is None
    assert len(list(back.predict(daily(2, "5min")))) == 2
    back.serialize(tmp_path / "model")
    assert PeftPredictor.deserialize(tmp_path / "model", device="cpu").freq is None


def test_the_frequency_goes_with_the_adapter(tuned: PeftPredictor, tmp_path: Path) -> None:
    tuned.serialize(tmp_path / "daily")
    estimator().train(daily(freq="h")).serialize(tmp_path / "hourly")
    model = PeftPredictor.deserialize(tmp_path / "daily", device="cpu")
    model.swap(tmp_path / "hourly")
    assert model.freq == "h"
    model.swap(tmp_path / "daily" / "adapter")
    assert model.freq is None


def test_validation_data_of_another_frequency_are_refused() -> None:
    with pytest.raises(EntryError, match="^item_id 'd0' has the frequency 'h', and the model was tuned on data of 'D'"):
        estimator().train(daily(), daily(freq="h"))


def test_results_find_their_entries_where_some_were_left_out() -> None:
    data = [GOOD[0], GOOD[1], {**GOOD[1], "start": START + 1}, {**GOOD[2], "item_id": None}]
    found = list(in_step([("b", START), ("b", START + 1), ("3", START)], data))
    assert found == data[1:]
    with pytest.raises(ValueError, match="^the dataset has no entry of item_id 'b' that starts at 2024-01-01 00:00"):
        list(in_step([("c", START), ("b", START)], GOOD))


JSON_VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
PARTS = {
    "item_id": st.just("x") | JSON_VALUES,
    "start": st.just(START) | JSON_VALUES,
    "target": st.just([1.0, 2.0, 3.0]) | JSON_VALUES,
    "feat_dynamic_real": st.none() | JSON_VALUES,
}


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.fixed_dictionaries({}, optional=PARTS) | JSON_VALUES, min_size=1, max_size=3) | JSON_VALUES,
    st.booleans(),
)
def test_whatever_is_given_passes_or_is_refused_in_words(data: Any, features: bool) -> None:
    door = Door("forecast", fields=features, multivariate=features)
    try:
        kept = list(door.open(data))
    except EntryError as error:
        assert re.search(r"give|expected|needed|rescale|has shape", str(error)), str(error)  # noqa: PT017
    else:
        for each in kept:
            assert isinstance(each["start"], pd.Period)
            assert np.asarray(each["target"]).dtype.kind in "biuf"


def backbone_capabilities() -> list[tuple[str, Backbone]]:
    families = (("chronos", "bolt-nano"), ("chronos", "t5-nano"), ("chronos", "chronos2-nano"), ("moirai", None))
    return [(name, zero_shot(name, checkpoint).backbone) for name, checkpoint in families]


def test_a_target_of_two_dimensions_passes_where_the_family_takes_it() -> None:
    wide = [entry(name, target=np.ones((2, 40)) * np.arange(40)) for name in "ab"]
    for _, backbone in backbone_capabilities():
        door = Door("forecast", backbone=backbone)
        if "multivariate" in backbone.capabilities:
            assert len(list(door.open(wide))) == 2
            with pytest.raises(EntryError, match="^target of item_id 'b' has (3 rows|shape)"):
                door.open([wide[0], entry("b", target=np.ones((3, 40)))])
        else:
            with pytest.raises(EntryError, match="^multivariate targets are not supported, target of item_id 'a'"):
                door.open(wide)
