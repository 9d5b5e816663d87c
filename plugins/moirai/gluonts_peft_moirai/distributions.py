"""The output distributions of Moirai 1.x: decoded safely, computed for one patch size, without randomness in losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional
from torch.utils._pytree import tree_map
from uni2ts import distribution
from uni2ts.distribution._base import convert_to_container, tree_map_multi

from gluonts_peft.checkpoint import CheckpointError
from gluonts_peft.errors import unknown

__all__ = ["decode", "drawing_from", "log_prob", "parameters"]

_OUTPUTS = {
    name: cls
    for cls in (getattr(distribution, name) for name in (*distribution.DISTRIBUTION_OUTPUTS, "ParetoOutput"))
    for name in (f"{cls.__module__}.{cls.__name__}", f"uni2ts.distribution.{cls.__name__}")
}


def decode(config: Any) -> Any:
    """Build the output distribution that ``config.json`` describes by ``_target_`` mappings.

    Only the classes of ``uni2ts.distribution`` are known here: nothing is imported by a name from a file.

    Raises
    ------
    CheckpointError
        If the description names anything else, or its arguments do not fit.
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("_target_"), str):
        raise CheckpointError(f"distr_output {config!r} is not a mapping with a _target_")
    target = config["_target_"]
    if target not in _OUTPUTS:
        raise CheckpointError("distr_output is refused: " + unknown("_target_", target, sorted(_OUTPUTS)))
    arguments = {name: value for name, value in config.items() if name != "_target_"}
    if "components" in arguments:
        if not isinstance(arguments["components"], list) or not arguments["components"]:
            raise CheckpointError(f"distr_output: components of {target} is not a list of distributions")
        arguments["components"] = [decode(part) for part in arguments["components"]]
    for name, value in arguments.items():
        if name != "components" and not (isinstance(value, int | float) and 0 < value < float("inf")):
            raise CheckpointError(f"distr_output: {name} of {target} is {value!r}, not a positive number")
    try:
        return _OUTPUTS[target](**arguments)
    except TypeError as error:
        raise CheckpointError(f"distr_output: arguments of {target} do not fit: {error}") from error


def parameters(projection: nn.Module, features: Tensor, index: int, patch_size: int) -> Any:
    """Return the distribution's parameters at every step of some patches: a tree of tensors.

    uni2ts computes all patch sizes at full width and keeps one; this computes the rows of that one.

    Parameters
    ----------
    projection
        ``param_proj`` of the network.
    features
        Shape ``(batch, variates, patches, d_model)``.
    index, patch_size
        Which of the network's patch sizes, and how many steps it has.

    Returns
    -------
    tree of Tensor
        Shapes ``(batch, variates, patches * patch_size)``, the mixture's logits with a last axis of components.
    """

    def project(linear: Any) -> Tensor:
        def rows(x: Tensor) -> Tensor:
            kept: Tensor = x.unflatten(0, (linear.dim, -1))[:, :patch_size].flatten(0, 1)
            return kept

        weight = rows(linear.weight[index] * linear.mask[index])
        found = functional.linear(features, weight, rows(linear.bias[index]))
        # The domain maps are exponentials: half precision would be felt.
        steps: Tensor = found.float().unflatten(-1, (linear.dim, patch_size)).transpose(-1, -2).flatten(2, 3)
        return steps

    raw = tree_map(project, convert_to_container(projection.proj))
    return tree_map_multi(lambda func, x: func(x), projection.domain_map, raw)


def log_prob(base: Distribution, value: Tensor) -> Tensor:
    """Return the log probability of scaled values, shape of ``value``.

    Equal to uni2ts's own, whose mixture draws samples on the way: its loss moves the state of torch's generator.
    """
    mixture = isinstance(base, distribution.mixture.Mixture)
    parts: list[Any] = base.components if mixture else [base]  # type: ignore[attr-defined]
    found = []
    for part in parts:
        inside = part.support.check(value)
        # One is in the support of all but Pareto, where it gives finite numbers too. A plain where would pass NaN back.
        logs = part.log_prob(torch.where(inside, value, torch.ones_like(value)))
        found.append(torch.where(inside, logs, -torch.inf))
    if not mixture:
        return found[0]
    logits: Tensor = base.weights.logits  # type: ignore[attr-defined]
    return (logits + torch.stack(found, -1)).logsumexp(-1)


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Let torch's global generator, which ``torch.distributions`` draws from, go on where ``generator`` stands.

    Afterwards ``generator`` stands where the draws have left it, and the global one where it stood before. Without a
    generator the global one is used as it is.
    """
    if generator is None:
        yield
        return
    device = generator.device
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        if cuda:
            torch.cuda.set_rng_state(generator.get_state(), device)
        else:
            torch.set_rng_state(generator.get_state())
        yield
        generator.set_state(torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state())
