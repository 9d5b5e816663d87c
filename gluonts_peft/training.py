"""The fit loop on Lightning, and the zero-shot gate.

Every random number of a step follows from the seed and the number of the step: the windows that are drawn, and dropout.
So a run that was interrupted needs no state of its sampler, and ends with the same weights as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from .deadline import Deadline, parse_time_limit
from .features import FeatureCache, with_features
from .heads import forecast_error
from .keeper import Bar, Keeper, mixed
from .noise import without_noise
from .processes import keeping_handler
from .resume import SafeCheckpointIO, read_checkpoint
from .series.windows import Windows
from .trainer_kwargs import check_precision, check_trainer_kwargs, deciding, resolve_precision
from .verdict import Verdict
from .weights import Snapshot
from .words import BETTER, PROVEN

if TYPE_CHECKING:
    from .adapters.base import Adapter
    from .backbone import Backbone
    from .items import ItemJudge
    from .verdict import Judge

    Loss = Callable[[Backbone, Mapping[str, Tensor]], Tensor]

__all__ = ["Fit", "Gate", "TrainingOptions", "TuningDidNotHelp", "fit", "mean_loss", "resolve_device", "to_device"]

logger = logging.getLogger(__name__)

LAST = "last.ckpt"
# Between the adapter as it was attached and as an epoch leaves it: what may be handed over besides.
_WEIGHTS = (0.75, 0.5, 0.25)
# Of families whose forecasts take a pass a step.
_FEW_WEIGHTS = (0.5,)
# A training step in forward passes of as many windows: a guess for before the first one.
_STEP = 3.0


class TuningDidNotHelp(UserWarning):  # noqa: N818
    """There is no evidence on the validation windows that the tuned model is better than the pretrained one."""


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Parameters
    ----------
    max_epochs
        Epochs at most; each ends with a validation.
    num_batches_per_epoch
        Steps of an epoch; no more than it takes to draw as many windows as there are, so that few series are not
        passed over more often than ``max_epochs`` times, with a validation after each.
    batch_size
        Windows a step.
    learning_rate
        Peak rate of AdamW; the adapter's own if None.
    weight_decay
        Of AdamW, on the adapter's parameters.
    warmup
        Share of all steps in which the rate rises linearly; then it falls by half a cosine to zero.
    gradient_clip_val
        Largest norm of the gradient; 0 means no limit.
    patience
        Epochs without a better validation loss after which training stops; 0 means never.
    seed
        Decides initialisation, windows and dropout.
    device
        ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
    precision
        A precision of Lightning, or ``"auto"``: bfloat16 where a GPU has it, else float32. ``"16-mixed"`` needs a GPU.
    time_limit
        What training may take with all that belongs to it, verdict included; see
        :func:`gluonts_peft.deadline.parse_time_limit`. It is kept in seconds. None means no limit. It decides when a
        training ends, and no number before that: the rate falls as if it were trained for ``max_epochs``.
    """

    max_epochs: int = 10
    num_batches_per_epoch: int = 50
    batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.1
    gradient_clip_val: float = 1.0
    patience: int = 5
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    time_limit: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            # It would pass for 0 or 1.
            if isinstance(value, bool) and name != "time_limit":
                raise ValueError(f"{name} {value!r} is not a {'name' if name in ('device', 'precision') else 'number'}")
        object.__setattr__(self, "time_limit", parse_time_limit(self.time_limit))
        for name in ("max_epochs", "num_batches_per_epoch", "batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        for name in ("weight_decay", "gradient_clip_val", "patience", "seed"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} {value} is negative")
            if not value < math.inf:
                raise ValueError(f"{name} {value} is not finite")
        if self.seed >= 2**63:
            raise ValueError(f"seed {self.seed} is too large; name one below 2**63")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate {self.learning_rate} is not positive")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup {self.warmup} is not a share of the training; name a number from 0 to below 1")
        check_precision(self.precision)

    @property
    def total_steps(self) -> int:
        """Steps of an uninterrupted run that does not stop early."""
        return self.max_epochs * self.num_batches_per_epoch


@dataclass(frozen=True)
class Gate:
    """Scores of zero-shot and of the weights that are kept, on the same validation windows.

    These windows have chosen the weights, so the tuned score is flattering; whether tuning helped is for the
    :class:`~gluonts_peft.verdict.Verdict` to say, whose word stands here too.

    Parameters
    ----------
    zero_shot, tuned
        Mean score over the validation windows, before and after; lower is better. There is no score before where the
        checkpoint brings no forecasting head.
    windows
        Number of validation windows.
    measure
        What is scored: ``"loss"``, the training loss of the family; ``"forecast error"`` where a new head took the
        place of the model's own, so that their losses differ in kind, see :func:`gluonts_peft.heads.forecast_error`;
        ``"score of all tasks"``, see :meth:`gluonts_peft.objectives.Joint.relative`.
    verdict
        The word of the verdict. None where there is none: in records before version 0.2, and where there is nothing
        to compare with; then the two scores decide.
    """

    zero_shot: float | None
    tuned: float
    windows: int
    measure: str = "loss"
    verdict: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the tuned model is handed over."""
        if self.verdict is not None:
            return self.verdict in (PROVEN, BETTER)
        return math.isfinite(self.tuned) if self.zero_shot is None else self.tuned < self.zero_shot

    def __str__(self) -> str:
        if self.zero_shot is None:
            return (
                f"no zero-shot forecast to compare with: validation {self.measure} {self.tuned:.5g}"
                f" ({self.windows} windows)"
            )
        change = 100.0 * (self.tuned / self.zero_shot - 1.0) if self.zero_shot else math.nan
        return (
            f"{self.verdict or 'no verdict'}: validation {self.measure} {self.zero_shot:.5g} zero-shot,"
            f" {self.tuned:.5g} tuned ({change:+.2f} %, {self.windows} windows, which chose the epoch)"
        )


@dataclass(frozen=True)
class Fit:
    """What a training run leaves behind, besides the adapter's weights."""

    gate: Gate
    epochs: int
    steps: int
    seconds: float
    learning_rate: float
    history: list[dict[str, float]] = field(default_factory=list)
    # What the adapter found out, as its report() says.
    report: dict[str, Any] = field(default_factory=dict)
    # Of each task, its own loss before and after, where there were several.
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    # Did tuning help? None where there was nothing to compare with, and in records before version 0.2.
    verdict: Verdict | None = None
    # "time_limit" if the clock ended the training, so that a repetition need not give the same numbers.
    stopped: str | None = None


def resolve_device(device: str) -> torch.device:
    """Return the device that was asked for.

    Raises
    ------
    ValueError
        If it does not exist here; there is no fall-back to another one.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown; name 'auto', 'cpu', 'cuda' or 'cuda:1'") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} does not exist; this machine has {torch.cuda.device_count()} CUDA devices")
    return found


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Return a batch of arrays as tensors on a device."""
    return {name: torch.as_tensor(value).to(device) for name, value in batch.items()}


def mean_loss(backbone: Backbone, batches: Iterable[Mapping[str, Any]], loss: Loss | None = None) -> float:
    """Return the mean of the family's loss, or of another one, over validation batches."""
    mean = _Mean()
    with backbone.reading() as reader:
        for batch in batches:
            mean.add(_losses(reader, to_device(batch, backbone.device), loss))
    return mean.value


class _Mean:
    """A mean over windows in double precision: the one that epochs and the gate are compared by."""

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
        # Where gradients accumulate, an update comes after several batches.
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
        # The windows of a step are drawn in the step itself, from its number.
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
    """Attach an adapter to a backbone and train it; the best weights are kept.

    Parameters
    ----------
    backbone
        Without an adapter.
    adapter
        Not attached yet.
    windows
        Where training windows are drawn from. For an adapter that asks for ``scoring_windows``, windows at the ends of
        its series are set apart, see :meth:`gluonts_peft.series.windows.Windows.hold_out`.
    validation
        Batches of validation windows.
    options
        How to train.
    folder
        Where checkpoints go, after each epoch; None means none are written.
    ckpt_path
        A checkpoint to go on from, or ``"last"``: that of ``folder``, if there is one.
    progress
        Show a progress bar.
    trainer_kwargs
        Further arguments of ``lightning.pytorch.Trainer``, see :mod:`gluonts_peft.trainer_kwargs`; its ``callbacks``
        are added to ours.
    loss
        Another loss than the family's own: takes the backbone and a batch, gives the loss of each window. It is known
        again by its ``repr`` when a run is resumed. If it has an attribute ``history`` that is true, it judges the
        history of a window and not only its label.
    score
        What the gate compares, lower is better, in place of the mean loss: called before the adapter is attached, and
        after the training.
    judge
        Scores each epoch on validation windows, unit by unit: the best weights are those with the lowest mean over
        units, and ``Fit.verdict`` says what that is worth. If None, the mean loss of `validation` chooses an epoch.
    interpolate
        Let the judge choose among weights between the adapter as it was attached, which changes nothing, and as each
        epoch leaves it; else among epochs alone. Has no effect with a new head, which begins at random.
    deadline
        When to be done; that of ``options.time_limit``, from now on, if None. Scores before tuning always come first. A
        run that is gone on with has spent what its training took up to its last whole epoch. What the caller does
        afterwards counts as the parts ``"after"`` and ``"calibration"``.
    items
        Lets items choose weights of their own, if there are weights to choose from: ``Fit.verdict.items`` says what
        that is worth, and ``items.found`` has them. The adapter is left at the common weight: 0 if items have weights
        of their own, and there is no evidence for all together.

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
    # Without a head there is no forecast to score; another loss need not be one of forecasts.
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
    # Without a forecast before tuning there is nothing to compare with.
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
        run = {
            "adapter": adapter.spec,
            "base": asdict(backbone.source),
            "backbone_options": backbone.options,
            "data": windows.store.fingerprint(),
            "validation": _digest(validation),
            "windows": {
                name: _plain(getattr(given, name))
                for name in ("context_length", "prediction_length", "min_context", "holdout", "seed")
            },
            "options": _deciding_options(options) | {"learning_rate": rate, "device": device.type},
            **({} if loss is None else {"loss": repr(loss)}),
            **({} if not scoring else {"scoring": _digest(scoring)}),
            "trainer": {"precision": precision, **deciding(extra)},
            **({} if judge is None else {"verdict": {"unit": judge.unit, "interpolate": interpolate}}),
        }
        path, start, earlier = _checkpoints(folder, ckpt_path, run)
        if start is not None and "verdict" not in earlier:
            # Begun before there was a verdict: its first epochs were not judged, so it ends by the rule it began with.
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
            # What an epoch costs is not known before the first: these are passes over the same windows.
            deadline.expect("batch", _STEP * a_pass * options.batch_size / max(count, 1))
            deadline.expect("epoch's end", a_pass + (judged - validated) * (1 + len(between)))
            share = 0.0 if items is None or judge is None else (len(between) + 3) * len(items) / max(judge.windows, 1)
            later = deadline.cost("after") + deadline.cost("calibration")
            deadline.expect("end", a_pass + later + share * (judged - validated))
        keeper = Keeper(adapter, path, run, options.patience, judge, between, deadline, before)
        callbacks: list[Callback] = [*extra.pop("callbacks", []), keeper]
        if progress:
            callbacks.append(Bar(options.total_steps, repr(adapter)))
        kept: FeatureCache | None = None
        shown: Iterable[Mapping[str, Any]] = validation
        # Another loss may look at other parts of a window than the features are made of.
        caches = adapter.caches and loss is None
        if caches and deadline is not None:
            # Without it the same windows are drawn, and their features computed step by step.
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
            trainer = pl.Trainer(
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
            batches = [to_device(batch, torch.device("cpu")) for batch in shown]
            loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
            try:
                _leave_sigterm(trainer)
                with _interruptible():
                    trainer.fit(module, val_dataloaders=loader, ckpt_path=start)
            finally:
                if kept is not None:
                    kept.close()
    backbone.to(device).eval()
    # A precision such as "bf16-true" has rounded the base, too; what is scored and handed over rests on the checkpoint.
    types.restore_types()
    verdict = None if judge is None or before is None else judge.verdict(before, keeper.candidates)
    if keeper.weights:
        weight = 1.0 if verdict is None or verdict.weight is None else verdict.weight
        if items is not None and verdict is not None and keeper.start.keys() == keeper.weights.keys():
            common = weight if verdict.helped or items.keep else 0.0
            verdict = replace(verdict, items=items.decide(adapter, keeper.start, keeper.weights, between, common))
            weight = weight if items.found is None else common
        adapter.load_state_dict(keeper.weights if weight == 1.0 else mixed(keeper.start, keeper.weights, weight))
        adapter.finish()
    # The same function scores both sides, so that they differ by the weights alone.
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


def _checkpoints(
    folder: Path | None, ckpt_path: str | Path | None, run: Mapping[str, Any]
) -> tuple[Path | None, Path | None, Mapping[str, Any]]:
    """Return where checkpoints go, the one to start from, and what it says of its run."""
    path = None if folder is None else folder / LAST
    if ckpt_path == "last":
        if path is None:
            raise ValueError("ckpt_path 'last' needs the folder of the earlier run; name it as `folder`")
        start = path if path.is_file() else None
    else:
        start = None if ckpt_path is None else Path(ckpt_path)
        if path is not None and path.is_file() and not (start is not None and path.samefile(start)):
            raise ValueError(
                f"folder {str(folder)!r} already holds a training run; pass ckpt_path='last' to go on with it, or name"
                " another folder"
            )
    earlier: Any = {}
    if start is not None:
        states = read_checkpoint(start).get("callbacks", {})
        earlier = next((state["run"] for state in states.values() if isinstance(state, dict) and "run" in state), {})
        # Records of 0.1.0 do not say how the trainer was told to compute, and know no verdict.
        compared = [name for name in run if name in earlier or name not in ("trainer", "verdict")]
        if differing := [name for name in compared if _plain(earlier.get(name)) != _plain(run[name])]:
            raise ValueError(
                f"checkpoint {str(start)!r} belongs to another run: {', '.join(differing)} differ"
                f" ({_first_difference(earlier, run, differing[0])})"
            )
    return path, start, earlier


def _deciding_options(options: TrainingOptions) -> dict[str, Any]:
    """Return the options that decide numbers; a limit of time decides how many of them there are."""
    return {name: value for name, value in asdict(options).items() if name != "time_limit"}


def _digest(batches: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(np.ascontiguousarray(batch[name]).data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _first_difference(earlier: Mapping[str, Any], run: Mapping[str, Any], name: str) -> str:
    left, right = earlier.get(name), run[name]
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        key = next(key for key in {**right, **left} if _plain(left.get(key)) != _plain(right.get(key)))
        return f"{key}: {left.get(key)!r} there, {right.get(key)!r} here"
    return f"{left!r} there, {right!r} here"


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch within the context and leave its global state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt: Lightning makes it a SystemExit and leaves the signal ignored."""
    with keeping_handler(signal.SIGINT):
        try:
            yield
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise


def _leave_sigterm(trainer: pl.Trainer) -> None:
    """Let SIGTERM do what it did before: Lightning would end the process with exit code 0, as if all were done."""
    connector = trainer._signal_connector
    register = connector.register_signal_handlers

    def without_sigterm() -> None:
        with keeping_handler(signal.SIGTERM):
            register()

    connector.register_signal_handlers = without_sigterm
