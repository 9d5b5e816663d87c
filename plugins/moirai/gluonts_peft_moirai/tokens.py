"""From batches of windows to the tokens of Moirai.

uni2ts packs the patches of all variates of a series into one sequence, told apart by identities. Here the same tokens
stand in a rectangle (batch, variate, patch): what uni2ts finds by comparing all pairs of tokens is then a sum over an
axis, and a pass of the network starts from a few large tensors. Source: ``uni2ts.model.moirai.forecast._convert``.

Steps before the first observed one are padding: no token attends to a patch of nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Tokens", "Window", "encode", "impute", "tokens", "window"]


@dataclass(frozen=True)
class Window:
    """History and horizon of all variates of a batch.

    Parameters
    ----------
    values
        Shape ``(batch, variates, steps)``: targets, then features that are known in the future, then those that are
        not; 0 where not observed. The last ``horizon`` steps are the horizon.
    observed
        Same shape, bool.
    horizon
        Steps of the horizon.
    targets, past_only
        Number of variates at the front to be forecast, and at the back without values in the horizon.
    labelled
        Whether the targets' values in the horizon are there.
    """

    values: Tensor
    observed: Tensor
    horizon: int
    targets: int
    past_only: int
    labelled: bool


@dataclass(frozen=True)
class Tokens:
    """Patches of all variates of a batch.

    Parameters
    ----------
    values, observed
        Shape ``(batch, variates, patches, patch_size)``.
    sample_id
        Shape ``(batch, variates, patches)``: 1, or 0 for patches that do not exist; the two kinds do not attend to
        each other.
    time_id
        Shape ``(batch, patches)``: position in time, from the first patch with an observed target.
    history
        Patches of the history; those of the horizon follow.
    targets
        Number of variates at the front to be forecast.
    """

    values: Tensor
    observed: Tensor
    sample_id: Tensor
    time_id: Tensor
    history: int
    targets: int

    def loc_scale(self, known: int, scaling: bool) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each variate, shapes ``(batch, variates, 1, 1)``.

        Parameters
        ----------
        known
            Patches of the targets that count; of features all count.
        scaling
            Whether the network scales at all; else 0 and 1.
        """
        if not scaling:
            zero = self.values.new_zeros((*self.values.shape[:2], 1, 1))
            return zero, zero + 1.0
        mask = self.observed.double()
        mask[:, : self.targets, known:] = 0.0
        count = mask.sum((-1, -2), keepdim=True)
        values = self.values.double()
        loc = (values * mask).sum((-1, -2), keepdim=True) / count.clamp_min(1.0)
        variance = ((values - loc) ** 2 * mask).sum((-1, -2), keepdim=True) / (count - 1.0).clamp_min(1.0)
        return loc.float(), (variance + 1e-5).sqrt().float()

    def fill(self, values: Tensor, at: int) -> Tokens:
        """Take patches of the horizon as known: ``values`` of shape ``(batch, targets, n, patch_size)`` from ``at``."""
        span = slice(at, at + values.shape[2])
        filled, observed = self.values.clone(), self.observed.clone()
        filled[:, : self.targets, span] = values
        observed[:, : self.targets, span] = True
        return replace(self, values=filled, observed=observed)

    def repeat(self, count: int) -> Tokens:
        """Repeat each row: ``(batch * count, ...)``."""
        return replace(
            self,
            **{
                name: getattr(self, name).repeat_interleave(count, 0)
                for name in ("values", "observed", "sample_id", "time_id")
            },
        )


def window(batch: Mapping[str, Tensor], context_length: int, horizon: int, *, earlier: bool = False) -> Window:
    """Return history and horizon of a batch.

    Parameters
    ----------
    batch
        As :class:`gluonts_peft.backbone.Backbone` describes it.
    context_length
        Most steps of history.
    horizon
        Steps to forecast.
    earlier
        Take the last ``horizon`` steps of the history for the horizon.
    """
    values, observed = (_variates(batch[name]) for name in ("past_target", "past_observed_values"))
    targets, past = values.shape[1], values.shape[2]
    labelled = earlier or "future_target" in batch
    columns = [(values, observed)]
    if not earlier:
        label = ("future_target", "future_observed_values")
        ends = [_variates(batch[n]) if labelled else values.new_zeros((*values.shape[:2], horizon)) for n in label]
        columns = [(torch.cat([values, ends[0]], 2), torch.cat([observed, ends[1]], 2))]
    known = past if earlier else past + horizon
    if "feat_dynamic_real" in batch:
        names = ("feat_dynamic_real", "observed_feat_dynamic_real")
        columns.append(tuple(_variates(batch[name])[..., :known] for name in names))  # type: ignore[arg-type]
    past_only = 0
    if "past_feat_dynamic_real" in batch:
        names = ("past_feat_dynamic_real", "past_observed_feat_dynamic_real")
        ended = max(known - horizon, 0)
        pairs = [functional.pad(_variates(batch[name])[..., :ended], (0, known - ended)) for name in names]
        columns.append((pairs[0], pairs[1]))
        past_only = pairs[0].shape[1]
    values, observed = (torch.cat([pair[i] for pair in columns], 1) for i in (0, 1))
    # At least one step of history, be it padding.
    start, missing = max(known - horizon - context_length, 0), max(horizon + 1 - known, 0)
    values, observed = (functional.pad(x[..., start:], (missing, 0)) for x in (values, observed))
    return Window(torch.where(observed > 0, values, 0.0), observed > 0, horizon, targets, past_only, labelled)


def _variates(x: Tensor) -> Tensor:
    """Return ``(batch, variates, steps)`` of ``(batch, steps)`` or ``(batch, steps, variates)``."""
    return x[:, None] if x.ndim == 2 else x.transpose(1, 2)


def tokens(given: Window, patch_size: int) -> Tokens:
    """Cut a window into patches: history ends, and the horizon starts, at a border of patches."""
    steps, targets = given.values.shape[-1] - given.horizon, given.targets
    padding = (-steps % patch_size, -given.horizon % patch_size)
    values, observed = (
        functional.pad(x, padding).unflatten(-1, (-1, patch_size)) for x in (given.values, given.observed)
    )
    history = (steps + padding[0]) // patch_size
    count = values.shape[2]
    started = observed[:, :targets].any(-1).any(1).long().cummax(1).values
    past = (started[:, :history].cumsum(1) - 1).clamp_min(0)
    future = past[:, -1:] + 1 + torch.arange(count - history, device=past.device)
    sample_id = started[:, None].repeat(1, values.shape[1], 1)
    if not given.labelled:
        sample_id[:, :targets, history:] = 1
    sample_id[:, targets:, history:] = 1
    if given.past_only:
        sample_id[:, -given.past_only :, history:] = 0
    return Tokens(values, observed, sample_id, torch.cat([past, future], 1), history, targets)


def impute(given: Window) -> Window:
    """Fill gaps with the mean of all that came before, as uni2ts does for the causal models on univariate targets.

    Within a gap, the mean counts the last observed value once for every step of the gap so far. Unlike uni2ts, which
    looks back to the start of the series, this sees the window alone. Source:
    ``gluonts.transform.CausalMeanValueImputation``.
    """
    if given.targets > 1:
        return given
    values, observed = given.values[:, 0], given.observed[:, 0]
    step = torch.arange(values.shape[1], device=values.device)
    last = torch.where(observed, step, 0).cummax(1).values
    begun = observed.long().cummax(1).values
    forward = values.gather(1, last).double()
    before = torch.cat([forward.new_zeros(len(values), 1), forward.cumsum(1)[:, :-1]], 1)
    age = (begun.cumsum(1) - 1).clamp_min(1)
    filled = torch.where(observed | (begun == 0), values, (before / age).to(values.dtype))
    return replace(given, values=torch.cat([filled[:, None], given.values[:, 1:]], 1))


def encode(network: nn.Module, embedded: Tensor, given: Tokens, *, causal: bool) -> Tensor:
    """Run the transformer on ``embedded``, shape ``(batch, variates, n, d_model)``, the first ``n`` patches."""
    variates, count = embedded.shape[1:3]
    sample = given.sample_id[:, :, :count].flatten(1)
    time = given.time_id[:, None, :count].expand(-1, variates, -1).flatten(1)
    variate = torch.arange(variates, device=time.device).repeat_interleave(count).expand(len(time), -1)
    mask = sample[:, :, None] == sample[:, None]
    if causal:
        mask = mask & (time[:, None] <= time[:, :, None])
    encoded: Tensor = network.encoder(embedded.flatten(1, 2), mask, time_id=time, var_id=variate)  # type: ignore
    apart: Tensor = encoded.unflatten(1, (variates, count))
    return apart
