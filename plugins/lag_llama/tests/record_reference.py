"""Record what the reference implementation of Lag-Llama computes, for ``test_lag_llama_network.py``.

    python record_reference.py CHECKOUT

CHECKOUT is a clone of github.com/time-series-foundation-models/lag-llama. It is not needed to run the tests.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def import_reference(checkout: str) -> Any:
    """Return the module of the reference's network, with the part of gluonts that it misses since gluonts 0.15."""
    import gluonts.torch.modules as parent
    from pydantic import BaseModel

    class DistributionLoss(BaseModel):
        pass

    class NegativeLogLikelihood(DistributionLoss):
        beta: float = 0.0

        def __call__(self, law: Any, target: Tensor) -> Tensor:
            nll: Tensor = -law.log_prob(target)
            return nll

    loss = types.ModuleType("gluonts.torch.modules.loss")
    for part in (DistributionLoss, NegativeLogLikelihood):
        part.__module__ = loss.__name__
        setattr(loss, part.__name__, part)
    sys.modules[loss.__name__] = parent.loss = loss
    sys.path.insert(0, checkout)
    from lag_llama.gluon import lightning_module

    return lightning_module


@torch.no_grad()
def record(module: Any, config: dict[str, Any], found: dict[str, Tensor], fill: Any) -> dict[str, Any]:
    """Return distributions, losses of all steps, and the laws of the steps of a given path."""
    from gluonts.torch.distributions import StudentTOutput

    def build() -> Any:
        model = {**config, "lags_seq": list(config["lags_seq"]), "input_size": 1, "distr_output": StudentTOutput()}
        network = module.LagLlamaLightningModule(
            model_kwargs=model, context_length=config["context_length"], prediction_length=4, use_kv_cache=False
        ).eval()
        fill(network.model)
        return network

    network = build()
    past, observed = found["past_target"], found["past_observed_values"]
    length = past.shape[1]

    def dates(steps: int) -> dict[str, Tensor]:
        calendar = found["time_feat"]
        if not config["time_feat"]:
            return {}
        return {"past_time_feat": calendar[:, :length], "future_time_feat": calendar[:, length : length + steps]}

    law, level, spread = network.model(past, observed, **dates(4), future_target=found["future_target"])
    window = {name: value for name, value in found.items() if name != "time_feat"}
    parts = dict(zip(("df", "loc", "scale"), law, strict=True), level=level, spread=spread)
    parts["loss"] = network._compute_loss({**window, **dates(4)}, do_not_average=True)
    # Dynamic positions remember the longest sequence so far, so the path gets a network of its own.
    network, path = build(), []
    for step in range(4):
        law, level, spread = network.model(past, observed, **dates(step + 1))
        path.append(torch.stack([*(part[:, -1] for part in law), level[:, 0], spread[:, 0]], 1))
        past = torch.cat([past, found["future_target"][:, step : step + 1]], 1)
        observed = torch.cat([observed, torch.ones(len(observed), 1)], 1)
    return {name: rounded(part) for name, part in parts.items()} | {"path": [rounded(step) for step in path]}


def rounded(values: Tensor) -> list[list[float]]:
    """Nine digits give back every float32."""
    return [[float(f"{value:.9g}") for value in row] for row in values.tolist()]


def main() -> None:
    """Run as a program."""
    from test_lag_llama_network import CASES, CONFIG, batch, fill

    module = import_reference(sys.argv[1])
    numbers = {name: record(module, {**CONFIG, **change}, batch(), fill) for name, change in CASES.items()}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in numbers.items()]
    (Path(__file__).parent / "reference.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
