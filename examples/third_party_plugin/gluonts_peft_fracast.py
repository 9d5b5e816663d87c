"""Fracast-0 for gluonts-peft: a convolutional forecaster of 85,001 weights, which lie in the package ``fracast``."""

import json
from pathlib import Path
from typing import Any

import fracast
import torch
from fracast._core.model import build_from_cfg
from safetensors.torch import load_file
from torch import Tensor, nn

from gluonts_peft.backbone import Backbone, Trajectories
from gluonts_peft.checkpoint import CheckpointError, read_config, save_tensors
from gluonts_peft.estimator import PeftEstimator


class FracastBackbone(Backbone):
    family = "fracast"
    capabilities = frozenset({"quantiles"})
    impossible = {"ia3": "it scales keys and values of attention, and this network convolves instead of attending"}

    @classmethod
    def bundled(cls) -> dict[str, Path]:
        return {"fracast-0": Path(fracast.__file__).parent / "weights"}

    @classmethod
    def load_network(cls, folder: Path) -> nn.Module:
        config = read_config(folder)
        try:
            network = nn.ModuleDict(zip(("core", "head"), build_from_cfg(config), strict=True))
            network.load_state_dict(load_file(folder / "model.safetensors"))
        except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            raise CheckpointError(f"{str(folder)!r} is no checkpoint of Fracast: {error!r}") from error
        network.settings = config
        return network

    @classmethod
    def from_network(cls, network: Any, *, context_length: int | None = None, **rest: Any) -> Backbone:
        length = network["core"].W if context_length is None else context_length
        if length > network["core"].W:
            raise ValueError(f"context_length {length} exceeds the {network['core'].W} steps that Fracast can see")
        return cls(network, context_length=length, **rest)

    def __init__(self, network: Any, **lengths: Any) -> None:
        super().__init__(network, **lengths)
        self.levels = tuple(network.settings["model"]["quantiles"])
        # A separable convolution filters over time, then mixes channels: that is where attention has its output.
        linear = {"o": ".pw", "ff_in": ".up", "ff_out": ".down"}
        self.places_by_kind = {
            **{kind: tuple(n for n, _ in network.named_modules() if n.endswith(end)) for kind, end in linear.items()},
            "norm": tuple(name for name, module in network.named_modules() if isinstance(module, nn.RMSNorm)),
            "head": ("head.out_proj",),
            "bias": tuple(name for name, _ in network.named_parameters() if name.endswith("bias")),
        }

    def sites(self) -> dict[str, tuple[str, ...]]:
        return self.places_by_kind

    def block(self, values: Tensor, observed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scaled quantiles (batch, levels, 48) after a history (batch, past), and its offset and scale."""
        (core, head), mask = self.network.values(), observed > 0
        offset = values.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
        scale = (values.masked_fill(~mask, -torch.inf).amax(1, keepdim=True) - offset).clamp(min=1e-5)
        scaled = torch.where(mask, (values - offset) / scale, 0.0)
        values, mask = (nn.functional.pad(part, (core.W - part.shape[1], 0)) for part in (scaled, mask))
        hidden = core(values[:, None], mask[:, None], mask[:, None].float())
        found = head.forward_horizon(hidden, last_obs=values[:, -1:], ctx=values, ctx_mask=mask)
        return found.transpose(1, 2), offset, scale

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Pinball loss of the scaled label, mean over levels and observed steps."""
        predicted, offset, scale = self.block(batch["past_target"], batch["past_observed_values"])
        label, observed = (batch[name][:, : predicted.shape[2]] for name in ("future_target", "future_observed_values"))
        error = ((label - offset) / scale)[:, None] - predicted[..., : label.shape[1]]
        levels = error.new_tensor(self.levels)[:, None]
        pinball = torch.maximum(levels * error, (levels - 1) * error).mean(1)
        return (pinball * observed).sum(1) / observed.sum(1).clamp(min=1.0)

    def forecast(self, batch: dict[str, Tensor], *, num_samples: Any = None, generator: Any = None) -> Trajectories:
        """Beyond 48 steps the history goes on with the median, as in ``FracastModel.forecast``."""
        values, observed, found = batch["past_target"], batch["past_observed_values"], []
        while sum(quantiles.shape[2] for quantiles in found) < self.prediction_length:
            quantiles, offset, scale = self.block(values, observed)
            found.append(quantiles * scale[:, None] + offset[:, None])
            values = torch.cat([values, found[-1][:, self.levels.index(0.5)]], 1)[:, -self.context_length :]
            observed = nn.functional.pad(observed, (0, quantiles.shape[2]), value=1.0)[:, -self.context_length :]
        return Trajectories(torch.cat(found, 2)[..., : self.prediction_length], self.levels)

    def export(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(self.network.settings, indent=2))
        save_tensors(self.network.state_dict(), folder / "model.safetensors", {"format": "pt"})


class FracastEstimator(PeftEstimator):
    backbone_class = FracastBackbone
    default_checkpoint = "fracast-0"
