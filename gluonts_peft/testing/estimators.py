"""Clauses of the contract of a family's estimator, :class:`gluonts_peft.PeftEstimator`."""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import numpy as np
import torch

from ..backbone import Backbone
from ..registry import families
from .cases import EstimatorCase, apart, differing, near, quiet, same
from .contract import Clause, clause_of, refusal, require

if TYPE_CHECKING:
    from ..estimator import PeftEstimator
    from ..predictor import PeftPredictor

__all__ = ["ESTIMATOR_CHECKS"]

ESTIMATOR_CHECKS: dict[str, Clause] = {}


def _arrays(predictor: PeftPredictor, dataset: Any) -> list[Any]:
    from gluonts.model.forecast import SampleForecast

    forecasts = list(predictor.predict(dataset, num_samples=4))
    return [
        forecast.samples if isinstance(forecast, SampleForecast) else forecast.forecast_array for forecast in forecasts
    ]


def _equal(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def _attributes(estimator: PeftEstimator) -> dict[str, Any]:
    return {name: value for name, value in vars(estimator).items() if not name.startswith("__")}


@clause_of(ESTIMATOR_CHECKS)
def class_names_its_backbone(case: EstimatorCase) -> None:
    """The class is a PeftEstimator with a backbone class and a default checkpoint that loads."""
    from ..estimator import PeftEstimator

    kind = case.estimator
    require(isinstance(kind, type) and issubclass(kind, PeftEstimator), f"{kind!r} does not derive from PeftEstimator")
    backbone = getattr(kind, "backbone_class", None)
    require(
        isinstance(backbone, type) and issubclass(backbone, Backbone),
        "set backbone_class to the family's Backbone class",
    )
    require(isinstance(getattr(kind, "default_checkpoint", None), str), "set default_checkpoint to a checkpoint's name")
    with quiet():
        loaded = case.make().load_backbone()
    require(loaded.family == kind.backbone_class.family, f"the backbone is of family {loaded.family!r}")


@clause_of(ESTIMATOR_CHECKS)
def family_is_registered(case: EstimatorCase) -> None:
    """The family's name in the registry leads to this class, else a stored predictor could not be opened."""
    name = case.estimator.backbone_class.family
    require(
        name in families.names(),
        f'family {name!r} is not registered; add to pyproject.toml: [project.entry-points."{families.group}"] {name} ='
        f' "{case.estimator.__module__.partition(".")[0]}:{case.estimator.__name__}", and install the distribution',
    )
    found = families.get(name)
    require(found is case.estimator, f"family {name!r} leads to {found!r}, not to {case.estimator!r}")


@clause_of(ESTIMATOR_CHECKS)
def training_leaves_a_record(case: EstimatorCase) -> None:
    """A trained predictor knows the gate's scores, the steps and the losses."""
    fit = case.tuned.fit
    assert fit is not None
    options = case.make().options
    untrained = case.tuned.backbone.untrained
    require(np.isfinite(fit.gate.tuned), f"the validation loss is {fit.gate.tuned}")
    require(
        (fit.gate.zero_shot is None) == bool(untrained) and np.isfinite(fit.gate.zero_shot or 0.0),
        f"the zero-shot score is {fit.gate.zero_shot}, and the checkpoint brings {'no' if untrained else 'a'} head",
    )
    require(
        fit.gate.windows == len(case.dataset), f"{fit.gate.windows} validation windows of {len(case.dataset)} series"
    )
    require(fit.steps == options.total_steps, f"{fit.steps} steps of {options.total_steps} were trained")
    require(
        len(fit.history) == fit.epochs == options.max_epochs
        and all(np.isfinite(value) for epoch in fit.history for value in epoch.values()),
        f"the history {fit.history} does not have {options.max_epochs} epochs of finite losses",
    )
    adapter = case.tuned.backbone.adapter
    require(adapter is not None and adapter.num_parameters() > 0, "the predictor has no adapter")


@clause_of(ESTIMATOR_CHECKS)
def forecasts_are_gluonts_forecasts(case: EstimatorCase) -> None:
    """One forecast a series, in order, with item_id, start and shape as GluonTS has them."""
    from gluonts.model.forecast import QuantileForecast, SampleForecast

    predictor, dataset = case.tuned, case.dataset
    forecasts = list(predictor.predict(dataset, num_samples=4))
    require(len(forecasts) == len(dataset), f"{len(forecasts)} forecasts of {len(dataset)} series")
    samples = "samples" in predictor.backbone.capabilities
    for entry, forecast in zip(dataset, forecasts, strict=True):
        array = forecast.samples if isinstance(forecast, SampleForecast) else forecast.forecast_array
        require(
            isinstance(forecast, SampleForecast if samples else QuantileForecast), f"{type(forecast).__name__} came out"
        )
        require(forecast.item_id == entry["item_id"], f"forecast of {entry['item_id']} calls itself {forecast.item_id}")
        require(
            forecast.start_date == entry["start"] + len(entry["target"]), f"forecast starts at {forecast.start_date}"
        )
        require(array.shape[-1] == case.horizon == forecast.prediction_length, f"forecast has shape {array.shape}")
        require(np.isfinite(array).all(), "forecast is not finite")
        median = forecast.quantile(0.5)
        require(median.shape == (case.horizon,) and np.isfinite(median).all(), "forecast has no median")


@clause_of(ESTIMATOR_CHECKS)
def missing_values_and_short_series_are_forecast(case: EstimatorCase) -> None:
    """Series with gaps, and series of a few steps, are forecast like others."""
    target = case.dataset[0]["target"].copy()
    target[10:40:3] = np.nan
    dataset = [
        {**case.dataset[0], "target": target},
        {**case.dataset[1], "target": case.dataset[1]["target"][:3]},
        {**case.dataset[2], "target": np.append(case.dataset[2]["target"], np.float32(np.nan))},
    ]
    arrays = _arrays(case.tuned, dataset)
    require(all(np.isfinite(array).all() for array in arrays), "a forecast from a history with gaps is not finite")
    said = refusal(
        lambda: _arrays(case.tuned, [{**case.dataset[0], "target": np.full(20, np.nan, np.float32)}]),
        ValueError,
        "a series without any observed value",
    )
    require("item-0" in said, f"the refusal does not name the series: {said}")


@clause_of(ESTIMATOR_CHECKS)
def batches_make_no_difference(case: EstimatorCase) -> None:
    """Forecasts do not depend on how many series are forecast at a time."""
    from ..predictor import PeftPredictor

    predictor = case.tuned
    if "samples" in predictor.backbone.capabilities:
        raise SkipTest("sample paths share one stream of random numbers")
    alone = PeftPredictor(predictor.backbone, batch_size=1, device="cpu")
    for left, right in zip(_arrays(predictor, case.dataset), _arrays(alone, case.dataset), strict=True):
        found, expected = torch.from_numpy(left), torch.from_numpy(right)
        require(near(found, expected, 1e-3), f"batch_size changes forecasts ({apart(found, expected)})")


@clause_of(ESTIMATOR_CHECKS)
def stored_predictor_forecasts_the_same(case: EstimatorCase) -> None:
    """gluonts.model.Predictor opens what serialize wrote, JSON and safetensors alone, with the same forecasts."""
    from gluonts.model.predictor import Predictor

    with tempfile.TemporaryDirectory() as folder:
        case.tuned.serialize(Path(folder))
        suffixes = {path.suffix for path in Path(folder).rglob("*") if path.is_file()}
        require(suffixes <= {".json", ".safetensors"}, f"a stored predictor has files of type {sorted(suffixes)}")
        torch.manual_seed(1234)
        again = Predictor.deserialize(Path(folder), device="cpu")
    require(
        _equal(_arrays(again, case.dataset), _arrays(case.tuned, case.dataset)),
        "a stored predictor has other forecasts",
    )
    require(again.fit == case.tuned.fit, "a stored predictor has another record of its training")


@clause_of(ESTIMATOR_CHECKS)
def exported_model_needs_no_adapter(case: EstimatorCase) -> None:
    """export writes base and adapter, merged, as a checkpoint that the family loads with the same weights."""
    predictor = case.tuned
    merged = copy.deepcopy(predictor.backbone)
    assert merged.adapter is not None
    if not merged.adapter.mergeable:
        raise SkipTest(f"adapter {merged.adapter!r} cannot be merged")
    merged.adapter.merge()
    with tempfile.TemporaryDirectory() as folder:
        predictor.export(folder)
        with quiet():
            again = type(merged).from_checkpoint(
                folder,
                prediction_length=merged.prediction_length,
                context_length=merged.context_length,
                **merged.options,
            )
    found, expected = again.network.state_dict(), merged.network.state_dict()
    require(same(found, expected), f"the exported model loads with other weights: {differing(expected, found)}")


@clause_of(ESTIMATOR_CHECKS)
def estimator_can_be_encoded(case: EstimatorCase) -> None:
    """An estimator makes the way to JSON and back with all of its arguments."""
    from gluonts.core import serde

    estimator = case.make()
    again = serde.load_json(serde.dump_json(estimator))
    require(type(again) is type(estimator), f"decoding gives a {type(again).__name__}")
    require(_attributes(again) == _attributes(estimator), f"decoding gives other arguments: {again!r}")
    require(repr(again) == repr(estimator), f"decoding gives {again!r}")


@clause_of(ESTIMATOR_CHECKS)
def hyperparameters_build_the_same(case: EstimatorCase) -> None:
    """from_hyperparameters builds what the constructor builds, and refuses names it does not know."""
    built = case.estimator.from_hyperparameters(**case.options)
    require(type(built) is case.estimator, f"from_hyperparameters gives a {type(built).__name__}")
    require(_attributes(built) == _attributes(case.make()), "from_hyperparameters gives other arguments")
    wrong = partial(case.estimator.from_hyperparameters, **case.options, max_epoch=3)
    said = refusal(wrong, ValueError, "the hyperparameter max_epoch")
    require("max_epochs" in said, f"the refusal does not offer the near name: {said}")


@clause_of(ESTIMATOR_CHECKS)
def wrong_arguments_are_refused(case: EstimatorCase) -> None:
    """Arguments that cannot be used are refused by name before anything is loaded."""
    for name, value in (
        ("prediction_length", 0),
        ("max_epochs", 0),
        ("batch_size", -1),
        ("gate", "maybe"),
        ("seed", -1),
    ):
        said = refusal(partial(case.make, **{name: value}), ValueError, f"{name}={value!r}")
        require(name in said, f"the refusal of {name}={value!r} does not name it: {said}")
    refusal(partial(case.make, adapter="no-such-adapter"), ValueError, "adapter='no-such-adapter'")


@clause_of(ESTIMATOR_CHECKS)
def unusable_data_are_refused(case: EstimatorCase) -> None:
    """Data without entries, with too short, missing or infinite series are refused, not trained on."""
    entry = case.dataset[0]
    infinite = entry["target"].copy()
    infinite[3] = np.inf
    for what, dataset in {
        "an empty dataset": [],
        "series that are too short": [{**entry, "target": entry["target"][:2]}],
        "series without an observed value": [{**entry, "target": np.full(80, np.nan, np.float32)}],
        "an infinite value": [{**entry, "target": infinite}],
    }.items():
        refusal(partial(case.train, dataset=dataset), ValueError, what)


@clause_of(ESTIMATOR_CHECKS)
def seed_decides_training(case: EstimatorCase) -> None:
    """The same seed gives the same losses and forecasts, another seed others."""
    torch.manual_seed(99)
    again, first = case.train(), case.tuned
    assert again.fit is not None
    assert first.fit is not None
    require(again.fit.history == first.fit.history, "the same seed gives other losses")
    require(_equal(_arrays(again, case.dataset), _arrays(first, case.dataset)), "the same seed gives other forecasts")
    other = case.train(seed=int(case.options.get("seed", 0)) + 1)
    assert other.fit is not None
    require(other.fit.history != first.fit.history, "another seed gives the same losses; is the seed used?")


@clause_of(ESTIMATOR_CHECKS)
def interrupted_run_goes_on(case: EstimatorCase) -> None:
    """A run that stops after an epoch and is resumed with ckpt_path="last" ends as an undisturbed one."""
    from lightning.pytorch.callbacks import Callback

    class Interruption(Exception):  # noqa: N818
        pass

    class Interrupt(Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                raise Interruption

    extra = dict(case.options.get("trainer_kwargs") or {})
    broken = {**extra, "callbacks": [*extra.get("callbacks", []), Interrupt()]}
    with tempfile.TemporaryDirectory() as folder:
        interrupted = partial(case.train, folder=folder, trainer_kwargs=broken)
        refusal(interrupted, Interruption, "an exception in a callback")
        resumed = case.train(folder=folder, trainer_kwargs=extra, ckpt_path="last")
    assert resumed.fit is not None
    assert case.tuned.fit is not None
    require(resumed.fit.history == case.tuned.fit.history, "a resumed run has other losses")
    require(
        _equal(_arrays(resumed, case.dataset), _arrays(case.tuned, case.dataset)), "a resumed run has other forecasts"
    )


@clause_of(ESTIMATOR_CHECKS)
def zero_shot_needs_no_training(case: EstimatorCase) -> None:
    """Adapter "none" hands over the pretrained model; without a trained head it is refused, and says what to do."""
    if case.tuned.backbone.untrained:
        said = refusal(partial(case.train, adapter="none"), ValueError, "adapter 'none' without a trained head")
        require("head" in said, f"the refusal does not name the head that is to be trained: {said}")
        return
    predictor = case.train(adapter="none")
    fit = predictor.fit
    assert fit is not None
    assert case.tuned.fit is not None
    require(fit.steps == 0, f"adapter 'none' trains {fit.steps} steps")
    require(fit.gate.zero_shot == case.tuned.fit.gate.zero_shot, "the zero-shot score depends on the adapter")
    require(
        not _equal(_arrays(predictor, case.dataset), _arrays(case.tuned, case.dataset)), "training changed no forecast"
    )


@clause_of(ESTIMATOR_CHECKS)
def dynamic_features_train_and_forecast(case: EstimatorCase) -> None:
    """Where the family takes covariates, GluonTS's fields for them are used in training as in forecasting."""
    if "covariates" not in case.tuned.backbone.capabilities:
        raise SkipTest("the family takes no covariates")
    generator = np.random.default_rng(0)
    dataset = [
        {
            **entry,
            "feat_dynamic_real": generator.standard_normal((2, len(entry["target"]) + case.horizon)).astype(np.float32),
            "past_feat_dynamic_real": generator.standard_normal((1, len(entry["target"]))).astype(np.float32),
        }
        for entry in case.dataset
    ]
    predictor = case.train(dataset=dataset)
    require(predictor.gate != case.tuned.gate, "dynamic features do not change the scores of training")
    require(
        not _equal(_arrays(predictor, dataset), _arrays(predictor, case.dataset)),
        "dynamic features do not change the forecasts",
    )
    short = [{**entry, "feat_dynamic_real": entry["feat_dynamic_real"][:, : -case.horizon]} for entry in dataset]
    refusal(lambda: _arrays(predictor, short), ValueError, "feat_dynamic_real that ends before the forecast")


@clause_of(ESTIMATOR_CHECKS)
def multivariate_targets_train_and_forecast(case: EstimatorCase) -> None:
    """Where the family is multivariate, targets of shape (D, T) give forecasts with a dimension more."""
    if "multivariate" not in case.tuned.backbone.capabilities:
        raise SkipTest("the family is univariate")
    targets = [entry["target"] for entry in case.dataset]
    dataset = [
        {**entry, "target": np.stack([entry["target"], targets[i - 1], targets[i - 2]])}
        for i, entry in enumerate(case.dataset)
    ]
    for forecast in case.train(dataset=dataset).predict(dataset, num_samples=4):
        array = getattr(forecast, "samples", None)
        array = forecast.forecast_array if array is None else array
        require(
            array.shape[1:] == (case.horizon, 3) and np.isfinite(array).all(),
            f"multivariate forecast has shape {array.shape}",
        )
