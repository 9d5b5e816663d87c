"""The network is Lag-Llama: same distributions and losses as the reference implementation, to rounding.

The numbers in ``reference.json`` were written by ``record_reference.py``, which runs the reference implementation on
the tiny network and the batch below. Both are arithmetic, so that they are the same everywhere.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from gluonts_peft.backbone import Source
from gluonts_peft_lag_llama import LagLlamaBackbone, LagLlamaConfig, LagLlamaNetwork
from gluonts_peft_lag_llama.network import StudentT

CONFIG: dict[str, Any] = dict(
    context_length=8,
    max_context_length=64,
    lags_seq=(0, 1, 6, 11, 23),
    n_layer=2,
    n_head=2,
    n_embd_per_head=8,
    scaling="robust",
    time_feat=True,
    rope_scaling=None,
)
CASES: dict[str, dict[str, Any]] = {
    "robust": {},
    "std": {"scaling": "std"},
    "mean": {"scaling": "mean"},
    "unscaled": {"scaling": None},
    "no-calendar": {"time_feat": False},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "nope": {"rope_scaling": {"type": "nope", "factor": None}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_context_length": 8},
}
# The published checkpoint: lags of the reference's rule for the frequencies Q, M, W, D, H, T and S.
PUBLISHED_LAGS = tuple(
    sorted(
        {0, 7, 8, 10, 11, 12, 13, 14, 55, 83}
        | {k + d for k in (20, 27, 23, 35, 51, 103, 155, 363, 727, 1091) for d in (-1, 0, 1)}
        | {k + d for k in (23, 47, 71, 95, 119, 143, 167, 335, 503, 671, 719) for d in (-1, 0, 1)}
        | {k + d for k in (59, 119, 179) for d in (-2, -1, 0, 1, 2)}
        | {29, 30}
    )
)


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Set all weights by a formula."""
    for i, (name, tensor) in enumerate(sorted(network.state_dict().items())):
        step = torch.arange(tensor.numel(), dtype=torch.float64)
        wave = torch.sin(0.3 * step * step + step + i).reshape(tensor.shape)
        size = 2 * tensor.shape[-1] ** -0.5 if tensor.ndim == 2 else 0.5
        tensor.copy_(1 + 0.2 * wave if name.endswith(".scale") else size * wave)


def batch() -> dict[str, Tensor]:
    """Three series of 31 + 4 steps: one whole but for a label, one that begins late, one with gaps."""
    steps = torch.arange(35, dtype=torch.float64)
    values = torch.stack(
        [
            70 + 8 * torch.sin(steps / 3) + torch.cos(5 * steps),
            20 - 3 * torch.cos(steps / 5) + 0.1 * steps,
            5 * torch.sin(steps),
        ]
    )
    observed = torch.ones_like(values)
    observed[0, 33] = observed[1, :17] = observed[2, 4:30:5] = 0
    calendar = 0.5 * torch.sin(torch.outer(steps, torch.arange(1, 7) / 4)).expand(3, -1, -1).clone()
    calendar[1, :17] = 0
    values, observed, calendar = ((part).float() for part in (values * observed, observed, calendar))
    return {
        "past_target": values[:, :31],
        "past_observed_values": observed[:, :31],
        "future_target": values[:, 31:],
        "future_observed_values": observed[:, 31:],
        "time_feat": calendar,
    }


@cache
def reference() -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads((Path(__file__).parent / "reference.json").read_text())
    return numbers


def tiny(case: str) -> LagLlamaNetwork:
    network = LagLlamaNetwork(LagLlamaConfig(**{**CONFIG, **CASES[case]})).eval()
    fill(network)
    return network


def calendar(network: LagLlamaNetwork, found: dict[str, Tensor]) -> Tensor | None:
    return found["time_feat"] if network.config.time_feat else None


def assert_recorded(found: Tensor, case: str, name: str) -> None:
    expected = torch.tensor(reference()[case][name])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_every_case_is_recorded() -> None:
    assert list(reference()) == list(CASES)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_distributions_equal_the_reference(case: str) -> None:
    network, found = tiny(case), batch()
    law, level, spread = network(
        found["past_target"], found["past_observed_values"], calendar(network, found), found["future_target"]
    )

    assert law.df.shape == (3, 11)
    for name, part in zip(("df", "loc", "scale"), law, strict=True):
        assert_recorded(part, case, name)
    assert_recorded(level, case, "level")
    assert_recorded(spread, case, "spread")


def test_the_cases_differ() -> None:
    """Equal numbers would be no evidence that scaling, calendar and positions do anything."""
    found = {case: torch.tensor(reference()[case]["loc"]) for case in CASES}
    for case in set(CASES) - {"robust"}:
        assert (found[case] - found["robust"]).abs().max() > 0.01, case


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_loss_equals_the_reference_of_each_window(case: str) -> None:
    network, found = tiny(case), batch()
    source = Source("lag-llama", "tiny", "folder", None, "")
    lengths: dict[str, Any] = dict(prediction_length=4, context_length=8, source=source)
    backbone = LagLlamaBackbone(network, context_loss=True, **lengths)
    # Steps that were not observed are 0 in the record already.
    observed = torch.cat([found["past_observed_values"][:, -7:], found["future_observed_values"]], 1)
    expected = torch.tensor(reference()[case]["loss"]).sum(1) / observed.sum(1)

    torch.testing.assert_close(backbone.loss(found), expected, rtol=1e-5, atol=1e-5)
    # By default the label alone.
    label = torch.tensor(reference()[case]["loss"])[:, 7:].sum(1) / observed[:, 7:].sum(1)
    torch.testing.assert_close(LagLlamaBackbone(network, **lengths).loss(found), label, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_steps_of_a_given_path_equal_the_reference(case: str) -> None:
    """The reference forecasts so: it takes the path into the history and estimates level and spread anew."""
    network, found = tiny(case), batch()
    past, observed = found["past_target"], found["past_observed_values"]
    for step in range(4):
        law, level, spread = network(past, observed, calendar(network, found))
        expected = torch.tensor(reference()[case]["path"][step])
        got = torch.stack([*(part[:, -1] for part in law), level[:, 0], spread[:, 0]], 1)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        past = torch.cat([past, found["future_target"][:, step : step + 1]], 1)
        observed = torch.cat([observed, torch.ones(3, 1)], 1)


def test_sizes_and_names_are_those_of_the_published_checkpoint() -> None:
    config = LagLlamaConfig(
        context_length=32, lags_seq=PUBLISHED_LAGS, n_layer=8, n_head=9, n_embd_per_head=16, scaling="robust"
    )
    network = LagLlamaNetwork(config)
    names = list(network.state_dict())

    assert (len(PUBLISHED_LAGS), config.max_lag, config.token_size) == (84, 1092, 92)
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_449_299
    assert names[:8] == [f"param_proj.proj.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")] + [
        "transformer.wte.weight",
        "transformer.wte.bias",
    ]
    block = ["rms_1.scale", "attn.q_proj", "attn.kv_proj", "attn.c_proj", "rms_2.scale", "mlp.c_fc1", "mlp.c_fc2"]
    assert names[8:16] == [
        f"transformer.h.0.{part}{'' if part.endswith('scale') else '.weight'}" for part in [*block, "mlp.c_proj"]
    ]
    assert names[-1] == "transformer.ln_f.scale"
    assert network.state_dict()["transformer.h.0.mlp.c_fc1.weight"].shape == (512, 144)


def test_a_step_sees_no_later_one() -> None:
    network, found = tiny("robust"), batch()
    changed = found["future_target"].clone()
    changed[:, 2] += 10.0
    with torch.no_grad():
        first, second = (
            network(found["past_target"], found["past_observed_values"], found["time_feat"], future)[0].loc
            for future in (found["future_target"], changed)
        )

    # Tokens are the 8 steps of the context and the first 3 of the label; the changed one is the last.
    assert torch.equal(first[:, :10], second[:, :10])
    assert (first[:, 10] != second[:, 10]).all()


def test_draws_follow_the_law() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand((20_000, 2), generator=generator)
    for df, loc, scale in ((2.1, -3.0, 0.5), (5.0, 0.0, 1.0), (400.0, 10.0, 4.0)):
        law = StudentT(*(torch.full((20_000,), value) for value in (df, loc, scale)))
        drawn = law.quantile_of(uniform)

        assert drawn.isfinite().all()
        assert stats.kstest(drawn.double().numpy(), stats.t(df, loc, scale).cdf).pvalue > 0.01


def test_extreme_uniforms_give_finite_draws() -> None:
    law = StudentT(*(torch.full((4,), value) for value in (2.0, 0.0, 1.0)))
    edge = torch.tensor([[0.0, 0.0], [1 - 2.0**-24, 0.0], [0.0, 0.5], [1 - 2.0**-24, 0.5]])

    assert law.quantile_of(edge).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 0}, "n_layer 0 is not a positive integer"),
        ({"context_length": 2.0}, "context_length 2.0 is not a positive integer"),
        ({"n_embd_per_head": 7}, "n_embd_per_head 7 is odd; rotary positions turn pairs"),
        ({"input_size": 3}, "input_size 3 is not supported; Lag-Llama takes one series at a time"),
        ({"lags_seq": ()}, r"lags_seq \(\) must name at least one lag, each an integer from 0"),
        ({"lags_seq": (0, -1)}, r"lags_seq \(0, -1\) must name"),
        ({"scaling": "minmax"}, "scaling 'minmax' is unknown; known: 'mean', 'std', 'robust', None"),
        ({"time_feat": "yes"}, "time_feat 'yes' must be true or false"),
        ({"dropout": 1.0}, "dropout 1.0 is not a probability below 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "must be None or a mapping of 'type'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling factor 0.5 must be a number from 1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LagLlamaConfig(**{**CONFIG, **change})
