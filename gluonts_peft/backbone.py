"""The contract of a model family: a pretrained forecaster that adapters attach to.

A family says *where* its places are (``sites``), never which adapter goes there; an adapter says *what kind of place*
it wants, never how a family names it. :data:`SITES` is the closed set of kinds that both agree on.
"""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .checkpoint import Checkpoint, CheckpointError, fingerprint, parse, resolve
from .errors import unknown
from .networks import SENSELESS, Networks, read_network
from .units import wrap_methods
from .weights import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

    from .adapters.base import Adapter

__all__ = [
    "CAPABILITIES",
    "SITES",
    "Backbone",
    "ForecastingHead",
    "Source",
    "Trajectories",
    "find_sites",
    "load_backbone",
]

SITES: dict[str, str] = {
    "q": "query projections of attention (modules)",
    "k": "key projections of attention (modules)",
    "v": "value projections of attention (modules)",
    "o": "output projections of attention (modules)",
    "ff_in": "projections into feed-forward layers (modules)",
    "ff_out": "projections out of feed-forward layers (modules)",
    "norm": "all normalisation layers (modules)",
    "attention_norm": "normalisation layers that feed attention (modules)",
    "embedding": "layers that embed the input (modules)",
    "head": "layers that make the forecast from the last features (modules)",
    "bias": "bias tensors (parameters)",
}


CAPABILITIES: dict[str, str] = {
    "samples": "forecasts are sample paths",
    "quantiles": "forecasts are quantiles",
    "features": "other heads can be put on it",
    "reconstruct": "gives back its input, for anomalies and gaps",
    "covariates": "takes dynamic features, known in the future or in the past only",
    "multivariate": "takes targets of several dimensions",
}


@dataclass(frozen=True)
class Source:
    """Where the weights of a backbone came from, as recorded with everything that is saved."""

    family: str
    checkpoint: str
    kind: str
    revision: str | None
    fingerprint: str


@dataclass(frozen=True)
class Trajectories:
    """Forecasts of a batch.

    Parameters
    ----------
    values
        Shape ``(batch, n, prediction_length)``: ``n`` quantiles or ``n`` sample paths; of multivariate targets
        ``(batch, n, prediction_length, dimensions)``. float32, or float64 where that cannot hold them.
    levels
        Quantile levels of axis 1, or None for sample paths.
    """

    values: Tensor
    levels: tuple[float, ...] | None


#: Where in the network a head lies that takes the place of the family's own.
NEW_HEAD = "new_head"


class ForecastingHead(Protocol):
    """A module that forecasts from the features of a backbone, in place of the family's own head."""

    def loss(self, features: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each window, shape ``(batch,)``."""

    def forecast(self, features: Tensor, batch: Mapping[str, Tensor]) -> Trajectories:
        """Forecast the whole horizon."""


def _or_by_new_head(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a family's method that hands over to the new head in the network, if there is one."""
    name = method.__name__
    if name not in ("loss", "forecast"):
        return method

    @wraps(method)
    def answer(self: Backbone, batch: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        head = self.new_head
        if head is None:
            return method(self, batch, *args, **kwargs)
        return getattr(head, name)(self.full_features(batch), batch)

    return answer


class Backbone(nn.Module, ABC):
    """A pretrained forecaster.

    Subclasses set the class attributes, build ``network`` in ``__init__`` and implement :meth:`load_network`,
    :meth:`sites`, :meth:`loss`, :meth:`forecast` and :meth:`export`.

    Numbers that float32 or a network's own constants would spoil never reach a family: :meth:`loss`, :meth:`forecast`,
    :meth:`features` and :meth:`reconstruct` of every subclass are wrapped, see :mod:`gluonts_peft.units`. A family
    writes them for float32 batches of ordinary numbers; who calls them may give float64, of any scale and level, and
    gets forecasts and reconstructions in the units of the data, float64 where float32 cannot hold them.

    Batches are mappings of GluonTS names to float32 tensors: ``past_target`` and ``past_observed_values`` of shape
    ``(batch, past)`` with ``past <= past_length``, and for training ``future_target`` and ``future_observed_values``
    of shape ``(batch, prediction_length)``. Missing values, and padding on the left, are 0 where the observed mask
    is 0. Families with capability ``"multivariate"`` also take targets with a last axis of dimensions; those with
    ``"covariates"`` get ``feat_dynamic_real`` and ``observed_feat_dynamic_real`` of shape
    ``(batch, past + prediction_length, features)``, ``past_feat_dynamic_real`` and
    ``past_observed_feat_dynamic_real`` of shape ``(batch, past, features)`` where the data have them; those that name
    ``time_features`` get ``time_feat`` of shape ``(batch, past + prediction_length, len(time_features))``.

    Attributes
    ----------
    family
        Name in the registry.
    network
        The pretrained module that adapters rewrite.
    capabilities
        What the family can do: a subset of :data:`CAPABILITIES`.
    equivariance
        What forecasts follow when a window is scaled or shifted, one of :data:`gluonts_peft.units.EQUIVARIANCE`; it
        says which windows are ordinary.
    batch_dtype
        Type of the values in batches: float64 for families that put them into bins, where a rounding is a step.
    density
        Whether the loss is minus a log density of the values, so that ``log(s)`` is added to it where data are scaled
        by ``s``. Any other loss is free of units.
    impossible
        Adapter name -> reason, for adapters that have no place to attach to in this family.
    untrained
        Kinds of site whose weights the checkpoint does not bring, such as the head of a model that was pretrained to
        reconstruct: they must train along with any adapter, and there is no zero-shot forecast.
    time_features
        Names of functions of ``gluonts.time_feature`` whose values the network takes.
    patch_length
        Steps that the network takes as one, counted from the end of the history: what :meth:`reconstruct` hides and
        fills in as a whole.
    source
        Base checkpoint, revision and fingerprint.
    options
        Options of the family that :meth:`from_checkpoint` was given; JSON values.
    adapter
        The adapter that is attached, or None.
    place
        Folder that the weights were read from, if they were.
    weights
        What is known of the weights besides their values.
    """

    family: ClassVar[str]
    capabilities: ClassVar[frozenset[str]] = frozenset()
    equivariance: ClassVar[str] = "none"
    density: ClassVar[bool] = False
    batch_dtype: ClassVar[torch.dtype] = torch.float32
    impossible: ClassVar[Mapping[str, str]] = {}
    untrained: tuple[str, ...] = ()
    time_features: tuple[str, ...] = ()
    patch_length: int = 1
    place: Path | None = None

    network: nn.Module

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        wrap_methods(cls, Backbone, _or_by_new_head)

    def __init__(
        self, network: nn.Module, *, prediction_length: int, context_length: int, source: Source, **options: Any
    ) -> None:
        super().__init__()
        if options:
            # What a subclass does not name in its own signature comes here.
            common = inspect.signature(Backbone.__init__).parameters
            own = inspect.signature(type(self).__init__).parameters.values()
            known = [each.name for each in own if each.name not in common and each.kind is not each.VAR_KEYWORD]
            raise ValueError(unknown("backbone option", min(options), known))
        if prediction_length <= 0:
            raise ValueError(f"prediction_length {prediction_length} is not positive; name the steps to forecast")
        if context_length <= 0:
            raise ValueError(f"context_length {context_length} is not positive; name the steps of history to use")
        self.network = network.requires_grad_(False)
        self.prediction_length = prediction_length
        self.context_length = context_length
        self.source = source
        self.options: dict[str, Any] = {}
        self.adapter: Adapter | None = None
        self.weights = Weights()
        self.eval()

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.network.parameters())
        return f"{type(self).__name__}({self.source.checkpoint!r}, {count:,} parameters, adapter={self.adapter!r})"

    @classmethod
    def bundled(cls) -> dict[str, Path]:
        """Return the checkpoints that ship with the plug-in, name -> folder: by default those in the folder
        ``checkpoints`` beside the module of the class, or of a class that it derives from.
        """
        found: dict[str, Path] = {}
        for kind in cls.__mro__[: cls.__mro__.index(Backbone)]:
            place = getattr(sys.modules[kind.__module__], "__file__", None)
            root = Path(place or "").parent / "checkpoints"
            folders = sorted(root.glob("*")) if place else []
            found = {folder.name: folder for folder in folders if (folder / "config.json").is_file()} | found
        return found

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path | Checkpoint,
        *,
        prediction_length: int,
        context_length: int | None = None,
        networks: Networks | None = None,
        **options: Any,
    ) -> Self:
        """Load the weights and build the backbone.

        Parameters
        ----------
        checkpoint
            Bundled name, local folder in the family's official layout, or hub id with an optional ``@revision``.
        prediction_length
            Steps to forecast.
        context_length
            Steps of history that the model sees at most; the checkpoint's own length by default.
        networks
            Networks that were read before: a checkpoint among them is not read again, and shares its values on the CPU.
        **options
            Options of the family.

        Raises
        ------
        CheckpointError
            If the checkpoint is missing, damaged or of another family.
        ValueError
            If an option is unknown or a length is not positive.
        """
        parsed = parse(checkpoint, bundled=cls.bundled())
        folder, revision = cls.fetch(parsed)
        network, digest = read_network(cls, folder) if networks is None else networks.get(cls, folder)
        source = Source(cls.family, parsed.name, parsed.kind, revision, digest)
        try:
            backbone = cls.from_network(
                network, prediction_length=prediction_length, context_length=context_length, source=source, **options
            )
        except SENSELESS as error:
            given = f" with options {options!r}" if options else ""
            raise CheckpointError(
                f"config.json of checkpoint folder {str(folder)!r} cannot be used by family {cls.family!r}{given}:"
                f" {type(error).__name__}: {error}; fetch it again{', or mend the options' if options else ''}"
            ) from error
        backbone.options = options
        backbone.place = folder.absolute()
        return backbone

    @classmethod
    def fetch(cls, checkpoint: Checkpoint) -> tuple[Path, str | None]:
        """Return the folder of a checkpoint and its exact revision, see :func:`gluonts_peft.checkpoint.resolve`; for
        families whose weights are not in safetensors files to extend.
        """
        return resolve(checkpoint, bundled=cls.bundled())

    @classmethod
    def fingerprint(cls, folder: Path) -> str:
        """Return the SHA-256 of the weights in a checkpoint folder."""
        return fingerprint(folder)

    @classmethod
    @abstractmethod
    def load_network(cls, folder: Path) -> nn.Module:
        """Build the network from a checkpoint folder in the family's official layout."""

    @classmethod
    @abstractmethod
    def from_network(
        cls,
        network: nn.Module,
        *,
        prediction_length: int,
        context_length: int | None = None,
        source: Source,
        **options: Any,
    ) -> Self:
        """Wrap a network that is in memory."""

    @abstractmethod
    def sites(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the places in ``network``, as it was before any adapter: kind of :data:`SITES` -> names.

        Kinds that the family does not have are absent or empty.
        """

    @abstractmethod
    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the family's own training loss of each window, shape ``(batch,)``."""

    @abstractmethod
    def forecast(
        self, batch: Mapping[str, Tensor], *, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Trajectories:
        """Forecast ``prediction_length`` steps.

        Parameters
        ----------
        batch
            As for training, without the label; ``past`` is the longest history in the batch.
        num_samples
            Sample paths a series, for families that sample.
        generator
            Source of randomness, for families that sample.
        """

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the network in the family's official layout into an existing folder."""

    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the network makes of the history, shape ``(batch, patches, d_model)``, for other heads.

        Raises
        ------
        NotImplementedError
            If the family does not declare the capability ``"features"``.
        """
        raise NotImplementedError(f"family {self.family!r} does not offer features; capability 'features' names those")

    def reconstruct(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the history as the network sees it, shape of ``past_target``, also where it was not observed.

        Raises
        ------
        NotImplementedError
            If the family does not declare the capability ``"reconstruct"``.
        """
        raise NotImplementedError(
            f"family {self.family!r} does not reconstruct its input; capability 'reconstruct' names those that do"
        )

    @property
    def new_head(self) -> ForecastingHead | None:
        """The head in the network that takes the place of the family's own in :meth:`loss` and :meth:`forecast`."""
        found: Any = self.network._modules.get(NEW_HEAD)
        return found  # type: ignore[no-any-return]

    def full_features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the features of windows that are padded on the left to ``past_length``: as many patches for all.

        Those that the batch brings as ``features``, computed before, are handed back.

        Raises
        ------
        ValueError
            If the targets have several dimensions.
        """
        if "features" in batch:
            return batch["features"]
        if batch["past_target"].ndim != 2:
            raise ValueError(
                f"a new head forecasts one target, and these data have {batch['past_target'].shape[2]}; give each a"
                " series of its own"
            )
        missing = self.past_length - batch["past_target"].shape[1]
        if missing > 0:
            batch = {
                name: tensor if name.startswith("future_") else _pad_start(tensor, missing)
                for name, tensor in batch.items()
            }
        if self.adapter is not None and self.adapter.frozen_features:
            # Nothing before the head trains, so nothing is dropped out there.
            with self.inference():
                return self.features(batch)
        return self.features(batch)

    @property
    def past_length(self) -> int:
        """Steps of history in a batch; more than ``context_length`` where the network looks back by lags."""
        return self.context_length

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.network.parameters()).device

    def places(self, kinds: str | Iterable[str]) -> tuple[str, ...]:
        """Return the names of all sites of one kind or several, in the network's order, each once.

        Raises
        ------
        ValueError
            If a kind is unknown or no name, or the family has no site of any of them.
        """
        given = kinds
        kinds = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
        if not kinds or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(f"sites {given!r} are no kinds of site; name some of: {', '.join(sorted(SITES))}")
        sites = self.sites()
        for kind in kinds:
            if kind not in SITES:
                raise ValueError(unknown("site", kind, SITES))
        found = {name for kind in kinds for name in sites.get(kind, ())}
        if not found:
            have = ", ".join(kind for kind in SITES if sites.get(kind))
            raise ValueError(f"family {self.family!r} has no site of kind {', '.join(kinds)}; it has: {have}")
        everything = [name for name, _ in self.network.named_modules()] + [
            name for name, _ in self.network.named_parameters(remove_duplicate=False)
        ]
        order = {name: index for index, name in enumerate(everything)}
        return tuple(sorted(found, key=lambda name: order.get(name, len(order))))

    @property
    def merged(self) -> bool:
        """Whether an adapter was folded into the weights, which are then no longer those of the checkpoint."""
        return self.weights.merged

    @contextmanager
    def reading(self) -> Iterator[Self]:
        """Hand out a copy that only reads, for forecasts, features and reconstructions within the context.

        It is in evaluation mode, has the adapter folded in, and records no gradients. Any number of threads may read at
        once. Copies are kept as long as no tensor has changed; they share all values with this backbone but buffers and
        the matrices into which the adapter is folded: these take memory once, however many threads there are. While a
        copy is in use it stays as it is, also if meanwhile the adapter is merged or exchanged. Training meanwhile, or
        loading weights into the adapter that is attached, is not foreseen.

        Who changes anything else of the network by hand than its modules and tensors, or writes into ``tensor.data`` of
        the base, calls ``weights.forget()``.
        """
        with self.weights.reading(self) as reader:
            yield reader  # type: ignore[misc]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = self.weights.before
        with self.weights.changing(), nullcontext() if before is None else before.moving():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode without gradients; the mode of every module is restored on exit.

        For work with the model itself, in the thread that owns it. Others read: :meth:`reading`.
        """
        # A plain walk, since `modules()` takes a tenth of the time of a small network's forecast.
        training: list[nn.Module] = [self] if self.training else []
        stack = [self._modules]
        while stack:
            for module in stack.pop().values():
                if module is not None:
                    stack.append(module._modules)
                    if module.training:
                        training.append(module)
        for module in training:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True


def _pad_start(tensor: Tensor, steps: int) -> Tensor:
    return functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (steps, 0))


def find_sites(
    network: nn.Module, table: Mapping[type[nn.Module], Mapping[str, str]], biases: tuple[str, ...] = (".bias",)
) -> dict[str, tuple[str, ...]]:
    """Return the sites of a network by the types of its modules.

    Parameters
    ----------
    network
        Without adapters.
    table
        Type of module -> kind of site -> names of its children, separated by spaces, ``"."`` for the module itself.
        Children that a module does not have are passed over.
    biases
        Endings of the names of parameters that are sites of kind ``"bias"``.
    """
    found: dict[str, list[str]] = {}
    for name, module in network.named_modules():
        for row, kinds in table.items():
            if not isinstance(module, row):
                continue
            for kind, children in kinds.items():
                for child in children.split():
                    if child == ".":
                        found.setdefault(kind, []).append(name)
                    elif child in module._modules:
                        found.setdefault(kind, []).append(f"{name}.{child}")
    found["bias"] = [name for name, _ in network.named_parameters() if name.endswith(biases)]
    return {kind: tuple(names) for kind, names in found.items()}


def load_backbone(
    family: str,
    *,
    prediction_length: int,
    checkpoint: str | Path | None = None,
    context_length: int | None = None,
    **options: Any,
) -> Backbone:
    """Load the backbone of a family by name, for work with the parts alone.

    Parameters
    ----------
    family
        Name in the registry, e.g. ``"chronos"``.
    prediction_length
        Steps to forecast.
    checkpoint
        Bundled name, folder or hub id; the family's default if None.
    context_length
        Steps of history; the checkpoint's own by default.
    **options
        Options of the family.

    Raises
    ------
    ValueError
        If the family or the checkpoint is unknown.
    """
    from .registry import get_estimator

    estimator = get_estimator(family)
    backbone: Backbone = estimator.backbone_class.from_checkpoint(
        checkpoint if checkpoint is not None else estimator.default_checkpoint,
        prediction_length=prediction_length,
        context_length=context_length,
        **options,
    )
    return backbone
