"""Clauses about computing: losses, forecasts, features and reconstructions of a loaded backbone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from unittest import SkipTest

import torch
from torch import Tensor

from ..errors import unknown
from ..units import EQUIVARIANCE
from .cases import (
    BackboneCase,
    apart,
    at_once,
    clone,
    differing,
    forecast_of,
    loss_of,
    make_batch,
    near,
    rows,
    same,
    traits,
    without_start,
)
from .contract import Clause, ContractError, clause_of, refusal, require

__all__ = ["COMPUTING_CHECKS"]

COMPUTING_CHECKS: dict[str, Clause] = {}


@clause_of(COMPUTING_CHECKS)
def copies_are_independent(case: BackboneCase) -> None:
    """copy.deepcopy gives a backbone that computes the same and has its own weights."""
    twin = case.fresh()
    before = loss_of(case.base, case.batch)
    require(torch.equal(loss_of(twin, case.batch), before), "a deep copy has another loss than the original")
    with torch.no_grad():
        for parameter in twin.network.parameters():
            parameter.add_(0.1)
    require(
        torch.equal(loss_of(case.base, case.batch), before), "changing the weights of a deep copy changes the original"
    )
    require(
        not torch.equal(loss_of(twin, case.batch), before),
        "changing the weights of a deep copy does not change its loss: the copy computes with other weights than its"
        " own",
    )


@clause_of(COMPUTING_CHECKS)
def loss_is_one_number_a_window(case: BackboneCase) -> None:
    """loss(batch) has shape (batch,), is finite, and is deterministic in evaluation mode."""
    for size in (4, 1):
        batch = make_batch(case.base, size=size)
        torch.manual_seed(1)
        found = loss_of(case.base, batch)
        torch.manual_seed(2)
        again = loss_of(case.base, batch)
        require(
            found.shape == (size,),
            f"loss of {size} windows has shape {tuple(found.shape)}; return one number a window, without a mean over"
            " them",
        )
        require(found.isfinite().all(), f"loss is not finite: {found.tolist()}")
        require(
            torch.equal(found, again),
            f"loss depends on torch's global seed in evaluation mode ({apart(found, again)}); the zero-shot gate"
            " compares losses, so decide by the batch, or draw only while training",
        )


@clause_of(COMPUTING_CHECKS)
def loss_is_differentiable(case: BackboneCase) -> None:
    """In training mode the loss has finite gradients that reach the network."""
    backbone = case.fresh()
    backbone.train()
    backbone.network.requires_grad_(True)
    found = backbone.loss(case.batch)
    require(
        found.shape == (4,) and found.requires_grad, "loss has no gradient in training mode; remove detach or no_grad"
    )
    found.mean().backward()
    gradients = {name: p.grad for name, p in backbone.network.named_parameters() if p.grad is not None}
    require(any(g.any() for g in gradients.values()), "no gradient reaches the network")
    broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    require(not broken, f"the gradient of {broken[:1]} is not finite; mask missing values before, not after, dividing")


@clause_of(COMPUTING_CHECKS)
def loss_of_a_window_is_its_own(case: BackboneCase) -> None:
    """The loss of a window depends neither on its position in the batch nor on the other windows."""
    found = loss_of(case.base, case.batch)
    order = torch.tensor([2, 0, 3, 1])
    permuted = loss_of(case.base, rows(case.batch, order))
    require(
        near(permuted, found[order]),
        f"permuting the windows does not permute their losses ({apart(permuted, found[order])})",
    )
    alone = torch.cat([loss_of(case.base, rows(case.batch, slice(i, i + 1))) for i in range(4)])
    require(
        near(alone, found),
        f"windows have another loss alone than in a batch ({apart(alone, found)}); take no mean or maximum over"
        " windows",
    )


@clause_of(COMPUTING_CHECKS)
def loss_takes_missing_labels(case: BackboneCase) -> None:
    """A label with missing steps, even all but one, has a finite loss and finite gradients."""
    batch = dict(case.batch)
    observed = torch.zeros_like(batch["future_observed_values"])
    observed[:, 0] = 1.0
    observed[0] = batch["future_observed_values"][0]
    batch |= {"future_observed_values": observed, "future_target": batch["future_target"] * observed}
    backbone = case.fresh()
    backbone.network.requires_grad_(True)
    found = backbone.loss(batch)
    require(found.isfinite().all(), f"loss is not finite where one step of a label is observed: {found.tolist()}")
    found.mean().backward()
    broken = [n for n, p in backbone.network.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    require(not broken, f"the gradient of {broken[:1]} is not finite where most of a label is missing")
    whole = loss_of(case.base, case.batch)
    require(
        near(found[:1].detach(), whole[:1]),
        "what is missing in the labels of other windows changes the loss of the first",
    )


@clause_of(COMPUTING_CHECKS)
def masked_values_have_no_influence(case: BackboneCase) -> None:
    """Where the observed mask is 0, the value affects neither the loss nor the forecast."""
    batch = make_batch(case.base, missing=0.3)
    changed = dict(batch)
    for values, mask in (("past_target", "past_observed_values"), ("future_target", "future_observed_values")):
        changed[values] = batch[values] + 1000.0 * (1.0 - batch[mask])
    found, expected = loss_of(case.base, changed), loss_of(case.base, batch)
    require(
        near(found, expected),
        f"loss changes with values that were not observed ({apart(found, expected)}); use the observed masks of the"
        " history and of the label",
    )
    if not case.base.untrained:
        found, expected = forecast_of(case.base, changed).values, forecast_of(case.base, batch).values
        require(
            near(found, expected),
            f"forecasts change with values that were not observed ({apart(found, expected)}); use past_observed_values",
        )


@clause_of(COMPUTING_CHECKS)
def missing_steps_have_an_influence(case: BackboneCase) -> None:
    """A missing step differs from an observed zero."""
    batch = make_batch(case.base, missing=0.3)
    seen = batch | {"past_observed_values": torch.ones_like(batch["past_observed_values"])}
    require(
        not torch.equal(loss_of(case.base, seen), loss_of(case.base, batch)),
        "loss is the same whether zeros were observed or are missing; past_observed_values is not used",
    )


@clause_of(COMPUTING_CHECKS)
def padding_has_no_influence(case: BackboneCase) -> None:
    """Unobserved leading steps change nothing, so a series does not depend on longer ones in its batch."""
    steps = case.base.past_length // 3
    if steps == 0:
        raise SkipTest(f"past_length {case.base.past_length} leaves no room for padding")
    batch = make_batch(case.base, missing=0.0)
    mask = torch.ones_like(batch["past_observed_values"])
    mask[:, :steps] = 0.0
    padded = batch | {"past_observed_values": mask, "past_target": batch["past_target"] * mask}
    short = without_start(batch, steps)
    hint = "pad and mask every history alike, or drop leading steps that no window observes"
    found, expected = loss_of(case.base, padded), loss_of(case.base, short)
    require(near(found, expected, 1e-3), f"padding on the left changes the loss ({apart(found, expected)}); {hint}")
    if not case.base.untrained and not case.samples:
        found, expected = forecast_of(case.base, padded).values, forecast_of(case.base, short).values
        require(
            near(found, expected, 1e-3), f"padding on the left changes forecasts ({apart(found, expected)}); {hint}"
        )


@clause_of(COMPUTING_CHECKS)
def forecast_has_the_promised_shape(case: BackboneCase) -> None:
    """forecast(batch) is finite float32 of shape (batch, n, prediction_length), with levels as declared."""
    case.forecasts()
    base = case.base
    for size in (4, 1):
        found = forecast_of(base, make_batch(base, size=size), count=5)
        values, levels = found.values, found.levels
        count = 5 if levels is None else len(levels)
        require(
            tuple(values.shape) == (size, count, base.prediction_length),
            f"forecast has shape {tuple(values.shape)}, expected {(size, count, base.prediction_length)}: (batch,"
            f" {'num_samples' if levels is None else 'levels'}, prediction_length)",
        )
        require(values.dtype == torch.float32, f"forecast has type {values.dtype}; make it float32")
        require(not values.requires_grad, "forecast carries gradients in inference mode")
        require(values.isfinite().all(), "forecast is not finite")
        kind = "samples" if levels is None else "quantiles"
        require(kind in base.capabilities, f"forecast returns {kind}, but capabilities are {sorted(base.capabilities)}")
        if levels is not None:
            require(
                list(levels) == sorted(set(levels)) and levels[0] > 0 and levels[-1] < 1,
                f"levels {levels} do not rise between 0 and 1",
            )
            low, high = values[:, 0].mean(), values[:, -1].mean()
            require(
                low <= high, f"the lowest quantile {low:.4g} lies above the highest {high:.4g} on average: order them"
            )


@clause_of(COMPUTING_CHECKS)
def forecast_takes_short_and_odd_histories(case: BackboneCase) -> None:
    """Very short histories, constant ones, and those with a single observed step have finite forecasts."""
    case.forecasts()
    base = case.base
    batches = {
        f"histories of {steps} steps": make_batch(base, past=steps) for steps in (1, 2, 7) if steps <= base.past_length
    }
    whole = make_batch(base, missing=0.0)
    for name, step in (("only the last step observed", -1), ("only the first step observed", 0)):
        mask = torch.zeros_like(whole["past_observed_values"])
        mask[:, step] = 1.0
        batches[name] = whole | {"past_observed_values": mask, "past_target": whole["past_target"] * mask}
    for value in (0.0, 5.0):
        target = torch.full_like(whole["past_target"], value)
        batches[f"constant histories of {value:g}"] = whole | {"past_target": target}
    for name, batch in batches.items():
        try:
            found = forecast_of(base, batch).values
        except Exception as error:
            raise ContractError(f"{name} cannot be forecast: {type(error).__name__}: {error}; pad them") from error
        require(found.isfinite().all(), f"{name} have forecasts that are not finite; guard the scale against 0")
        loss = loss_of(base, batch)
        require(loss.isfinite().all(), f"{name} have a loss that is not finite; guard the scale against 0")


@clause_of(COMPUTING_CHECKS)
def forecast_of_a_window_is_its_own(case: BackboneCase) -> None:
    """The quantiles of a window do not depend on the other windows of the batch."""
    case.forecasts()
    if case.samples:
        raise SkipTest("sample paths share one stream of random numbers")
    found = forecast_of(case.base, case.batch).values
    alone = torch.cat([forecast_of(case.base, rows(case.batch, slice(i, i + 1))).values for i in range(4)])
    require(near(alone, found), f"windows have another forecast alone than in a batch ({apart(alone, found)})")


@clause_of(COMPUTING_CHECKS)
def forecast_does_not_see_the_label(case: BackboneCase) -> None:
    """The forecast does not depend on the label in the batch."""
    case.forecasts()
    base, generator = case.base, torch.Generator()
    expected = forecast_of(base, case.batch).values
    for offset in (0.0, 50.0):
        batch = case.batch | {"future_target": case.batch["future_target"] + offset}
        with base.inference():
            found = base.forecast(batch, num_samples=2, generator=generator.manual_seed(3)).values
        require(
            torch.equal(found, expected),
            f"forecasts change with future_target in the batch ({apart(found, expected)}); use the history alone",
        )


@clause_of(COMPUTING_CHECKS)
def forecast_sees_the_history(case: BackboneCase) -> None:
    """The forecast depends on the history."""
    case.forecasts()
    other = make_batch(case.base, seed=1)
    require(
        not near(forecast_of(case.base, other).values, forecast_of(case.base, case.batch).values),
        "forecasts do not depend on past_target",
    )


@clause_of(COMPUTING_CHECKS)
def generator_decides_the_forecast(case: BackboneCase) -> None:
    """The generator alone decides: same seed, same forecast; another seed, other sample paths."""
    case.forecasts()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = forecast_of(case.base, case.batch, seed=3).values
    require(
        torch.equal(torch.get_rng_state(), state),
        "forecast draws from torch's global generator; draw from the generator that it is given",
    )
    torch.manual_seed(2)
    again, other = (forecast_of(case.base, case.batch, seed=seed).values for seed in (3, 4))
    require(torch.equal(first, again), f"one seed gives two forecasts ({apart(first, again)}); use the generator alone")
    if case.samples:
        require(not torch.equal(first, other), "sample paths are the same under another seed; use the generator")
    else:
        require(torch.equal(first, other), "quantiles depend on the generator; declare 'samples' or compute them")


@clause_of(COMPUTING_CHECKS)
def forecast_changes_nothing(case: BackboneCase) -> None:
    """Forecasting changes no weights, buffers, modes or gradients."""
    case.forecasts()
    backbone = case.fresh()
    backbone.network.train()
    state = clone(backbone.state_dict())
    modes = [module.training for module in backbone.modules()]
    batch = clone(case.batch)
    forecast_of(backbone, batch)
    require(
        same(backbone.state_dict(), state),
        f"forecast changes {differing(backbone.state_dict(), state)} of the state; keep what a call needs in variables",
    )
    require([module.training for module in backbone.modules()] == modes, "forecast changes the mode of modules")
    require(not any(p.requires_grad for p in backbone.parameters()), "forecast makes parameters trainable")
    require(same(batch, case.batch), "forecast changes the batch it is given; work on copies")
    torch.manual_seed(0)
    before = loss_of(backbone, case.batch)
    require(torch.equal(before, loss_of(case.base, case.batch)), "the loss is another one after a forecast")


@clause_of(COMPUTING_CHECKS)
def threads_forecast_the_same(case: BackboneCase) -> None:
    """Concurrent threads, each with its own reader and generator, get the forecasts of a single one."""
    case.forecasts()
    backbone = case.fresh()
    before = traits(backbone)
    batches = [case.batch, make_batch(case.base, seed=1, past=max(1, case.base.past_length // 2))]

    def forecasts() -> list[Tensor]:
        with backbone.reading() as reader:
            return [forecast_of(reader, batch).values for batch in batches]

    alone = forecasts()
    for found in at_once(forecasts):
        require(
            all(torch.equal(left, right) for left, right in zip(found, alone, strict=True)),
            "threads that forecast at once get other forecasts than one alone; keep what a call needs in variables",
        )
    require(not (found := traits(backbone).differing(before)), f"a reader changes {found} of the model that it is of")


@clause_of(COMPUTING_CHECKS)
def untrained_head_refuses_to_forecast(case: BackboneCase) -> None:
    """Without a trained head forecasting is refused, and the message says what to do."""
    if "head" not in case.base.untrained:
        raise SkipTest("the checkpoint brings a trained head")
    said = refusal(partial(forecast_of, case.fresh(), case.batch), ValueError, "a forecast without a trained head")
    require("head" in said, f"the refusal does not name the head that is to be trained: {said}")


@clause_of(COMPUTING_CHECKS)
def features_are_as_declared(case: BackboneCase) -> None:
    """features(batch) has shape (batch, patches, d_model) where declared, and is refused where not."""
    past = {name: value for name, value in case.batch.items() if not name.startswith("future_")}
    with case.base.inference():
        if "features" not in case.base.capabilities:
            refusal(partial(case.base.features, past), NotImplementedError, "features() without the capability")
            return
        found = case.base.features(past)
    require(
        found.ndim == 3 and len(found) == 4 and found.isfinite().all(),
        f"features have shape {tuple(found.shape)}; return finite numbers of shape (batch, patches, d_model)",
    )
    require(not near(found[0], found[1]), "features of two different windows are the same")


@clause_of(COMPUTING_CHECKS)
def reconstruction_is_as_declared(case: BackboneCase) -> None:
    """reconstruct(batch) has the shape of past_target where declared, and is refused where not."""
    past = {name: value for name, value in case.batch.items() if not name.startswith("future_")}
    with case.base.inference():
        if "reconstruct" not in case.base.capabilities:
            refusal(partial(case.base.reconstruct, past), NotImplementedError, "reconstruct() without the capability")
            return
        found = case.base.reconstruct(past)
        masked = past["past_target"] + 1000.0 * (1.0 - past["past_observed_values"])
        again = case.base.reconstruct(past | {"past_target": masked})
    require(
        found.shape == past["past_target"].shape and found.isfinite().all(),
        f"reconstruction has shape {tuple(found.shape)}; return finite numbers of shape"
        f" {tuple(past['past_target'].shape)}",
    )
    require(near(again, found), f"values that were not observed change the reconstruction ({apart(again, found)})")


@clause_of(COMPUTING_CHECKS)
def dynamic_features_are_used(case: BackboneCase) -> None:
    """Where the family takes covariates, they affect loss and forecast, and masked values of them do not."""
    if "covariates" not in case.base.capabilities:
        raise SkipTest("the family takes no covariates")
    base, batch = case.base, make_batch(case.base, features=True)
    found = loss_of(base, batch)
    require(found.shape == (4,) and found.isfinite().all(), f"loss with dynamic features is {found.tolist()}")
    for name, mask in (
        ("feat_dynamic_real", "observed_feat_dynamic_real"),
        ("past_feat_dynamic_real", "past_observed_feat_dynamic_real"),
    ):
        other = batch | {name: batch[name].flip(1)}
        require(not torch.equal(loss_of(base, other), found), f"the loss does not depend on {name}")
        hidden = batch | {name: batch[name] + 1000.0 * (1.0 - batch[mask])}
        require(near(loss_of(base, hidden), found), f"the loss depends on values of {name} that were not observed")
        if base.untrained:
            continue
        values = forecast_of(base, batch).values
        require(
            tuple(values.shape)[0::2] == (4, base.prediction_length) and values.isfinite().all(),
            f"forecast with dynamic features has shape {tuple(values.shape)} or is not finite",
        )
        require(not torch.equal(forecast_of(base, other).values, values), f"the forecast does not depend on {name}")


@clause_of(COMPUTING_CHECKS)
def multivariate_targets_are_taken(case: BackboneCase) -> None:
    """Where the family is multivariate, targets (batch, past, D) give values of shape (batch, n, horizon, D)."""
    if "multivariate" not in case.base.capabilities:
        raise SkipTest("the family is univariate")
    base, batch = case.base, make_batch(case.base, dimensions=3)
    found = loss_of(base, batch)
    require(
        found.shape == (4,) and found.isfinite().all(),
        f"loss of multivariate windows has shape {tuple(found.shape)} or is not finite; return one number a window",
    )
    alone = torch.cat([loss_of(base, rows(batch, slice(i, i + 1))) for i in range(4)])
    require(near(alone, found), f"multivariate windows have another loss alone than in a batch ({apart(alone, found)})")
    case.forecasts()
    values = forecast_of(base, batch).values
    shape = (4, values.shape[1], base.prediction_length, 3)
    require(
        tuple(values.shape) == shape and values.isfinite().all(),
        f"multivariate forecast has shape {tuple(values.shape)}, expected {shape}, or is not finite",
    )


# Pairs of scale and shift, the shift in spreads of the window, whose answers must agree once they are undone.
_ORDINARY, _FAR = (1.0, 0.0), (2.0**12, -1e6)
_SCALED = [(_ORDINARY, (scale, 0.0)) for scale in (0.25, 2.0**-30, 2.0**40)]
_MOVED = {
    "affine": [*_SCALED, (_ORDINARY, (1.0, 30.0)), (_ORDINARY, (1.0, 1e9)), (_ORDINARY, (1e-9, -1e7))],
    "scale": [*_SCALED, (_FAR, (1e-9, 1e9))],
    "none": [(_FAR, (1e-9, 1e9)), (_FAR, (2.0**40, 3.0))],
}


@clause_of(COMPUTING_CHECKS)
def scale_and_shift_are_followed(case: BackboneCase) -> None:
    """Forecasts, losses and reconstructions are equivariant to scale and shift, as `equivariance` declares."""
    base = case.base
    require(base.equivariance in EQUIVARIANCE, unknown("equivariance", str(base.equivariance), EQUIVARIANCE))
    batch = make_batch(base, missing=0.0)
    spread = batch["past_target"].double().std(1, keepdim=True, correction=0)

    def answers(scale: float, shift: float) -> Iterator[tuple[str, Tensor]]:
        given = dict(batch)
        for name in ("past_target", "future_target"):
            given[name] = (scale * (batch[name].double() + shift * spread)) * batch[
                name.replace("target", "observed_values")
            ]
        found = loss_of(base, given).double()
        yield "loss", found - (math.log(scale) if base.density else 0.0)
        if not base.untrained:
            values = forecast_of(base, given).values.double()
            yield "forecast", (values / scale / spread[:, None]) - shift
        if "reconstruct" in base.capabilities:
            with base.inference():
                values = base.reconstruct({k: v for k, v in given.items() if k.startswith("past_")}).double()
            yield "reconstruction", values / scale / spread - shift

    for first, second in _MOVED[base.equivariance]:
        for (what, expected), (_, found) in zip(answers(*first), answers(*second), strict=True):
            require(
                near(found, expected, 1e-3),
                f"with equivariance {base.equivariance!r}, the {what} of windows times {second[0]:g} and moved by"
                f" {second[1]:g} spreads is another than that of times {first[0]:g} and {first[1]:g}"
                f" ({apart(found, expected)}, in spreads); divide by a scale of the history, set density = True if the"
                " loss is minus a log density, or declare less",
            )
