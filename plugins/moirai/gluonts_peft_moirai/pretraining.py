"""Pretrain the bundled checkpoint from scratch, on synthetic series only.

    python -m gluonts_peft_moirai.pretraining moirai-nano --out FOLDER

The folder is in the official layout of Moirai-2 (``config.json`` and ``model.safetensors``) and opens with
``uni2ts.model.moirai2.Moirai2Module.from_pretrained``. Sizes, data and schedule are our choice; the architecture is
that of Moirai-2 (arXiv 2511.11698), and so is the idea to scale by the beginning of a series and to learn at every
patch after it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gluonts_peft.backbone import Source
from gluonts_peft.pretraining import Loss, Recipe, run

from .loading import save_network
from .quantiles import Moirai2Backbone
from .tokens import Window, impute, tokens

__all__ = ["RECIPES", "build"]

RECIPES = {
    "moirai-nano": Recipe(
        model=dict(d_model=128, d_ff=192, num_layers=3, patch_size=12, max_seq_len=38),
        config=dict(
            attn_dropout_p=0.0,
            dropout_p=0.0,
            num_predict_token=6,
            quantile_levels=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        ),
        horizon=72,
        contexts={120: 0.4, 252: 0.4, 384: 0.2},
        batch_size=64,
        steps=5_000,
        warmup=300,
        daily=0.5,
        learning_rate=2e-3,
    ),
}

# Further from the beginning of a series than this many of its standard deviations, nothing is learnt.
_FAR = 15.0


def build(recipe: Recipe) -> tuple[nn.Module, Loss]:
    """Return a freshly initialised network and its loss of ``(history, label)``."""
    from uni2ts.model.moirai2.module import Moirai2Module

    network = Moirai2Module(**recipe.model, **recipe.config)
    backbone = Moirai2Backbone(
        network,
        prediction_length=recipe.horizon,
        context_length=max(recipe.contexts),
        source=Source("moirai", "pretraining", "memory", None, ""),
    )
    network.requires_grad_(True)
    levels = torch.tensor(backbone.levels)[:, None]
    ahead = backbone.own_patches

    def quantile_loss(history: Tensor, label: Tensor) -> Tensor:
        # Any number of steps, as in use: the first patch then begins with padding.
        start = int(torch.randint(backbone.patch_size, ()))
        values = torch.cat([history, label], 1)[:, None, start:]
        if torch.rand(()) < 0.25:
            values = related(values)
        observed = ~values.isnan()
        given = Window(values.nan_to_num(0.0), observed, label.shape[1], values.shape[1], 0, True)
        cut = tokens(impute(given), backbone.patch_size)
        last = cut.values.shape[2] - 1
        # Short beginnings more often: that is where series are hard to scale.
        known = 1 + int(torch.rand(()) ** 2 * cut.history)
        loc, scale = cut.loc_scale(known, True)
        positions = range(known - 1, min(2 * known + 2, last))
        predicted = backbone.predict(cut, loc, scale, positions)
        targets, seen = (
            nn.functional.pad(x[:, :, known : last + 1], (0, 0, 0, ahead)).unfold(2, ahead, 1)[:, :, : len(positions)]
            for x in ((cut.values - loc) / scale, cut.observed)
        )
        # (batch, variates, positions, patches ahead, patch_size)
        targets, seen = targets.transpose(-1, -2), seen.transpose(-1, -2)
        begun = cut.observed[:, :, :known].sum((-1, -2)) >= backbone.patch_size // 2
        counted = seen & (targets.abs() < _FAR) & begun[:, :, None, None, None]
        difference = targets[..., None, :] - predicted
        pinball = torch.maximum(levels * difference, (levels - 1.0) * difference).mean(-2)
        return torch.where(counted, pinball, 0.0).sum() / counted.sum().clamp_min(1)

    return network, quantile_loss


def related(values: Tensor) -> Tensor:
    """Make pairs of variates, related or not, of ``(batch, 1, steps)``: shape ``(batch // 2, 2, steps)``."""
    half = len(values) // 2
    first, second = values[:half, 0], values[half : 2 * half, 0]
    centre, spread = _moments(first)
    other_centre, other_spread = _moments(second)
    share = torch.randint(-1, 2, (half, 1)) * torch.rand(half, 1)
    mixed = share * (first - centre) / spread + (1.0 - share**2).sqrt() * (second - other_centre) / other_spread
    return torch.stack([first, other_centre + other_spread * mixed], 1)


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    centre = values.nanmean(1, keepdim=True)
    return centre, (values - centre).square().nanmean(1, keepdim=True).sqrt().clamp_min(1e-3)


if __name__ == "__main__":
    run(RECIPES, build, save_network)
