"""Hybrids: several adapters at once on one backbone, trained together.

Combining methods is an open question of arXiv 2409.11302. Parts attach in the given order, except that those which
need plain linear layers go first; an additive part that comes later wraps what an earlier one has put at the same
place, so their changes add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .base import Adapter, AdapterError

if TYPE_CHECKING:
    from ..backbone import Backbone

__all__ = ["Hybrid"]


class Hybrid(Adapter):
    """Several adapters as one.

    Parameters
    ----------
    parts
        At least two adapters of different names.

    Raises
    ------
    AdapterError
        If there are fewer than two, or a name appears twice, or ``none`` or ``full`` is among them.
    """

    name = "hybrid"

    def __init__(self, parts: Sequence[Adapter]) -> None:
        super().__init__({})
        names = [part.name for part in parts]
        if len(parts) < 2:
            raise AdapterError(f"a hybrid needs at least two adapters, got {names}; name a single adapter by itself")
        if len(set(names)) < len(names):
            raise AdapterError(f"a hybrid takes each adapter once, got {names}")
        if alone := {"none", "full"} & set(names):
            raise AdapterError(f"adapter {alone.pop()!r} cannot be a part of a hybrid, got {names}")
        kinds = [getattr(part, "prefix", part.name) for part in parts]
        if len(set(kinds)) < len(kinds):
            raise AdapterError(f"a hybrid takes one variant of a method, got {names}, which share their tensors' names")
        self.parts = sorted(parts, key=lambda part: not part.innermost)
        # The most sensitive part decides; a rate that is too small only costs time.
        self.learning_rate = min(part.learning_rate for part in parts)
        self.mergeable = all(part.mergeable for part in parts)
        self.head_levels = next((part.head_levels for part in parts if part.head_levels is not None), None)
        self.frozen_features = all(part.frozen_features for part in parts)
        self.scoring_windows = max(part.scoring_windows for part in parts)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))

    @property
    def spec(self) -> Any:
        """List of the parts' specs."""
        return [part.spec for part in self.parts]

    def require_trainable(self) -> None:
        for part in self.parts:
            for option in part.alone:
                if part.options.get(option):
                    raise AdapterError(
                        f"adapter {part!r}: option {option!r} is for training alone, and beside"
                        f" {', '.join(other.name for other in self.parts if other is not part)} features change at each"
                        " step; leave it out"
                    )

    def _attach(self, backbone: Backbone) -> None:
        for part in self.parts:
            if reason := backbone.impossible.get(part.name):
                raise AdapterError(f"adapter {part.name!r} is impossible on {backbone.family!r}: {reason}")
            part._attach(backbone)
            part.backbone = backbone

    def _detach(self, backbone: Backbone) -> None:
        for part in reversed(self.parts):
            part._detach(backbone)
            part.backbone = None

    def _fold(self) -> None:
        # From the inside out, as the forward pass goes.
        for part in self.parts:
            part._fold()

    def _unwrap(self, backbone: Backbone) -> None:
        for part in reversed(self.parts):
            part._unwrap(backbone)
            part.backbone = None

    def folds(self) -> list[nn.Parameter] | None:
        found = [part.folds() for part in self.parts]
        if any(each is None for each in found):
            return None
        return list(dict.fromkeys(parameter for each in found if each is not None for parameter in each))

    def _fold_into(self, reader: Backbone) -> None:
        if self.mergeable:
            super()._fold_into(reader)
            return
        # The others stay: a new head, for example.
        parts = [part for part in self.parts if part.mergeable]
        for part in parts:
            part._fold()
        for part in reversed(parts):
            part._unwrap(reader)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for part in self.parts for parameter in part.parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{part.name}/{name}": tensor for part in self.parts for name, tensor in part.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for part in self.parts:
            start = f"{part.name}/"
            part.load_state_dict({k[len(start) :]: tensor for k, tensor in state.items() if k.startswith(start)})

    def prepare(self, total_steps: int) -> None:
        for part in self.parts:
            part.prepare(total_steps)

    def score_on(self, batches: Sequence[Mapping[str, Tensor]], loss: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
        for part in self.parts:
            part.score_on(batches, loss)

    def after_step(self, step: int) -> None:
        for part in self.parts:
            part.after_step(step)

    @property
    def settled(self) -> bool:
        return all(part.settled for part in self.parts)

    def finish(self) -> None:
        for part in self.parts:
            part.finish()

    def report(self) -> dict[str, Any]:
        return {part.name: found for part in self.parts if (found := part.report())}

    def penalty(self) -> Tensor | None:
        terms = [term for part in self.parts if (term := part.penalty()) is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def training_state(self) -> dict[str, Tensor]:
        return {f"{part.name}/{name}": value for part in self.parts for name, value in part.training_state().items()}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        for part in self.parts:
            start = f"{part.name}/"
            part.load_training_state({k[len(start) :]: value for k, value in state.items() if k.startswith(start)})

    def save(self, folder: str | Path) -> None:
        """Write each part into a folder of its own name, which opens by itself, and a record of the whole."""
        backbone = self.attached
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for part in self.parts:
            part.save(folder / part.name)
        self._write_record(folder, backbone)

    def load(self, folder: str | Path) -> Adapter:
        for part in self.parts:
            part.load(Path(folder) / part.name)
        return self
