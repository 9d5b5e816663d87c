"""Reading tables and GluonTS folders, writing forecasts, splitting by item."""

from __future__ import annotations

import json
import logging
import re

import numpy as np
import pandas as pd
import pytest
from gluonts.dataset.arrow import ArrowWriter, ParquetWriter
from gluonts.dataset.common import MetaData, TrainDatasets
from gluonts.dataset.jsonl import JsonLinesWriter
from gluonts.model.forecast import QuantileForecast, SampleForecast

from gluonts_peft.series.table import read_dataset, split_by_item, write_forecasts


def write(folder, text, name="table.csv"):
    path = folder / name
    path.write_text("item_id,timestamp,target\n" + text)
    return path


def rows(item, times, values=None):
    values = range(len(times)) if values is None else values
    return "".join(f"{item},{time},{value}\n" for time, value in zip(times, values, strict=True))


def fails(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def read_back(path):
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, parse_dates=["timestamp"])


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_unsorted_rows_with_a_gap_become_sorted_series_on_a_grid(tmp_path, suffix):
    frame = pd.DataFrame(
        {
            "stay": ["b", "a", "b", "a", "a"],
            "when": pd.to_datetime(
                ["2024-01-01 02:00", "2024-01-01 05:00", "2024-01-01 01:00"] + ["2024-01-01 02:00"] * 2
            ),
            "rate": [20.0, 5.0, 10.0, 2.0, np.nan],
            "unused": list("vwxyz"),
        }
    )
    frame.loc[4, "when"] = pd.Timestamp("2024-01-01 03:00")
    path = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)

    first, second = read_dataset(path, item_id="stay", timestamp="when", target="rate")

    assert (first["item_id"], second["item_id"]) == ("b", "a")
    assert first["start"] == pd.Period("2024-01-01 01:00", "h")
    assert second["start"] == pd.Period("2024-01-01 02:00", "h")
    assert first["target"].dtype == np.float32
    np.testing.assert_array_equal(first["target"], [10.0, 20.0])
    np.testing.assert_array_equal(second["target"], [2.0, np.nan, np.nan, 5.0])


@pytest.mark.parametrize(
    ("pandas_freq", "period_freq"),
    [
        ("5min", "5min"),
        ("h", "h"),
        ("90min", "90min"),
        ("D", "D"),
        ("B", "B"),
        ("W-MON", "W-SUN"),
        ("2W-WED", "2W-TUE"),
        ("MS", "M"),
        ("ME", "M"),
        ("BME", "M"),
        ("2MS", "2M"),
        ("QS", "Q-DEC"),
        ("QE", "Q-DEC"),
        ("QS-NOV", "Q-OCT"),
        ("YS", "Y-DEC"),
        ("YE", "Y-DEC"),
        ("YS-JUL", "Y-JUN"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*BDay.*:FutureWarning")
def test_the_frequency_is_inferred_and_periods_hold_their_time_stamps(tmp_path, pandas_freq, period_freq):
    times = pd.date_range("2023-03-01", periods=9, freq=pandas_freq)
    [entry] = read_dataset(write(tmp_path, rows("a", times)))
    assert entry["start"].freqstr == period_freq
    assert entry["start"] == pd.Period(times[0], period_freq)
    np.testing.assert_array_equal(entry["target"], np.arange(9))
    assert entry["start"] + 8 == pd.Period(times[8], period_freq)

    [given] = read_dataset(tmp_path / "table.csv", freq=pandas_freq)
    assert given["start"] == entry["start"]
    np.testing.assert_array_equal(given["target"], entry["target"])


@pytest.mark.parametrize(
    ("pandas_freq", "period_freq"),
    [
        ("5min", "5min"),
        ("h", "h"),
        ("D", "D"),
        ("W-MON", "W-SUN"),
        ("MS", "M"),
        ("ME", "M"),
        ("QS-OCT", "Q-DEC"),
        ("YE", "Y-DEC"),
    ],
)
def test_gaps_do_not_hide_the_frequency(tmp_path, pandas_freq, period_freq):
    times = pd.date_range("2023-01-31", periods=10, freq=pandas_freq)
    kept = [0, 1, 4, 5, 9]
    [entry] = read_dataset(write(tmp_path, rows("a", times[kept], kept)))
    assert entry["start"].freqstr == period_freq
    expected = np.full(10, np.nan)
    expected[kept] = kept
    np.testing.assert_array_equal(entry["target"], expected)


def test_an_item_with_few_rows_follows_the_regular_ones(tmp_path):
    regular = pd.date_range("2024-01-01", periods=5, freq="h")
    text = rows("a", regular) + rows("b", [regular[0], regular[4]]) + rows("c", [regular[2]])
    entries = read_dataset(write(tmp_path, text))
    assert [entry["start"].freqstr for entry in entries] == ["h", "h", "h"]
    np.testing.assert_array_equal(entries[1]["target"], [0, np.nan, np.nan, np.nan, 1])
    np.testing.assert_array_equal(entries[2]["target"], [0])


def test_one_row_is_enough_if_the_frequency_is_given(tmp_path):
    [entry] = read_dataset(write(tmp_path, rows("a", ["2024-02-29"], [3])), freq="Q")
    assert entry["start"] == pd.Period("2024Q1", "Q-DEC")
    assert entry["target"].tolist() == [3.0]


def test_names_stay_text(tmp_path):
    times = pd.date_range("2024-01-01", periods=3, freq="D")
    entries = read_dataset(write(tmp_path, rows("NA", times) + rows("007", times)))
    assert [entry["item_id"] for entry in entries] == ["NA", "007"]


def test_a_single_series_needs_no_item_column(tmp_path):
    path = tmp_path / "oil.csv"
    path.write_text("timestamp,target\n2024-01-01,1\n2024-01-02,2\n2024-01-03,null\n")
    [entry] = read_dataset(path, item_id=None)
    assert entry["item_id"] == "oil"
    np.testing.assert_array_equal(entry["target"], [1, 2, np.nan])


def test_periods_begin_with_the_clock_of_the_first_stamp_and_have_an_absolute_length(tmp_path):
    times = ["2024-03-31T00:00:00+01:00", "2024-03-31T01:00:00+01:00", "2024-03-31T03:00:00+02:00"]
    [entry] = read_dataset(write(tmp_path, rows("a", times)))
    assert entry["start"] == pd.Period("2024-03-31 00:00", "h")
    assert entry["target"].tolist() == [0.0, 1.0, 2.0]


def test_the_number_of_filled_time_stamps_is_logged(tmp_path, caplog):
    path = write(tmp_path, rows("a", ["2024-01-01", "2024-01-02", "2024-01-06"]))
    with caplog.at_level(logging.INFO, logger="gluonts_peft.series.frames"):
        read_dataset(path)
    assert caplog.messages == [f"'{path}': 3 missing time stamps filled with NaN at freq D"]


@pytest.mark.parametrize("name", ["gone.csv", "nowhere"])
def test_a_missing_path_is_named(tmp_path, name):
    path = tmp_path / name
    with fails(f"path '{path}' does not exist; give a table (.csv, .csv.gz, .parquet) or a GluonTS folder"):
        read_dataset(path)


@pytest.mark.parametrize("name", ["table.xlsx", "table.txt"])
def test_an_unknown_ending_lists_the_known(tmp_path, name):
    path = write(tmp_path, "", name)
    known = ".csv, .csv.gz, .parquet, .json, .json.gz, .jsonl, .jsonl.gz, .arrow, .feather, or a GluonTS folder"
    with fails(f"path '{path}' has an unknown ending; known: {known}"):
        read_dataset(path)


@pytest.mark.parametrize(
    ("argument", "value", "hint"),
    [
        ("item_id", "itemid", "; did you mean 'item_id'?"),
        ("timestamp", "zeit", ";"),
        ("target", "targets", "; did you mean 'target'?"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_wrong_column_lists_those_there_are(tmp_path, argument, value, hint, suffix):
    path = write(tmp_path, "a,2024-01-01,1\n")
    if suffix == ".parquet":
        path = tmp_path / "table.parquet"
        pd.read_csv(tmp_path / "table.csv").to_parquet(path)
    with fails(f"{argument} '{value}' is not a column of '{path}'{hint} columns: item_id, timestamp, target"):
        read_dataset(path, **{argument: value})


def test_one_column_cannot_be_two_things(tmp_path):
    path = write(tmp_path, "a,2024-01-01,1\n")
    with fails(
        f"one column of '{path}' is asked for twice: item_id 'item_id', timestamp 'timestamp', target 'item_id'; "
        "give each its own column"
    ):
        read_dataset(path, target="item_id")


def test_an_empty_table_is_refused(tmp_path):
    path = write(tmp_path, "")
    with fails(f"path '{path}' holds no rows; give a table with at least one"):
        read_dataset(path)
    path.write_text("")
    with fails(f"path '{path}' is an empty file; give a table with a header and rows"):
        read_dataset(path)


def test_an_item_without_a_name_is_refused(tmp_path):
    path = write(tmp_path, "a,2024-01-01,1\n,2024-01-02,1\n")
    with fails(f"item_id 'item_id' is missing in row 2 of '{path}'; name every item"):
        read_dataset(path)


@pytest.mark.parametrize(("item", "day", "times"), [("a", "2024-01-02", 2), ("b", "2024-01-03", 3)])
def test_a_duplicate_time_stamp_is_named(tmp_path, item, day, times):
    days = ["2024-01-01", "2024-01-02", "2024-01-03"]
    path = write(tmp_path, rows("a", days) + rows("b", days) + rows(item, [day] * (times - 1)))
    with fails(
        f"item '{item}' has the timestamp {day} 00:00:00 {times} times in '{path}' "
        f"({times - 1} rows too many in all); keep one row per item and timestamp"
    ):
        read_dataset(path)


@pytest.mark.parametrize(("item", "text", "row"), [("a", "31.01.2024", 2), ("b", "01/02/2024", 5)])
def test_an_unreadable_time_stamp_is_named_and_never_guessed(tmp_path, item, text, row):
    lines = [f"{name},2024-01-0{day},1" for name in "ab" for day in (1, 2, 3)]
    lines[row - 1] = f"{item},{text},1"
    path = write(tmp_path, "\n".join(lines))
    with fails(
        f"timestamp 'timestamp' of item '{item}' in '{path}' is '{text}', which is not ISO 8601 "
        f"(row {row}, 1 such rows); write it like 2024-01-31 13:00, or say how it is written, e.g. "
        "date_format='%d.%m.%Y' (command line: --date-format)"
    ):
        read_dataset(path)


def test_a_missing_time_stamp_is_named(tmp_path):
    path = write(tmp_path, "a,2024-01-01,1\na,,1\na,,1\n")
    with fails(
        f"timestamp 'timestamp' of item 'a' in '{path}' is missing (row 2, 2 such rows); write it like 2024-01-31 13:00"
    ):
        read_dataset(path)


@pytest.mark.parametrize("first", [0, 1700000000])
def test_numbers_are_no_time_stamps(tmp_path, first):
    path = tmp_path / "table.parquet"
    pd.DataFrame({"item_id": ["a"] * 2, "timestamp": [first, first + 1], "target": [1.0, 2.0]}).to_parquet(path)
    with fails(
        f"timestamp 'timestamp' of '{path}' holds numbers (first: {first}), which have no unit; "
        "write ISO 8601 like 2024-01-31 13:00"
    ):
        read_dataset(path)


def test_time_stamps_with_and_without_a_zone_do_not_mix(tmp_path):
    path = write(tmp_path, rows("a", ["2024-01-01 00:00", "2024-01-01 01:00Z"]))
    with fails(
        f"timestamp 'timestamp' of '{path}' holds time stamps with a time zone (first: 2024-01-01 01:00Z) and without "
        "(first: 2024-01-01 00:00); write all the same way"
    ):
        read_dataset(path)


@pytest.mark.parametrize(
    ("freq", "off", "times", "suggested"),
    [
        ("h", "2024-01-01 00:30:00", ["2024-01-01 00:00", "2024-01-01 00:30", "2024-01-01 01:00"], "30min"),
        ("2D", "2024-01-02 00:00:00", ["2024-01-01", "2024-01-02", "2024-01-03"], "D"),
        ("M", "2024-02-20 00:00:00", ["2024-01-31", "2024-02-01", "2024-02-20"], None),
        ("B", "2024-01-06 00:00:00", ["2024-01-05", "2024-01-06", "2024-01-08"], "D"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*BDay.*:FutureWarning")
def test_a_time_stamp_off_the_given_grid_is_named(tmp_path, freq, off, times, suggested):
    count = 2 if freq == "B" else 1
    hint = f" (the time stamps suggest {suggested!r})" if suggested else ""
    path = write(tmp_path, rows("a", times))
    with fails(
        f"timestamp {off} of item 'a' is off the grid of freq '{freq}' (given), which starts at "
        f"{pd.Timestamp(times[0])} ({count} such rows); resample, or give another freq={hint}"
    ):
        read_dataset(path, freq=freq)


def test_a_time_stamp_off_the_inferred_grid_says_who_set_it(tmp_path):
    times = pd.date_range("2024-01-01", periods=4, freq="h")
    path = write(tmp_path, rows("a", times) + rows("b", ["2024-01-01 00:00", "2024-01-01 00:40"]))
    with fails(
        "timestamp 2024-01-01 00:40:00 of item 'b' is off the grid of freq 'h' (inferred from item 'a'), which starts "
        "at 2024-01-01 00:00:00 (1 such rows); resample, or give freq= (command line: --freq)"
    ):
        read_dataset(path)


@pytest.mark.parametrize("freq", ["fortnight", "SMS"])
def test_an_unknown_frequency_shows_known_ones(tmp_path, freq):
    path = write(tmp_path, rows("a", ["2024-01-01"]))
    with fails(f"freq '{freq}' is not a frequency of periods; give one like 5min, h, D, W, M, Q or Y"):
        read_dataset(path, freq=freq)


@pytest.mark.parametrize(("item", "text", "shown"), [("a", "inf", "inf"), ("b", "-1e39", "-1e+39")])
def test_an_infinite_target_is_named(tmp_path, item, text, shown):
    days = ["2024-01-01", "2024-01-02"]
    path = write(tmp_path, rows("a", days) + rows("b", days) + f"{item},2024-01-03,{text}\n")
    with fails(
        f"target 'target' of item '{item}' at 2024-01-03 00:00:00 in '{path}' is {shown}, infinite as float32 "
        "(1 such rows); leave missing values empty"
    ):
        read_dataset(path)


@pytest.mark.parametrize(
    ("item", "text", "hint"),
    [("a", "high", ""), ("b", "1,5", "; a decimal ','? give decimal=',' (command line: --decimal ,)")],
)
def test_a_target_that_is_no_number_is_named(tmp_path, item, text, hint):
    days = ["2024-01-01", "2024-01-02"]
    path = write(tmp_path, rows("a", days) + rows("b", days) + f'{item},2024-01-03,"{text}"\n')
    with fails(
        f"target 'target' of item '{item}' at 2024-01-03 00:00:00 in '{path}' is '{text}', which is not a number "
        f"(1 such rows); leave missing values empty, or name another column{hint}"
    ):
        read_dataset(path)


@pytest.mark.parametrize("item", ["a", "x"])
def test_single_rows_have_no_frequency(tmp_path, item):
    path = write(tmp_path, rows(item, ["2024-01-01"]) + rows("z", ["2024-01-02"]))
    with fails(
        f"the frequency cannot be inferred: every item has a single row (first: '{item}'); "
        "give freq= (command line: --freq), for example freq='h'"
    ):
        read_dataset(path)


@pytest.mark.parametrize(("item", "minutes"), [("a", 25), ("b", 35)])
def test_uneven_differences_have_no_frequency(tmp_path, item, minutes):
    times = [pd.Timestamp("2024-01-01") + pd.Timedelta(minutes=m) for m in (0, 10, 10 + minutes)]
    path = write(tmp_path, rows(item, times))
    with fails(
        f"the frequency cannot be inferred: item '{item}' has time stamps 0 days 00:{minutes}:00 apart, not a multiple "
        "of the smallest difference, 0 days 00:10:00; give freq= (command line: --freq), or resample"
    ):
        read_dataset(path)


def test_an_accidental_step_is_no_frequency(tmp_path):
    path = write(tmp_path, rows("a", ["2024-01-01 00:00:00", "2024-01-01 00:00:01", "2024-01-02 07:11:13"]))
    with fails(
        "the frequency cannot be inferred: at the smallest difference, 's', only 0.00% of the points of item 'a' and "
        "the others would be observed; the time stamps suggest about '12h'; give freq= (command line: --freq), or "
        "resample"
    ):
        read_dataset(path)


@pytest.mark.parametrize(("one", "other"), [("h", "5min"), ("D", "M")])
def test_mixed_frequencies_are_named(tmp_path, one, other):
    first, second = (pd.period_range("2024-01-01", periods=4, freq=freq).to_timestamp() for freq in (one, other))
    path = write(tmp_path, rows("p", first) + rows("q", second))
    with fails(
        f"items have different frequencies: 'p' has '{one}', 'q' has '{other}'; keep items of one frequency in a file, "
        "or give freq= (command line: --freq)"
    ):
        read_dataset(path)


ENTRIES = [
    {"start": pd.Period("2024-01-02", "D"), "target": np.array([1.0, np.nan, 3.0], dtype=np.float32), "item_id": "b"},
    {"start": pd.Period("2024-01-01", "D"), "target": np.array([4.0, 5.0], dtype=np.float32), "item_id": "a"},
]


@pytest.mark.parametrize(
    "writer", [JsonLinesWriter(), ArrowWriter(), ParquetWriter()], ids=["jsonl", "arrow", "parquet"]
)
def test_what_gluonts_wrote_is_read(tmp_path, writer):
    saved = TrainDatasets(metadata=MetaData(freq="1D"), train=ENTRIES, test=ENTRIES[:1])
    saved.save(str(tmp_path / "data"), writer)

    second, first = read_dataset(tmp_path / "data" / "train")

    assert (first["item_id"], second["item_id"]) == ("a", "b")
    assert second["start"] == pd.Period("2024-01-02", "D")
    assert second["target"].dtype == np.float32
    assert second["target"].flags.writeable
    np.testing.assert_array_equal(second["target"], [1, np.nan, 3])
    assert len(read_dataset(tmp_path / "data" / "test", freq="D")) == 1
    [file] = (tmp_path / "data" / "train").iterdir()
    assert len(read_dataset(file, freq="D")) == 2
    with fails(
        f"path '{tmp_path / 'data'}' holds the folder 'train'; give one part, such as '{tmp_path / 'data' / 'train'}'"
    ):
        read_dataset(tmp_path / "data")
    meta = tmp_path / "data" / "metadata.json"
    with fails(f"freq 'h' is not that of '{meta}', '1D'; leave freq out, or correct one"):
        read_dataset(tmp_path / "data" / "train", freq="h")


def gluonts_folder(tmp_path, *entries):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "data.json").write_text("\n".join(json.dumps(entry) for entry in entries))
    return tmp_path / "set"


def test_other_fields_of_gluonts_entries_stay(tmp_path):
    folder = gluonts_folder(tmp_path, {"start": "2024-01-01", "target": [1, 2], "feat_static_cat": [3]})
    [entry] = read_dataset(folder, freq="h")
    assert entry["item_id"] == "0"
    assert entry["feat_static_cat"].tolist() == [3]


@pytest.mark.parametrize(("values", "hour", "shown"), [([1, "Infinity"], 1, "inf"), (["-Infinity", 2], 0, "-inf")])
def test_an_infinite_target_in_a_gluonts_folder_is_named(tmp_path, values, hour, shown):
    folder = gluonts_folder(tmp_path, {"start": "2024-01-01", "target": values, "item_id": "a"})
    with fails(
        f"target of item 'a' at 2024-01-01 0{hour}:00:00 in '{folder / 'data.json'}' is {shown}, infinite as float32 "
        "(1 such values); write missing values as NaN"
    ):
        read_dataset(folder, freq="h")


@pytest.mark.parametrize("field", ["start", "target"])
def test_a_gluonts_entry_without_a_needed_field_is_named(tmp_path, field):
    entry = {"start": "2024-01-01", "target": [1, 2]}
    folder = gluonts_folder(tmp_path, entry, {name: value for name, value in entry.items() if name != field})
    with pytest.raises(ValueError, match=f"^entry 1 in '{re.escape(str(folder / 'data.json'))}' .*{field}"):
        read_dataset(folder, freq="h")


def test_a_folder_without_frequency_or_files_is_refused(tmp_path):
    folder = gluonts_folder(tmp_path, {"start": "2024-01-01", "target": [1, 2]})
    with fails(f"'{folder}' has no metadata.json with a freq; give freq= (command line: --freq), for example freq='h'"):
        read_dataset(folder)
    (folder / "data.json").rename(folder / "data.txt")
    with fails(
        f"path '{folder}' holds no GluonTS file; known endings: .parquet, .json, .json.gz, .jsonl, .jsonl.gz, .arrow, "
        ".feather"
    ):
        read_dataset(folder, freq="h")


def sample_forecast(item="a", horizon=3):
    samples = np.arange(101, dtype=np.float32)[:, None] + 1000 * np.arange(horizon, dtype=np.float32)
    return SampleForecast(samples, start_date=pd.Period("2024-01-01 01:00", "h"), item_id=item)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_forecasts_are_written_long(tmp_path, suffix):
    path = tmp_path / f"forecasts{suffix}"
    quantile = QuantileForecast(
        np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        start_date=pd.Period("2024-02", "M"),
        forecast_keys=["0.1", "0.9", "mean"],
        item_id="007",
    )
    write_forecasts(iter([sample_forecast(), quantile]), path, quantiles=(0.1, 0.9))

    table = read_back(path)
    assert list(table.columns) == ["item_id", "timestamp", "mean", "0.1", "0.9"]
    assert table["item_id"].astype(str).str.lstrip("0").tolist() == ["a", "a", "a", "7", "7"]
    assert table["timestamp"].tolist() == [
        pd.Timestamp(when)
        for when in ("2024-01-01 01:00", "2024-01-01 02:00", "2024-01-01 03:00", "2024-02-01", "2024-03-01")
    ]
    np.testing.assert_allclose(table["mean"], [50, 1050, 2050, 5, 6])
    np.testing.assert_allclose(table["0.1"], [10, 1010, 2010, 1, 2])
    np.testing.assert_allclose(table["0.9"], [90, 1090, 2090, 3, 4])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["one.csv", "two.parquet"])
def test_a_file_is_replaced_only_on_demand(tmp_path, name):
    path = tmp_path / name
    write_forecasts([sample_forecast()], path)
    before = path.read_bytes()
    with fails(f"path '{path}' exists; give another one, or overwrite=True (command line: --overwrite)"):
        write_forecasts([sample_forecast("b")], path)
    assert path.read_bytes() == before
    write_forecasts([sample_forecast("b")], path, overwrite=True)
    assert read_back(path)["item_id"].unique().tolist() == ["b"]
    assert list(read_back(path).columns)[3:] == [f"0.{k}" for k in range(1, 10)]


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "forecasts.csv"
    path.write_text("old")

    def broken(columns, out):
        out.write(b"half a fi")
        raise OSError("disk full")

    monkeypatch.setattr("gluonts_peft.series.writing._write_csv", broken)
    with pytest.raises(OSError, match="^disk full$"):
        write_forecasts([sample_forecast()], path, overwrite=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_bad_arguments_are_found_before_forecasting(tmp_path):
    def forecasts():
        raise AssertionError("forecasting began")
        yield

    for path, quantiles, message in [
        ("a.xls", (0.5,), "path '{path}' has an unknown ending; known: .csv, .csv.gz, .parquet"),
        ("no/a.csv", (0.5,), "the folder of path '{path}' does not exist; make it first"),
        ("a.csv", (0.5, 1.0), "quantiles holds 1.0, which is not between 0 and 1; give levels like 0.1"),
        ("a.csv", (-0.1, 0.5), "quantiles holds -0.1, which is not between 0 and 1; give levels like 0.1"),
        ("a.csv", (0.5, 0.5), "quantiles [0.5, 0.5] holds a level twice; give each once"),
    ]:
        with fails(message.format(path=tmp_path / path)):
            write_forecasts(forecasts(), tmp_path / path, quantiles)


def test_forecasts_that_cannot_be_written_are_named(tmp_path):
    path = tmp_path / "a.csv"
    start = pd.Period("2024-01-01", "D")
    with fails("forecast 1 has no item_id; give every entry of the dataset an 'item_id'"):
        write_forecasts([sample_forecast(), sample_forecast(None)], path)
    with fails(
        "the forecast of item 'm' has the shape (4, 2); only univariate ones can be written, take forecast.copy_dim(0) "
        "and so on"
    ):
        write_forecasts([SampleForecast(np.zeros((5, 4, 2)), start, item_id="m")], path)
    lone = QuantileForecast(np.zeros((2, 4)), start, ["0.5", "mean"], item_id="q")
    with fails("the forecast of item 'q' does not know the quantile 0.9; it has: 0.5, mean"):
        write_forecasts([lone], path, (0.5, 0.9))
    with fails(f"there are no forecasts to write to '{path}'; is the dataset, or an iterator, used up?"):
        write_forecasts([], path)
    assert not path.exists()


def dataset(groups, each=1):
    return [{"item_id": f"p{group:03d}/{k}"} for group in range(groups) for k in range(each)]


def names(part):
    return [entry["item_id"] for entry in part]


def test_a_split_covers_all_and_shares_nothing():
    entries = dataset(50)
    parts = split_by_item(entries)
    assert [len(part) for part in parts] == [40, 5, 5]
    assert sorted(sum(map(names, parts), [])) == sorted(names(entries))
    assert all(names(part) == sorted(names(part)) for part in parts)


def test_a_split_keeps_groups_together():
    parts = split_by_item(dataset(20, each=3), key=lambda item_id: item_id.split("/")[0], fractions=(0.5, 0.5))
    groups = [{name.split("/")[0] for name in names(part)} for part in parts]
    assert [len(part) for part in parts] == [30, 30]
    assert not groups[0] & groups[1]


def test_a_split_depends_on_the_seed_and_not_on_the_order():
    entries = dataset(30)
    parts = split_by_item(entries, seed=3)
    backwards = split_by_item(entries[::-1], seed=3)
    assert [set(names(part)) for part in parts] == [set(names(part)) for part in backwards]
    assert set(names(parts[1])) != set(names(split_by_item(entries, seed=4)[1]))


@pytest.mark.parametrize(
    ("groups", "fractions", "sizes"),
    [
        (3, (0.8, 0.1, 0.1), [1, 1, 1]),
        (11, (0.8, 0.1, 0.1), [9, 1, 1]),
        (7, (0.5, 0.0, 0.5), [4, 0, 3]),
        (4, (1.0,), [4]),
    ],
)
def test_no_asked_part_is_empty(groups, fractions, sizes):
    assert [len(part) for part in split_by_item(dataset(groups), fractions=fractions)] == sizes


@pytest.mark.parametrize("fractions", [(0.8, 0.1), (1.2, -0.2), ()])
def test_fractions_must_add_up(fractions):
    with fails(f"fractions {fractions} must be at least 0 and add up to 1, as (0.8, 0.1, 0.1) do"):
        split_by_item(dataset(5), fractions=fractions)


@pytest.mark.parametrize("groups", [0, 2])
def test_too_few_groups_are_counted(groups):
    with fails(
        f"fractions (0.8, 0.1, 0.1) ask for 3 parts, but there are {groups} groups of items; "
        "give fewer fractions or more items"
    ):
        split_by_item(dataset(groups))


@pytest.mark.parametrize("position", [0, 2])
def test_an_entry_without_item_id_is_named(position):
    entries = dataset(4)
    entries[position] = {}
    with fails(f"entry {position} of dataset has no 'item_id'; give every entry one before splitting"):
        split_by_item(entries)
