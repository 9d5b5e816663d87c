"""The network of Lag-Llama (Rasul et al. 2023, arXiv 2310.08278): a Llama decoder over lags of one series.

A token is one step of time: the scaled values at a fixed set of lags, then log(1 + |level|) and log(spread) of the
series, then calendar features. Blocks are Llama's (RMS norms before attention and before a gated feed-forward layer,
rotary positions), with one projection for keys and values. A head gives the Student-t distribution of the next step.
Names and shapes of the tensors are those of the published ``lag-llama.ckpt``, without its prefix ``model.``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["TIME_FEATURES", "Block", "LagLlamaConfig", "LagLlamaNetwork", "StudentT"]

TIME_FEATURES = (
    "second_of_minute",
    "minute_of_hour",
    "hour_of_day",
    "day_of_week",
    "day_of_month",
    "day_of_year",
)

SCALINGS = ("mean", "std", "robust", None)
ROPE_SCALINGS = ("linear", "dynamic", "nope")


@dataclass(frozen=True)
class LagLlamaConfig:
    """Sizes and rules of a network, under the names that the published checkpoint gives them.

    Parameters
    ----------
    context_length
        Steps of history that become tokens, unless told otherwise.
    lags_seq
        Lags of a token, in steps; 0 is the newest value.
    n_layer, n_head, n_embd_per_head
        Blocks, heads a block, width of a head (even).
    max_context_length
        Positions that ``rope_scaling`` of type ``"dynamic"`` starts from, and the longest context.
    scaling
        ``"robust"`` (median and interquartile range), ``"std"`` (mean and standard deviation), ``"mean"`` (mean
        magnitude) or None.
    time_feat
        Whether tokens hold :data:`TIME_FEATURES`.
    rope_scaling
        None, or ``{"type": "linear", "factor": 2.0}``, ``{"type": "dynamic", "factor": 2.0}``, or ``{"type": "nope",
        "factor": None}`` for no positions at all.
    dropout
        Of attention weights, in training.
    num_parallel_samples
        Sample paths a series, unless told otherwise.
    input_size
        Series a token; only 1 exists.

    Raises
    ------
    ValueError
        If a value cannot be used.
    """

    context_length: int
    lags_seq: tuple[int, ...]
    n_layer: int
    n_head: int
    n_embd_per_head: int
    max_context_length: int = 2048
    scaling: str | None = "mean"
    time_feat: bool = True
    rope_scaling: Mapping[str, Any] | None = None
    dropout: float = 0.0
    num_parallel_samples: int = 100
    input_size: int = 1

    def __post_init__(self) -> None:
        for name in (
            "context_length",
            "n_layer",
            "n_head",
            "n_embd_per_head",
            "max_context_length",
            "num_parallel_samples",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name} {value!r} is not a positive integer")
        if self.n_embd_per_head % 2:
            raise ValueError(f"n_embd_per_head {self.n_embd_per_head} is odd; rotary positions turn pairs")
        if self.input_size != 1:
            raise ValueError(f"input_size {self.input_size!r} is not supported; Lag-Llama takes one series at a time")
        lags = self.lags_seq
        if not lags or any(isinstance(lag, bool) or not isinstance(lag, int) or lag < 0 for lag in lags):
            raise ValueError(f"lags_seq {lags!r} must name at least one lag, each an integer from 0")
        object.__setattr__(self, "lags_seq", tuple(lags))
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling {self.scaling!r} is unknown; known: {', '.join(map(repr, SCALINGS))}")
        if not isinstance(self.time_feat, bool):
            raise ValueError(f"time_feat {self.time_feat!r} must be true or false")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout!r} is not a probability below 1")
        check_rope_scaling(self.rope_scaling)

    @property
    def width(self) -> int:
        """Width of a token in the network."""
        return self.n_head * self.n_embd_per_head

    @property
    def max_lag(self) -> int:
        """Steps before the context that its tokens look back to."""
        return max(self.lags_seq)

    @property
    def token_size(self) -> int:
        """Numbers in a token."""
        return len(self.lags_seq) + 2 + (len(TIME_FEATURES) if self.time_feat else 0)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the fields."""
        return tuple(field.name for field in fields(cls))


def check_rope_scaling(value: Mapping[str, Any] | None) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping) or set(value) != {"type", "factor"} or value["type"] not in ROPE_SCALINGS:
        raise ValueError(
            f"rope_scaling {value!r} must be None or a mapping of 'type' (one of {', '.join(ROPE_SCALINGS)}) and"
            " 'factor'"
        )
    factor = value["factor"]
    if value["type"] != "nope" and (isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1):
        raise ValueError(f"rope_scaling factor {factor!r} must be a number from 1, such as 2.0")


class StudentT(NamedTuple):
    """Parameters of Student-t distributions of scaled values, all of one shape."""

    df: Tensor
    loc: Tensor
    scale: Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at some values, of the shape of the parameters."""
        law = torch.distributions.StudentT(*self, validate_args=False)
        result: Tensor = law.log_prob(value)
        return result

    def quantile_of(self, uniform: Tensor) -> Tensor:
        """Turn pairs of uniform numbers, shape ``(..., 2)``, into draws: the polar method of Bailey 1994.

        One pair a draw whatever the parameters, so that paths do not depend on how a batch is cut up.
        """
        radius = torch.expm1(-2.0 / self.df * torch.log1p(-uniform[..., 0])) * self.df
        return self.loc + self.scale * radius.sqrt() * torch.cos(2 * math.pi * uniform[..., 1])


class Rotation(NamedTuple):
    """Cosines and sines of some positions, shape ``(positions, n_embd_per_head)``."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate ``(..., positions, n_embd_per_head)``: the two halves of a head are the pairs."""
        left, right = x.chunk(2, -1)
        return x * self.cos.to(x.dtype) + torch.cat([-right, left], -1) * self.sin.to(x.dtype)

    def at(self, position: int) -> Rotation:
        """Return the rotation of one position, shape ``(1, n_embd_per_head)``."""
        return Rotation(self.cos[position : position + 1], self.sin[position : position + 1])


class RMSNorm(nn.Module):
    """Divide by the root mean square and multiply by a weight."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.float().square().mean(-1, keepdim=True)
        return (self.scale * (x * torch.rsqrt(mean + self.eps))).type_as(x)


class Attention(nn.Module):
    """Causal self-attention; one projection makes keys and values."""

    def __init__(self, config: LagLlamaConfig) -> None:
        super().__init__()
        width = config.width
        self.q_proj = nn.Linear(width, width, bias=False)
        self.kv_proj = nn.Linear(width, 2 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.heads = config.n_head
        self.dropout = config.dropout

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each ``(rows, heads, steps, n_embd_per_head)``."""
        parts = (self.q_proj(x), *self.kv_proj(x).chunk(2, -1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return q, k, v

    def forward(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output, shape of ``x``, and rotated keys and values."""
        q, k, v = self.project(x)
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2)), k, v


class FeedForward(nn.Module):
    """Gated feed-forward layer; its inner width is 8/3 of the outer, rounded up to a multiple of 256."""

    def __init__(self, config: LagLlamaConfig) -> None:
        super().__init__()
        inner = math.ceil(int(8 * config.width / 3) / 256) * 256
        self.c_fc1 = nn.Linear(config.width, inner, bias=False)
        self.c_fc2 = nn.Linear(config.width, inner, bias=False)
        self.c_proj = nn.Linear(inner, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c_proj(functional.silu(self.c_fc1(x)) * self.c_fc2(x))
        return result


class Block(nn.Module):
    """One layer of the decoder."""

    def __init__(self, config: LagLlamaConfig) -> None:
        super().__init__()
        self.rms_1 = RMSNorm(config.width)
        self.attn = Attention(config)
        self.rms_2 = RMSNorm(config.width)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output, shape of ``x``, and the layer's rotated keys and values."""
        y, k, v = self.attn(self.rms_1(x), rotation)
        x = x + y
        return x + self.mlp(self.rms_2(x)), k, v


class Head(nn.Module):
    """Parameters of the next step's distribution: ``proj.0`` df, ``proj.1`` loc, ``proj.2`` scale."""

    def __init__(self, config: LagLlamaConfig) -> None:
        super().__init__()
        self.proj = nn.ModuleList(nn.Linear(config.width, 1) for _ in range(3))

    def forward(self, x: Tensor) -> StudentT:
        df, loc, scale = (layer(x).squeeze(-1).float() for layer in self.proj)
        smallest = torch.finfo(scale.dtype).eps
        return StudentT(2.0 + functional.softplus(df), loc, functional.softplus(scale).clamp(min=smallest))


class LagLlamaNetwork(nn.Module):
    """Lag-Llama.

    Parameters
    ----------
    config
        Sizes and rules.
    """

    def __init__(self, config: LagLlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.param_proj = Head(config)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Linear(config.token_size, config.width),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": RMSNorm(config.width),
            }
        )
        self.rope_scaling = config.rope_scaling

    @property
    def blocks(self) -> Sequence[Block]:
        """The layers."""
        return self.transformer["h"]  # type: ignore[return-value]

    def level_and_spread(self, past_target: Tensor, past_observed_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is subtracted from a series and what it is divided by, each ``(batch, 1)``.

        All steps count, those before the context too. As published: a spread of almost nothing (a constant series
        under ``"robust"``) is 1e-10, not 1.
        """
        values, observed = past_target.detach(), past_observed_values.detach()
        scaling = self.config.scaling
        if scaling is None:
            level = torch.zeros_like(values[:, :1])
            return level, torch.ones_like(level)
        if scaling == "robust":
            seen = torch.where(observed > 0, values, values.new_tensor(torch.nan))
            level = seen.nanmedian(1, keepdim=True).values.nan_to_num(nan=0.0)
            low, high = seen.nanquantile(values.new_tensor([0.25, 0.75]), 1, keepdim=True)
            return level, (high - low).nan_to_num(nan=1.0).clamp(min=1e-10)
        count = observed.sum(1, keepdim=True).clamp(min=1.0)
        if scaling == "mean":
            spread = (values * observed).abs().sum(1, keepdim=True) / count
            return torch.zeros_like(spread), spread.clamp(min=1e-10)
        level = (values * observed).sum(1, keepdim=True) / count
        variance = ((values.double() - level.double()).square() * observed).sum(1, keepdim=True) / count
        return level, (variance + 1e-5).sqrt().to(values.dtype)

    def tokens(self, scaled: Tensor, level: Tensor, spread: Tensor, time_feat: Tensor | None) -> Tensor:
        """Return the tokens of the steps after the first ``max_lag``, shape ``(batch, steps, token_size)``.

        Parameters
        ----------
        scaled
            Scaled values, shape ``(batch, max_lag + steps)``.
        level, spread
            Shape ``(batch, 1)``.
        time_feat
            Calendar features of the same steps, shape ``(batch, steps, len(TIME_FEATURES))``.
        """
        first = self.config.max_lag
        steps = scaled.shape[1] - first
        parts = [torch.stack([scaled[:, first - lag : first - lag + steps] for lag in self.config.lags_seq], -1)]
        parts.append(self.static(level, spread)[:, None].expand(-1, steps, -1))
        if self.config.time_feat:
            if time_feat is None:
                raise ValueError("time_feat is missing; this network's tokens hold calendar features")
            parts.append(time_feat.to(scaled.dtype))
        return torch.cat(parts, -1)

    @staticmethod
    def static(level: Tensor, spread: Tensor) -> Tensor:
        """Return the features that are the same at all steps, shape ``(batch, 2)``."""
        return torch.cat([level.abs().log1p(), spread.log()], -1)

    def rotation(self, length: int, like: Tensor) -> Rotation | None:
        """Return the rotation of the first ``length`` positions, on the device of a tensor; None for no positions."""
        rule: Mapping[str, Any] = self.rope_scaling or {"type": None, "factor": 1.0}
        if rule["type"] == "nope":
            return None
        size, base = self.config.n_embd_per_head, 10_000.0
        limit, factor = self.config.max_context_length, rule["factor"]
        if rule["type"] == "dynamic" and length > limit and size > 2:
            base *= (factor * length / limit - (factor - 1)) ** (size / (size - 2))
        powers = torch.arange(0, size, 2, device=like.device).float() / size
        positions = torch.arange(length, device=like.device).float()
        if rule["type"] == "linear":
            positions = positions / factor
        angles = torch.outer(positions, 1.0 / base**powers).repeat(1, 2)
        return Rotation(angles.cos(), angles.sin())

    def encode(self, tokens: Tensor, rotation: Rotation | None) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the last features, shape ``(batch, steps, width)``, and rotated keys and values of each layer."""
        x, cache = self.transformer["wte"](tokens), []
        for block in self.blocks:
            x, k, v = block(x, rotation)
            cache.append((k, v))
        return self.transformer["ln_f"](x), cache

    def forward(
        self,
        past_target: Tensor,
        past_observed_values: Tensor,
        time_feat: Tensor | None = None,
        future_target: Tensor | None = None,
    ) -> tuple[StudentT, Tensor, Tensor]:
        """Return the distribution of the step after each token, of scaled values.

        Parameters
        ----------
        past_target, past_observed_values
            History, shape ``(batch, max_lag + context)``; 0 where not observed, which is also what the tokens see.
        time_feat
            Calendar features of the history and of the steps after it, shape ``(batch, past + horizon, 6)``.
        future_target
            Known next values, shape ``(batch, horizon)``; the last of them is not used.

        Returns
        -------
        StudentT
            Parameters, each ``(batch, context + horizon - 1)``, or ``(batch, context)`` without known next values.
        level, spread
            Shape ``(batch, 1)``: a scaled value is ``(value - level) / spread``.
        """
        level, spread = self.level_and_spread(past_target, past_observed_values)
        values = past_target if future_target is None else torch.cat([past_target, future_target[:, :-1]], 1)
        if time_feat is not None:
            time_feat = time_feat[:, self.config.max_lag : values.shape[1]]
        tokens = self.tokens((values - level) / spread, level, spread, time_feat)
        x, _ = self.encode(tokens, self.rotation(tokens.shape[1], tokens))
        return self.param_proj(x), level, spread
