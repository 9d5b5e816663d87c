"""The contract of an adapter, and how adapters are stored.

An adapter that is saved is a folder: ``adapter_model.safetensors``, ``gluonts_peft.json`` (name, options, base
checkpoint and fingerprint, versions), and for methods of PEFT also ``adapter_config.json``, so that plain
``peft.PeftModel.from_pretrained`` opens it.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint import first_nonfinite, save_tensors
from ..files import NewerFormat, check_regular, load_json, opened, record, replacing, write_atomically
from ..moved import moved
from ..weights import BaseChangedError, Snapshot, fold

if TYPE_CHECKING:
    from ..backbone import Backbone

__all__ = ["Adapter", "AdapterError", "copy_into", "read_tensors", "unwrapped", "versions"]

RECORD = "gluonts_peft.json"
TENSORS = "adapter_model.safetensors"


class AdapterError(ValueError):
    """An adapter cannot be attached, saved or loaded."""


class Adapter(ABC):
    """Something small that trains on top of a frozen backbone.

    :meth:`attach` freezes everything and makes the adapter's own parameters trainable; at that moment the output of
    the model is unchanged unless an option says otherwise. One object serves one backbone at a time.

    Attributes
    ----------
    name
        Name in the registry.
    options
        Options that differ from the defaults: JSON values only.
    learning_rate
        Default rate; methods differ by orders of magnitude. Chosen by us on the bundled checkpoints.
    mergeable
        Whether :meth:`merge` can fold the adapter into the weights of the base.
    innermost
        Whether it must attach before the other parts of a hybrid.
    head_levels
        Quantile levels that a new head in place of the model's own forecasts; None where the model keeps its head. With
        a new head the output changes when it is attached, and losses before and after differ in kind.
    frozen_features
        Whether the features of the backbone stay what they are while the adapter trains.
    caches
        Whether to compute these features once instead of in each step.
    pool
        Training windows to draw once and to train on again and again; None for new ones in each step.
    scoring_windows
        Held-out windows, other than those that choose the best epoch, that the adapter wants for :meth:`score_on`.
    alone
        Options that have an effect only if the adapter is trained by itself.
    """

    name: str
    learning_rate: float
    mergeable: bool = True
    innermost: bool = False
    head_levels: tuple[float, ...] | None = None
    frozen_features: bool = False
    caches: bool = False
    pool: int | None = None
    scoring_windows: int = 0
    alone: tuple[str, ...] = ()

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)
        self.backbone: Backbone | None = None

    def __repr__(self) -> str:
        return self.name + (f"({', '.join(f'{k}={v!r}' for k, v in self.options.items())})" if self.options else "")

    @property
    def spec(self) -> Any:
        """Name and options, as :func:`gluonts_peft.get_adapter` takes them: a string, mapping or list."""
        return {"name": self.name, **self.options} if self.options else self.name

    def require_trainable(self) -> None:
        """Raise an AdapterError if an option would have no effect on a training; adapters of earlier versions that had
        such options still load.
        """

    def attach(self, backbone: Backbone) -> Adapter:
        """Attach to a backbone: freeze the base and make the adapter's parameters trainable.

        It happens as a whole or not at all. For a moment it takes memory for a second base: code that starts an adapter
        never has the values of the base in hand, and what it changes of the copies is noticed.

        Returns
        -------
        Adapter
            Itself.

        Raises
        ------
        AdapterError
            If another adapter is attached, or the family declares this one impossible.
        """
        if backbone.adapter is not None:
            raise AdapterError(
                f"adapter {self!r} cannot be attached: {backbone.adapter!r} already is; detach it, or attach a list of"
                " adapters as a hybrid"
            )
        if reason := backbone.impossible.get(self.name):
            raise AdapterError(f"adapter {self.name!r} is impossible on family {backbone.family!r}: {reason}")
        if backbone.weights.reads:
            raise AdapterError(
                f"adapter {self!r} cannot be attached to a copy that only reads; take the backbone itself"
            )
        if backbone.merged:
            raise AdapterError(
                f"adapter {self!r} cannot be attached: another one was merged into the weights, which are no longer"
                f" those of {backbone.source.checkpoint!r}; load that anew, or export the merged model and start there"
            )
        weights = backbone.weights
        with weights.changing():
            before = Snapshot(backbone, self)
            try:
                try:
                    with before.guarded():
                        self._attach(backbone)
                except BaseChangedError as error:
                    raise AdapterError(
                        f"adapter {self!r} changes weights of the base when it starts ({error}), so that there would be"
                        " no zero-shot forecast to go back to; use a start that leaves them alone"
                    ) from None
                self._bind(backbone, before)
                backbone.adapter, weights.before = self, before
                self._check_start(backbone)
            except BaseException:
                before.restore()
                raise
            before.keep_structure()
        return self

    def _bind(self, backbone: Backbone, before: Snapshot) -> None:
        """Make this adapter's parameters, and nothing else, trainable."""
        self.backbone = backbone
        # New modules start in training mode whatever the mode of those around them.
        backbone.network.train(backbone.network.training)
        backbone.network.requires_grad_(False)
        base = {id(tensor) for _, tensor, _ in before.values}
        own = self.parameters()
        # What trains of the base, and buffers, which some networks change in training, get values of their own.
        for tensor in (*own, *backbone.buffers()):
            if id(tensor) in base:
                tensor.data = tensor.data.clone()
        for parameter in own:
            parameter.requires_grad_(True)

    def _check_start(self, backbone: Backbone) -> None:
        """Refuse now what could not be folded later, or starts with numbers that are not finite."""
        if backbone.device.type == "meta":
            return
        try:
            folded = fold(backbone)
        except AdapterError:
            raise
        except Exception as error:
            raise AdapterError(
                f"adapter {self!r} cannot be folded into the weights of {backbone!r}: {type(error).__name__}: {error}"
            ) from error
        wrong = [name for name, tensor in folded.named_parameters() if not tensor.isfinite().all()]
        if wrong and all(tensor.isfinite().all() for tensor in backbone.network.parameters()):
            raise AdapterError(f"adapter {self!r} makes {wrong[0]} not finite when it starts; look at its options")

    def detach(self) -> None:
        """Remove the adapter: the backbone is again exactly what it was before :meth:`attach`."""
        backbone = self.attached
        weights = backbone.weights
        with weights.changing():
            self._detach(backbone)
            if weights.before is not None:
                weights.before.restore_base()
            backbone.adapter = self.backbone = weights.before = None

    def merge(self) -> None:
        """Fold the adapter into the weights of the base and remove it: same forecasts, no adapter left.

        The weights get new values; those of other backbones that share the old ones stay. If it fails, nothing has
        changed.

        Raises
        ------
        AdapterError
            If the method cannot be merged.
        """
        if not self.mergeable:
            raise AdapterError(f"adapter {self.name!r} cannot be merged: its effect is not a change of the weights")
        backbone = self.attached
        weights = backbone.weights
        changing, changes = self.folds(), self.num_parameters() > 0
        with weights.changing():
            before = Snapshot(backbone, self)
            try:
                for parameter in backbone.parameters() if changing is None else changing:
                    parameter.data = parameter.data.clone()
                self._merge(backbone)
            except BaseException as error:
                before.restore()
                if isinstance(error, AdapterError) or not isinstance(error, Exception):
                    raise
                raise AdapterError(f"adapter {self!r} cannot be merged: {type(error).__name__}: {error}") from error
            backbone.network.requires_grad_(False)
            backbone.adapter = self.backbone = weights.before = None
            weights.merged = weights.merged or changes

    def folds(self) -> list[nn.Parameter] | None:
        """Return the parameters of the base that :meth:`merge` changes; None if that is not known."""
        return None

    def _fold_into(self, reader: Backbone) -> None:
        """Fold what can be folded into a copy of the backbone, to which this copy of the adapter is attached."""
        if self.mergeable:
            self._merge(reader)
            reader.adapter = self.backbone = None

    @property
    def attached(self) -> Backbone:
        """The backbone that the adapter is attached to.

        Raises
        ------
        AdapterError
            If there is none.
        """
        if self.backbone is None:
            raise AdapterError(f"adapter {self!r} is not attached; call attach(backbone) first")
        return self.backbone

    @abstractmethod
    def _attach(self, backbone: Backbone) -> None: ...

    @abstractmethod
    def _detach(self, backbone: Backbone) -> None: ...

    @abstractmethod
    def _fold(self) -> None:
        """Change the weights of the base so that the adapter has no effect of its own left."""

    @abstractmethod
    def _unwrap(self, backbone: Backbone) -> None:
        """Remove what the adapter has put around the modules of the base."""

    def _merge(self, backbone: Backbone) -> None:
        self._fold()
        self._unwrap(backbone)

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable tensors: the only source of "what is the adapter"."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return what has to be stored, under names that do not depend on what else is attached."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over stored tensors; every one must find its place."""

    def parameter_names(self) -> list[str]:
        """Return the names of the trainable tensors in the network as it is now."""
        mine = {id(parameter) for parameter in self.parameters()}
        return [name for name, parameter in self.attached.network.named_parameters() if id(parameter) in mine]

    def num_parameters(self) -> int:
        """Return the number of trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def prepare(self, total_steps: int) -> None:
        """Learn how long the training will be, before its first step."""

    def score_on(self, batches: Sequence[Mapping[str, Tensor]], loss: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
        """Take over the held-out windows of ``scoring_windows``, and the loss that trains, a number a window."""

    def after_step(self, step: int) -> None:
        """Act after the backward pass and update of step ``step`` (counted from 0).

        Random numbers of torch follow from the seed and the step.
        """

    @property
    def settled(self) -> bool:
        """Whether what trains now is what will be kept; an epoch before that cannot be the best."""
        return True

    def finish(self) -> None:
        """Give up what only training needs, after its last step and with the weights of the best epoch."""

    def report(self) -> dict[str, Any]:
        """Return what the training has found out about the adapter, as JSON values."""
        return {}

    def penalty(self) -> Tensor | None:
        """Return a term to add to the loss, or None."""
        return None

    def training_state(self) -> dict[str, Tensor]:
        """Return what :meth:`after_step` needs to go on after an interruption, beyond the parameters."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`training_state` returned."""

    def save(self, folder: str | Path) -> None:
        """Write the adapter into a folder, which is created if need be. The base weights are not written."""
        backbone = self.attached
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_config(folder)
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            stored = tensor.detach().cpu().contiguous()
            # The format has no aliases; RandLora's stored bases are one tensor under many names.
            alias = any(stored.data_ptr() == other.data_ptr() for other in tensors.values())
            tensors[name] = stored.clone() if alias else stored
        with replacing(folder / TENSORS) as partial:
            save_tensors(tensors, partial, {"format": "pt"})
        self._write_record(folder, backbone)

    def _write_record(self, folder: Path, backbone: Backbone, **more: Any) -> None:
        content = {
            "adapter": self.spec,
            "base": asdict(backbone.source),
            "versions": versions(),
            **({"sha256": self._digest(folder / TENSORS)} if (folder / TENSORS).exists() else {}),
            **more,
        }
        write_atomically(folder / RECORD, json.dumps(record(content), indent=1) + "\n")

    def _digest(self, tensors: Path) -> str:
        """Return the SHA-256 of the adapter's options and of the file with its tensors."""
        digest = hashlib.sha256(json.dumps(self.spec, sort_keys=True).encode())
        with tensors.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    def _write_config(self, folder: Path) -> None:
        """Write further configuration files; most adapters have none."""

    def load(self, folder: str | Path) -> Adapter:
        """Take over the weights of a saved adapter of the same kind. The adapter must be attached.

        Raises
        ------
        AdapterError
            If the file is missing or damaged, or its tensors do not fit, or they or the options are not those that were
            saved.
        """
        path = Path(folder) / TENSORS
        tensors = read_tensors(path)
        stored = read_adapter_record(Path(folder)).get("sha256") if (Path(folder) / RECORD).exists() else None
        if stored is not None and stored != self._digest(path):
            # What does not fit at all is said more exactly.
            check_fit(self.state_dict(), tensors, self)
            raise AdapterError(
                f"adapter {self!r} in {str(folder)!r} is not what was saved: its tensors or its options were changed or"
                f" damaged since; fetch it again, or remove {RECORD} to open what is there as an adapter of plain PEFT"
            )
        self.load_state_dict(tensors)
        return self


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises
    ------
    AdapterError
        If it is missing, truncated or damaged, or a tensor holds NaN or infinite numbers.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        check_regular(path)
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise AdapterError(f"{str(path)!r} does not exist; name the folder of a saved adapter") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{str(path)!r} is truncated or damaged: {error}") from error
    if (name := first_nonfinite(tensors)) is not None:
        raise AdapterError(f"{str(path)!r}: tensor {name!r} holds NaN or infinite numbers; fetch or train it again")
    return tensors


def check_fit(targets: Mapping[str, Tensor], state: Mapping[str, Tensor], owner: object) -> None:
    """Make sure that stored tensors and their places agree in names and shapes.

    Raises
    ------
    AdapterError
        If a tensor is missing, has no place, or has another shape; the first of each is named.
    """
    missing, surplus = sorted(set(targets) - set(state)), sorted(set(state) - set(targets))
    if missing or surplus:
        raise AdapterError(
            f"stored tensors do not fit adapter {owner!r}: {len(missing)} missing"
            f"{f' (first: {missing[0]})' if missing else ''}, {len(surplus)} without a place"
            f"{f' (first: {surplus[0]})' if surplus else ''}; was it saved with other options or on another base?"
        )
    for name, target in targets.items():
        if target.shape != state[name].shape:
            raise AdapterError(
                f"stored tensor {name!r} has shape {tuple(state[name].shape)}, adapter {owner!r} needs"
                f" {tuple(target.shape)}; was it saved with other options or on another base?"
            )


def copy_into(targets: Mapping[str, Tensor], state: Mapping[str, Tensor], owner: object) -> None:
    """Copy stored tensors into their places, after :func:`check_fit`."""
    check_fit(targets, state, owner)
    with torch.no_grad():
        for name, target in targets.items():
            # Not into `target.data`, whose changes are not counted: readers would not notice.
            target.copy_(state[name])


def unwrapped(name: str) -> str:
    """Return a tensor's name as it is without the wrappers of other adapters, one or several, around its module."""
    return re.sub(r"(\.base_layer)+\.", ".", name)


def read_adapter_record(folder: Path) -> dict[str, Any]:
    """Return what :meth:`Adapter.save` recorded of an adapter: ``adapter``, ``base``, ``versions`` and more.

    Raises
    ------
    AdapterError
        If the record is missing, damaged, or written by a newer version.
    """
    path = folder / RECORD
    try:
        content: dict[str, Any] = opened(load_json(path))
        for name in ("adapter", "base"):
            content[name]
        base = content["base"]
        for name in ("fingerprint", "checkpoint"):
            if not isinstance(base[name], str):
                raise TypeError(f"base.{name} is {base[name]!r}, not text")
    except NewerFormat as error:
        raise AdapterError(f"{str(path)!r} was {error}") from None
    except OSError as error:
        raise AdapterError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{str(path)!r} is damaged: {type(error).__name__}: {error}") from error
    return content


def versions() -> dict[str, str]:
    """Return the versions of everything that decides what a saved adapter means."""
    found = {}
    for name in ("gluonts-peft", "gluonts", "torch", "peft", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


__getattr__ = moved(__name__, {"load_adapter": "gluonts_peft.adapters.load"})
