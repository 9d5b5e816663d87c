"""The network of MOMENT (Goswami et al. 2024, arXiv 2402.03885), written on the T5 encoder of ``transformers``.

A window is normalised by the mean and standard deviation of what is seen of it, cut into patches, embedded and encoded;
a linear head turns each patch's features back into its steps, another one all features into a forecast:

    x' = (x - mean) / (std + 1e-5),   e_i = W x'_i + p_i,   f = T5(e),   x̂_i = std (A f_i + a) + mean
    hidden patches: e_i = m + p_i,    forecast = std (F [f_1 ... f_n] + b) + mean

Names of tensors and keys of ``config.json`` are those of the official folders ``AutonLab/MOMENT-1-{small,base,large}``.
The token table of T5 and the sinusoidal positions are in these folders too: the first is not used, the second follows
from the sizes. Neither is kept here.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Stack

from gluonts_peft.checkpoint import CheckpointError, check_whole, read_config, save_tensors, weight_files

__all__ = ["MomentNetwork", "bridge", "normalise"]

EPSILON = 1e-5
# In official folders, without a use here.
_TOKENS = "encoder.embed_tokens.weight"
_POSITIONS = "patch_embedding.position_embedding.pe"
# Where a folder with a trained forecasting head keeps the head that the pretrained folder calls `head`.
_PRETRAINED_HEAD = "reconstruction_head"


def normalise(values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise windows by what is seen of them.

    Parameters
    ----------
    values
        Shape ``(batch, time)``; may be NaN where nothing is seen.
    seen
        Shape of ``values``; 1 where a value counts.

    Returns
    -------
    tuple of Tensor
        The normalised values, 0 where they were not finite, shape of ``values``; mean and standard deviation (biased,
        plus 1e-5) of what is seen, shape ``(batch, 1)``.
    """
    kept = seen > 0
    count = kept.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(kept, values, 0.0).sum(1, keepdim=True) / count
    variance = torch.where(kept, values - mean, 0.0).square().sum(1, keepdim=True) / count
    deviation = variance.sqrt() + EPSILON
    return torch.nan_to_num((values - mean) / deviation, nan=0.0, posinf=0.0, neginf=0.0), mean, deviation


def bridge(values: Tensor, observed: Tensor, patch_len: int) -> tuple[Tensor, Tensor]:
    """Make a window that the network can see as a whole from the first patch with an observed step on.

    The network attends to whole patches only. The reference's data sets are interpolated before they reach it; here
    gaps are bridged linearly, what is missing at the end repeats the last value, and what is missing in the first patch
    repeats the first.

    Parameters
    ----------
    values, observed
        Shape ``(batch, time)``, a whole number of patches; values count where ``observed`` is 1.
    patch_len
        Steps of a patch.

    Returns
    -------
    tuple of Tensor
        Values, NaN before the first patch, and 1 from this patch on, both of shape ``(batch, time)``.
    """
    length = values.shape[1]
    kept = observed > 0
    step = torch.arange(length, device=values.device).expand_as(values)
    before = torch.where(kept, step, -1).cummax(1).values
    after = torch.where(kept, step, length).flip(1).cummin(1).values.flip(1)
    left = torch.where(before < 0, after, before).clamp(max=length - 1)
    right = torch.where(after == length, before, after).clamp(min=0)
    low, high = values.gather(1, left), values.gather(1, right)
    bridged = low + (high - low) * ((step - left) / (right - left).clamp(min=1))
    first = after[:, :1]
    given = step >= first - first % patch_len
    return bridged.masked_fill(~given, torch.nan), given.to(values.dtype)


def positions(length: int, width: int) -> Tensor:
    """Return the sinusoidal embedding of positions (Vaswani et al. 2017, arXiv 1706.03762), ``(length, width)``."""
    rate = (torch.arange(0, width, 2).float() * (-math.log(10_000.0) / width)).exp()
    angle = torch.arange(length).float()[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


class PatchEmbedding(nn.Module):
    """Patches become vectors; hidden ones become the mask token."""

    positions: Tensor

    def __init__(self, patches: int, patch_len: int, width: int, *, bias: bool, positional: bool, dropout: float):
        super().__init__()
        self.value_embedding = nn.Linear(patch_len, width, bias=bias)
        self.mask_embedding = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout(dropout)
        table = positions(patches, width) if positional else torch.zeros(patches, width)
        self.register_buffer("positions", table, persistent=False)

    def forward(self, patches: Tensor, shown: Tensor | None = None) -> Tensor:
        """Embed the last patches of a full window.

        Parameters
        ----------
        patches
            Shape ``(batch, patches, patch_len)``.
        shown
            Shape ``(batch, patches)``, bool; patches that are not shown become the mask token. None shows all.
        """
        embedded: Tensor = self.value_embedding(patches)
        if shown is not None:
            embedded = torch.where(shown[..., None], embedded, self.mask_embedding)
        embedded = embedded + self.positions[len(self.positions) - patches.shape[1] :]
        result: Tensor = self.dropout(embedded)
        return result


class ReconstructionHead(nn.Module):
    """Features of a patch become its steps."""

    def __init__(self, width: int, patch_len: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, patch_len)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(batch, patches, width)`` to ``(batch, patches * patch_len)``."""
        steps: Tensor = self.linear(self.dropout(features)).flatten(1)
        return steps


class ForecastingHead(nn.Module):
    """Features of all patches become a forecast. Starts at zero: untrained.

    Dropout falls on the features; the reference drops steps of the forecast instead, which is noise on the label.
    """

    def __init__(self, width: int, horizon: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        # Without the usual initialisation, which would move the state of the random numbers.
        self.linear: nn.Linear = nn.utils.skip_init(nn.Linear, width, horizon)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(batch, patches, width)`` to ``(batch, horizon)``."""
        steps: Tensor = self.linear(self.dropout(features.flatten(1)))
        return steps


class MomentNetwork(nn.Module):
    """MOMENT with its reconstruction head and, once asked for, a forecasting head.

    Parameters
    ----------
    config
        The official ``config.json``.

    Raises
    ------
    ValueError
        If the configuration lacks a key or asks for what is not supported; the message names it.

    Attributes
    ----------
    head
        Reconstructs patches; pretrained.
    forecast_head
        Forecasts; None until :meth:`set_horizon` or a checkpoint brings it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config: dict[str, Any] = copy.deepcopy(dict(config))
        _check(self.config)
        t5 = T5Config.from_dict(
            # The token table is not used here: one row is the least that T5 makes.
            {
                **self.config["t5_config"],
                "vocab_size": 1,
                "eos_token_id": None,
                "is_encoder_decoder": False,
                "use_cache": False,
            }
        )
        self.seq_len, self.patch_len = int(self.config["seq_len"]), int(self.config["patch_len"])
        self.width = int(t5.d_model)
        self.patches = self.seq_len // self.patch_len
        self.patch_embedding = PatchEmbedding(
            self.patches,
            self.patch_len,
            self.width,
            bias=self.config.get("value_embedding_bias", False),
            positional=self.config.get("add_positional_embedding", True),
            dropout=self.config.get("patch_dropout", 0.1),
        )
        self.encoder = T5Stack(t5)
        self.encoder.embed_tokens = nn.Identity()
        self.head = ReconstructionHead(self.width, self.patch_len, self.config.get("head_dropout", 0.1))
        self.forecast_head: ForecastingHead | None = None
        for linear in (self.patch_embedding.value_embedding, self.head.linear):
            nn.init.orthogonal_(linear.weight, gain=self.config.get("orth_gain", 1.41))
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    @property
    def horizon(self) -> int | None:
        """Steps of the forecasting head; None if there is none."""
        return None if self.forecast_head is None else self.forecast_head.linear.out_features

    @torch.no_grad()
    def can_forecast(self) -> bool:
        """Return whether the forecasting head has been trained, that is, has left zero."""
        if self.forecast_head is None:
            return False
        # Asked of the layer, not of its weight: an adapter may lie around it.
        weight = self.head.linear.weight
        return bool(self.forecast_head.linear(weight.new_ones(1, self.width * self.patches)).any())

    def set_horizon(self, horizon: int) -> ForecastingHead:
        """Put an untrained forecasting head in place and return it."""
        head = ForecastingHead(self.width * self.patches, horizon, self.config.get("head_dropout", 0.1))
        weight = self.head.linear.weight
        self.forecast_head = head.to(weight.device, weight.dtype).train(self.training)
        return self.forecast_head

    @torch.no_grad()
    def cut_horizon(self, horizon: int) -> None:
        """Keep the first steps of the forecasting head; each is a linear map of its own."""
        old = self.forecast_head
        if old is not None and old.linear.out_features != horizon:
            new = self.set_horizon(horizon)
            new.linear.weight.copy_(old.linear.weight[:horizon])
            new.linear.bias.copy_(old.linear.bias[:horizon])

    def encode(self, values: Tensor, given: Tensor, shown: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features of each patch.

        Parameters
        ----------
        values
            Shape ``(batch, time)``: the last steps of a window, a whole number of patches, at most ``seq_len`` steps.
            NaN where nothing is known.
        given
            Shape of ``values``: 0 where the window is padded. A patch with any such step is not attended to.
        shown
            Shape of ``values``: 0 where a step is hidden from the network, which then sees the mask token in place of
            its patch and knows only that there is something. None hides nothing.

        Returns
        -------
        tuple of Tensor
            Features ``(batch, patches, d_model)``, mean and deviation ``(batch, 1)``.
        """
        scaled, mean, deviation = normalise(values, given if shown is None else given * shown)
        whole = self._whole(given)
        embedded = self.patch_embedding(self._patches(scaled), None if shown is None else self._whole(shown))
        # Additive and finite, so that a window without a whole patch attends to all alike instead of giving NaN.
        mask = (~whole)[:, None, None] * torch.finfo(embedded.dtype).min
        features: Tensor = self.encoder(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        return features, mean, deviation

    def _whole(self, steps: Tensor) -> Tensor:
        """Return which patches are 1 at every step, bool, shape ``(batch, patches)``."""
        return self._patches(steps > 0).all(-1)

    def _patches(self, steps: Tensor) -> Tensor:
        return steps.reshape(len(steps), -1, self.patch_len)

    def reconstruct(self, values: Tensor, given: Tensor, shown: Tensor | None = None) -> Tensor:
        """Return the window as the network sees it, shape and units of ``values``; parameters as :meth:`encode`."""
        features, mean, deviation = self.encode(values, given, shown)
        steps: Tensor = self.head(features) * deviation + mean
        return steps

    def predict(self, values: Tensor, given: Tensor) -> Tensor:
        """Return the forecast, shape ``(batch, horizon)``, in the units of ``values``, a full window of ``seq_len``."""
        if self.forecast_head is None:
            raise ValueError("the network has no forecasting head; call set_horizon(prediction_length) first")
        features, mean, deviation = self.encode(values, given)
        steps: Tensor = self.forecast_head(features) * deviation + mean
        return steps

    def forward(self, values: Tensor, given: Tensor | None = None, shown: Tensor | None = None) -> Tensor:
        """Reconstruct."""
        return self.reconstruct(values, torch.ones_like(values) if given is None else given, shown)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MomentNetwork:
        """Read a folder in the official layout, in evaluation mode.

        Raises
        ------
        CheckpointError
            If it is not MOMENT's, or a tensor is missing, has another shape or has no place.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        config = read_config(folder)
        start = f"checkpoint folder {str(folder)!r}"
        if "t5_config" not in config or "patch_len" not in config:
            raise CheckpointError(
                f"{start} is not of family 'moment': its config.json has no t5_config or no patch_len (model_type"
                f" {config.get('model_type')!r}); old revisions of the official folders lack t5_config: fetch again"
            )
        check_whole(config, folder)
        try:
            network = cls(config)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{start} cannot be used: {error}") from error
        state: dict[str, Tensor] = {}
        for path in weight_files(folder):
            state |= load_file(path)
        state.pop(_TOKENS, None)
        stored = state.pop(_POSITIONS, None)
        table = network.patch_embedding.positions
        if stored is not None and not torch.allclose(stored.float().flatten(0, -2)[: len(table)], table, atol=1e-4):
            raise CheckpointError(f"{start}: {_POSITIONS} does not hold the sinusoidal positions; fetch it again")
        if config.get("task_name") == "forecasting":
            network.set_horizon(int(config["forecast_horizon"]))
            state = {_from_forecasting(name): tensor for name, tensor in state.items()}
        own = network.state_dict()
        for problem, names in (
            ("missing", own.keys() - state.keys()),
            ("without a place", state.keys() - own.keys()),
            ("of another shape", {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}),
        ):
            if names:
                raise CheckpointError(
                    f"{start} does not fit its config.json: {len(names)} tensors {problem} (first: {min(names)})"
                )
        network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        return network.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` in the official layout into a folder, made if need be.

        With a trained forecasting head, ``head`` is this one and ``task_name`` is ``"forecasting"``, as the official
        class wants it; the reconstruction head is then kept as ``reconstruction_head``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {k: v for k, v in self.config.items() if k != "forecast_horizon"} | {"task_name": "reconstruction"}
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        if self.can_forecast():
            config |= {"task_name": "forecasting", "forecast_horizon": self.horizon}
            state = {_to_forecasting(name): tensor for name, tensor in state.items()}
        else:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("forecast_head.")}
        save_tensors(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _to_forecasting(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{ {'head': _PRETRAINED_HEAD, 'forecast_head': 'head'}.get(first, first) }.{rest}"


def _from_forecasting(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{ {_PRETRAINED_HEAD: 'head', 'head': 'forecast_head'}.get(first, first) }.{rest}"


def _check(config: Mapping[str, Any]) -> None:
    """Refuse what this implementation would compute wrongly."""
    for key in ("seq_len", "patch_len", "t5_config"):
        if key not in config:
            raise ValueError(f"config.json has no {key!r}")
    seq_len, patch_len = config["seq_len"], config["patch_len"]
    width = config["t5_config"].get("d_model")
    rules = {
        "task_name": config.get("task_name", "reconstruction") in ("reconstruction", "forecasting"),
        "forecast_horizon": config.get("task_name") != "forecasting" or config.get("forecast_horizon", 0) > 0,
        "transformer_type": config.get("transformer_type", "encoder_only") == "encoder_only",
        "patch_stride_len": config.get("patch_stride_len", patch_len) == patch_len,
        "seq_len": seq_len > 0 and patch_len > 0 and seq_len % patch_len == 0,
        "d_model": config.get("d_model") in (None, width),
        "revin_affine": not config.get("revin_affine", False),
    }
    wants = {
        "task_name": "'reconstruction' or 'forecasting'",
        "forecast_horizon": "a positive number for task 'forecasting'",
        "transformer_type": "'encoder_only'",
        "patch_stride_len": f"patch_len ({patch_len})",
        "seq_len": f"a multiple of patch_len ({patch_len})",
        "d_model": f"null or that of t5_config ({width})",
        "revin_affine": "false",
    }
    for key, kept in rules.items():
        if not kept:
            raise ValueError(f"config.json: {key} {config.get(key)!r} is not supported; it has to be {wants[key]}")
