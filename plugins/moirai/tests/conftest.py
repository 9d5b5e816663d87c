from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gluonts_peft.backbone import Source
from gluonts_peft_moirai import MoiraiBackbone

SOURCE = Source("moirai", "tiny", "folder", None, "0" * 64)


@cache
def _network(architecture: str) -> nn.Module:
    """A tiny network of each architecture, as it comes from its constructor but for a push off its special points."""
    from uni2ts import distribution as d

    outputs = [d.StudentTOutput(), d.NormalFixedScaleOutput(), d.NegativeBinomialOutput(), d.LogNormalOutput()]
    sizes: dict[str, Any] = dict(d_model=64, num_layers=2, max_seq_len=128, attn_dropout_p=0.0, dropout_p=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        network: nn.Module
        if architecture == "moirai-1":
            from uni2ts.model.moirai import MoiraiModule

            network = MoiraiModule(distr_output=d.MixtureOutput(outputs), patch_sizes=[8, 16, 32], **sizes)
        elif architecture == "moirai-moe":
            from uni2ts.model.moirai_moe import MoiraiMoEModule

            network = MoiraiMoEModule(distr_output=d.MixtureOutput(outputs), patch_sizes=[8, 16], d_ff=32, **sizes)
        else:
            from uni2ts.model.moirai2 import Moirai2Module

            network = Moirai2Module(d_ff=96, patch_size=8, num_predict_token=2, **sizes)
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                if name.endswith("centroid"):
                    buffer.normal_()
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.fixture(scope="session")
def network() -> Callable[[str], nn.Module]:
    """Tiny networks: not to be changed."""
    return _network


@pytest.fixture(scope="session")
def backbone() -> Callable[..., Any]:
    """Backbones around the tiny networks: not to be changed."""

    def build(architecture: str, prediction_length: int = 12, context_length: int = 96, **options: Any) -> Any:
        return MoiraiBackbone.from_network(
            _network(architecture),
            prediction_length=prediction_length,
            context_length=context_length,
            source=SOURCE,
            **options,
        )

    return build


@pytest.fixture(scope="session")
def walks() -> Callable[..., dict[str, Tensor]]:
    """Batches of random walks with gaps, padding and covariates, as the core makes them."""

    def make(
        size: int = 4,
        past: int = 80,
        horizon: int = 12,
        *,
        dims: int = 0,
        known: int = 0,
        past_only: int = 0,
        missing: float = 0.0,
        padded: bool = False,
        label: bool = True,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def draw(width: int, steps: int) -> tuple[Tensor, Tensor]:
            shape = (size, steps, max(width, 1))
            values = torch.randn(shape, generator=generator).cumsum(1) + 20 * torch.rand(shape, generator=generator)
            observed = (torch.rand(shape, generator=generator) >= missing).float()
            if padded:
                for row in range(size):
                    observed[row, : row * past // (size + 1)] = 0.0
            values = values * observed
            return (values, observed) if width else (values[..., 0], observed[..., 0])

        values, observed = draw(dims, past + horizon)
        batch = {"past_target": values[:, :past], "past_observed_values": observed[:, :past]}
        if label:
            batch |= {"future_target": values[:, past:], "future_observed_values": observed[:, past:]}
        if known:
            batch["feat_dynamic_real"], batch["observed_feat_dynamic_real"] = draw(known, past + horizon)
        if past_only:
            batch["past_feat_dynamic_real"], batch["past_observed_feat_dynamic_real"] = draw(past_only, past)
        return batch

    return make
