"""The fit loop on Lightning, and the zero-shot gate.

All random numbers of a step, of sampled windows and of dropout, derive from the seed and the number of the step. So an
interrupted run has no sampler state to restore, and ends with the same weights as an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from .checkpoint_io import SafeCheckpointIO
from .deadline import Deadline
from .features import FeatureCache, with_features
from .heads import forecast_error
from .keeper import Bar, Keeper, mixed
from .noise import without_noise
from .outcome import Fit, Gate, TuningDidNotHelp
from .processes import keeping_handler
from .resume import LAST, describe_run, digest, starting_point
from .series.windows import Windows
from .trainer_kwargs import check_trainer_kwargs, deciding, resolve_precision
from .training_options import TrainingOptions, resolve_device
from .weights import Snapshot

if TYPE_CHECKING:
    from .adapters.base import Adapter
    from .backbone import Backbone
    from .items import ItemJudge
    from .verdict import Judge, Verdict

    Loss = Callable[[Backbone, Mapping[str, Tensor]], Tensor]

__all__ = [
    "LAST",
    "Fit",
    "Gate",
    "TrainingOptions",
    "TuningDidNotHelp",
    "fit",
    "mean_loss",
    "resolve_device",
    "to_device",
]

logger = logging.getLogger(__name__)

# Weights between the adapter as attached (0) and after an epoch (1) that may be handed over as well.
_WEIGHTS = (0.75, 0.5, 0.25)
# For families whose forecasts take a forward pass per step.
_FEW_WEIGHTS = (0.5,)
# Estimated cost of the first training step, in forward passes over as many windows.
_STEP = 3.0


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Return a batch of arrays as tensors on a device."""
    return {name: torch.as_tensor(value).to(device) for name, value in batch.items()}


def mean_loss(backbone: Backbone, batches: Iterable[Mapping[str, Any]], loss: Loss | None = None) -> float:
    """Return the mean of the loss of the family, or of another loss, over validation windows."""
    mean = _Mean()
    with backbone.reading() as reader:
        for batch in batches:
            mean.add(_losses(reader, to_device(batch, backbone.device), loss))
    return mean.value


class _Mean:
    """A mean over windows in double precision, by which epochs and the gate are compared."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, losses: Tensor) -> None:
        self.total += losses.double().sum().item()
        self.count += len(losses)

    @property
    def value(self) -> float:
        return self.total / self.count


def _losses(backbone: Backbone, batch: Mapping[str, Tensor], loss: Loss | None) -> Tensor:
    return backbone.loss(batch) if loss is None else loss(backbone, batch)


class _Module(pl.LightningModule):  # type: ignore[misc]
    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        windows: Windows | FeatureCache,
        options: TrainingOptions,
        rate: float,
        updates: int,
        loss: Loss | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.backbone = backbone
        self.adapter = adapter
        self.windows = windows
        self.options = options
        self.rate = rate
        self.updates = updates
        self.strict_loading = False
        self.validated = _Mean()
        # Whether there is no time left for a validation.
        self.unjudged = False

    def training_step(self, _: Any, index: int) -> Tensor:
        step = self.current_epoch * self.options.num_batches_per_epoch + index
        torch.manual_seed(_mix(self.options.seed, step))
        batch = to_device(self.windows.sample(step, self.options.batch_size), self.device)
        loss = _losses(self.backbone, batch, self.loss).mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=self.options.batch_size)
        penalty = self.adapter.penalty()
        return loss if penalty is None else loss + penalty

    def on_train_start(self) -> None:
        self._done = self.global_step

    def on_train_batch_end(self, *_: Any) -> None:
        # If gradients accumulate, an update comes after several batches.
        if self.global_step > self._done:
            self._done = self.global_step
            self.adapter.after_step(self._done - 1)

    def on_validation_epoch_start(self) -> None:
        self.validated = _Mean()

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        if self.unjudged:
            return
        losses = _losses(self.backbone, batch, self.loss)
        self.validated.add(losses)
        # For the bar and for callbacks of others, in single precision.
        self.log("val_loss", losses.mean(), batch_size=len(losses), prog_bar=True)

    def configure_optimizers(self) -> Any:
        options = self.options
        optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=self.rate, weight_decay=options.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, self.updates, options.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> Any:
        # The windows of a step are drawn in the step itself, by its number.
        return range(self.options.num_batches_per_epoch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.adapter.state_dict()
        checkpoint["adapter_training_state"] = self.adapter.training_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.adapter.load_state_dict(checkpoint["state_dict"])
        self.adapter.load_training_state(checkpoint["adapter_training_state"])
        checkpoint["state_dict"] = {}


def _mix(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _rate(step: int, total: int, warmup: float) -> float:
    rising = warmup * total
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(total - rising, 1.0)))


def fit(
    backbone: Backbone,
    adapter: Adapter,
    windows: Windows,
    validation: Sequence[Mapping[str, Any]],
    options: TrainingOptions,
    *,
    folder: Path | None = None,
    ckpt_path: str | Path | None = None,
    progress: bool = True,
    trainer_kwargs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    score: Callable[[], float] | None = None,
    judge: Judge | None = None,
    interpolate: bool = True,
    deadline: Deadline | None = None,
    items: ItemJudge | None = None,
) -> Fit:
    """Attach an adapter to a backbone, train it and keep the best weights.

    Parameters
    ----------
    backbone
        Without an adapter.
    adapter
        Not attached yet.
    windows
        Training windows. For an adapter with ``scoring_windows``, windows at the ends of the series are held out, see
        :meth:`gluonts_peft.series.windows.Windows.hold_out`.
    validation
        Batches of validation windows.
    options
        How to train.
    folder
        Folder of the checkpoint that is written after each epoch; None writes none.
    ckpt_path
        A checkpoint to resume from, or ``"last"``: that of ``folder``, if there is one.
    progress
        Show a progress bar.
    trainer_kwargs
        Further arguments of ``lightning.pytorch.Trainer``, see :mod:`gluonts_peft.trainer_kwargs`; its ``callbacks``
        are added to ours.
    loss
        A loss to replace that of the family: maps the backbone and a batch to the loss of each window, shape
        ``(batch,)``. It is identified by its ``repr`` when a run is resumed. A true attribute ``history`` says that it
        depends on the history of a window, not only on the label.
    score
        Score for the gate, lower is better, to replace the mean loss; called before the adapter is attached and after
        training.
    judge
        Scores each epoch on validation windows, unit by unit: the best weights have the lowest mean over units, and
        ``Fit.verdict`` says what that is worth. If None, the mean loss of `validation` chooses the epoch.
    interpolate
        Let the judge also choose weights between the adapter as attached, which changes nothing, and after an epoch;
        else it chooses epochs only. Has no effect with a new head, which is initialised at random.
    deadline
        When to finish; ``options.time_limit`` from now if None. Zero-shot is scored first in any case. A resumed run
        has used the time that its complete epochs took. Work that the caller does afterwards is budgeted as
        ``"after"`` and ``"calibration"``.
    items
        Lets items choose their own weights, if there are weights to choose from: ``Fit.verdict.items`` says what that
        is worth, and ``items.found`` holds them. The adapter is left at the common weight, which is 0 if items have
        their own weights and there is no evidence over all items.

    Raises
    ------
    ValueError
        If the checkpoint belongs to another run, or the folder already holds one that was not asked for.
    """
    device = resolve_device(options.device)
    precision, extra = resolve_precision(options.precision, device), dict(trainer_kwargs or {})
    check_trainer_kwargs(extra)
    adapter.require_trainable()
    backbone.to(device)
    # Without a head there is no forecast to score; a given loss need not be one of forecasts.
    levels = adapter.head_levels

    def validate() -> float:
        if score is not None:
            return score()
        return mean_loss(backbone, validation, loss) if levels is None else forecast_error(backbone, validation, levels)

    if deadline is None and options.time_limit is not None:
        deadline = Deadline(options.time_limit)
    clock = time.perf_counter if deadline is None else deadline.clock
    begun = clock()
    unknown = score is None and backbone.untrained and (loss is None or levels is not None)
    zero_shot = None if unknown else validate()
    validated = clock()
    # Without a zero-shot forecast there is nothing to compare with.
    if unknown or (judge is not None and judge.forecasts and backbone.untrained):
        judge = None
    before = None if judge is None else judge.start(backbone)
    judged = clock()
    steps = min(options.num_batches_per_epoch, math.ceil(len(windows) / options.batch_size))
    options = replace(options, num_batches_per_epoch=steps)
    measure = "score of all tasks" if score is not None else "loss" if levels is None else "forecast error"
    count = sum(len(batch["past_target"]) for batch in validation)
    rate = adapter.learning_rate if options.learning_rate is None else options.learning_rate
    with _seeded(options.seed, device):
        adapter.attach(backbone)
        if adapter.num_parameters() == 0:
            return Fit(Gate(zero_shot, math.inf if zero_shot is None else zero_shot, count), 0, 0, 0.0, 0.0)
        updates = options.max_epochs * math.ceil(
            options.num_batches_per_epoch / int(extra.get("accumulate_grad_batches", 1))
        )
        adapter.prepare(updates)
        given, scoring = windows, list[Mapping[str, Any]]()
        if adapter.scoring_windows:
            windows, apart = windows.hold_out(adapter.scoring_windows, getattr(loss, "history", False))
            scoring = list(apart)
            adapter.score_on(
                [to_device(batch, device) for batch in scoring], lambda batch: _losses(backbone, batch, loss)
            )
        run = describe_run(
            backbone,
            adapter,
            given,
            validation,
            options,
            rate=rate,
            device=device.type,
            **({} if loss is None else {"loss": repr(loss)}),
            **({} if not scoring else {"scoring": digest(scoring)}),
            trainer={"precision": precision, **deciding(extra)},
            **({} if judge is None else {"verdict": {"unit": judge.unit, "interpolate": interpolate}}),
        )
        path, start, earlier = starting_point(folder, ckpt_path, run)
        if start is not None and "verdict" not in earlier:
            # Started before there were verdicts: its first epochs were not judged, so the earlier rule still applies.
            judge = before = None
            run.pop("verdict", None)
        between: tuple[float, ...] = ()
        if interpolate and judge is not None and levels is None:
            between = _FEW_WEIGHTS if judge.sampled else _WEIGHTS
        a_pass = validated - begun
        if deadline is not None:
            if unknown:
                # Now that there is a head to validate with.
                with deadline.measuring("pass"):
                    validate()
                a_pass = deadline.cost("pass")
            by_item = 0.0 if items is None or judge is None else len(items) / max(judge.windows, 1)
            _expect(deadline, a_pass, judged - validated, len(between), options.batch_size / max(count, 1), by_item)
        keeper = Keeper(adapter, path, run, options.patience, judge, between, deadline, before)
        callbacks: list[Callback] = [*extra.pop("callbacks", []), keeper]
        if progress:
            callbacks.append(Bar(options.total_steps, repr(adapter)))
        kept: FeatureCache | None = None
        shown: Iterable[Mapping[str, Any]] = validation
        # A given loss may depend on more of a window than the features do.
        caches = adapter.caches and loss is None
        if caches and deadline is not None:
            # Without the cache the same windows are drawn, and their features computed in each step.
            most = min(options.total_steps * options.batch_size, len(windows))
            deadline.expect("features", a_pass * most / max(count, 1))
            caches = deadline.fits("features", "features", "epoch's end", "end")
        if caches or adapter.pool is not None:
            kept = FeatureCache(
                backbone,
                windows,
                steps=options.total_steps,
                batch_size=options.batch_size,
                pool=adapter.pool,
                folder=folder,
                compute=caches,
                progress=progress,
            )
        if caches:
            shown = with_features(backbone, validation)
        types = Snapshot(backbone)
        module = _Module(backbone, adapter, kept or windows, options, rate, updates, loss).train()
        with without_noise("lightning"):
            trainer = _trainer(device, precision, options, callbacks, folder, extra)
            try:
                _run(trainer, module, shown, start)
            finally:
                if kept is not None:
                    kept.close()
    backbone.to(device).eval()
    # A precision such as "bf16-true" has rounded the base too; what is scored and handed over has its exact weights.
    types.restore_types()
    verdict = None if judge is None or before is None else judge.verdict(before, keeper.candidates)
    if keeper.weights:
        verdict = _load_best(adapter, keeper, verdict, items)
        adapter.finish()
    # The same function scores both, so that the scores differ by the weights alone.
    tuned = validate() if keeper.weights else math.inf
    gate = Gate(zero_shot, tuned, count, measure, None if verdict is None else verdict.word)
    return Fit(
        gate,
        len(keeper.history),
        trainer.global_step,
        keeper.seconds,
        rate,
        keeper.history,
        adapter.report(),
        verdict=verdict,
        stopped=keeper.why,
    )


def _expect(deadline: Deadline, a_pass: float, a_score: float, between: int, batch: float, by_item: float) -> None:
    """Tell a deadline what to expect before the first epoch, by the cost of passes over the validation windows.

    Parameters
    ----------
    deadline
        To be told.
    a_pass, a_score
        Seconds of a validation, and of scoring by the judge.
    between
        Number of weights that are scored besides the end of an epoch.
    batch
        Windows of a training step, as a share of the validation windows.
    by_item
        Windows that items choose by, relative to those that the judge scores.
    """
    deadline.expect("batch", _STEP * a_pass * batch)
    deadline.expect("epoch's end", a_pass + a_score * (1 + between))
    later = deadline.cost("after") + deadline.cost("calibration")
    deadline.expect("end", a_pass + later + (between + 3) * by_item * a_score)


def _run(
    trainer: pl.Trainer, module: pl.LightningModule, validation: Iterable[Mapping[str, Any]], start: Path | None
) -> None:
    batches = [to_device(batch, torch.device("cpu")) for batch in validation]
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    _leave_sigterm(trainer)
    with _interruptible():
        trainer.fit(module, val_dataloaders=loader, ckpt_path=start)


def _load_best(adapter: Adapter, keeper: Keeper, verdict: Verdict | None, items: ItemJudge | None) -> Verdict | None:
    """Load the best weights into the adapter, at the weight of the verdict; return it, with that on items if any."""
    weight = 1.0 if verdict is None or verdict.weight is None else verdict.weight
    if items is not None and verdict is not None and keeper.start.keys() == keeper.weights.keys():
        common = weight if verdict.helped or items.keep else 0.0
        found = items.decide(adapter, keeper.start, keeper.weights, keeper.between, common)
        verdict = replace(verdict, items=found)
        weight = weight if items.found is None else common
    adapter.load_state_dict(keeper.weights if weight == 1.0 else mixed(keeper.start, keeper.weights, weight))
    return verdict


def _trainer(
    device: torch.device,
    precision: Any,
    options: TrainingOptions,
    callbacks: list[Callback],
    folder: Path | None,
    extra: Mapping[str, Any],
) -> pl.Trainer:
    """Return a trainer that writes, shows and checks nothing of its own accord."""
    return pl.Trainer(
        **{
            "accelerator": "gpu" if device.type == "cuda" else device.type,
            "devices": [device.index or 0] if device.type == "cuda" else 1,
            "precision": precision,
            "max_epochs": options.max_epochs,
            "limit_train_batches": options.num_batches_per_epoch,
            "gradient_clip_val": options.gradient_clip_val or None,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "plugins": [SafeCheckpointIO()],
            "default_root_dir": folder,
            **extra,
        },
        callbacks=callbacks,
    )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch within the context and restore its global state on exit."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C: Lightning raises SystemExit and leaves the signal ignored."""
    with keeping_handler(signal.SIGINT):
        try:
            yield
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise


def _leave_sigterm(trainer: pl.Trainer) -> None:
    """Keep the handler of SIGTERM: that of Lightning ends the process with exit code 0, as if it had finished."""
    connector = trainer._signal_connector
    register = connector.register_signal_handlers

    def without_sigterm() -> None:
        with keeping_handler(signal.SIGTERM):
            register()

    connector.register_signal_handlers = without_sigterm
