"""Tables as people have them: indices, types, separators, encodings, dates; and files that are damaged."""

from __future__ import annotations

import decimal
import gzip
import json
import logging
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gluonts_peft.series.calendar import calendar_of, stamps_of
from gluonts_peft.series.table import read_dataset

pytestmark = pytest.mark.filterwarnings("ignore:.*BDay.*:FutureWarning")

DAYS = pd.date_range("2024-01-01", periods=6, freq="D")
FRAME = pd.DataFrame({"item_id": ["b"] * 3 + ["a"] * 3, "timestamp": [*DAYS[:3], *DAYS[1:4]], "target": np.arange(6.0)})
TEXT = "item_id,timestamp,target\n" + "".join(f"a,2024-01-0{day},{day}\n" for day in (1, 2, 3))


def parquet(folder, frame):
    frame.to_parquet(folder / "table.parquet")
    return folder / "table.parquet"


def csv(folder, times, items=None, name="table.csv"):
    frame = pd.DataFrame({"item_id": "a" if items is None else items, "timestamp": list(map(str, times))})
    frame["target"] = np.arange(len(frame))
    frame.to_csv(folder / name, index=False)
    return folder / name


def check(entries):
    assert [entry["item_id"] for entry in entries] == ["b", "a"]
    assert [entry["start"] for entry in entries] == [pd.Period("2024-01-01", "D"), pd.Period("2024-01-02", "D")]
    assert [entry["target"].tolist() for entry in entries] == [[0, 1, 2], [3, 4, 5]]


def nameless(frame):
    frame.index.names = [None] * frame.index.nlevels
    return frame


WHEN = FRAME["timestamp"]
LAYOUTS = {
    "columns": FRAME,
    "rows in any order": FRAME.iloc[[0, 5, 1, 3, 2, 4]],
    "an index of both": FRAME.set_index(["item_id", "timestamp"]),
    "an index of both, the other way": FRAME.set_index(["timestamp", "item_id"]),
    "a time index": FRAME.set_index("timestamp"),
    "an index of names": FRAME.set_index("item_id"),
    "a nameless index of both": nameless(FRAME.set_index(["item_id", "timestamp"])),
    "a nameless time index": nameless(FRAME.set_index("timestamp")),
    "an index with another name": FRAME.rename_axis("number"),
    "periods": FRAME.assign(timestamp=WHEN.dt.to_period("D")),
    "an index of periods": FRAME.assign(timestamp=WHEN.dt.to_period("D")).set_index("timestamp"),
    "dates": FRAME.assign(timestamp=WHEN.dt.date),
    "text": FRAME.assign(timestamp=WHEN.astype(str)),
    "categories": FRAME.assign(item_id=FRAME["item_id"].astype("category")),
    "categories of text": FRAME.assign(timestamp=WHEN.astype(str).astype("category")),
    "decimals": FRAME.assign(target=[decimal.Decimal(k) for k in range(6)]),
    "whole numbers": FRAME.assign(target=np.arange(6)),
    "nullable numbers": FRAME.assign(target=pd.array(range(6), dtype="Int64")),
    "text type": FRAME.assign(item_id=FRAME["item_id"].astype("string")),
    **{unit: FRAME.assign(timestamp=WHEN.astype(f"datetime64[{unit}]")) for unit in ("s", "ms", "us", "ns")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parquet_of_any_layout_is_read(tmp_path, layout):
    frame = LAYOUTS[layout]
    entries = read_dataset(parquet(tmp_path, frame))
    # Where items are mixed, the first row says which comes first.
    check(sorted(entries, key=lambda entry: entry["item_id"], reverse=True))
    table = pa.Table.from_pandas(frame)
    with pa.OSFile(str(tmp_path / "table.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    pyarrow.feather.write_feather(table, tmp_path / "table.feather")
    for name in ("table.arrow", "table.feather"):
        check(sorted(read_dataset(tmp_path / name), key=lambda entry: entry["item_id"], reverse=True))


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "+05:30"])
def test_parquet_of_any_unit_keeps_its_zone(tmp_path, unit, zone):
    when = WHEN.astype(f"datetime64[{unit}]").dt.tz_localize(zone)
    entries = read_dataset(parquet(tmp_path, FRAME.assign(timestamp=when)))
    check(entries)
    assert list(stamps_of(entries[1]["start"], 3, calendar_of(entries[1]))) == when[3:].tolist()


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.array([7, 3], np.int32), [7, 3]),
        (pd.array([7, 3], dtype="Int64"), [7, 3]),
        (pd.Categorical([7, 3]), [7, 3]),
        (["007", "3"], ["007", "3"]),
        (["NA", "None"], ["NA", "None"]),
        ([0.5, 2.0], [0.5, 2.0]),
    ],
)
def test_ids_of_parquet_keep_their_type(tmp_path, ids, expected):
    frame = FRAME.assign(item_id=pd.Series(ids).repeat(3).reset_index(drop=True))
    found = [entry["item_id"] for entry in read_dataset(parquet(tmp_path, frame))]
    assert (found, list(map(type, found))) == (expected, list(map(type, expected)))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.integers(-(10**17), 10**17).map(str),
            st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='"'), min_size=1),
        ),
        min_size=1,
        max_size=5,
        unique=True,
    )
)
def test_ids_of_csv_are_text_unless_all_are_whole_numbers(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("ids") / "table.csv"
    lines = [f'"{name}",2024-01-0{day},1' for name in ids for day in (1, 2, 3)]
    path.write_text("item_id,timestamp,target\n" + "\n".join(lines), encoding="utf-8")
    whole = all(re.fullmatch(r"0|-?[1-9][0-9]*", name) for name in ids)
    assert [entry["item_id"] for entry in read_dataset(path)] == ([int(name) for name in ids] if whole else ids)


GERMAN = "Gerät;Zeit;Wert\nMünchen;31.01.2024 13:00;1,5\nMünchen;31.01.2024 14:00;-2,25e1\nMünchen;31.01.2024 15:00;\n"
COLUMNS = dict(item_id="Gerät", timestamp="Zeit", target="Wert")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "cp1252", "utf-16"])
def test_each_error_of_a_foreign_table_names_the_next_option(tmp_path, encoding):
    path = tmp_path / "table.csv"
    path.write_bytes(GERMAN.encode(encoding))
    options = dict(COLUMNS)
    for option, value, said in [
        ("encoding", encoding, "utf-16" if encoding == "utf-16" else "latin-1"),
        ("sep", ";", "sep=';' (command line: --sep ';')"),
        ("date_format", "%d.%m.%Y %H:%M", "(command line: --date-format)"),
        ("decimal", ",", "decimal=',' (command line: --decimal ,)"),
    ]:
        if not (option == "encoding" and encoding.startswith("utf-8")):
            with pytest.raises(ValueError, match=re.escape(said)):
                read_dataset(path, **options)
        options[option] = value
    [entry] = read_dataset(path, **options)
    assert entry["item_id"] == "München"
    assert entry["start"] == pd.Period("2024-01-31 13:00", "h")
    np.testing.assert_array_equal(entry["target"], [1.5, -22.5, np.nan])


@pytest.mark.parametrize(
    ("text", "date_format", "expected"),
    [
        ("01/02/2024", "%m/%d/%Y", "2024-01-02"),
        ("01/02/2024", "%d/%m/%Y", "2024-02-01"),
        ("2024.01.02 03h", "%Y.%m.%d %Hh", "2024-01-02 03:00"),
        ("02 Jan 2024 03:00 -0500", "%d %b %Y %H:%M %z", "2024-01-02 03:00-05:00"),
    ],
)
def test_day_and_month_are_told_not_guessed(tmp_path, text, date_format, expected):
    (tmp_path / "table.csv").write_text(f"item_id,timestamp,target\na,{text},1\n")
    with pytest.raises(ValueError, match="is not ISO 8601"):
        read_dataset(tmp_path / "table.csv", freq="h")
    [entry] = read_dataset(tmp_path / "table.csv", freq="h", date_format=date_format)
    assert stamps_of(entry["start"], 1, calendar_of(entry))[0] == pd.Timestamp(expected)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("freq", [], "freq [] is a list; give text"),
        ("freq", {"a": 1}, "freq {'a': 1} is a dict; give text"),
        ("target", None, "target None is a NoneType; give text"),
        ("sep", ";;", "sep ';;' is not one character"),
        ("decimal", ",", "decimal ',' is not one mark other than sep ','"),
        ("encoding", "klingon", "encoding 'klingon' is unknown"),
        ("date_format", "dd.mm.yyyy", "date_format 'dd.mm.yyyy' has no '%'"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, option, value, said):
    (tmp_path / "table.csv").write_text(TEXT)
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        read_dataset(tmp_path / "table.csv", **{option: value})


@pytest.mark.parametrize("sep", [";", "\t", "|"])
def test_another_separator_is_recognised(tmp_path, sep):
    (tmp_path / "table.csv").write_text(TEXT.replace(",", sep))
    with pytest.raises(ValueError, match="has a single column, .*; is it separated by .* give sep="):
        read_dataset(tmp_path / "table.csv")
    assert len(read_dataset(tmp_path / "table.csv", sep="\\t" if sep == "\t" else sep)) == 1


@pytest.mark.parametrize("rows", ["a,2024-01-01,1,5\na,2024-01-02,2,5\n", "a,2024-01-01,1\na,2024-01-02,2,5\n"])
def test_a_row_longer_than_the_header_is_not_cut(tmp_path, rows):
    (tmp_path / "table.csv").write_text("item_id,timestamp,target\n" + rows)
    with pytest.raises(ValueError, match="quote fields that hold the separator, such as 1,5"):
        read_dataset(tmp_path / "table.csv")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("time", ["timestamp", "date"])
def test_a_wide_table_is_told_how_to_become_long(tmp_path, suffix, time):
    wide = pd.DataFrame({time: DAYS, **{f"shop{k}": np.arange(6.0) + k for k in range(200)}})
    path = tmp_path / f"wide{suffix}"
    wide.to_csv(path, index=False) if suffix == ".csv" else wide.to_parquet(path)
    with pytest.raises(ValueError, match="is a wide table") as caught:
        read_dataset(path)
    said = str(caught.value)
    assert len(said) < 600
    code = re.search(r"melt it: pandas\.(.*?); or read one series: (.*?) \(", said)
    long = eval(f"pd.{code[1].replace(repr(path.name), 'path')}", {"pd": pd, "path": path})
    long.to_csv(tmp_path / "long.csv", index=False)
    assert [entry["item_id"] for entry in read_dataset(tmp_path / "long.csv")] == [f"shop{k}" for k in range(200)]
    [one] = read_dataset(path, item_id=None, timestamp=time, target="shop7", ignore=True)
    assert one["target"].tolist() == [7, 8, 9, 10, 11, 12]


def test_many_columns_are_not_all_printed(tmp_path):
    pd.DataFrame({f"V{k}": ["x"] for k in range(300)}).to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(ValueError, match="V19 and 280 more$"):
        read_dataset(tmp_path / "table.csv")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_columns_that_are_not_read_are_named_once(tmp_path, suffix, caplog):
    frame, path = FRAME.assign(promo=1, holiday=0), tmp_path / f"table{suffix}"
    frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    read_dataset(path)
    assert caplog.messages == [
        f"'{path}': 2 columns are not read: promo, holiday; if they are meant to be left out, say so with ignore= "
        "(command line: --ignore)"
    ]
    caplog.clear()
    read_dataset(path, ignore=["promo"])
    assert "1 columns are not read: holiday" in caplog.text
    caplog.clear()
    for meant in (True, ["promo", "holiday"]):
        read_dataset(path, ignore=meant)
    assert caplog.messages == []
    with pytest.raises(ValueError, match=r"^ignore\[0\] 'promos' is not a column of .*; did you mean 'promo'\?"):
        read_dataset(path, ignore="promos")


def damaged(folder):
    """Files that something happened to, and what they are read with."""
    whole = parquet(folder, FRAME).read_bytes()
    pyarrow.feather.write_feather(FRAME, folder / "whole.feather")
    feather, text = (folder / "whole.feather").read_bytes(), (TEXT * 50).encode()
    packed = gzip.compress(text)
    lines = gzip.compress(b'{"start": "2024-01-01", "target": [1, 2, 3]}\n' * 20)
    for cut in (0, 3, 0.3, 0.9, 1):
        for name, content in (
            ("t.parquet", whole),
            ("t.feather", feather),
            ("t.arrow", feather),
            ("t.csv.gz", packed),
            ("t.jsonl.gz", lines),
        ):
            yield name, content[: int(cut if cut > 1 else cut * len(content) - 1)] if cut else b""
    yield "t.parquet", whole.replace(b"PAR1", b"PAR9")
    yield "t.csv.gz", packed[:40] + b"\xff" * 30 + packed[70:]
    yield "t.csv.gz", b"not gzip at all"
    yield "t.csv", TEXT.encode() + b"a,2024-01-04,\xff\xfe\n"
    yield "t.csv", bytes(range(256)) * 10
    yield "t.csv", TEXT.encode() + b'a,"2024-01-04,5\n'
    yield "t.jsonl", b'{"start": "2024-01-01", "target": [1, 2'
    yield "t.jsonl", b"[1, 2]\n"
    yield "t.jsonl", b"\xff\xfe\x00"
    yield "t.jsonl", b"[" * 100_000
    yield "t.jsonl", b'{"start": "2024-01-01", "target": "x"}\n'
    yield "t.jsonl", b'{"start": {"a": 1}, "target": [1]}\n'
    yield "t.jsonl", b'{"start": "2024-01-01", "target": [1], "info": {"calendar": {"zone": "Mars"}}}\n'
    yield "t.arrow", b"garbage " * 40


def test_damaged_files_are_refused_by_name(tmp_path):
    for number, (name, content) in enumerate(damaged(tmp_path)):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r".") as caught:
            read_dataset(path, freq="D")
        assert len(str(caught.value)) < 600
        assert str(path) in str(caught.value) or "calendar" in str(caught.value), (number, name, str(caught.value))


def freq_of(folder, times, items=None, **options):
    return {entry["start"].freqstr for entry in read_dataset(csv(folder, times, items), **options)}


def test_business_days_with_holidays_are_business_days(tmp_path):
    days = pd.bdate_range("2024-01-01", periods=60).delete([5, 17, 40])
    for zone in (None, "Asia/Tokyo", "America/New_York"):
        [entry] = read_dataset(csv(tmp_path, days.tz_localize(zone)))
        assert entry["start"].freqstr == "B"
        assert np.flatnonzero(np.isnan(entry["target"])).tolist() == [5, 17, 40]
    # A week without a weekend is no other frequency than the weeks of other items.
    assert freq_of(tmp_path, [*days[:5], *days[20:40]], ["a"] * 5 + ["b"] * 20) == {"B"}
    # Two weeks with a holiday, and three days of a week, all short.
    assert freq_of(tmp_path, days[:10].delete([3])) == {"B"}
    # A few days that happen to miss the weekend are days.
    assert freq_of(tmp_path, pd.to_datetime(["2024-01-01", "2024-01-02", "2024-01-05"])) == {"D"}


def test_quarters_that_begin_in_unlike_months_are_three_months(tmp_path):
    times = [pd.date_range("2020-01-01", periods=9, freq=freq) for freq in ("QS-JAN", "QS-FEB", "QE-NOV")]
    entries = read_dataset(csv(tmp_path, [*times[0], *times[1], *times[2]], ["a"] * 9 + ["b"] * 9 + ["c"] * 9))
    for entry, own in zip(entries, times, strict=True):
        assert entry["start"].freqstr == "3M"
        assert list(stamps_of(entry["start"], 9, calendar_of(entry))) == list(own)


def test_items_may_be_at_unlike_places_of_a_month(tmp_path):
    places = [pd.date_range("2020-01-01", periods=9, freq=freq) for freq in ("MS", "ME", "BME")]
    places.append(places[0] + pd.Timedelta("14D"))
    entries = read_dataset(csv(tmp_path, [one for own in places for one in own], np.repeat(list("abcd"), 9)))
    for entry, own in zip(entries, places, strict=True):
        assert entry["start"] == pd.Period(own[0], "M")
        assert list(stamps_of(entry["start"], 9, calendar_of(entry))) == list(own)


def test_stamps_that_vary_in_their_month_stay_if_months_are_asked_for(tmp_path, caplog):
    # The last trading day; Good Friday is none.
    days = pd.to_datetime(["2024-01-31", "2024-02-29", "2024-03-28", "2024-04-30", "2024-05-31", "2024-06-28"])
    for options, said in (({}, "cannot be inferred"), ({"freq": "BME"}, "2024-03-28.* is off the grid of freq 'BME'")):
        with pytest.raises(ValueError, match=said):
            read_dataset(csv(tmp_path, days), **options)
    [entry] = read_dataset(csv(tmp_path, days), freq="M")
    assert "vary inside their periods" in caplog.text
    calendar = calendar_of(json.loads(json.dumps({"info": entry["info"]})))
    assert list(stamps_of(entry["start"], 6, calendar)) == list(days)
    assert [str(one.date()) for one in stamps_of(entry["start"] + 6, 2, calendar)] == ["2024-07-31", "2024-08-30"]


@pytest.mark.parametrize(
    ("freq", "step"), [("5min", "D"), ("h", "D"), ("H", "D"), ("D", "W-SUN"), ("D", "MS"), ("min", "h")]
)
@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
def test_a_grid_that_is_mostly_missing_is_refused_with_the_frequency_of_the_stamps(tmp_path, freq, step):
    path = csv(tmp_path, pd.date_range("2023-01-01", periods=30, freq=step))
    suggested = {"MS": "M"}.get(step, step)
    with pytest.raises(ValueError, match=f"^freq '{freq}' leaves most of the grid missing: .* suggest '{suggested}'"):
        read_dataset(path, freq=freq)
    assert read_dataset(path, freq=suggested)[0]["target"].tolist() == list(range(30))


def test_sparse_rows_are_a_grid_only_if_it_is_asked_for(tmp_path):
    hours = pd.date_range("2023-01-01", periods=1000, freq="h")
    some = hours[np.sort(np.random.default_rng(0).choice(1000, 200, replace=False))]
    with pytest.raises(ValueError, match=r"at the smallest difference, 'h', only 20\.\d\d%"):
        read_dataset(csv(tmp_path, some))
    assert freq_of(tmp_path, some, freq="h") == {"h"}


def test_an_hour_that_comes_twice_needs_its_offset(tmp_path):
    times = pd.date_range("2024-10-26 22:00", periods=30, freq="h", tz="Europe/Berlin")
    [entry] = read_dataset(csv(tmp_path, times))
    assert len(entry["target"]) == 30
    assert not np.isnan(entry["target"]).any()
    with pytest.raises(
        ValueError, match=r"where clocks went back, write the offset too, like 2024-10-27 02:00\+01:00$"
    ):
        read_dataset(csv(tmp_path, times.tz_localize(None)))


@pytest.mark.parametrize("first", [0, 8])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_days_that_begin_at_one_are_days(tmp_path, first, suffix):
    # In Cairo clocks went forward at midnight of 2023-04-28.
    days = pd.date_range("2023-04-20", periods=14, freq="D").tz_localize("Africa/Cairo", nonexistent="shift_forward")[
        first:
    ]
    assert {str(day.time()) for day in days} == {"00:00:00", "01:00:00"}
    if suffix == ".csv" and first:
        return  # Of the day before the offset is not known.
    frame = pd.DataFrame({"item_id": "a", "timestamp": days, "target": np.arange(len(days) * 1.0)})
    [entry] = read_dataset(csv(tmp_path, days) if suffix == ".csv" else parquet(tmp_path, frame))
    assert (entry["start"], len(entry["target"])) == (pd.Period(days[0].date(), "D"), len(days))
    found = stamps_of(entry["start"], len(days), calendar_of(entry))
    assert [str(one) for one in found] == [str(day) for day in days]


def test_steps_of_24_hours_are_no_days_where_clocks_change(tmp_path):
    times = pd.date_range("2024-03-25", periods=12, freq="24h", tz="UTC").tz_convert("Europe/Berlin")
    [entry] = read_dataset(parquet(tmp_path, pd.DataFrame({"item_id": "a", "timestamp": times, "target": 1.0})))
    assert entry["start"].freqstr == "24h"
    assert list(stamps_of(entry["start"], 12, calendar_of(entry))) == list(times)


@pytest.mark.parametrize("text", ["1500-01-01", "3000-01-01"])
def test_years_beyond_nanoseconds_are_named(tmp_path, text):
    with pytest.raises(ValueError, match=f"'{text}', which lies outside the years 1678 to 2261"):
        read_dataset(csv(tmp_path, [text]), freq="D")


def test_no_warning_where_all_columns_are_read(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        read_dataset(parquet(tmp_path, FRAME.set_index(["item_id", "timestamp"])))
    assert caplog.messages == []
