"""Selective adapters: some of the model's own parameters train in place.

    none        nothing: zero-shot
    full        everything
    head        the layers that make the forecast from the last features
    bitfit      every bias the model has (Ben Zaken et al. 2022, arXiv 2106.10199)

Chronos-T5 has no bias tensors; arXiv 2409.11302 quotes 256 parameters for its Tiny size, which are exactly the two
tables of relative position biases. A family lists such tables among its ``bias`` sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import unknown
from .base import Adapter, AdapterError, copy_into, unwrapped

if TYPE_CHECKING:
    from ..backbone import Backbone

__all__ = ["Selection", "Selective", "bitfit", "full", "head", "none"]


class Selective(Adapter):
    """Parameters of the base that train in place.

    Parameters
    ----------
    name
        Name in the registry.
    sites
        Kinds of site whose parameters train; None means all parameters, empty none.
    learning_rate
        Default rate.
    """

    def __init__(self, name: str, sites: tuple[str, ...] | None, learning_rate: float) -> None:
        super().__init__({})
        self.name = name
        self.sites = sites
        self.learning_rate = learning_rate
        self._chosen: dict[str, nn.Parameter] = {}

    def _attach(self, backbone: Backbone) -> None:
        named = dict(backbone.network.named_parameters())
        if self.sites is None:
            chosen = named
        elif not self.sites:
            chosen = {}
        else:
            places = backbone.places(self.sites)
            # A name is a parameter, or a module all of whose parameters train. Tied parameters count once, under
            # the first of their names.
            every = dict(backbone.network.named_parameters(remove_duplicate=False))
            wanted = {
                id(parameter)
                for name, parameter in every.items()
                if any(name == place or name.startswith(f"{place}.") for place in places)
            }
            chosen = {name: parameter for name, parameter in named.items() if id(parameter) in wanted}
        self._chosen = {unwrapped(name): parameter for name, parameter in chosen.items()}

    def _detach(self, backbone: Backbone) -> None:
        self._chosen = {}

    def folds(self) -> list[nn.Parameter] | None:
        return []

    def _fold(self) -> None:
        """The parameters are the base's own: nothing to do."""

    def _unwrap(self, backbone: Backbone) -> None:
        self._chosen = {}

    def parameters(self) -> list[nn.Parameter]:
        return list(self._chosen.values())

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._chosen)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        copy_into(self._chosen, state, self)


@dataclass(frozen=True)
class Selection:
    """A row of the table of selective adapters; calling it builds the adapter."""

    name: str
    sites: tuple[str, ...] | None
    learning_rate: float

    def __call__(self, **options: Any) -> Selective:
        if options:
            raise AdapterError(f"adapter {self.name!r}: " + unknown("option", next(iter(options)), ()))
        return Selective(self.name, self.sites, self.learning_rate)


none = Selection("none", (), 0.0)
full = Selection("full", None, 1e-4)
head = Selection("head", ("head",), 1e-3)
bitfit = Selection("bitfit", ("bias",), 3e-3)
