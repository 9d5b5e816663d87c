from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from typer.testing import CliRunner

import gluonts_peft
from gluonts_peft.cli import app
from gluonts_peft.series import from_dataframe, read_dataset, to_dataframe

LEVELS = (0.05, 0.5, 0.9, 0.99)


def frame_of(items: int = 3, steps: int = 40, freq: str = "D", zone: str | None = None, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    parts = []
    for number in range(items):
        days = pd.date_range(f"2024-01-{number + 1:02}", periods=steps + number, freq=freq, tz=zone)
        count = len(days)
        promo = rng.integers(0, 2, count)
        parts.append(
            pd.DataFrame(
                {
                    "shop": f"s{number}",
                    "day": days,
                    "sold": 10 + 5 * promo + rng.normal(size=count),
                    "promo": promo,
                    "heat": rng.normal(size=count),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def future_of(frame: pd.DataFrame, steps: int) -> pd.DataFrame:
    parts = []
    for name, those in frame.groupby("shop", sort=False):
        days = pd.date_range(those["day"].iloc[-1], periods=steps + 1, freq="D")[1:]
        parts.append(pd.DataFrame({"shop": name, "day": days, "promo": np.arange(steps) % 2}))
    return pd.concat(parts, ignore_index=True)


ROLES: dict[str, Any] = dict(item_id="shop", timestamp="day", target="sold")
FEATURES: dict[str, Any] = dict(known=["promo"], past=["heat"])


def same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for field, value in one.items():
            if isinstance(value, np.ndarray):
                assert value.dtype == other[field].dtype
                np.testing.assert_array_equal(value, other[field])
            else:
                assert value == other[field]


@pytest.mark.parametrize(("freq", "zone"), list(itertools.product(("D", "5min", "MS"), (None, "Europe/Berlin"))))
def test_a_frame_reads_as_its_file_does(freq: str, zone: str | None, tmp_path: Path) -> None:
    frame = frame_of(freq=freq, zone=zone)
    # Rows in any order, some missing.
    frame = frame.drop(index=[7, 50]).sample(frac=1.0, random_state=0)
    frame.to_parquet(tmp_path / "shops.parquet", index=False)
    same(from_dataframe(frame, **ROLES, **FEATURES), read_dataset(tmp_path / "shops.parquet", **ROLES, **FEATURES))
    same(from_dataframe(frame, **ROLES), read_dataset(tmp_path / "shops.parquet", **ROLES, ignore=True))


@pytest.mark.parametrize(
    "spelled",
    [
        lambda frame: pa.Table.from_pandas(frame, preserve_index=False),
        lambda frame: frame.set_index(["shop", "day"]),
        lambda frame: frame.astype({"shop": "category"}),
        lambda frame: frame.convert_dtypes(),
        lambda frame: frame.assign(day=frame["day"].dt.strftime("%Y-%m-%d")),
        lambda frame: frame.assign(day=frame["day"].dt.to_period("D")),
    ],
    ids=["arrow", "index", "category", "nullable", "text", "periods"],
)
def test_a_frame_may_be_spelled_in_many_ways(spelled: Any) -> None:
    frame = frame_of()
    same(from_dataframe(spelled(frame), **ROLES, **FEATURES), from_dataframe(frame, **ROLES, **FEATURES))


def test_known_features_reach_into_the_future() -> None:
    frame = frame_of()
    entries = from_dataframe(frame, future=future_of(frame, 5), **ROLES, **FEATURES)
    for number, entry in enumerate(entries):
        steps = 40 + number
        assert entry["target"].shape == (steps,)
        assert entry["past_feat_dynamic_real"].shape == (1, steps)
        assert entry["feat_dynamic_real"].shape == (1, steps + 5)
        assert entry["feat_dynamic_real"][0, steps:].tolist() == [0, 1, 0, 1, 0]


def shifted(future: pd.DataFrame, days: int) -> pd.DataFrame:
    return future.assign(day=future["day"] + pd.Timedelta(days=days))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda future: future[future["shop"] != "s1"], "future has no rows of item 's1'"),
        (lambda future: future.replace({"shop": {"s2": "t"}}), "item 't', which has no history"),
        (lambda future: shifted(future, 1), r"future of item 's0' has 5 of the 6 steps"),
        (lambda future: future.drop(index=[2]), r"future of item 's0' has 4 of the 5 steps"),
        (lambda future: shifted(future, -2).iloc[3:], "has the timestamp|before its history ends"),
        (lambda future: future.drop(columns="promo"), r"known\[0\] 'promo' is not a column of 'future'"),
        (lambda future: future.assign(promo="yes"), "known 'promo' of item 's0'.* is not a number"),
        (lambda future: future.assign(day=future["day"].dt.tz_localize("UTC")), "time zone"),
    ],
)
def test_a_future_that_does_not_go_on_is_refused(change: Any, words: str) -> None:
    frame = frame_of()
    with pytest.raises(ValueError, match=words):
        from_dataframe(frame, future=change(future_of(frame, 5)), **ROLES, **FEATURES)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (
            lambda frame: frame,
            {"target": "solds"},
            "'solds' is not a column of 'data frame'; did you mean 'sold'",
        ),
        (lambda frame: frame, {"known": "promo"}, r"known 'promo' is text; give a list of columns: \['promo'\]"),
        (lambda frame: frame, {"known": ["sold"]}, "one column of 'data frame' is asked for twice"),
        (lambda frame: frame, {"future": frame_of(1)}, "future has no effect without known"),
        (lambda frame: pd.concat([frame, frame[["sold"]]], axis=1), {}, "column 'sold' more than once"),
        (lambda frame: pd.concat([frame, frame.iloc[:1]]), {}, "2 times in 'data frame'"),
        (lambda frame: frame.assign(sold="many"), {}, "'many', which is not a number"),
        (lambda frame: frame.iloc[:0], {}, "holds no rows"),
        (lambda frame: frame.to_dict("list"), {}, "data frame is a dict; give a frame of pandas or polars"),
    ],
)
def test_a_frame_that_cannot_be_read_is_refused(change: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_dataframe(change(frame_of()), **{**ROLES, **options})


@pytest.fixture(scope="module")
def predictor() -> Any:
    backbone = gluonts_peft.load_backbone("chronos", checkpoint="chronos2-nano", prediction_length=5, context_length=24)
    return gluonts_peft.PeftPredictor(backbone, device="cpu")


def test_forecasts_of_a_frame_are_those_of_its_entries(predictor: Any) -> None:
    frame, future = frame_of(), future_of(frame_of(), 5)
    table = predictor.predict_df(frame, future=future, quantile_levels=LEVELS, **ROLES, **FEATURES)
    entries = from_dataframe(frame, future=future, **ROLES, **FEATURES)
    assert list(table.columns) == ["shop", "day", "target_name", "predictions", *map(str, LEVELS)]
    assert set(table["target_name"]) == {"sold"}
    for forecast, (name, rows) in zip(predictor.predict(entries), table.groupby("shop", sort=False), strict=True):
        assert forecast.item_id == name
        np.testing.assert_array_equal(rows["predictions"], forecast.quantile(0.5))
        for level in LEVELS:
            np.testing.assert_array_equal(rows[str(level)], forecast.quantile(level))
    assert (table[[str(level) for level in LEVELS]].diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    starts = table.groupby("shop", sort=False)["day"].min()
    ends = frame.groupby("shop", sort=False)["day"].max()
    assert (starts - ends == pd.Timedelta(days=1)).all()
    # What is known of the future counts.
    other = predictor.predict_df(frame, future=future.assign(promo=1), quantile_levels=LEVELS, **ROLES, **FEATURES)
    assert not np.array_equal(table["predictions"], other["predictions"])


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, 1.5])
def test_a_level_outside_of_0_and_1_is_refused(predictor: Any, level: float) -> None:
    with pytest.raises(ValueError, match="not between 0 and 1"):
        predictor.predict_df(frame_of(), quantile_levels=[level], **ROLES)


def test_the_names_of_a_table_may_not_meet(predictor: Any) -> None:
    frame = frame_of(1).rename(columns={"shop": "predictions"})
    with pytest.raises(ValueError, match="give item_id and timestamp other names"):
        predictor.predict_df(frame, item_id="predictions", timestamp="day", target="sold")
    with pytest.raises(ValueError, match="there are no forecasts"):
        to_dataframe([])


def test_training_takes_frames(tmp_path: Path) -> None:
    def train(data: Any, **columns: Any) -> Any:
        estimator = gluonts_peft.get_estimator("chronos")(
            prediction_length=5, context_length=24, checkpoint="chronos2-nano", adapter="lora", max_epochs=1,
            num_batches_per_epoch=2, batch_size=4, device="cpu", gate="keep", progress=False,
        )  # fmt: skip
        return estimator.train(data, **columns)

    frame, future = frame_of(), future_of(frame_of(), 5)
    tuned = train(frame, **ROLES, **FEATURES)
    again = train(from_dataframe(frame, **ROLES, **FEATURES))
    left, right = (each.predict_df(frame, future=future, **ROLES, **FEATURES) for each in (tuned, again))
    pd.testing.assert_frame_equal(left, right)

    # The same by the command line.
    tuned.serialize(tmp_path / "model")
    frame.to_csv(tmp_path / "shops.csv", index=False)
    future.to_csv(tmp_path / "plan.csv", index=False)
    command = ["forecast", tmp_path / "shops.csv", "--model", tmp_path / "model", "--out", tmp_path / "forecasts.csv"]
    command += ["--item-id", "shop", "--timestamp", "day", "--target", "sold", "--known", "promo", "--past", "heat"]
    done = CliRunner().invoke(app, [*map(str, command), "--future", str(tmp_path / "plan.csv")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    written = pd.read_csv(tmp_path / "forecasts.csv")
    np.testing.assert_allclose(written["0.9"], left["0.9"], rtol=1e-6)
