"""Stamps, ids and values through forecast, impute, detect and backtest, on the bundled checkpoints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from gluonts.dataset.pandas import PandasDataset
from gluonts.dataset.split import split
from gluonts.model.forecast import QuantileForecast, SampleForecast
from typer.testing import CliRunner

from gluonts_peft import cli
from gluonts_peft.anomaly import detect, write_detections
from gluonts_peft.backbone import load_backbone
from gluonts_peft.backtesting import SeasonalNaive, backtest
from gluonts_peft.imputation import impute, write_imputed
from gluonts_peft.predictor import PeftPredictor
from gluonts_peft.series.table import read_dataset, write_forecasts

pytestmark = pytest.mark.filterwarnings("ignore:.*BDay.*:FutureWarning", "ignore:.*drop timezone.*:UserWarning")
HORIZON = 3


@pytest.fixture(scope="module")
def forecaster():
    return PeftPredictor(load_backbone("chronos", prediction_length=HORIZON, checkpoint="bolt-nano"), device="cpu")


@pytest.fixture(scope="module")
def filler():
    return PeftPredictor(load_backbone("moment", prediction_length=1, checkpoint="moment-nano"), device="cpu")


def series(times, seed=0):
    noise = np.random.default_rng(seed).normal(size=len(times))
    return 50 + 10 * np.sin(np.arange(len(times)) / 3) + noise


def table(path, **items):
    frame = pd.concat(
        pd.DataFrame({"item_id": name, "timestamp": times, "target": series(times)}) for name, times in items.items()
    )
    frame.to_parquet(path, index=False) if path.suffix == ".parquet" else frame.to_csv(path, index=False)
    return path


def written(path):
    """A table as text, to see stamps as they were written."""
    return pd.read_csv(path, dtype={"timestamp": str, "start": str, "end": str}, float_precision="round_trip")


def zoned(begin, freq, zone, steps=60):
    return pd.date_range(begin, periods=steps, freq=freq).tz_localize(zone)


EXAMPLES = {
    "days in Tokyo": (zoned("2024-05-08", "D", "Asia/Tokyo"), "D"),
    "days in Berlin in summer": (zoned("2024-06-01", "D", "Europe/Berlin"), "D"),
    "days across a change of clocks": (zoned("2024-02-20", "D", "Europe/Berlin"), "D"),
    "days across a change of half an hour": (zoned("2024-03-20", "D", "Australia/Lord_Howe"), "D"),
    "hours across a change of clocks": (
        pd.date_range("2024-10-26", periods=60, freq="h", tz="America/New_York"),
        "h",
    ),
    "weeks in Tokyo": (zoned("2023-05-01", "W-MON", "Asia/Tokyo"), "W-MON"),
    "months in Tokyo": (zoned("2019-01-01", "MS", "Asia/Tokyo"), "MS"),
    "months in Berlin": (zoned("2019-01-01", "MS", "Europe/Berlin"), "MS"),
    "business days in Kolkata": (zoned("2024-01-01", "B", "Asia/Kolkata"), "B"),
    "month ends": (pd.date_range("2018-05-31", periods=60, freq="ME"), "ME"),
    "quarter ends": (pd.date_range("2008-05-31", periods=60, freq="QE"), "QE"),
    "year ends": (pd.date_range("1960-05-31", periods=60, freq="YE"), "YE"),
    "business month ends": (pd.date_range("2018-05-31", periods=60, freq="BME"), "BME"),
    "days at noon": (pd.date_range("2024-01-01 12:00", periods=60, freq="D"), "D"),
    "hours at 17": (pd.date_range("2024-01-01 00:17", periods=60, freq="h"), "h"),
    "two hours at 17 in Kathmandu": (zoned("2024-01-01 01:17", "2h", "Asia/Kathmandu"), "2h"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_stamps_come_back_from_every_verb(name, tmp_path, forecaster, filler):
    times, freq = EXAMPLES[name]
    data = read_dataset(table(tmp_path / "data.parquet", b=times, a=times[:-7]), dtype=np.float64)
    whole = {"b": times, "a": times[:-7]}
    expected = {item: pd.date_range(own[-1], periods=HORIZON + 1, freq=freq)[1:] for item, own in whole.items()}

    write_forecasts(forecaster.predict(data), tmp_path / "out.parquet")
    out = pd.read_parquet(tmp_path / "out.parquet")
    assert out["item_id"].unique().tolist() == ["b", "a"]
    for item, own in expected.items():
        assert out.loc[out["item_id"] == item, "timestamp"].tolist() == list(own)
    write_forecasts(forecaster.predict(data), tmp_path / "out.csv")
    assert [pd.Timestamp(text) for text in written(tmp_path / "out.csv")["timestamp"]] == [
        pd.Timestamp(str(stamp)) for own in expected.values() for stamp in own
    ]

    gaps = [{**entry, "target": entry["target"].copy()} for entry in data]
    for entry in gaps:
        entry["target"][4::9] = np.nan
    filled = write_imputed(gaps, impute(filler, gaps), tmp_path / "filled.csv")
    assert filled["timestamp"].tolist() == [*times, *times[:-7]]
    assert filled["imputed"].sum() == sum(np.isnan(entry["target"]).sum() for entry in gaps)
    assert [str(pd.Timestamp(text)) for text in written(tmp_path / "filled.csv")["timestamp"]] == [
        str(pd.Timestamp(str(stamp))) for stamp in (*times, *times[:-7])
    ]

    found = detect(filler, data, calibration=50, threshold={"name": "quantile", "level": 0.5})
    write_detections(found, data, tmp_path / "found", plots=2)
    scores, events = written(tmp_path / "found" / "scores.csv"), written(tmp_path / "found" / "events.csv")
    assert [str(pd.Timestamp(text)) for text in scores["timestamp"]] == [
        str(pd.Timestamp(str(stamp))) for stamp in (*times, *times[:-7])
    ]
    firsts = [times[event.first] for each in found for event in each.events]
    assert [str(pd.Timestamp(text)) for text in events["start"]] == [str(pd.Timestamp(str(stamp))) for stamp in firsts]

    rows = backtest(forecaster, data, windows=2, per_window=True).reset_index()
    starts = [own[len(own) - steps] for own in (times, times[:-7]) for steps in (2 * HORIZON, HORIZON)]
    assert [pd.Timestamp(str(start)) for start in rows["forecast_start"]] == [pd.Timestamp(str(own)) for own in starts]


def test_items_on_unequal_weekdays_keep_theirs(tmp_path, forecaster):
    mondays, wednesdays = (pd.date_range("2023-01-01", periods=60, freq=freq) for freq in ("W-MON", "W-WED"))
    data = read_dataset(table(tmp_path / "data.csv", a=mondays, b=wednesdays))
    write_forecasts(forecaster.predict(data), tmp_path / "out.csv")
    out = written(tmp_path / "out.csv")
    days = pd.to_datetime(out["timestamp"]).dt.day_name().groupby(out["item_id"]).unique()
    assert (days["a"].tolist(), days["b"].tolist()) == (["Monday"], ["Wednesday"])


def test_offsets_without_a_zone_go_on_with_the_last(tmp_path, forecaster, filler):
    times = pd.date_range("2024-02-15", periods=40, freq="D", tz="America/New_York")
    frame = pd.DataFrame({"item_id": "a", "timestamp": [str(time)[:-3] for time in times], "target": series(times)})
    frame.loc[[3, 30], "target"] = np.nan
    frame.to_csv(tmp_path / "data.csv", index=False)
    assert frame["timestamp"].str[-3:].unique().tolist() == ["-05", "-04"]
    data = read_dataset(tmp_path / "data.csv", dtype=np.float64)
    assert data[0]["start"].freqstr == "D"
    write_forecasts(forecaster.predict(data), tmp_path / "out.csv")
    assert written(tmp_path / "out.csv")["timestamp"].tolist() == [
        f"2024-03-{day} 00:00:00-04:00" for day in (26, 27, 28)
    ]
    write_imputed(data, impute(filler, data), tmp_path / "filled.csv")
    assert written(tmp_path / "filled.csv")["timestamp"].tolist() == [str(time) for time in times]


def test_items_of_unlike_zones_keep_theirs(tmp_path, forecaster):
    zones = {"tokyo": "+09:00", "berlin": "+01:00", "nowhere": "UTC"}
    times = {name: pd.date_range("2024-01-01", periods=40, freq="D", tz=zone) for name, zone in zones.items()}
    data = read_dataset(table(tmp_path / "data.csv", **times))
    forecasts = list(forecaster.predict(data))
    write_forecasts(forecasts, tmp_path / "out.csv")
    assert written(tmp_path / "out.csv")["timestamp"].tolist() == [
        f"2024-02-{day} 00:00:00{offset}" for offset in ("+09:00", "+01:00", "+00:00") for day in (10, 11, 12)
    ]
    # A column of Parquet has one zone.
    write_forecasts(forecasts, tmp_path / "out.parquet")
    stamps = pd.read_parquet(tmp_path / "out.parquet")["timestamp"]
    assert str(stamps.dt.tz) == "UTC"
    assert stamps.tolist() == [pd.Timestamp(text) for text in written(tmp_path / "out.csv")["timestamp"]]


def test_hours_of_a_pandas_dataset_go_over_a_change_of_clocks(tmp_path, forecaster):
    times = pd.date_range("2024-10-26 00:17", periods=50, freq="h", tz="Europe/Berlin")
    dataset = PandasDataset(pd.DataFrame({"target": series(times)}, index=times), freq="h")
    [forecast] = forecaster.predict(dataset)
    forecast.item_id = "a"
    write_forecasts([forecast], tmp_path / "out.csv")
    assert written(tmp_path / "out.csv")["timestamp"].tolist() == [
        f"2024-10-28 0{hour}:17:00+01:00" for hour in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("start", "freq", "first"),
    [
        ("2020-01-31", "M", "2023-02-28"),
        ("2020-01-31 18:00", "ME", "2023-02-28 18:00:00"),
        ("2020-01-01", "M", "2023-02-01"),
        ("2024-01-03", "W", "2024-09-18"),
        ("2024-01-01 12:00", "D", "2024-02-07 12:00:00"),
        ("2024-01-01T00:00:00+09:00", "D", "2024-02-07 00:00:00+09:00"),
    ],
)
def test_a_gluonts_folder_goes_on_from_its_starts(tmp_path, start, freq, first):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "metadata.json").write_text(json.dumps({"freq": freq}))
    entry = {"start": start, "target": series(np.arange(37)).tolist(), "item_id": 5}
    (tmp_path / "set" / "data.json").write_text(json.dumps(entry))
    model = ["--checkpoint", "bolt-nano", "--horizon", "3", "--device", "cpu"]
    run = CliRunner().invoke(cli.app, ["forecast", str(tmp_path / "set"), *model, "--out", str(tmp_path / "out.csv")])
    assert run.exit_code == 0, run.output
    out = written(tmp_path / "out.csv")
    assert out["timestamp"].tolist()[0] == first
    assert out["item_id"].tolist() == [5, 5, 5]


def test_a_pandas_dataset_keeps_zone_and_phase(tmp_path, forecaster, filler):
    times = zoned("2024-05-08 12:00", "D", "Asia/Tokyo")
    dataset = PandasDataset({"a": pd.DataFrame({"target": series(times)}, index=times)}, freq="D")
    write_forecasts(forecaster.predict(dataset), tmp_path / "out.csv")
    assert written(tmp_path / "out.csv")["timestamp"].tolist()[0] == "2024-07-07 12:00:00+09:00"
    entries = list(dataset)
    filled = impute(filler, dataset)
    out = write_imputed(entries, filled, tmp_path / "filled.csv")
    assert out["timestamp"].tolist() == list(times)
    assert backtest(forecaster, dataset, per_window=True).index[0][1] == times[-HORIZON]


def test_calendars_survive_predictors_and_splits_of_gluonts(tmp_path):
    times = pd.date_range("2018-05-31 18:00", periods=60, freq="ME").tz_localize("Europe/Berlin")
    data = read_dataset(table(tmp_path / "data.parquet", a=times))
    _, template = split(data, offset=-HORIZON)
    history = [entry for entry, _ in template.generate_instances(HORIZON)]
    write_forecasts(SeasonalNaive(HORIZON, 12).predict(history), tmp_path / "out.csv")
    assert written(tmp_path / "out.csv")["timestamp"].tolist() == [str(time) for time in times[-HORIZON:]]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("ids", [[30, 4, 100], ["007", "NA", "b"]])
def test_ids_come_back_in_their_order_and_type(tmp_path, forecaster, filler, ids, suffix):
    times = pd.date_range("2024-01-01", periods=40, freq="h")
    path = tmp_path / f"data{suffix}"
    frame = pd.concat(pd.DataFrame({"store": name, "when": times, "sold": series(times)}) for name in ids)
    frame = frame.sample(frac=1, random_state=0, ignore_index=True)
    order = frame["store"].drop_duplicates().tolist()
    frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    model = ["--checkpoint", "bolt-nano", "--horizon", "3", "--device", "cpu"]
    names = ["--item-id", "store", "--timestamp", "when", "--target", "sold"]
    run = CliRunner().invoke(cli.app, ["forecast", str(path), *model, *names, "--out", str(tmp_path / f"out{suffix}")])
    assert run.exit_code == 0, run.output
    kind = {"store": str} if isinstance(ids[0], str) else {}
    out = (
        pd.read_csv(tmp_path / f"out{suffix}", dtype=kind, keep_default_na=False, parse_dates=["when"])
        if suffix == ".csv"
        else pd.read_parquet(tmp_path / f"out{suffix}")
    )
    assert out["store"].drop_duplicates().tolist() == order
    assert len(out.merge(frame.drop_duplicates("store"), on="store")) == 3 * len(ids)


def test_observed_values_of_17_digits_come_back_from_impute(tmp_path, filler):
    values = np.random.default_rng(0).normal(size=400) * 10.0 ** np.random.default_rng(1).integers(-12, 12, 400)
    values[[7, 200, 399]] = np.nan
    times = pd.date_range("2024-01-01", periods=400, freq="h")
    texts = ["" if np.isnan(value) else repr(float(value)) for value in values]
    lines = [f"a,{time},{text}" for time, text in zip(times, texts, strict=True)]
    (tmp_path / "data.csv").write_text("item_id,timestamp,target\n" + "\n".join(lines))
    run = CliRunner().invoke(cli.app, ["impute", str(tmp_path / "data.csv"), "--out", str(tmp_path / "out.csv")])
    assert run.exit_code == 0, run.output
    seen = ~np.isnan(values)
    assert (written(tmp_path / "out.csv")["target"].to_numpy()[seen] == values[seen]).all()


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_what_is_written_are_the_forecasts_to_the_last_bit(tmp_path, suffix):
    rng = np.random.default_rng(0)
    keys = [f"0.{k}" for k in range(1, 10)]
    start = pd.Period("2024-01-01", "h")
    scales = 10.0 ** rng.integers(-9, 9, size=(7, 1, 1))
    arrays = (rng.normal(size=(7, 9, 5)) * scales).astype(np.float32)
    many = [QuantileForecast(own, start + i, keys, f"q,{i}") for i, own in enumerate(arrays)]
    many += [SampleForecast(rng.normal(size=(11, 4)).astype(np.float32), start, f's"{i}') for i in range(7)]
    write_forecasts(many, tmp_path / f"out{suffix}")
    out = pd.read_parquet(tmp_path / f"out{suffix}") if suffix == ".parquet" else written(tmp_path / f"out{suffix}")
    for name, values in [("mean", [f.mean for f in many]), *((key, [f.quantile(key) for f in many]) for key in keys)]:
        assert (out[name].to_numpy(np.float32) == np.concatenate(values)).all(), name
    assert out["item_id"].drop_duplicates().tolist() == [f.item_id for f in many]


WRONG = {
    "a column": ["--target", "sales"],
    "a path": None,
    "a frequency": ["--freq", "fortnight"],
    "a separator": ["--sep", "--"],
    "an encoding": ["--encoding", "klingon"],
    "a family": ["--family", "cronos"],
}
VERBS = {
    "fit": ["--horizon", "3"],
    "forecast": ["--horizon", "3"],
    "backtest": ["--horizon", "3"],
    "detect": ["--horizon", "3", "--calibration", "0.5"],
    "impute": [],
}


def test_wrong_columns_files_and_options_cost_no_import_of_torch(tmp_path):
    times = pd.date_range("2024-01-01", periods=40, freq="h")
    path = table(tmp_path / "data.csv", a=times)
    calls = [
        [verb, str(tmp_path / "gone.csv" if wrong is None else path), *own, *(wrong or ())]
        + ["--out", str(tmp_path / f"{verb}.csv")]
        for verb, own in VERBS.items()
        for wrong in WRONG.values()
    ]
    calls += [["forecast", str(path), "--model", str(tmp_path), "--out", str(tmp_path / "f.csv")]]
    calls += [["fit", str(path), "--horizon", "3", "--adapter", "lorra", "--out", str(tmp_path / "m")]]
    calls += [["impute", str(path), "--unfillable", "maybe", "--out", str(tmp_path / "i.csv")]]
    calls += [["detect", str(path), "--out", str(tmp_path / "d")]]
    calls += [["detect", str(path), "--calibration", "1.5", "--out", str(tmp_path / "d")]]
    calls += [["fit", str(path), "--horizon", "0", "--out", str(tmp_path / "m")]]
    calls += [["fit", str(path), "--horizon", "3", "--gate", "maybe", "--out", str(tmp_path / "m")]]
    calls += [["detect", str(path), "--method", "magic", "--calibration", "0.5", "--out", str(tmp_path / "d")]]
    calls += [["show", str(tmp_path / "gone")]]
    base = {"family": "chronos", "prediction_length": 3, "data": {"source": "file", "path": str(tmp_path / "gone.csv")}}
    space = {"training.max_epochs": {"space": "choice", "categories": [1, 2]}}
    for verb, more in (("study", {"grid": {"seed": [0, 1]}}), ("search", {"space": space, "num_samples": 1})):
        spec = tmp_path / f"{verb}.yaml"
        spec.write_text(json.dumps({"base": base, **more}))
        calls += [[verb, str(each), "--out", str(tmp_path / verb)] for each in (path, tmp_path / "gone.yaml")]
        calls += [[verb, str(spec), "--out", str(tmp_path / verb), "--set", "bse.seed=1"]]
    code = (
        "import sys, json\nfrom typer.testing import CliRunner\nfrom gluonts_peft import cli\n"
        "for call in json.loads(sys.argv[1]):\n"
        "    run = CliRunner().invoke(cli.app, call)\n"
        "    assert run.exit_code == 2 and run.stderr.startswith('error: '), (call, run.output)\n"
        "    assert 'torch' not in sys.modules, call\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(calls)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(Path(tmp_path).iterdir()) == [path, tmp_path / "search.yaml", tmp_path / "study.yaml"]


def test_a_table_and_a_gluonts_file_begin_alike(tmp_path):
    for name, text in (("day", "2024-07-01T00:00:00+09:00"), ("night", "2024-07-01T23:00:00-05:00")):
        for freq in ("D", "h"):
            times = pd.date_range(text, periods=10, freq=freq)
            lines = [f"a,{time.isoformat()},1.5" for time in times]
            (tmp_path / f"{name}{freq}.csv").write_text("item_id,timestamp,target\n" + "\n".join(lines))
            entry = json.dumps({"start": text, "target": [1.5] * 10, "item_id": "a"})
            (tmp_path / f"{name}{freq}.jsonl").write_text(entry)
            [one] = read_dataset(tmp_path / f"{name}{freq}.csv")
            [other] = read_dataset(tmp_path / f"{name}{freq}.jsonl", freq=freq)
            assert one["start"] == other["start"] == pd.Period(re.sub(r"[+-]\d\d:\d\d$", "", text), freq)
            assert one["info"] == other["info"]
