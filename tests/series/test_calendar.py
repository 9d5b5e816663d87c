"""What comes in goes out: stamps in their zone and phase, through every reader."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pytest
from gluonts.dataset.pandas import PandasDataset

from gluonts_peft.series.calendar import calendar_of, period_freq, stamps_of
from gluonts_peft.series.dated import dated
from gluonts_peft.series.table import read_dataset

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*BDay.*:FutureWarning", "ignore:.*drop timezone.*:UserWarning", "ignore:.*is deprecated.*:FutureWarning"
)

CLOCK = ["D", "2D", "B", "W-SUN", "W-WED", "MS", "ME", "2MS", "2ME", "BMS", "BME"]
CLOCK += ["QS", "QE", "QS-FEB", "QE-NOV", "BQE", "YS", "YE", "YE-JUN"]
ABSOLUTE = ["30s", "min", "5min", "15min", "h", "2h", "6h"]
ZONES = [
    None,
    "UTC",
    "Asia/Tokyo",
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",
    "Asia/Kolkata",
    "Asia/Kathmandu",
    "-04:30",
]
PHASES = ["0min", "12h", "17min", "23h59min"]
STEPS, HORIZON = 40, 5
READERS = ("csv", "parquet", "arrow", "index", "gluonts", "pandas")


def stamps(freq, zone, phase, begin="2023-01-01"):
    """Stamps as people have them: days on the clock of their zone, hours of an absolute length."""
    if freq in CLOCK or freq == "W-MON":
        naive = pd.date_range(begin, periods=STEPS, freq=freq) + pd.Timedelta(phase)
        return naive if zone is None else naive.tz_localize(zone)
    # So that clocks change inside the data, in all the zones.
    begin = pd.Timestamp("2024-03-30 20:00" if zone != "Australia/Lord_Howe" else "2024-04-06 10:00")
    step = pd.Timedelta(pd.tseries.frequencies.to_offset(freq)) * STEPS
    first = begin if step > pd.Timedelta("1D") else begin + pd.Timedelta("2h")
    first = first + pd.Timedelta(phase) % pd.Timedelta("1h")
    return pd.date_range(first if zone is None else first.tz_localize(zone), periods=STEPS, freq=freq)


def read(folder, reader, series, freq=None):
    """A data set by way of a reader; entries in the order of the series."""
    frame = pd.concat(
        [
            pd.DataFrame({"item_id": name, "timestamp": times, "target": np.arange(len(times)) / 7})
            for name, times, _ in series
        ]
    )
    if reader == "csv":
        frame["timestamp"] = frame["timestamp"].map(str)
        frame.to_csv(folder / "table.csv", index=False)
        return read_dataset(folder / "table.csv", freq=freq)
    if reader == "parquet":
        frame.to_parquet(folder / "table.parquet", index=False)
        return read_dataset(folder / "table.parquet", freq=freq)
    if reader == "arrow":
        pyarrow.feather.write_feather(pa.Table.from_pandas(frame, preserve_index=False), folder / "table.feather")
        return read_dataset(folder / "table.feather", freq=freq)
    if reader == "index":
        frame.set_index(["item_id", "timestamp"]).to_parquet(folder / "table.parquet")
        return read_dataset(folder / "table.parquet", freq=freq)
    if reader == "gluonts":
        lines = [
            {"item_id": name, "start": str(times[0]), "target": (np.arange(len(times)) / 7).tolist()}
            for name, times, _ in series
        ]
        (folder / "set").mkdir()
        (folder / "set" / "data.json").write_text("\n".join(map(json.dumps, lines)))
        return read_dataset(folder / "set", freq=freq)
    frames = {name: pd.DataFrame({"target": np.arange(len(at)) / 7}, index=at) for name, at, _ in series}
    return list(dated(PandasDataset(frames, freq=period_freq(freq))))


def known(reader, times, freq):
    """Stamps as a reader can know them: text has offsets, not the name of a zone, and a GluonTS file starts."""
    if reader == "gluonts":
        return list(pd.date_range(pd.Timestamp(str(times[0])), periods=len(times), freq=freq))
    return [pd.Timestamp(str(time)) for time in times] if reader == "csv" else list(times)


def same(found, expected):
    assert [str(one) for one in found] == [str(one) for one in expected]


def check(reader, entries, series):
    """Stamps of the data come back, and forecasts go on from them."""
    assert [entry["item_id"] for entry in entries] == [name for name, _, _ in series]
    for entry, (_, times, freq) in zip(entries, series, strict=True):
        np.testing.assert_array_equal(entry["target"], (np.arange(len(times)) / 7).astype(entry["target"].dtype))
        # By way of JSON, as GluonTS files keep it.
        calendar = calendar_of(json.loads(json.dumps({"info": entry.get("info")})))
        expected = known(reader, times, freq)
        same(stamps_of(entry["start"], len(times), calendar), expected)
        future = pd.date_range(expected[-1], periods=HORIZON + 1, freq=freq)[1:]
        same(stamps_of(entry["start"] + len(times), HORIZON, calendar), future)


GRID = list(itertools.product([*CLOCK, *ABSOLUTE], ZONES))


@pytest.mark.parametrize(("freq", "zone"), GRID)
def test_stamps_in_are_stamps_out(tmp_path, freq, zone):
    # Phases, readers and whether the frequency is given take turns: every frequency and every zone meets each of them.
    turn = GRID.index((freq, zone))
    phase, other = PHASES[turn % 4], PHASES[(turn // 4) % 4]
    weekday = "W-MON" if freq.startswith("W") else freq
    series = [("b", stamps(freq, zone, phase), freq), ("a", stamps(weekday, zone, other, "2023-02-01"), weekday)]
    for reader in ("csv", READERS[1 + turn % (len(READERS) - 1)]):
        folder = tmp_path / reader
        folder.mkdir()
        given = freq if reader in ("gluonts", "pandas") or turn % 2 else None
        check(reader, read(folder, reader, series, given), series)


def test_every_frequency_meets_every_reader_and_phase():
    met = {(freq, READERS[1 + turn % 5], turn % 4) for turn, (freq, _) in enumerate(GRID)}
    for freq in (*CLOCK, *ABSOLUTE):
        assert {reader for name, reader, _ in met if name == freq} == set(READERS[1:])
        assert {phase for name, _, phase in met if name == freq} == {0, 1, 2, 3}
