"""Chronos-2 as a backbone: quantiles of one or several targets, with covariates.

The network is that of ``chronos-forecasting`` (Ansari et al. 2025, arXiv 2510.15821); with adapter ``"none"`` forecasts
equal ``Chronos2Pipeline``'s to float rounding. A window is a *group* of rows: its targets, its covariates known in the
past only, and its covariates known in the future. Rows of a group see each other in the network's group attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.layers import (
    MHA,
    MLP,
    Chronos2LayerNorm,
    Chronos2RotaryEmbedding,
    GroupSelfAttention,
    TimeSelfAttention,
)
from chronos.utils import weighted_quantile
from torch import Tensor, nn
from torch.nn import functional

from gluonts_peft.backbone import Source, Trajectories, find_sites

from .base import ChronosBackbone

__all__ = ["Chronos2Backbone", "predict_patches", "quantile_loss"]

# The quantiles that go on beyond the own length: the official pipeline's.
_UNROLLED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

# Rows that attend together, of several groups: the fastest on a CPU.
_CHUNK = 32

# Added to the scores of attention where it may not look: far below any score, and finite in bfloat16 too.
_CLOSED = -1e30


_SITES = {
    MHA: {"q": "q", "k": "k", "v": "v", "o": "o"},
    MLP: {"ff_in": "wi", "ff_out": "wo"},
    Chronos2LayerNorm: {"norm": "."},
    TimeSelfAttention: {"attention_norm": "layer_norm"},
    GroupSelfAttention: {"attention_norm": "layer_norm"},
}


class Chronos2Backbone(ChronosBackbone):
    """Chronos-2: patches of all rows of a group in, quantiles of the targets out.

    Parameters
    ----------
    max_output_patches
        Patches that are forecast at once; the checkpoint's own number by default. More of them put the training on a
        longer label, as ``Chronos2Pipeline.fit`` does, at the price of a worse zero-shot forecast of that length.
    """

    pipeline = "Chronos2Pipeline"
    loads = Chronos2Model
    wraps = Chronos2Model
    capabilities = frozenset({"quantiles", "features", "covariates", "multivariate"})
    equivariance = "affine"
    ends = {"embedding": ("shared", "input_patch_embedding"), "head": ("output_patch_embedding",)}

    def __init__(
        self,
        network: nn.Module,
        *,
        prediction_length: int,
        source: Source,
        max_output_patches: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(network, prediction_length=prediction_length, source=source, **options)
        config = network.chronos_config
        if max_output_patches is None:
            max_output_patches = int(config.max_output_patches)  # type: ignore[union-attr, arg-type]
        if max_output_patches <= 0:
            raise ValueError(f"max_output_patches {max_output_patches} is not positive; name the patches of a forecast")
        self.patch_size = int(config.output_patch_size)  # type: ignore[union-attr, arg-type]
        self.own_prediction_length = max_output_patches * self.patch_size
        self.levels = tuple(float(level) for level in config.quantiles)  # type: ignore[union-attr]
        missing = [level for level in _UNROLLED if level not in self.levels]
        if missing and prediction_length > self.own_prediction_length:
            raise ValueError(
                f"prediction_length {prediction_length} exceeds the {self.own_prediction_length} steps of checkpoint"
                f" {source.checkpoint!r}, and forecasts roll on from quantiles that it does not have ({missing[0]});"
                " name a shorter one, or more max_output_patches"
            )

    @cached_property
    def _sites(self) -> dict[str, tuple[str, ...]]:
        return find_sites(self.network, _SITES) | self.ends

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the quantile loss of the official training, before its mean over the batch, shape ``(batch,)``.

        Twice the pinball loss of the scaled label, sum over levels, mean over the steps of the forecast patches
        (unobserved steps count as 0) and over the targets. Covariates are given and cost nothing.
        """
        label = _rows(batch["future_target"])[..., : self.own_prediction_length]
        observed = _rows(batch["future_observed_values"])[..., : self.own_prediction_length]
        history, future = _group(batch)
        if future is not None:
            future = future[..., : label.shape[-1]]
        predicted, norm = predict_patches(self.network, history, future, self._patches(label.shape[-1]))
        loss = quantile_loss(self.network, predicted, norm, label, observed)
        return loss.mean(1)

    def forecast(
        self, batch: Mapping[str, Tensor], *, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Trajectories:
        """Forecast quantiles. Beyond the own length, nine quantiles are taken as paths that go on, and the weighted
        quantiles of all that follows from them are kept: the official pipeline's rule.
        """
        history, future = _group(batch)
        targets = _rows(batch["past_target"]).shape[1]
        remaining = self.prediction_length
        blocks = [self._quantiles(history, future, remaining)]
        remaining -= blocks[-1].shape[-1]
        if remaining > 0:
            paths = [self.levels.index(level) for level in _UNROLLED]
            weights = torch.outer(_masses(_UNROLLED), _masses(self.levels)).flatten().to(history.device)
            limit = int(self.network.chronos_config.context_length)  # type: ignore[union-attr, arg-type]
            history = history[:, None].expand(-1, len(paths), -1, -1).flatten(0, 1)
            if future is not None:
                future = future[:, None].expand(-1, len(paths), -1, -1).flatten(0, 1)
        while remaining > 0:
            # (batch, rows, paths, steps) -> (batch * paths, rows, steps)
            following = blocks[-1][:, :, paths].transpose(1, 2).flatten(0, 1)
            if future is not None:
                known, future = future[..., : following.shape[-1]], future[..., following.shape[-1] :]
                following = torch.where(known.isnan(), following, known)
            history = torch.cat([history, following], -1)[..., -limit:]
            quantiles = self._quantiles(history, future, remaining).unflatten(0, (-1, len(paths)))
            samples = quantiles.permute(0, 2, 4, 1, 3).flatten(3)  # (batch, rows, steps, paths * levels)
            blocks.append(weighted_quantile(list(self.levels), weights, samples).transpose(2, 3))
            remaining -= blocks[-1].shape[-1]
        values = torch.cat(blocks, -1)[:, :targets, :, : self.prediction_length]
        return Trajectories(values[:, 0] if batch["past_target"].ndim == 2 else values.permute(0, 2, 3, 1), self.levels)

    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the states of the patches of the history and of those to forecast, which are all that the own head
        sees, shape ``(batch, patches, d_model)``; of several targets, those of the first.
        """
        history, future = _group(batch)
        patches = self._patches(self.prediction_length)
        if future is not None:
            future = future[..., : patches * self.patch_size]
        states, _ = encode_patches(self.network, history, future, patches, keep=None)
        states = states.unflatten(0, history.shape[:2])[:, 0]
        registers = int(self.network.chronos_config.use_reg_token)  # type: ignore[union-attr, arg-type]
        own = states.shape[1] - patches - registers
        return torch.cat([states[:, :own], states[:, own + registers :]], 1)

    def _patches(self, steps: int) -> int:
        return min(math.ceil(steps / self.patch_size), self.own_prediction_length // self.patch_size)

    def _quantiles(self, history: Tensor, future: Tensor | None, steps: int) -> Tensor:
        """Return the quantiles of the next patches, at most ``steps``, shape ``(batch, rows, levels, steps)``."""
        patches = self._patches(steps)
        if future is not None:
            future = future[..., : patches * self.patch_size]
        predicted, (loc, scale) = predict_patches(self.network, history, future, patches)
        network: Any = self.network
        quantiles: Tensor = network.instance_norm.inverse(predicted.flatten(2), (loc, scale)).view_as(predicted)
        return quantiles


def _rows(values: Tensor) -> Tensor:
    """Return ``(batch, steps)`` or ``(batch, steps, rows)`` as ``(batch, rows, steps)``."""
    return values[:, None] if values.ndim == 2 else values.transpose(1, 2)


def _group(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return a batch as groups, NaN where nothing was observed.

    Returns
    -------
    tuple
        History ``(batch, rows, past)`` and future ``(batch, rows, prediction_length)``, or None for the latter if
        nothing is known of it. Rows are targets, covariates known in the past only, covariates known in the future.
    """
    past = batch["past_target"].shape[1]
    rows = [_with_gaps(batch["past_target"], batch["past_observed_values"])]
    if "past_feat_dynamic_real" in batch:
        rows.append(_with_gaps(batch["past_feat_dynamic_real"], batch["past_observed_feat_dynamic_real"]))
    if "feat_dynamic_real" not in batch:
        return torch.cat(rows, 1), None
    known = _with_gaps(batch["feat_dynamic_real"], batch["observed_feat_dynamic_real"])
    history, future = torch.cat([*rows, known[..., :past]], 1), known[..., past:]
    unknown_rows = future.new_full((len(future), history.shape[1] - future.shape[1], future.shape[2]), torch.nan)
    return history, torch.cat([unknown_rows, future], 1)


def _with_gaps(values: Tensor, observed: Tensor) -> Tensor:
    return _rows(torch.where(observed > 0, values, values.new_tensor(torch.nan)))


def _masses(levels: tuple[float, ...]) -> Tensor:
    """Return the share of the distribution that each quantile stands for: half the way to both its neighbours."""
    edges = torch.tensor([0.0, *levels, 1.0])
    mass = (edges[2:] - edges[:-2]) / 2
    return mass / mass.sum()


def predict_patches(
    network: Chronos2Model | nn.Module, history: Tensor, future: Tensor | None, patches: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run the network on groups of equal size.

    Same result as the official forward pass, at less cost: that one lets all rows of a batch attend to each other and
    masks what is not of one group, and its last block works on positions that nobody asks for.

    Parameters
    ----------
    network
        Chronos-2.
    history
        Shape ``(batch, rows, past)``, NaN where missing.
    future
        What is known of the steps to forecast, shape ``(batch, rows, steps)``, NaN elsewhere; None if nothing is.
    patches
        Patches to forecast; ``future`` is not longer.

    Returns
    -------
    tuple
        Scaled quantiles ``(batch, rows, levels, patches * patch_size)``, and location and scale, each
        ``(batch, rows, 1)``.
    """
    net: Any = network
    groups, rows = history.shape[:2]
    states, (loc, scale) = encode_patches(network, history, future, patches, keep=patches)
    predicted = net.output_patch_embedding(states)
    predicted = predicted.view(groups, rows, patches, net.num_quantiles, -1).transpose(2, 3).flatten(3)
    return predicted, (loc.view(groups, rows, 1), scale.view(groups, rows, 1))


def encode_patches(
    network: Chronos2Model | nn.Module, history: Tensor, future: Tensor | None, patches: int, *, keep: int | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return states, location and scale of each row, for parameters as of :func:`predict_patches`.

    States have shape ``(batch * rows, keep, d_model)``, of the last positions: the patches of the history, the register
    token if there is one, the patches to forecast. ``keep`` None means all of them.
    """
    net: Any = network
    groups, rows = history.shape[:2]
    context, seen, norm = net._prepare_patched_context(history.flatten(0, 1))
    ahead, _ = net._prepare_patched_future(
        future_covariates=None if future is None else future.flatten(0, 1),
        future_covariates_mask=None,
        loc_scale=norm,
        num_output_patches=patches,
        batch_size=groups * rows,
    )
    parts = [net.input_patch_embedding(context), net.input_patch_embedding(ahead)]
    if net.chronos_config.use_reg_token:
        register = seen.new_full((groups * rows, 1), net.config.reg_token_id, dtype=torch.long)
        parts.insert(1, net.shared(register))
    states = torch.cat(parts, 1)
    always = states.new_ones(groups * rows, states.shape[1] - seen.shape[1])
    mask = torch.cat([seen.to(states.dtype), always], 1)
    return _encode(net.encoder, states, mask, rows, states.shape[1] if keep is None else keep), norm


def _encode(encoder: Any, states: Tensor, mask: Tensor, rows: int, keep: int) -> Tensor:
    """Run the encoder on ``(batch * rows, length, d_model)``, groups of ``rows`` one after another.

    Returns
    -------
    Tensor
        Of the last ``keep`` positions, shape ``(batch * rows, keep, d_model)``: the last block makes no others.
    """
    length = states.shape[1]
    positions = torch.arange(length, device=states.device)[None]
    across_time = _CLOSED * (1.0 - mask)[:, None, None]
    alone = rows == 1 and not torch.is_grad_enabled()
    # Whole groups, a chunk at a time: the cost of a chunk grows with its square, but many small products are slow too.
    chunk = max(_CHUNK // rows, 1) * rows
    owner = torch.arange(min(chunk, len(states)), device=states.device) // rows
    same = (owner[:, None] == owner).to(states.dtype)
    across_rows = [
        _CLOSED * (1.0 - same[: len(part), : len(part)] * part.T[:, None])[:, None]
        for part in (() if alone else mask.split(chunk))
    ]
    states = encoder.dropout(states)
    for block in encoder.block:
        time, group, feedforward = block.layer
        size = keep if block is encoder.block[-1] else length
        known = time.layer_norm(states)
        rotation = time.self_attention.rope_embed(states, positions)
        mixed = _attend(time.self_attention, known[:, -size:], known, across_time, rotation=rotation)
        states = states[:, -size:] + time.dropout(mixed)
        attention, known = group.self_attention, group.layer_norm(states)
        if alone:
            # The weight of the only row is one, whatever its query and key are.
            mixed = attention.o(attention.v(known))
        else:
            # Of a softmax in the open, the gradient of that query and key is exactly zero; the fused kernel leaves
            # rounding noise, which Adam would make as large as any other.
            parts = zip((part.transpose(0, 1) for part in known.split(chunk)), across_rows, strict=True)
            found = [_attend(attention, part, part, each[-size:], fused=rows > 1) for part, each in parts]
            mixed = torch.cat([part.transpose(0, 1) for part in found])
        states = feedforward(states + group.dropout(mixed))
    result: Tensor = encoder.dropout(encoder.final_layer_norm(states))
    return result


def _attend(
    attention: MHA,
    queries: Tensor,
    states: Tensor,
    mask: Tensor,
    *,
    rotation: tuple[Tensor, Tensor] | None = None,
    fused: bool = True,
) -> Tensor:
    """Let ``queries``, the last of ``states``, attend to all of them; scores are not scaled, as in T5."""

    def heads(values: Tensor) -> Tensor:
        apart: Tensor = values.unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
        return apart

    query, key, value = heads(attention.q(queries)), heads(attention.k(states)), heads(attention.v(states))
    if rotation is not None:
        cos, sin = (part[:, None].type_as(query) for part in rotation)
        half, last = Chronos2RotaryEmbedding.rotate_half, slice(-query.shape[2], None)
        query = query * cos[:, :, last] + half(query) * sin[:, :, last]
        key = key * cos + half(key) * sin
    dropout = attention.dropout if attention.training else 0.0
    if fused:
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=1.0)
    else:
        weights = (query @ key.transpose(2, 3) + mask).float().softmax(-1).type_as(value)
        mixed = functional.dropout(weights, dropout) @ value
    result: Tensor = attention.o(mixed.transpose(1, 2).flatten(2))
    return result


def quantile_loss(
    network: Chronos2Model | nn.Module,
    predicted: Tensor,
    norm: tuple[Tensor, Tensor],
    label: Tensor,
    observed: Tensor,
) -> Tensor:
    """Return the official loss of the first rows of each group, those that have a label, shape ``(batch, targets)``.

    Parameters
    ----------
    network
        Chronos-2.
    predicted, norm
        As :func:`predict_patches` returns them.
    label, observed
        Shape ``(batch, targets, steps)``, at most as many steps as were forecast.
    """
    net: Any = network
    (targets, steps), width = label.shape[1:], predicted.shape[-1]
    loc, scale = norm
    label, _ = net.instance_norm(label, (loc[:, :targets], scale[:, :targets]))
    difference = label[:, :, None] - predicted[:, :targets, :, :steps].float()
    levels = net.quantiles[:, None]
    pinball = torch.maximum(levels * difference, (levels - 1.0) * difference)
    loss: Tensor = 2.0 * (pinball * observed[:, :, None]).sum((2, 3)) / width
    return loss
