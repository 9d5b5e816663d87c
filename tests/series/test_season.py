from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

from gluonts_peft.backtesting import SeasonalNaive, backtest
from gluonts_peft.series.season import season_length, unit_of

SEASONS = {
    "ms": 1,
    "s": 3600,
    "10s": 360,
    "min": 1440,
    "5min": 288,
    "15min": 96,
    "30min": 48,
    "h": 24,
    "60min": 24,
    "2h": 12,
    "5h": 1,
    "D": 7,
    "24h": 7,
    "2D": 1,
    "B": 5,
    "W-SUN": 52,
    "W-WED": 52,
    "7D": 52,
    "2W-MON": 26,
    "M": 12,
    "MS": 12,
    "ME": 12,
    "BME": 12,
    "2M": 6,
    "Q-DEC": 4,
    "QS": 4,
    "QE-JAN": 4,
    "Y-DEC": 1,
    "YE": 1,
}


@pytest.mark.parametrize(("freq", "season"), SEASONS.items())
def test_each_frequency_has_its_season(freq: str, season: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert season_length(freq) == season


@pytest.mark.parametrize("freq", ["min", "5min", "h", "D", "B", "W-TUE", "M", "2M", "Q-NOV", "Y-DEC"])
@pytest.mark.filterwarnings("ignore:.*BDay.*:FutureWarning")
def test_a_period_and_the_name_of_its_frequency_say_the_same(freq: str) -> None:
    period = pd.Period("2024-01-02", freq)
    assert unit_of(period.freqstr) == unit_of(freq) == unit_of(period.freq)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("h", "60min", True),
        ("D", "24h", True),
        ("W-MON", "W-FRI", True),
        ("W-MON", "7D", True),
        ("M", "MS", True),
        ("M", "ME", True),
        ("Q-DEC", "Q-JAN", True),
        ("Q-DEC", "3M", True),
        ("D", "B", False),
        ("D", "5min", False),
        ("M", "2M", False),
        ("Y-DEC", "Q-DEC", False),
    ],
)
def test_units_tell_frequencies_apart_but_not_their_spellings(one: str, other: str, same: bool) -> None:
    assert (unit_of(one) == unit_of(other)) is same


@pytest.mark.parametrize("freq", ["fortnight", "", "5 apples"])
def test_what_is_no_frequency_is_refused(freq: str) -> None:
    with pytest.raises(ValueError, match="is not a frequency; give one like"):
        season_length(freq)


def daily(days: int) -> dict[str, object]:
    return {"item_id": "a", "start": pd.Period("2024-01-01", "D"), "target": np.arange(days) % 7 + 1.0}


def test_daily_data_are_scaled_by_the_week_before() -> None:
    week = np.arange(70) % 7.0
    week[40] += 7.0
    data = [{"start": pd.Period("2024-01-01", "D"), "target": np.append(week, [3.0])}]
    frame = backtest(SeasonalNaive(1, 7), data)
    # 63 differences of a week, of which two are 7 and the others 0.
    label, forecast = 3.0, 0.0
    assert frame["MASE[0.5]"].item() == pytest.approx((label - forecast) / (14 / 63))
    assert frame.attrs["seasonless_windows"] == 0
    assert backtest(SeasonalNaive(1, 7), data, seasonality=1)["MASE[0.5]"].item() != frame["MASE[0.5]"].item()


@pytest.mark.parametrize(
    ("days", "windows", "without"), [(30, 2, 0), (10, 1, 0), (9, 1, 1), (13, 2, 0), (12, 2, 1), (30, 1, 0)]
)
def test_windows_without_a_season_before_them_are_counted(days: int, windows: int, without: int) -> None:
    frame = backtest(SeasonalNaive(3, 7), [daily(days)], windows=windows)
    assert frame.attrs["seasonless_windows"] == without


def test_where_the_frequency_has_no_season_no_window_has_one() -> None:
    data = [{"start": pd.Period("1950", "Y-DEC"), "target": np.arange(40.0)}]
    assert backtest(SeasonalNaive(3), data, windows=2).attrs["seasonless_windows"] == 2
    assert backtest(SeasonalNaive(3), data, windows=2, seasonality=10).attrs["seasonless_windows"] == 0
