"""Sample paths of Lag-Llama with a key/value cache.

The history is encoded once a series and shared by all of its paths; after that each path pays for one token a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .network import Block, LagLlamaNetwork, Rotation

__all__ = ["sample_paths", "sample_paths_rescaled"]

# Numbers in the cache of the paths' own steps, all layers together: 128 MiB in float32.
_CACHE = 1 << 25


def sample_paths(
    network: LagLlamaNetwork,
    past_target: Tensor,
    past_observed_values: Tensor,
    time_feat: Tensor | None,
    *,
    prediction_length: int,
    num_samples: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw sample paths, step by step, from the distribution that the network was trained as.

    Level and spread are those of the history, as in training, so that what was computed for earlier steps stays valid.

    Parameters
    ----------
    network
        In evaluation mode.
    past_target, past_observed_values, time_feat
        As for the network, without known next values.
    prediction_length
        Steps, H.
    num_samples
        Paths a series, n.
    generator
        Source of randomness: a series takes the same numbers from it however memory cuts the batch up.

    Returns
    -------
    Tensor
        Shape ``(batch, n, H)``, float32.
    """
    uniform = _uniform(past_target, num_samples, prediction_length, generator)
    config = network.config
    rows = max(1, _CACHE // (2 * config.n_layer * config.width * prediction_length))
    series = max(1, rows // num_samples)
    paths = [
        _paths(
            network,
            past_target[part],
            past_observed_values[part],
            None if time_feat is None else time_feat[part],
            uniform[part],
        )
        for part in (slice(i, i + series) for i in range(0, len(past_target), series))
    ]
    return torch.cat(paths)


def _uniform(like: Tensor, samples: int, steps: int, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand((len(like), samples, steps, 2), generator=generator, device=device).to(like.device)


def _paths(
    network: LagLlamaNetwork,
    past_target: Tensor,
    past_observed_values: Tensor,
    time_feat: Tensor | None,
    uniform: Tensor,
) -> Tensor:
    config = network.config
    batch, samples, horizon, _ = uniform.shape
    length = past_target.shape[1]
    level, spread = network.level_and_spread(past_target, past_observed_values)
    scaled = (past_target - level) / spread
    calendar = None if time_feat is None else time_feat[:, config.max_lag : length]
    tokens = network.tokens(scaled, level, spread, calendar)
    context = tokens.shape[1]
    rotation = network.rotation(context + horizon - 1, tokens)
    head = None if rotation is None else Rotation(rotation.cos[:context], rotation.sin[:context])
    features, cache = network.encode(tokens, head)
    law = network.param_proj(features[:, -1:])
    first: Tensor = law.quantile_of(uniform[:, :, 0])
    if horizon == 1:
        return (first * spread + level).unsqueeze(-1)

    # Time comes first, so that the lags of a step are whole rows.
    known = config.max_lag
    values = scaled.new_empty((known + horizon, batch, samples))
    values[:known] = scaled[:, length - known :].T[..., None]
    values[known] = first
    lags = torch.tensor(config.lags_seq, device=scaled.device)
    static = network.static(level, spread)
    decoder = [_Layer(block, k, v, samples, horizon - 1) for block, (k, v) in zip(network.blocks, cache, strict=True)]
    for step in range(1, horizon):
        rest = static if time_feat is None else torch.cat([static, time_feat[:, length + step - 1]], -1)
        lagged = values[known + step - 1 - lags].permute(1, 2, 0)
        x = network.transformer["wte"](torch.cat([lagged, rest[:, None].expand(-1, samples, -1)], -1))
        turn = None if rotation is None else rotation.at(context + step - 1)
        for layer in decoder:
            x = layer(x, turn)
        law = network.param_proj(network.transformer["ln_f"](x))
        values[known + step] = law.quantile_of(uniform[:, :, step])
    return values[known:].permute(1, 2, 0) * spread[..., None] + level[..., None]


class _Layer:
    """A block that takes one step at a time for ``samples`` paths of each series.

    Parameters
    ----------
    block
        The layer.
    keys, values
        Of the history, shape ``(batch, heads, context, size)``.
    samples
        Paths a series.
    steps
        The most steps that will be taken.
    """

    def __init__(self, block: Block, keys: Tensor, values: Tensor, samples: int, steps: int) -> None:
        self.block = block
        self.keys, self.values = keys.transpose(2, 3).contiguous(), values.contiguous()
        batch, heads, _, size = keys.shape
        self.own_keys = keys.new_empty((batch, heads, samples, size, steps))
        self.own_values = keys.new_empty((batch, heads, samples, steps, size))
        self.position = 0

    def __call__(self, x: Tensor, turn: Rotation | None) -> Tensor:
        """Take the paths' newest tokens, shape ``(batch, samples, width)``; return the same shape."""
        block = self.block
        q, k, v = block.attn.project(block.rms_1(x))
        if turn is not None:
            q, k = turn(q), turn(k)
        now = self.position
        self.own_keys[..., now], self.own_values[..., now, :] = k, v
        self.position = now + 1
        shared = q @ self.keys
        own = (q[..., None, :] @ self.own_keys[..., : now + 1])[..., 0, :]
        weights = (torch.cat([shared, own], -1) * q.shape[-1] ** -0.5).float().softmax(-1).to(v.dtype)
        context = weights.shape[-1] - now - 1
        y = weights[..., :context] @ self.values
        y = y + (weights[..., None, context:] @ self.own_values[..., : now + 1, :])[..., 0, :]
        x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
        result: Tensor = x + block.mlp(block.rms_2(x))
        return result


def sample_paths_rescaled(
    network: LagLlamaNetwork,
    past_target: Tensor,
    past_observed_values: Tensor,
    time_feat: Tensor | None,
    *,
    prediction_length: int,
    num_samples: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw sample paths as the reference implementation does: slowly.

    After each step it estimates level and spread anew, from the history and the path's own values, and runs the whole
    network again. Arguments and result are those of :func:`sample_paths`.
    """
    uniform = _uniform(past_target, num_samples, prediction_length, generator).flatten(0, 1)
    past, observed = (part.repeat_interleave(num_samples, 0) for part in (past_target, past_observed_values))
    calendar = None if time_feat is None else time_feat.repeat_interleave(num_samples, 0)
    for step in range(prediction_length):
        law, level, spread = network(past, observed, calendar)
        last = type(law)(*(part[:, -1] for part in law))
        drawn = last.quantile_of(uniform[:, step])[:, None] * spread + level
        past, observed = torch.cat([past, drawn], 1), torch.cat([observed, torch.ones_like(drawn)], 1)
    return past[:, -prediction_length:].reshape(len(past_target), num_samples, prediction_length)
