"""Pretrain the bundled checkpoint from scratch, on synthetic series only.

    python -m gluonts_peft_moment.pretraining moment-nano --out FOLDER

As MOMENT was (Goswami et al. 2024, arXiv 2402.03885): 30 % of the patches of a window are hidden, and the network
learns to fill them in. The error is measured in standard deviations of the whole window. Our choice: the error of the
patches that are shown counts a fifth as much, or so small a network does not learn to give them back; sizes, data and
schedule; windows that are short more often than long, as vital signs are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gluonts_peft.pretraining import Loss, Recipe, run

from .network import MomentNetwork, bridge, normalise

__all__ = ["RECIPES", "build", "hide"]

# Weight of the error of patches that are shown, relative to that of hidden ones.
VISIBLE = 0.2

RECIPES = {
    "moment-nano": Recipe(
        model=dict(
            d_model=64,
            d_kv=16,
            d_ff=192,
            num_layers=4,
            num_heads=4,
            feed_forward_proj="gated-silu",
            initializer_factor=1.0,
            dropout_rate=0.0,
            layer_norm_epsilon=1e-6,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=64,
            # T5 wants words; MOMENT has none.
            vocab_size=1,
            pad_token_id=0,
            eos_token_id=None,
            decoder_start_token_id=0,
            is_encoder_decoder=False,
            model_type="t5",
        ),
        config=dict(
            task_name="reconstruction",
            model_name="MOMENT",
            transformer_type="encoder_only",
            transformer_backbone="google/flan-t5-small",
            d_model=None,
            seq_len=512,
            patch_len=8,
            patch_stride_len=8,
            patch_dropout=0.0,
            head_dropout=0.1,
            mask_ratio=0.3,
            model_kwargs={},
        ),
        horizon=8,
        contexts={504: 0.1, 248: 0.15, 120: 0.25, 64: 0.25, 40: 0.15, 24: 0.1},
        batch_size=64,
        steps=5_000,
        daily=0.5,
        learning_rate=3e-3,
    ),
}


def hide(given: Tensor, patch_len: int, ratio: float) -> Tensor:
    """Hide patches at random: as many of each window as the reference hides, the rest rounded up.

    Parameters
    ----------
    given
        Shape ``(batch, time)``; 1 where there is a window.
    patch_len
        Steps of a patch.
    ratio
        Share of the given patches to hide.

    Returns
    -------
    Tensor
        Shape of ``given``: 0 where hidden, else 1.
    """
    patches = given.reshape(len(given), -1, patch_len).amin(-1) > 0
    order = torch.rand(patches.shape, device=given.device).masked_fill(~patches, 2.0).argsort(1).argsort(1)
    shown = order < (patches.sum(1, keepdim=True) * (1.0 - ratio)).ceil()
    return (shown | ~patches).repeat_interleave(patch_len, 1).to(given.dtype)


def build(recipe: Recipe) -> tuple[MomentNetwork, Loss]:
    """Return a freshly initialised network and its loss of history and label, which are one window to it."""
    network = MomentNetwork({**recipe.config, "t5_config": dict(recipe.model)})
    ratio, patch_len = recipe.config["mask_ratio"], network.patch_len

    def reconstruction_error(history: Tensor, label: Tensor) -> Tensor:
        window = torch.cat([history, label], 1)
        observed = (~window.isnan()).to(window.dtype)
        window = window.nan_to_num(0.0)
        values, given = bridge(window, observed, patch_len)
        shown = hide(given, patch_len, ratio)
        deviation = normalise(window, observed)[2]
        errors = ((network.reconstruct(values, given, shown) - window) / deviation).square()
        hidden, visible = (1.0 - shown) * observed, shown * observed

        def mean_over(steps: Tensor) -> Tensor:
            return (errors * steps).sum() / steps.sum().clamp(min=1.0)

        return mean_over(hidden) + VISIBLE * mean_over(visible)

    return network, reconstruction_error


if __name__ == "__main__":
    run(RECIPES, build)
