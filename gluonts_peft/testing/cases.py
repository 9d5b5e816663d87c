"""What is checked, and the batches, data and short trainings that the checks share."""

from __future__ import annotations

import copy
import logging
import re
import shutil
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import numpy as np
import torch
from torch import Tensor

from ..adapters.base import Adapter, AdapterError
from ..adapters.load import get_adapter, load_adapter
from ..backbone import Backbone, Trajectories
from ..checkpoint import Checkpoint
from ..weights import same_bits

if TYPE_CHECKING:
    from ..estimator import PeftEstimator
    from ..predictor import PeftPredictor

__all__ = ["AdapterCase", "BackboneCase", "EstimatorCase", "make_batch", "make_dataset"]

Batch = dict[str, Tensor]

# Steps of training: enough for every tensor to move, then some more for the loss to fall.
FEW, MORE, ALL = 4, 6, 15
# Far more than are trained: methods that prune must not begin before the checks look.
PLANNED = 500


def make_batch(
    backbone: Backbone,
    *,
    size: int = 4,
    past: int | None = None,
    seed: int = 0,
    missing: float = 0.1,
    dimensions: int | None = None,
    features: bool = False,
) -> Batch:
    """Return a batch for training as the contract describes it: random walks on a level, some of the steps missing.

    Parameters
    ----------
    backbone
        Whose lengths and time features count.
    size
        Windows, B.
    past
        Steps of history, P; ``backbone.past_length`` if None.
    missing
        Share of steps that are not observed.
    dimensions
        Of a multivariate target.
    features
        Add two dynamic features that are known in the future and one that is not.
    """
    past = backbone.past_length if past is None else past
    length = past + backbone.prediction_length
    generator = torch.Generator().manual_seed(seed)

    def walks(width: int | None) -> tuple[Tensor, Tensor]:
        shape = (size, length) if width is None else (size, length, width)
        level = 20 + 80 * torch.rand((size, 1, *shape[2:]), generator=generator)
        values = level + torch.randn(shape, generator=generator).cumsum(1)
        observed = (torch.rand(shape, generator=generator) >= missing).float()
        # Every window keeps something to see and something to forecast.
        observed[:, max(past - 2, 0) : past + 1] = 1.0
        return values * observed, observed

    values, observed = walks(dimensions)
    batch = {
        "past_target": values[:, :past],
        "past_observed_values": observed[:, :past],
        "future_target": values[:, past:],
        "future_observed_values": observed[:, past:],
    }
    if backbone.time_features:
        batch["time_feat"] = _time_features(backbone.time_features, past, backbone.prediction_length, size)
    if features:
        batch["feat_dynamic_real"], batch["observed_feat_dynamic_real"] = walks(2)
        known, seen = walks(1)
        batch["past_feat_dynamic_real"], batch["past_observed_feat_dynamic_real"] = known[:, :past], seen[:, :past]
    return batch


def _time_features(names: Sequence[str], past: int, future: int, size: int) -> Tensor:
    import pandas as pd
    from gluonts import time_feature

    # The forecast begins at the same hour whatever the history.
    first = pd.Period("2024-03-01 05:00", freq="h")
    index = pd.period_range(first - past, periods=past + future, freq="h")
    columns = [np.asarray(getattr(time_feature, name)(index), np.float32) for name in names]
    return torch.from_numpy(np.stack(columns, -1)).expand(size, -1, -1).contiguous()


def make_dataset(count: int = 6, length: int = 80, seed: int = 0) -> list[dict[str, Any]]:
    """Return a GluonTS dataset of hourly series that return to a level of their own, so there is something to learn."""
    import pandas as pd

    generator = np.random.default_rng(seed)
    values = generator.standard_normal((count, length))
    for step in range(1, length):
        values[:, step] += 0.7 * values[:, step - 1]
    values += generator.uniform(20, 100, (count, 1))
    start = pd.Period("2024-01-01 00:00", freq="h")
    return [{"item_id": f"item-{i}", "start": start, "target": row.astype(np.float32)} for i, row in enumerate(values)]


class BackboneCase:
    """A backbone to be checked. It is loaded when it is first needed, and never changed."""

    def __init__(self, backbone: Backbone | Callable[[], Backbone], label: str | None = None) -> None:
        self._backbone = backbone
        self._label = label

    def __str__(self) -> str:
        if self._label is not None:
            return self._label
        return (
            f"{self.base.family}-{self.base.source.checkpoint}" if isinstance(self._backbone, Backbone) else "backbone"
        )

    @cached_property
    def base(self) -> Backbone:
        backbone = self._backbone if isinstance(self._backbone, Backbone) else self._backbone()
        if backbone.adapter is not None:
            raise ValueError(f"{backbone!r} has an adapter; give a backbone without one")
        return backbone

    @cached_property
    def batch(self) -> Batch:
        return make_batch(self.base)

    @property
    def samples(self) -> bool:
        return "samples" in self.base.capabilities and "quantiles" not in self.base.capabilities

    def fresh(self) -> Backbone:
        return copy.deepcopy(self.base)

    def again(self, checkpoint: Any = None, **changes: Any) -> Backbone:
        """Load the backbone once more, or another checkpoint or with other arguments."""
        base = self.base
        where = Checkpoint(base.source.kind, base.source.checkpoint, base.source.revision)
        arguments = {"prediction_length": base.prediction_length, "context_length": base.context_length, **base.options}
        with quiet():
            return type(base).from_checkpoint(where if checkpoint is None else checkpoint, **{**arguments, **changes})

    def forecasts(self) -> None:
        """Skip a check of forecasts where there is no trained head to make them."""
        if self.base.untrained:
            raise SkipTest(
                f"the checkpoint brings no trained {', '.join(self.base.untrained)}: nothing to forecast with"
            )

    @contextmanager
    def exported(self) -> Iterator[Path]:
        """A temporary folder with the network in the family's own layout."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "exported"
            folder.mkdir()
            self.base.export(folder)
            yield folder


class AdapterCase(BackboneCase):
    """An adapter to be checked on a backbone."""

    def __init__(
        self,
        adapter: Any,
        backbone: Backbone | Callable[[], Backbone],
        label: str | None = None,
        *,
        without_effect: str | Iterable[str] = (),
    ) -> None:
        if isinstance(adapter, Adapter):
            adapter = adapter.spec
        self._adapter = list(adapter) if isinstance(adapter, tuple) else adapter
        super().__init__(backbone, label if label is not None else label_of(self._adapter))
        patterns = [without_effect] if isinstance(without_effect, str) else list(without_effect)
        self.without_effect = [re.compile(pattern) for pattern in patterns]

    @cached_property
    def spec(self) -> Any:
        """The adapter, and the head where the checkpoint brings none."""
        spec = self._adapter
        parts = spec if isinstance(spec, list) else [spec]
        if "head" not in self.base.untrained or {title(part) for part in parts} & {"none", "full", "head"}:
            return spec
        return [*parts, "head"]

    @property
    def parts(self) -> list[str]:
        return [title(part) for part in self.spec] if isinstance(self.spec, list) else [title(self.spec)]

    @property
    def trains(self) -> bool:
        return self.parts != ["none"]

    @property
    def impossible(self) -> dict[str, str]:
        return {name: self.base.impossible[name] for name in self.parts if name in self.base.impossible}

    @property
    def cell(self) -> Cell:
        """The adapter, trained; checks ask and change nothing."""
        self.possible()
        return train_cell(self)

    def possible(self) -> None:
        for name, reason in self.impossible.items():
            raise SkipTest(f"adapter {name!r} is declared impossible: {reason}")

    def attach(self, seed: int) -> Adapter:
        self.possible()
        torch.manual_seed(seed)
        adapter = get_adapter(copy.deepcopy(self.spec)).attach(self.fresh())
        adapter.prepare(PLANNED)
        return adapter

    def answers(self, backbone: Backbone) -> list[Tensor]:
        """Loss, and the forecast where it is a smooth function of the weights; one other token makes another path."""
        found = [loss_of(backbone, self.batch)]
        if not self.samples and not self.base.untrained:
            found.append(forecast_of(backbone, self.batch).values)
        return found

    def moved(self, folder: Path, steps: int = 0) -> tuple[Backbone, Adapter]:
        """Load what was trained onto a new copy of the base."""
        backbone = self.fresh()
        adapter = load_adapter(folder, backbone)
        adapter.prepare(PLANNED)
        if steps:
            train_steps(adapter, self.batch, optimizer_of(adapter), range(steps))
        return backbone, adapter


class EstimatorCase:
    """An estimator class to be checked, with arguments that keep its training short."""

    SHORT: Mapping[str, Any] = {
        "prediction_length": 6,
        "adapter": "lora",
        "max_epochs": 2,
        "num_batches_per_epoch": 2,
        "batch_size": 4,
        "gate": "keep",
        "device": "cpu",
        "progress": False,
    }

    def __init__(
        self, estimator: type[PeftEstimator], options: Mapping[str, Any] | None = None, label: str | None = None
    ) -> None:
        self.estimator = estimator
        self.options = {**self.SHORT, **(options or {})}
        self._label = label
        self.dataset = make_dataset()

    def __str__(self) -> str:
        return self.estimator.__name__ if self._label is None else self._label

    def make(self, **changes: Any) -> PeftEstimator:
        estimator: PeftEstimator = self.estimator(**{**self.options, **changes})
        return estimator

    def train(self, *, ckpt_path: str | None = None, dataset: Any = None, **changes: Any) -> PeftPredictor:
        with quiet():
            return self.make(**changes).train(self.dataset if dataset is None else dataset, ckpt_path=ckpt_path)

    @property
    def tuned(self) -> PeftPredictor:
        """A trained predictor; checks ask and change nothing."""
        return train_predictor(self)

    @property
    def horizon(self) -> int:
        return int(self.options["prediction_length"])


@dataclass
class Cell:
    """A trained adapter and what was seen on the way."""

    adapter: Adapter
    folder: Path
    training: list[str]
    initial_answers: list[Tensor]
    initial: Batch
    after_few: Batch
    after_more: Batch
    interruption: tuple[Batch, Batch, dict[str, Any]]
    losses: list[float]

    @property
    def backbone(self) -> Backbone:
        return self.adapter.attached


# The checks of a case come one after another; more than one trained model need not be in memory.
@lru_cache(maxsize=1)
def train_cell(case: AdapterCase) -> Cell:
    adapter = case.attach(seed=1)
    training = [name for name, module in adapter.attached.network.named_modules() if module.training]
    # A new head has nothing to say yet.
    initial_answers = [] if adapter.head_levels is not None else case.answers(adapter.attached)
    initial = tensors_of(adapter)
    optimizer = optimizer_of(adapter)
    losses = train_steps(adapter, case.batch, optimizer, range(FEW))
    after_few = tensors_of(adapter)
    state = {} if optimizer is None else copy.deepcopy(optimizer.state_dict())
    interruption = (clone(adapter.state_dict()), clone(adapter.training_state()), state)
    losses += train_steps(adapter, case.batch, optimizer, range(FEW, MORE))
    after_more = tensors_of(adapter)
    losses += train_steps(adapter, case.batch, optimizer, range(MORE, ALL))
    folder = Path(tempfile.mkdtemp())
    cell = Cell(
        adapter, folder / "saved", training, initial_answers, initial, after_few, after_more, interruption, losses
    )
    weakref.finalize(cell, shutil.rmtree, folder, ignore_errors=True)
    adapter.save(cell.folder)
    return cell


@lru_cache(maxsize=1)
def train_predictor(case: EstimatorCase) -> PeftPredictor:
    return case.train()


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two tensors agree, relative to the largest number in them."""
    if found.shape != expected.shape:
        return False
    difference = float((found - expected).abs().max()) if found.numel() else 0.0
    return difference <= tolerance * max(1.0, float(expected.abs().max()) if found.numel() else 0.0)


def apart(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    return f"largest difference {float((found - expected).abs().max()):.3g}"


def loss_of(backbone: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
    with backbone.inference():
        return backbone.loss(batch)


def forecast_of(backbone: Backbone, batch: Mapping[str, Tensor], seed: int = 3, count: int = 2) -> Trajectories:
    past = {name: value for name, value in batch.items() if not name.startswith("future_")}
    with backbone.inference():
        return backbone.forecast(past, num_samples=count, generator=torch.Generator().manual_seed(seed))


def rows(batch: Mapping[str, Tensor], index: Any) -> Batch:
    return {name: tensor[index] for name, tensor in batch.items()}


def without_start(batch: Mapping[str, Tensor], steps: int) -> Batch:
    return {name: tensor if name.startswith("future_") else tensor[:, steps:] for name, tensor in batch.items()}


def clone(state: Mapping[str, Tensor]) -> Batch:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def differing(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> str:
    names = [name for name in left if name not in right or not torch.equal(left[name], right[name])]
    names += [name for name in right if name not in left]
    return f"{len(names)} tensors (first: {names[0]})" if names else "none"


@dataclass
class Traits:
    """What reading must not change of a backbone."""

    modules: list[tuple[str, int, type, bool]]
    tensors: list[tuple[str, int, bool, Tensor, Tensor]]

    def differing(self, before: Traits) -> str:
        """Return the first thing that is not what it was, or an empty text."""
        if self.modules != before.modules:
            names = [entry[0] for entry in self.modules if entry not in before.modules]
            return f"module {names[0]!r}" if names else "the modules"
        if [entry[:3] for entry in self.tensors] != [entry[:3] for entry in before.tensors]:
            return "the parameters and buffers"
        for (name, *_, now, _), (*_, value) in zip(self.tensors, before.tensors, strict=True):
            if not same_bits(now, value):
                return f"tensor {name!r}"
        return ""


def traits(backbone: Backbone) -> Traits:
    modules = [(name, id(module), type(module), module.training) for name, module in backbone.named_modules()]
    named = (*backbone.named_parameters(), *backbone.named_buffers())
    return Traits(
        modules,
        [(name, id(tensor), tensor.requires_grad, tensor.detach(), tensor.detach().clone()) for name, tensor in named],
    )


def at_once(call: Callable[[], Any], count: int = 3) -> list[Any]:
    """Call a function in several threads that start together; return all results."""
    barrier = threading.Barrier(count)

    def one(_: int) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def read_answers(case: AdapterCase, backbone: Backbone) -> list[Tensor]:
    with backbone.reading() as reader:
        return case.answers(reader)


def fail(done: Callable[..., Any], *arguments: Any) -> None:
    """Do something, then fail."""
    done(*arguments)
    raise AdapterError("this attach fails at its end")


def tensors_of(adapter: Adapter) -> Batch:
    everything = dict(adapter.attached.network.named_parameters())
    return clone({name: everything[name] for name in adapter.parameter_names()})


def optimizer_of(adapter: Adapter) -> torch.optim.Optimizer | None:
    parameters = adapter.parameters()
    return torch.optim.AdamW(parameters, lr=adapter.learning_rate, weight_decay=0.0) if parameters else None


def train_steps(
    adapter: Adapter, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None, steps: Iterable[int]
) -> list[float]:
    """Train as the fit loop does, on one batch; return the loss before each step."""
    losses = []
    for step in steps:
        value = adapter.attached.loss(batch).mean()
        losses.append(value.item())
        if optimizer is None:
            continue
        penalty = adapter.penalty()
        optimizer.zero_grad()
        (value if penalty is None else value + penalty).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        adapter.after_step(step)
    return losses


def title(spec: Any) -> str:
    return str(spec["name"]) if isinstance(spec, Mapping) else str(spec)


def label_of(spec: Any) -> str:
    """Short text for a specification: ``lora(r=2)+bitfit``."""
    if isinstance(spec, str):
        return spec
    if isinstance(spec, Mapping):
        options = [f"{k}={'+'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in spec.items() if k != "name"]
        return f"{spec.get('name')}({','.join(options)})" if options else title(spec)
    return "+".join(map(label_of, spec)) if isinstance(spec, Iterable) else repr(spec)


@contextmanager
def quiet() -> Iterator[None]:
    """Drop warnings about short trainings and long horizons; they are of no interest here."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.disable(level)
