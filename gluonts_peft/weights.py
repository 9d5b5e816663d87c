"""State of weights: what undoes a change, and copies of a model that only read.

Three rules keep forecasts right however many predictors and threads share one base:

- *Reading never writes.* A forecast runs on a reader, a copy of the modules in evaluation mode into which the adapter
  is folded. It shares all parameters with the model but the matrices that folding changes: these are its memory.
- *The base is never written to.* What an adapter trains of it, and what a merge changes, are new values under the old
  parameters; so values that other backbones share stay as they are.
- *A change happens, or nothing does.* Attaching, merging and exchanging an adapter start with a :class:`Snapshot`,
  which puts everything back if they fail. The one of before an adapter came is kept, for when it goes.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .adapters.base import Adapter
    from .backbone import Backbone

__all__ = ["BaseChangedError", "Snapshot", "Weights", "alive", "fold", "key_of", "same_bits", "variant"]

_STRUCTURE = ("_modules", "_parameters", "_buffers")


class BaseChangedError(ValueError):
    """Something wrote into the values of the base; the message names the tensors."""


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree in type, shape and every bit, also of NaN."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.is_meta or left.data_ptr() == right.data_ptr() or torch.equal(left, right):
        return True
    raw = [tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*raw)


class _Saved:
    """The attributes of an object, and what is in those that are containers."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.kind = type(owner)
        self.values: dict[str, Any] = dict(vars(owner))
        self.contents: dict[str, Any] = {
            name: copy.copy(value) for name, value in self.values.items() if isinstance(value, dict | list | set)
        }

    def restore(self, names: Collection[str] | None = None) -> None:
        """Restore the attributes of these names, or all; containers are the same objects as before."""
        own = vars(self.owner)
        self.owner.__class__ = self.kind
        if names is None:
            for name in own.keys() - self.values.keys():
                del own[name]
        for name, value in self.values.items():
            if names is not None and name not in names:
                continue
            own[name] = value
            if name in self.contents and not _alike(value, self.contents[name]):
                value.clear()
                if isinstance(value, list):
                    value.extend(self.contents[name])
                else:
                    value.update(self.contents[name])

    def keep(self, names: Collection[str]) -> None:
        """Forget attributes of other names."""
        self.values = {name: value for name, value in self.values.items() if name in names}
        self.contents = {name: value for name, value in self.contents.items() if name in names}


def _alike(left: Any, right: Any) -> bool:
    """Whether two containers hold the same objects."""
    if isinstance(left, set):
        return bool(left == right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(left[name] is right[name] for name in left)
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


class Snapshot:
    """A backbone as it is now: modules, tensors, their values and types.

    Values are remembered, not copied, since nothing writes into those of the base; code that is not known to keep to
    that runs under :meth:`guarded`.

    Parameters
    ----------
    backbone
        The backbone.
    *adapters
        Adapters whose own attributes belong to it; parts of hybrids are found.
    """

    def __init__(self, backbone: Backbone, *adapters: Adapter | None) -> None:
        self.backbone = backbone
        self.modules = [_Saved(module) for module in backbone.modules() if module is not backbone]
        # Other attributes of the backbone are the user's, such as options of sampling.
        self.outer = _Saved(backbone)
        self.outer.keep(_STRUCTURE)
        self.adapters = [_Saved(each) for adapter in adapters if adapter is not None for each in _with_parts(adapter)]
        self.state = (backbone.adapter, backbone.weights.merged, backbone.weights.before)
        self.values: list[tuple[str, Tensor, Tensor]] = [
            (name, tensor, tensor.data) for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers())
        ]
        self.flags = [tensor.requires_grad for _, tensor, _ in self.values]

    def __getstate__(self) -> dict[str, Any]:
        # A value that is still the tensor's own goes along with the tensor: a base is not sent twice.
        own = [None if tensor.data_ptr() == value.data_ptr() else value for _, tensor, value in self.values]
        return {**vars(self), "values": [(name, tensor) for name, tensor, _ in self.values], "others": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        others, named = state.pop("others"), state["values"]
        state["values"] = [
            (name, tensor, tensor.data if other is None else other)
            for (name, tensor), other in zip(named, others, strict=True)
        ]
        vars(self).update(state)

    def keep_structure(self) -> None:
        """Forget what only the undoing of an unfinished change needs."""
        for saved in self.modules:
            saved.keep(_STRUCTURE)
        self.adapters = []

    def restore(self) -> None:
        """Put everything back."""
        self._restore(None)
        for saved in self.adapters:
            saved.restore()
        self.backbone.adapter, self.backbone.weights.merged, self.backbone.weights.before = self.state

    def restore_base(self) -> None:
        """Put modules and values back, on the device that the backbone is on now."""
        self._restore(_STRUCTURE)

    def _restore(self, names: Collection[str] | None) -> None:
        for saved in self.modules:
            saved.restore(names)
        self.outer.restore(_STRUCTURE)
        for (_, tensor, value), flag in zip(self.values, self.flags, strict=True):
            if tensor.data_ptr() != value.data_ptr():
                tensor.grad = None
                tensor.data = value.to(tensor.device)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(flag)

    def restore_types(self) -> None:
        """Undo a change of types, such as that of a training in half precision: what trains keeps its values, in its
        old type, and everything else is what it was, bit by bit.
        """
        for saved in (*self.modules, self.outer):
            # A change of type replaces buffers, and changes parameters in place.
            saved.restore(("_buffers",))
        for _, tensor, value in self.values:
            if not tensor.requires_grad:
                tensor.data = value
            elif tensor.dtype != value.dtype:
                tensor.grad = None
                tensor.data = tensor.data.to(value.device, value.dtype)

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Within this context the backbone moves to another device, and what is remembered of it moves along."""
        faithful = [tensor.data_ptr() == value.data_ptr() for _, tensor, value in self.values]
        yield
        self.values = [
            (name, tensor, tensor.data if same and tensor.dtype == value.dtype else value)
            for same, (name, tensor, value) in zip(faithful, self.values, strict=True)
        ]

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Within this context the values of the base are copies; after it they are what they were.

        Raises
        ------
        BaseChangedError
            If the copies were changed.
        """
        for _, tensor, value in self.values:
            tensor.data = value.clone()
        yield
        changed = [name for name, tensor, value in self.values if not same_bits(tensor.data, value)]
        for saved in self.modules:
            for kind in ("_parameters", "_buffers"):
                now = vars(saved.owner).get(kind, {})
                changed += [key for key, tensor in saved.contents.get(kind, {}).items() if now.get(key) is not tensor]
        if changed:
            raise BaseChangedError(
                ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            )
        for _, tensor, value in self.values:
            tensor.data = value


def _with_parts(adapter: Adapter) -> Iterator[Adapter]:
    yield adapter
    for part in getattr(adapter, "parts", ()):
        yield from _with_parts(part)


class Weights:
    """What is known of the weights of a backbone besides their values: the one place.

    Attributes
    ----------
    merged
        Whether an adapter was folded into the base, which is then no longer that of its checkpoint.
    before
        The backbone before its adapter was attached, if one is.
    lock
        Held while an adapter is attached, detached, merged or exchanged, and while a reader is made.
    reads
        Whether this belongs to a reader.
    """

    def __init__(self, *, merged: bool = False, reads: bool = False) -> None:
        self.merged = merged
        self.reads = reads
        self.before: Snapshot | None = None
        self.lock = threading.RLock()
        self._current: _Folded | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"merged": self.merged, "reads": self.reads, "before": self.before}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock(), _current=None)

    def forget(self) -> None:
        """Make readers anew when next they are asked for."""
        self._current = None

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock within the context; who wants to read meanwhile waits."""
        with self.lock:
            self._current = None
            try:
                yield
            finally:
                self._current = None

    @contextmanager
    def reading(self, backbone: Backbone) -> Iterator[Backbone]:
        """Hand out a reader, for one thread at a time: some networks keep tables that grow as they run."""
        if self.reads:
            with torch.no_grad():
                yield backbone
            return
        folded = self._folded(backbone)
        reader = folded.take()
        with torch.no_grad():
            yield reader
        # One that was left by an exception is not used again.
        folded.free.append(reader)

    def _folded(self, backbone: Backbone) -> _Folded:
        found = self._current
        if found is not None and found.fits(backbone):
            return found
        with self.lock:
            found = self._current
            if found is None or not found.fits(backbone):
                found = self._current = _Folded(backbone)
        return found


class _Folded:
    """A backbone with its adapter folded in, as long as no tensor of the two has changed.

    Attributes
    ----------
    template
        The copy; it never runs.
    free
        Copies of it that are not in use.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._key, self._kept = key_of(backbone), alive(backbone)
        self._outer = _attributes(backbone)
        adapter = backbone.adapter
        # Writing into `tensor.data` leaves no trace in the key: what was folded is compared number by number.
        self._own = [] if adapter is None or adapter.folds() == [] else adapter.parameters()
        self._numbers = _numbers(self._own)
        self.template = fold(backbone)
        self.free: deque[Backbone] = deque()

    def fits(self, backbone: Backbone) -> bool:
        """Whether it is still what the backbone is now."""
        try:
            outer = _attributes(backbone)
            return (
                outer.keys() == self._outer.keys()
                and all(outer[name] is value for name, value in self._outer.items())
                and key_of(backbone) == self._key
                and torch.equal(_numbers(self._own), self._numbers)
            )
        except RuntimeError:
            # Another thread changes the modules: it has the lock.
            return False

    def take(self) -> Backbone:
        """Return a copy that nobody else uses."""
        try:
            return self.free.pop()
        except IndexError:
            memo: dict[int, Any] = {id(parameter): parameter for parameter in self.template.parameters()}
            return copy.deepcopy(self.template, memo | _hooks(self.template))


def fold(backbone: Backbone) -> Backbone:
    """Return a copy of a backbone that only reads, with its adapter folded in as far as it can be.

    It shares all values but those that folding changes.
    """
    adapter = backbone.adapter
    changing = [] if adapter is None else adapter.folds()
    own = None if changing is None else {id(parameter) for parameter in changing}
    memo: dict[int, Any] = {id(backbone.weights): Weights(merged=backbone.weights.merged, reads=True)}
    copied: list[tuple[Tensor, nn.Parameter]] = []
    for parameter in backbone.parameters():
        value: Tensor = parameter.detach()
        if own is None or id(parameter) in own:
            value = value.clone()
            copied.append((value, parameter))
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for buffer in backbone.buffers():
        memo[id(buffer)] = buffer.detach()
    reader = copy.deepcopy(backbone, memo | _hooks(backbone))
    reader.eval()
    if reader.adapter is not None:
        with torch.no_grad():
            reader.adapter._fold_into(reader)
    for value, parameter in copied if own is None else ():
        # Of what may have changed, that which has not is shared after all.
        if same_bits(value, parameter):
            memo[id(parameter)].data = parameter.detach()
    return reader


def variant(backbone: Backbone, state: Mapping[str, Tensor]) -> Backbone:
    """Return a copy of a backbone, to read from, whose adapter has another state.

    It shares all values but those of the adapter.

    Parameters
    ----------
    backbone
        With an adapter.
    state
        As :meth:`gluonts_peft.adapters.base.Adapter.state_dict` gives it.
    """
    adapter = backbone.adapter
    assert adapter is not None, "there is no adapter"
    stored = {tensor.data_ptr() for tensor in (*adapter.state_dict().values(), *adapter.parameters())}
    memo: dict[int, Any] = {id(backbone.weights): Weights(merged=backbone.weights.merged)}
    for parameter in backbone.parameters():
        value = parameter.detach()
        memo[id(parameter)] = nn.Parameter(value.clone() if value.data_ptr() in stored else value, requires_grad=False)
    for buffer in backbone.buffers():
        memo[id(buffer)] = buffer.detach().clone() if buffer.data_ptr() in stored else buffer.detach()
    copied = copy.deepcopy(backbone, memo | _hooks(backbone))
    copied.eval()
    assert copied.adapter is not None
    copied.adapter.load_state_dict({name: tensor.to(backbone.device) for name, tensor in state.items()})
    return copied


def _hooks(backbone: Backbone) -> dict[int, Any]:
    """Return the tables of hooks, shared by copies: copying them takes most of the time."""
    return {
        id(value): value
        for module in backbone.modules()
        for name, value in vars(module).items()
        if isinstance(value, dict) and "hooks" in name
    }


def _attributes(backbone: Backbone) -> dict[str, Any]:
    # Those that begin with an underscore are caches and torch's own.
    return {name: value for name, value in vars(backbone).items() if name[0] != "_" and name != "training"}


def _numbers(tensors: list[nn.Parameter]) -> Tensor:
    """Return all numbers of some tensors in a row, as a copy."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors]) if tensors else torch.empty(0)


def key_of(backbone: Backbone) -> list[int]:
    """Return what tells this state of all tensors from another, as long as :func:`alive` are alive."""
    # A plain walk, since `parameters()` takes a tenth of the time of a small network's forecast.
    found: list[int] = []
    stack: list[nn.Module] = [backbone]
    while stack:
        module = stack.pop()
        found.append(id(module))
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    found += (id(tensor), tensor.data_ptr(), tensor._version)
        stack += [child for child in module._modules.values() if child is not None]
    return found


def alive(backbone: Backbone) -> list[Any]:
    """Return what must stay alive so that no address is used a second time."""
    return [
        *backbone.modules(),
        *((tensor, tensor.detach()) for tensor in (*backbone.parameters(), *backbone.buffers())),
    ]
