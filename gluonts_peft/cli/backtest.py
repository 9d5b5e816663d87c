"""``backtest``: score a model on the ends of series."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app, example
from .claims import claiming
from .columns import Columns, reads_data
from .options import (
    AnyFreq,
    Checkpoint,
    Context,
    Data,
    Device,
    Family,
    Horizon,
    Model,
    Overwrite,
    Samples,
    Season,
    Unusable,
    check_model,
    check_samples,
    load_model,
    one_of,
)
from .output import print_rows, say

__all__ = ["backtest"]


Baselines = Annotated[bool, typer.Option(help="Score zero-shot, last value and seasonal naive as well.")]


@app.command(epilog=example("backtest test.csv --model model --windows 3 --out scores.csv"))
@claiming
@reads_data
def backtest(
    data: Data,
    model: Model = None,
    family: Family = None,
    checkpoint: Checkpoint = None,
    horizon: Horizon = None,
    context: Context = None,
    windows: Annotated[int, typer.Option(help="Windows a series, the last ones.")] = 1,
    seasonality: Season = None,
    baselines: Baselines = True,
    baseline: Annotated[
        list[str] | None, typer.Option(help="Score this as well: auto_ets or auto_theta (extra baselines).")
    ] = None,
    num_samples: Samples = None,
    device: Device = "auto",
    unusable: Unusable = "raise",
    any_freq: AnyFreq = False,
    out: Annotated[Path | None, typer.Option(help="CSV file for the scores.")] = None,
    overwrite: Overwrite = False,
    *,
    columns: Columns,
) -> None:
    """Score a model on the last windows of each series of DATA, which it must not have been trained on."""
    one_of("unusable", unusable, ("raise", "skip"))
    if out is not None:
        if out.exists() and not overwrite:
            raise FileExistsError(f"--out {out} exists; name another file, or replace it: --overwrite")
        if not out.parent.is_dir():
            raise FileNotFoundError(f"the folder of --out {out} does not exist; make it first")
    check_model(model, family, horizon, context)
    from ..trials.baselinespec import STATISTICAL, missing_package

    for name in baseline or ():
        one_of("baseline", name, STATISTICAL)
        if package := missing_package(name):
            raise ImportError(f"--baseline {name} needs {package}; install gluonts-peft[baselines]")
    dataset = columns.read(data)

    import pandas as pd

    from ..backtesting import SeasonalNaive
    from ..backtesting import backtest_both as score
    from ..files import delivering
    from ..series.season import season_length
    from ..trials.statistics import against_zero_shot
    from ..trials.tables import INTERVAL, JUDGE, METRICS, judged

    predictor = load_model(model, family, checkpoint, horizon, context, device)
    check_samples(predictor, num_samples)
    season = season_length(dataset[0]["start"].freqstr) if seasonality is None else seasonality
    common: dict[str, Any] = dict(
        windows=windows,
        seasonality=season,
        unusable=unusable,
        any_freq=any_freq,
        visible_context=predictor.backbone.past_length,
    )
    adapter, own = predictor.backbone.adapter, predictor.calibration
    plain = adapter is None and own is None
    scores = {"zero-shot" if plain else "model": score(predictor, dataset, num_samples=num_samples, **common)}
    counts = next(iter(scores.values()))[0].attrs
    if baselines:
        if predictor.backbone.untrained:
            name = predictor.backbone.source.checkpoint
            say(f"{name} brings no forecasting head: there is no zero-shot to compare with")
        elif not plain:
            if adapter is not None:
                adapter.detach()
            predictor.calibration = None
            scores["zero-shot"] = score(predictor, dataset, num_samples=num_samples, **common)
        naive = {"last value": 1}
        without, all_windows = counts["seasonless_windows"], counts["windows"]
        if without < all_windows:
            naive[f"seasonal naive ({season})"] = season
        if without:
            why = f"fewer than the {season} steps of a season before them" if season > 1 else "no season (--season)"
            there = "is the last value there" if without < all_windows else "would be the last value: it is left out"
            say(f"{without} of {all_windows} windows have {why}: seasonal naive {there}")
        for name, steps in naive.items():
            scores[name] = score(SeasonalNaive(predictor.prediction_length, steps), dataset, **common)
    for name in dict.fromkeys(baseline or ()):
        from ..trials.statistical import SIMPLER, StatisticalPredictor
        from ..trials.tables import BASELINES

        fitted = StatisticalPredictor(predictor.prediction_length, name, season_length=season)
        scores[BASELINES[name]] = score(fitted, dataset, **common)
        for reason, count in fitted.simpler.items():
            say(f"{BASELINES[name]} forecasts {count} of {counts['windows']} windows {SIMPLER[reason]}")
    frame = pd.concat([over_all for over_all, _ in scores.values()], keys=scores.keys()).droplevel(1)
    tests = against_zero_shot({name: each[METRICS[JUDGE]] for name, (_, each) in scores.items()}, JUDGE)
    rows = [(metric, *(f"{value:.4g}" for value in column)) for metric, column in frame.items()]
    if tests is not None:
        if "model" in tests.index:
            say(f"model: {tests['sentence']['model']}")
        verdicts = [judged(row) for _, row in tests.iterrows()]
        rows = [*zip(("verdict", f"{JUDGE} change", INTERVAL), *verdicts, strict=True), *rows]
        frame = pd.concat([tests.drop(columns="sentence"), frame], axis=1)
    if out is not None:
        with delivering(out, "backtest") as part:
            frame.to_csv(part, index_label="model")
    title = f"{counts['windows']} windows of {counts['series']} series, {predictor.prediction_length} steps each"
    print_rows(("metric", *frame.index), rows, title, right=1)
    if "MASE[0.5]" in frame:
        say("MASE[0.5] weighs windows by their observed labels, as gluonts.ev does")
