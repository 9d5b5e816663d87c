"""One trial of a search: run as in a study, and scored on its validation windows after every so many epochs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import Record, as_number
from .spec import TrialSpec

if TYPE_CHECKING:
    from gluonts.model.predictor import Predictor

    from ..networks import Networks

__all__ = ["Report", "run_and_report"]

Report = Callable[[dict[str, Any]], None]


def run_and_report(
    spec: TrialSpec,
    folder: Path,
    report: Report,
    *,
    columns: Sequence[str],
    every: int = 1,
    reported: int = 0,
    replay: bool = False,
    where: Mapping[str, Any] | None = None,
    visible_context: int | None = None,
    networks: Networks | None = None,
) -> None:
    """Run a trial, or go on with it, and report the objectives as they become known.

    Parameters
    ----------
    spec
        The trial.
    folder
        Its folder; evaluations are stored there beside what :func:`gluonts_peft.trials.run_trial` leaves.
    report
        Called with ``score``, the first objective, ``scores``, all of them as JSON, ``epochs`` and ``finished``: after
        each evaluation, and at last, with the ``epochs`` of the last evaluation, for the weights that are kept.
    columns
        Scores of the backtest that are the objectives.
    every
        Epochs between two evaluations.
    reported
        Epochs up to which evaluations were reported before; the others that are stored are reported first.
    replay
        Report what is stored and run nothing.
    where
        Stored with each evaluation.
    visible_context
        See :func:`gluonts_peft.trials.run_trial`; of validation windows too.
    networks
        See :func:`gluonts_peft.trials.run_trial`.
    """
    from .run import PREDICTOR, run_trial

    record = Record.read(folder)

    def tell(scores: Mapping[str, float | None], epochs: int, finished: bool = False) -> None:
        objectives = [as_number(scores.get(column)) for column in columns]
        report({"score": objectives[0], "scores": json.dumps(objectives), "epochs": epochs, "finished": finished})

    begun = False

    def evaluate(predictor: Predictor, epochs: int | None) -> None:
        nonlocal begun
        if epochs is None:
            record.final = _validate(predictor, spec, visible_context)
            record.write()
            return
        if not begun:
            begun = True
            record.attempts.append({"epochs": epochs, **(where or {})})
        if epochs % every == 0 and epochs > record.last:
            scores = _validate(predictor, spec, visible_context, columns)
            record.evaluations.append({"epochs": epochs, "scores": scores, **(where or {})})
            record.write()
            tell(scores, epochs)

    for each in list(record.evaluations):
        if each["epochs"] > reported:
            tell(each["scores"], each["epochs"])
    if replay and record.final is None:
        return
    run_trial(spec, folder, evaluate=evaluate, visible_context=visible_context, networks=networks)
    if record.final is None:
        from gluonts.model.predictor import Predictor

        evaluate(Predictor.deserialize(folder / PREDICTOR), None)
    assert record.final is not None
    tell(record.final, max(record.last, reported), finished=True)


def _validate(
    predictor: Predictor, spec: TrialSpec, visible_context: int | None, columns: Sequence[str] | None = None
) -> dict[str, float | None]:
    """Return scores on the last windows of the validation part."""
    from ..backtesting import backtest, default_metrics
    from .data import load_data
    from .run import counted_not_logged, finite, visible

    if getattr(predictor, "calibration", None) is not None:
        # It was learnt on a part of these series, and epochs are scored without.
        predictor = copy.copy(predictor)
        predictor.calibration = None
    metrics = [metric for metric in default_metrics() if columns is None or metric(axis=None).name in columns]
    validation = visible(load_data(spec.data).validation, spec, spec.data, visible_context)
    with counted_not_logged():
        options: dict[str, Any] = dict(metrics=metrics, seasonality=spec.data.season, unusable="skip")
        scores = backtest(predictor, validation, windows=spec.data.windows, **options).iloc[0]
    return {str(name): finite(value) for name, value in scores.items()}
