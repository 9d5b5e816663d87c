"""TRACE: LoRA modules that are selected while they train, by Gated DSIC (arXiv 2503.16991).

    h = W x + g m (alpha/r) B A x          a module is one adapted weight matrix; gate g trains, mask m is 0 or 1
    repeat: train {A, B, g, head} for alpha_steps steps under m
            for k in 1..simulations: draw masks z; loss on held-out windows with g z;  S += |dL/dg| z;  C += z
            m = the modules of largest S / C, up to the budget
    at last the modules with m = 0 are dropped and the gates folded into B: a plain LoRA

Known of the paper: one scalar gate a module; training and scoring in turns; scores on validation data under random
masks of a fixed proportion, so that a module is judged as it will be after the others are gone; 8 simulations; masking
can be undone; rank 2. All else is our choice:

- A gate starts at 1. S / C is the mean over the simulations in which a module was on. Masks are balanced: how often two
  modules are on differs by one at most.
- The share of modules that are on falls in equal steps, from 1 to ``keep`` in the last of the ``schedule`` rounds; by
  default the rounds lie evenly in the first half of the training. A simulation masks as many modules as the round will.
- Each simulation sees other windows: the held-out ones are dealt out to the simulations. They are not the windows that
  choose the best epoch. Nothing is dropped out while scoring.
- A module that is masked keeps its A, B, gate and optimiser state and is scored again (``reversible``), or is out for
  good.

``selection`` names the method or a control: ``"dsic"``; ``"all_on"``, the same without masks; ``"magnitude"``, |g|;
``"random"``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import unknown
from .base import AdapterError, copy_into
from .forward import replace_method, restore_method
from .peft import Method, PeftAdapter

if TYPE_CHECKING:
    from ..backbone import Backbone

__all__ = ["Trace", "TraceOptions", "trace"]

logger = logging.getLogger(__name__)

SELECTIONS = ("dsic", "all_on", "magnitude", "random")
SCORES = ("gradient", "gate_gradient")

# A gate scales one product of two thin matrices: variants of LoRA that are more than this have no place here.
_LORA = {"r", "lora_alpha", "use_rslora", "lora_dropout", "sites", "target_modules", "exclude_modules"}

# Held-out windows that a simulation sees, if there are that many.
_WINDOWS = 8

_ROW = Method("trace", "LoraConfig", 2e-3, defaults={"r": 2, "lora_alpha": 16})


@dataclass(frozen=True)
class TraceOptions:
    """Options of the selection.

    Parameters
    ----------
    keep
        Share of the modules to keep, in (0, 1].
    schedule
        Rounds of selection.
    alpha_steps
        Training steps before each round; None spreads the rounds over the first half of the training.
    simulations
        Backward passes of a round.
    mask_proportion
        Share of the modules that a simulation masks; None means as many as the round will.
    score
        ``"gradient"``, the mean of ``|dL/dg|``, or ``"gate_gradient"``, of ``|g dL/dg|``, which does not change when a
        gate is scaled against its B.
    reversible
        Score masked modules too, so that they can come back.
    selection
        ``"dsic"``, ``"all_on"``, ``"magnitude"`` or ``"random"``.

    Raises
    ------
    AdapterError
        If a value cannot be used.
    """

    keep: float = 0.5
    schedule: int = 4
    alpha_steps: int | None = None
    simulations: int = 8
    mask_proportion: float | None = None
    score: str = "gradient"
    reversible: bool = True
    selection: str = "dsic"

    def __post_init__(self) -> None:
        if not isinstance(self.keep, int | float) or not 0 < self.keep <= 1:
            raise AdapterError(f"adapter 'trace': keep {self.keep!r} is not a share of the modules in (0, 1]")
        for name in ("schedule", "simulations", "alpha_steps"):
            value = getattr(self, name)
            if name == "alpha_steps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise AdapterError(f"adapter 'trace': {name} {value!r} is not a positive whole number")
        share = self.mask_proportion
        if share is not None and (not isinstance(share, int | float) or not 0 <= share < 1):
            raise AdapterError(f"adapter 'trace': mask_proportion {share!r} is not a share of the modules in [0, 1)")
        for name, known in (("score", SCORES), ("selection", SELECTIONS)):
            if getattr(self, name) not in known:
                raise AdapterError("adapter 'trace': " + unknown(name, getattr(self, name), known))


class Trace(PeftAdapter):
    """LoRA with gates and a selection of modules.

    Options are those of :class:`TraceOptions` and of LoRA under PEFT's names: ``r``, ``lora_alpha``, ``use_rslora``,
    ``lora_dropout``, ``sites`` and ``target_modules``. What is saved is a plain LoRA over the kept modules; saving ends
    the selection.
    """

    own_options = frozenset(field.name for field in fields(TraceOptions))

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(_ROW, options)
        self.settings = TraceOptions(**{name: options[name] for name in self.own_options & set(options)})
        if self._selects:
            # Also for controls that score nothing, so that all train on the same data.
            self.scoring_windows = self.settings.simulations * _WINDOWS
        # Those that are still gated: by name, in the network's order. Empty once the selection is over.
        self._gated: dict[str, Any] = {}
        self._names: list[str] = []
        self._rounds: dict[int, int] = {}
        self._log: dict[str, list[Tensor]] = {}
        self._cost = [0.0, 0.0]
        self._scoring: list[Mapping[str, Tensor]] = []
        self._loss: Callable[[Mapping[str, Tensor]], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Held-out windows, and a loss that may have no name, belong to the training and stay there.
        return {**vars(self), "_scoring": [], "_loss": None}

    def known_options(self) -> set[str]:
        return _LORA | self.own_options

    @property
    def _selects(self) -> bool:
        return self.settings.keep < 1

    @property
    def _measures(self) -> bool:
        return self._selects and self.settings.selection in ("dsic", "all_on")

    def _attach(self, backbone: Backbone) -> None:
        from peft.tuners.lora import Linear

        super()._attach(backbone)
        names = {id(module): name for name, module in backbone.network.named_modules()}
        layers = {names[id(layer)]: layer for layer in self._layers}
        for name, layer in layers.items():
            if not isinstance(layer, Linear):
                self._unwrap(backbone)
                raise AdapterError(
                    f"adapter {self!r} gates linear layers, and {name!r} is a {type(layer.get_base_layer()).__name__};"
                    " name other sites"
                )
        for layer in self._layers:
            weight = layer.lora_A["default"].weight
            layer.gate = nn.Parameter(torch.ones((), device=weight.device, dtype=weight.dtype))
            layer.on = True
            replace_method(layer, "forward", gated_forward)
            replace_method(layer, "get_delta_weight", gated_delta)
        self._gated, self._names, self._log, self._cost = layers, list(layers), {}, [0.0, 0.0]
        self._refresh()

    def _refresh(self) -> None:
        """Look anew at what trains, after layers or gates have come or gone."""
        self._parameters = [
            parameter
            for layer in self._layers
            for name, parameter in layer.named_parameters()
            if name == "gate" or name.startswith("lora_")
        ]

    def _unwrap(self, backbone: Backbone) -> None:
        for layer in self._gated.values():
            _ungate(layer)
        super()._unwrap(backbone)
        self._gated, self._rounds, self._scoring, self._loss = {}, {}, [], None

    def prepare(self, total_steps: int) -> None:
        settings, count = self.settings, len(self._gated)
        if not self._selects or not count:
            return
        every = settings.alpha_steps or max(1, total_steps // (2 * settings.schedule))
        if every * settings.schedule >= total_steps:
            raise AdapterError(
                f"adapter 'trace': schedule {settings.schedule} with alpha_steps {every} leaves none of the"
                f" {total_steps} training steps after the last selection; lower them or train longer"
            )
        for number in range(1, settings.schedule + 1):
            on = self._simulated(self._candidates(number), self._budget(number))
            if settings.selection == "dsic" and on * settings.simulations < self._candidates(number):
                raise AdapterError(
                    f"adapter 'trace': {settings.simulations} simulations with {on} of {count} modules on leave some"
                    f" unscored; use at least {-(-count // on)} simulations, a lower mask_proportion or a larger keep"
                )
        self._rounds = {every * number: number for number in range(1, settings.schedule + 1)}

    def score_on(self, batches: Sequence[Mapping[str, Tensor]], loss: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
        """Deal the held-out windows out to the simulations.

        Raises
        ------
        AdapterError
            If there are fewer windows than simulations.
        """
        if not self._measures:
            return
        count, simulations = sum(len(batch["past_target"]) for batch in batches), self.settings.simulations
        if count < simulations:
            raise AdapterError(
                f"adapter 'trace': {simulations} simulations need as many held-out windows, and there are {count};"
                " lower simulations or give more or longer series"
            )
        together = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        self._scoring = [
            {name: tensor[start::simulations] for name, tensor in together.items()} for start in range(simulations)
        ]
        self._loss = loss

    def _budget(self, number: int) -> int:
        """Return how many modules stay on after a round."""
        share = 1.0 - (1.0 - self.settings.keep) * number / self.settings.schedule
        return max(1, round(share * len(self._names)))

    def _candidates(self, number: int) -> int:
        """Return how many modules a round chooses from."""
        return len(self._names) if self.settings.reversible or number == 1 else self._budget(number - 1)

    def _simulated(self, candidates: int, budget: int) -> int:
        """Return how many modules are on in a simulation."""
        if self.settings.selection == "all_on":
            return candidates
        share = self.settings.mask_proportion
        return budget if share is None else max(1, round((1.0 - share) * candidates))

    def after_step(self, step: int) -> None:
        number = self._rounds.get(step + 1)
        if number is None or not self._gated:
            return
        on = torch.tensor([layer.on for layer in self._gated.values()])
        candidates = torch.ones_like(on) if self.settings.reversible else on
        started = time.perf_counter()
        importance, error = self._importance(candidates, self._budget(number))
        self._cost[0] += time.perf_counter() - started
        order = torch.where(candidates, importance, -1.0).argsort(descending=True, stable=True)
        chosen = torch.zeros_like(on)
        chosen[order[: self._budget(number)]] = True
        for name, value in (("importance", importance), ("standard_error", error), ("on", chosen)):
            self._log.setdefault(name, []).append(value)
        self._switch(chosen)
        logger.info(
            "trace: round %d of %d after %d steps keeps %d of %d modules; importance with standard error: %s",
            number,
            self.settings.schedule,
            step + 1,
            int(chosen.sum()),
            len(chosen),
            ", ".join(f"{n} {i:.3g} ± {e:.2g}" for n, i, e in zip(self._names, importance, error, strict=True)),
        )

    def _switch(self, on: Tensor) -> None:
        for layer, state in zip(self._gated.values(), on.tolist(), strict=True):
            layer.on = state
        self.attached.weights.forget()

    def _importance(self, candidates: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """Return the importance of each module and its standard error, NaN if unknown, shape ``(modules,)``."""
        count, none = len(candidates), torch.full((len(candidates),), torch.nan)
        if self.settings.selection == "random":
            return torch.rand(count), none
        gates = [layer.gate for layer in self._gated.values()]
        if self.settings.selection == "magnitude":
            return torch.stack([gate.detach().abs().cpu() for gate in gates]), none
        if self._loss is None:
            raise AdapterError("adapter 'trace' has no held-out windows to score on; hand them over with score_on()")
        masks = self._masks(candidates, self._simulated(int(candidates.sum()), budget))
        before = torch.tensor([layer.on for layer in self._gated.values()])
        found = torch.zeros(masks.shape)
        try:
            with _evaluation(self.attached), torch.enable_grad():
                for scores, mask, batch in zip(found, masks, self._scoring, strict=True):
                    self._switch(mask)
                    loss = self._loss(batch).mean()
                    gradients = torch.autograd.grad(loss, gates, allow_unused=True)
                    for index, (gate, gradient) in enumerate(zip(gates, gradients, strict=True)):
                        if gradient is not None:
                            weight = gate.detach() if self.settings.score == "gate_gradient" else 1.0
                            scores[index] = float((weight * gradient).abs())
        finally:
            self._switch(before)
        self._cost[1] += len(masks)
        times = masks.sum(0)
        mean = (found * masks).sum(0) / times.clamp(min=1)
        # Of one simulation nothing can be said: 0 / 0 is NaN.
        variance = ((found - mean).square() * masks).sum(0) / (times - 1).clamp(min=0)
        return mean, (variance / times).sqrt()

    def _masks(self, candidates: Tensor, on: int) -> Tensor:
        """Draw which modules are on in each simulation, each about equally often, shape ``(simulations, modules)``."""
        times = torch.zeros(len(candidates))
        masks = torch.zeros(self.settings.simulations, len(candidates), dtype=torch.bool)
        for mask in masks:
            # Those that were on less often come first, in a random order.
            rank = torch.where(candidates, times + torch.rand(len(times)), torch.inf)
            mask[rank.argsort()[:on]] = True
            times += mask
        return masks

    @property
    def settled(self) -> bool:
        return not self._rounds or not self._gated or len(self._log.get("on", ())) == self.settings.schedule

    def finish(self) -> None:
        """End the selection: drop the masked modules and fold the gates into B, which changes no output."""
        self._finish([name for name, layer in self._gated.items() if layer.on], fold=True)

    @torch.no_grad()
    def _finish(self, kept: Sequence[str], *, fold: bool) -> None:
        if not self._gated:
            return
        backbone = self.attached
        dropped = {id(layer) for name, layer in self._gated.items() if name not in kept}
        for layer in self._gated.values():
            if fold and layer.on:
                layer.lora_B["default"].weight.mul_(layer.gate)
            _ungate(layer)
        for module in backbone.network.modules():
            for name, child in list(module.named_children()):
                if id(child) in dropped:
                    setattr(module, name, child.base_layer)
        self._layers = [layer for layer in self._layers if id(layer) not in dropped]
        # Names in full, in the network's order.
        self._tuner.peft_config["default"].target_modules = [name for name in self._names if name in kept]
        self._gated, self._scoring, self._loss = {}, [], None
        self._refresh()

    @property
    def kept(self) -> list[str]:
        """Names of the modules that are on."""
        if self._gated:
            return [name for name, layer in self._gated.items() if layer.on]
        return list(self._tuner.peft_config["default"].target_modules)

    def state_dict(self) -> dict[str, Tensor]:
        gates = {f"base_model.model.{name}.gate": layer.gate for name, layer in self._gated.items()}
        return {**super().state_dict(), **gates}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over stored tensors; those of a selection that was over end this one with the same modules."""
        stored = {name.removeprefix("base_model.model.").rpartition(".lora_A")[0] for name in state}
        kept = [name for name in self._names if name in stored]
        if self._gated and kept and not any(name.endswith(".gate") for name in state):
            self._finish(kept, fold=False)
        copy_into(self.state_dict(), state, self)

    def training_state(self) -> dict[str, Tensor]:
        state = {name: torch.stack(values) for name, values in self._log.items()}
        return {**state, "cost": torch.tensor(self._cost, dtype=torch.float64)} if state else {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self._log = {name: list(values) for name, values in state.items() if name != "cost"}
            self._cost = state["cost"].tolist()
            self._switch(self._log["on"][-1])

    def report(self) -> dict[str, Any]:
        """Return the modules, what each round found of them, and what the selection cost.

        ``rounds`` holds for each round the importance of the modules, its standard error (None of fewer than two
        simulations), and which were on after it, in the order of ``modules``.
        """
        if not self._names:
            return {}
        names = list(self._log)
        rounds = [
            {
                name: [None if number != number else number for number in value.tolist()]
                for name, value in zip(names, values, strict=True)
            }
            for values in zip(*self._log.values(), strict=True)
        ]
        cost = {"seconds": self._cost[0], "backward_passes": int(self._cost[1])}
        return {"modules": self._names, "kept": self.kept, "rounds": rounds, "cost": cost}

    def save(self, folder: str | Path) -> None:
        self.finish()
        super().save(folder)

    def _write_record(self, folder: Path, backbone: Backbone, **more: Any) -> None:
        super()._write_record(folder, backbone, kept=self.kept, **more)


def gated_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return what a LoRA layer of PEFT makes of ``x``: its change is scaled by ``gate``, or left out unless ``on``."""
    if layer.disable_adapters or layer.merged:
        plain: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return plain
    result: Tensor = layer.base_layer(x, *args, **kwargs)
    if not layer.on:
        return result
    inner = functional.linear(layer.lora_dropout["default"](x), layer.lora_A["default"].weight)
    # The gate scales B, the smaller factor, so that folding it in later gives the same numbers bit by bit.
    change = functional.linear(inner, layer.lora_B["default"].weight * layer.gate)
    scaling: float = layer.scaling["default"]
    return result + change * scaling


def gated_delta(layer: Any, adapter: str) -> Tensor:
    """Return the change of the weight of such a layer."""
    delta: Tensor = type(layer).get_delta_weight(layer, adapter)
    return delta * layer.gate if layer.on else torch.zeros_like(delta)


def _ungate(layer: Any) -> None:
    """Make a layer PEFT's own again."""
    if hasattr(layer, "gate"):
        restore_method(layer, "forward")
        restore_method(layer, "get_delta_weight")
        del layer.gate, layer.on


@contextmanager
def _evaluation(backbone: Backbone) -> Iterator[None]:
    """Evaluation mode with gradients; the mode of every module is restored on exit."""
    training = [module for module in backbone.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def trace(**options: Any) -> Trace:
    """Build the adapter."""
    return Trace(options)
