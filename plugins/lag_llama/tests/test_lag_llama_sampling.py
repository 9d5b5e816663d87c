"""The cached sampler draws from the network's own distributions, and its shortcuts change no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gluonts_peft_lag_llama import LagLlamaConfig, LagLlamaNetwork, sampling
from gluonts_peft_lag_llama.network import StudentT
from gluonts_peft_lag_llama.sampling import sample_paths, sample_paths_rescaled

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-calendar": {"time_feat": False},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_context_length": 10},
    "nope": {"rope_scaling": {"type": "nope", "factor": None}},
    "mean": {"scaling": "mean"},
    "robust": {"scaling": "robust"},
}
CONTEXT, LAG, HORIZON = 10, 9, 7


def network(rule: str = "plain") -> LagLlamaNetwork:
    torch.manual_seed(4)
    sizes: dict[str, Any] = dict(n_layer=2, n_head=2, n_embd_per_head=8, scaling="std")
    built = LagLlamaNetwork(
        LagLlamaConfig(**{**sizes, **dict(context_length=CONTEXT, lags_seq=(0, 2, 9)), **RULES[rule]})
    )
    with torch.no_grad():
        for parameter in built.parameters():
            # Far enough from the start that tokens attend to each other.
            parameter.mul_(2.0)
    return built.eval()


def history(built: LagLlamaNetwork, size: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    past = 50 + torch.randn(size, CONTEXT + LAG, generator=generator).cumsum(1)
    observed = torch.ones_like(past)
    observed[0, :5] = observed[1, 7] = 0
    calendar = torch.rand(size, CONTEXT + LAG + HORIZON, 6, generator=generator) - 0.5
    return past * observed, observed, calendar if built.config.time_feat else None


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(8)


def draw(built: LagLlamaNetwork, samples: int = 4, horizon: int = HORIZON, rescaled: bool = False) -> Tensor:
    function = sample_paths_rescaled if rescaled else sample_paths
    with torch.no_grad():
        return function(built, *history(built), prediction_length=horizon, num_samples=samples, generator=seeded())


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_each_step_is_a_draw_from_what_the_whole_network_says(rule: str) -> None:
    """Teacher-forced: the network gets the paths as known next values and must explain every draw."""
    built, samples = network(rule), 4
    paths = draw(built, samples)
    past, observed, calendar = (None if x is None else x.repeat_interleave(samples, 0) for x in history(built))
    law, level, spread = built(past, observed, calendar, paths.flatten(0, 1))
    uniform = torch.rand((3, samples, HORIZON, 2), generator=seeded()).flatten(0, 1)
    last = StudentT(*(part[:, -HORIZON:] for part in law))

    assert paths.shape == (3, samples, HORIZON)
    torch.testing.assert_close((paths.flatten(0, 1) - level) / spread, last.quantile_of(uniform), rtol=1e-5, atol=2e-5)
    # The laws do depend on the path, so that the comparison could have failed.
    assert (
        last.loc.unflatten(0, (3, samples))[:, 0, 1:] - last.loc.unflatten(0, (3, samples))[:, 1, 1:]
    ).abs().min() > 1e-5


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_rescaled_paths_are_draws_with_level_and_spread_of_the_growing_history(rule: str) -> None:
    built, samples = network(rule), 2
    paths = draw(built, samples, rescaled=True).flatten(0, 1)
    past, observed, calendar = (None if x is None else x.repeat_interleave(samples, 0) for x in history(built))
    uniform = torch.rand((3, samples, HORIZON, 2), generator=seeded()).flatten(0, 1)
    for step in range(HORIZON):
        grown = torch.cat([past, paths[:, :step]], 1)
        seen = torch.cat([observed, torch.ones(len(paths), step)], 1)
        law, level, spread = built(grown, seen, calendar)
        drawn = StudentT(*(part[:, -1:] for part in law)).quantile_of(uniform[:, step : step + 1])
        torch.testing.assert_close(paths[:, step : step + 1], drawn * spread + level, rtol=1e-5, atol=1e-5)


def test_both_samplers_agree_on_the_first_step_and_then_part() -> None:
    cached, rescaled = draw(network()), draw(network(), rescaled=True)

    torch.testing.assert_close(cached[..., 0], rescaled[..., 0], rtol=1e-5, atol=1e-5)
    assert (cached[..., 1:] != rescaled[..., 1:]).any()


def test_memory_limits_change_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw(network())
    monkeypatch.setattr(sampling, "_CACHE", 1)

    torch.testing.assert_close(draw(network()), whole, rtol=1e-6, atol=1e-5)


def test_a_single_step_needs_no_cache() -> None:
    one = draw(network(), horizon=1)

    assert one.shape == (3, 4, 1)
    assert one.isfinite().all()


@torch.no_grad()
def test_paths_follow_the_law_of_a_plain_loop() -> None:
    """Against torch's own Student-t and the network run anew at each step, with level and spread held."""
    built, count, horizon = network(), 3000, 3
    past, observed, calendar = history(built)
    level, spread = built.level_and_spread(past, observed)
    wide = [None if x is None else x.repeat_interleave(count, 0) for x in (past, observed, calendar)]
    drawn = torch.empty(3 * count, 0)
    torch.manual_seed(2)
    for _ in range(horizon):
        # One more value than is known: the network does not look at the last.
        law, _, _ = built(*wide, torch.cat([drawn, torch.zeros(len(drawn), 1)], 1))
        last = torch.distributions.StudentT(*(part[:, -1] for part in law))
        value = last.sample() * spread.repeat_interleave(count) + level.repeat_interleave(count)
        drawn = torch.cat([drawn, value[:, None]], 1)
    expected = drawn.unflatten(0, (3, count))
    found = draw(built, count, horizon)

    grid = torch.cat([found, expected], 1)
    below = [(paths[:, :, None] <= grid[:, None, ::6]).float().mean(1) for paths in (found, expected)]
    # Distance of two empirical distributions: 1.36 * sqrt(2 / 3000) = 0.035 is exceeded once in twenty.
    assert (below[0] - below[1]).abs().max() < 0.065
    assert (expected.std(1) > 0.05).all()
