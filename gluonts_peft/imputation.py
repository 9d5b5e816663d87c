"""Filling gaps with a model that reconstructs its input.

    predictor = MomentEstimator(prediction_length=1, task="reconstruct").train(dataset)     hidden patches are the label
    filled = impute(predictor, dataset)                                         observed values keep their bits

This takes a family with the capability ``"reconstruct"``: given a window with hidden parts, it returns the whole
window. MOMENT was pretrained in this way (Goswami et al. 2024, arXiv 2402.03885). The network takes ``patch_length``
steps as one patch: only whole patches are hidden from it, and missing steps of a partly observed patch are interpolated
first.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .errors import unknown
from .objectives import Reconstruction, reconstruction_loss
from .preparation import Reconstructing
from .series.calendar import calendar_of, stamp_table
from .series.entries import Door, in_step, nothing_seen
from .series.store import SeriesStore
from .series.writing import Names, writable, write_columns
from .sweep import backbone_of, batches, gather, reconstruct, require_reconstruct, runs
from .units import refuse_nonfinite

if TYPE_CHECKING:
    from .backbone import Backbone
    from .estimator import PeftEstimator
    from .predictor import PeftPredictor
    from .series.table import DataEntry

__all__ = ["Reconstruction", "impute", "reconstruction_loss", "train_reconstruction", "write_imputed"]

logger = logging.getLogger(__name__)

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]

UNFILLABLE = ("raise", "keep")


def train_reconstruction(
    estimator: PeftEstimator,
    training_data: Iterable[Mapping[str, Any]],
    validation_data: Iterable[Mapping[str, Any]] | None = None,
    *,
    mask_ratio: float = 0.3,
    held_out: float = 0.2,
    ckpt_path: str | None = None,
) -> PeftPredictor:
    """Train an estimator to reconstruct: the old spelling of ``PeftEstimator(..., task="reconstruct").train(...)``.

    It stays for one release. Parameters and errors are those of :meth:`gluonts_peft.PeftEstimator.train` and of
    :class:`gluonts_peft.preparation.Reconstructing`.
    """
    warnings.warn(
        "train_reconstruction() will be removed; use PeftEstimator(..., task='reconstruct').train()",
        DeprecationWarning,
        stacklevel=2,
    )
    own = copy.copy(estimator)
    own.task = Reconstructing(mask_ratio, held_out)
    try:
        return own.train(training_data, validation_data, ckpt_path)
    finally:
        estimator.skipped = own.skipped


def impute(
    model: PeftPredictor | Backbone,
    dataset: Iterable[Mapping[str, Any]],
    *,
    max_gap: int | None = None,
    unfillable: str = "raise",
    unusable: str = "raise",
    any_freq: bool = False,
    batch_size: int = 64,
    progress: bool = False,
) -> list[DataEntry]:
    """Fill the gaps of each series; observed values stay as they are, bit for bit.

    A gap is filled from a window of ``context_length`` steps that is centred on it and aligned so that the gap begins
    with a patch; neighbouring gaps share a window if they lie in its central half. Gaps at the ends of a series are
    filled too. Missing steps of a partly observed patch are interpolated before the network sees them.

    Parameters
    ----------
    model
        Predictor or backbone of a family with the capability ``"reconstruct"``, tuned or not.
    dataset
        GluonTS dataset, univariate; NaN is missing.
    max_gap
        Longest gap to fill, in steps: at most the context less two patches; half the context if None (our choice).
    unfillable
        How to treat longer gaps and series without an observed value: ``"raise"``, or ``"keep"``, which leaves them
        missing and warns with their number.
    unusable
        How to treat series without an observed value, unless they are kept: ``"raise"``, or ``"skip"``, which leaves
        them out of the result with a warning that names them.
    any_freq
        Accept data of another frequency than the model was tuned on.
    batch_size
        Windows per forward pass.
    progress
        Show a progress bar.

    Returns
    -------
    list of dict
        The entries in order, each with a new ``target`` of the same type.

    Raises
    ------
    EntryError
        If `dataset` is not a dataset, or an entry is wrong. It is a ValueError and a TypeError.
    ValueError
        If the family does not reconstruct, an argument cannot be used, or a series is unusable or cannot be filled and
        the policy is to raise; the message names it.
    """
    backbone = backbone_of(model)
    require_reconstruct(backbone)
    if unfillable not in UNFILLABLE:
        raise ValueError(unknown("unfillable", unfillable, UNFILLABLE))
    context = backbone.context_length
    longest = context // 2 if max_gap is None else max_gap
    patch = backbone.patch_length
    if not 0 < longest <= context - 2 * patch:
        raise ValueError(
            f"max_gap {longest} is not between 1 and {context - 2 * patch}, the context_length less two patches"
        )
    door = Door(
        "imputed",
        backbone=backbone,
        fields=False,
        multivariate=False,
        lacks=nothing_seen if unfillable == "raise" else None,
        unusable=unusable,
        freq=getattr(model, "freq", None),
        any_freq=any_freq,
        gaps=True,
        remedy="keep them missing: unfillable='keep',",
    )
    entries = door.read(dataset)
    if not entries and door.found_freq is not None:
        return []
    store = SeriesStore.from_dataset(entries, exact=True)
    plan: list[tuple[int, int, int]] = []
    kept: list[str] = []
    wanted = np.isnan(store.values)
    for i, name in enumerate(store.item_ids):
        missing = np.isnan(store.series(i))
        if len(missing) and missing.all():
            kept.append(f"series {name!r} has no observed value: there is nothing to fill it from; leave it out")
            continue
        gaps = runs(missing)
        for begin, end in gaps[gaps[:, 1] - gaps[:, 0] > longest]:
            wanted[store.offsets[i] + begin : store.offsets[i] + end] = False
            kept.append(
                f"series {name!r} misses the {end - begin} steps {begin} to {end - 1}, more than max_gap {longest}; cut"
                " the series there"
            )
        plan.extend((i, begin, end) for begin, end in _shared(gaps[gaps[:, 1] - gaps[:, 0] <= longest], context // 2))
    if kept and unfillable == "raise":
        others = f" ({len(kept)} such in the dataset)" if len(kept) > 1 else ""
        raise ValueError(f"{kept[0]}, or keep it missing with unfillable='keep'{others}")
    if kept:
        logger.warning("%d gaps stay missing; the first: %s", len(kept), kept[0])
    filled = [np.array(entry["target"]) for entry in entries]
    series, begins, ends = np.array(plan, np.int64).reshape(-1, 3).T
    width = min(context, int(store.lengths.max()))
    last = np.minimum(np.maximum((begins + ends) // 2 + width // 2, width), store.lengths[series])
    # If gaps begin with a patch, fewer patches are partly observed.
    aligned = last - (last - begins) % patch
    last = np.where((aligned >= width) & (aligned >= ends), aligned, last)
    for rows in batches(len(plan), batch_size, "impute", progress):
        values, observed = gather(store, series[rows], last[rows], width)
        found = reconstruct(backbone, values, observed)
        decimals = _decimals(values, observed)
        for row, window in zip(range(rows.start, rows.stop), found, strict=True):
            target, first = filled[series[row]], last[row] - width
            steps = np.arange(begins[row], ends[row])
            steps = steps[wanted[store.offsets[series[row]] + steps]]
            # Via the shortest decimal, so that float64 shows no digits that were not computed.
            shown = window[steps - first]
            shown = shown.astype(str) if shown.dtype == np.float32 else np.round(shown, decimals[row - rows.start])
            with np.errstate(over="ignore"):
                target[steps] = shown.astype(target.dtype)
            refuse_nonfinite(target[steps][None], lambda _, i=series[row]: store.item_ids[i], "reconstruction")  # type: ignore[misc]
    return [{**entry, "target": target} for entry, target in zip(entries, filled, strict=True)]


def write_imputed(
    dataset: Iterable[Mapping[str, Any]],
    filled: Iterable[Mapping[str, Any]],
    path: str | Path,
    *,
    overwrite: bool = False,
    columns: Sequence[str] = ("item_id", "timestamp", "target"),
) -> pd.DataFrame:
    """Write filled series as a long table, one row per item and time, and return it.

    Time stamps are those of the data if the entries know them (from `read_dataset` or ``PandasDataset``), else the
    starts of the periods.

    Parameters
    ----------
    dataset, filled
        Input and output of :func:`impute`; each entry has an ``item_id``. Series that were left out are skipped.
    path
        File to write, ``.csv``, ``.csv.gz`` or ``.parquet``, in an existing folder.
    overwrite
        Whether an existing file is replaced.
    columns
        Names of the columns for item, time and value; a fourth, ``imputed``, is True where a value was filled in.

    Raises
    ------
    ValueError
        If the file cannot be written there.
    """
    path, suffix = writable(path, overwrite)
    filled = list(filled)
    entries = in_step([(after.get("item_id"), after["start"]) for after in filled], dataset)
    pairs = list(zip(entries, filled, strict=True))
    lengths = [len(after["target"]) for _, after in pairs]
    stamps = stamp_table([after["start"] for _, after in pairs], lengths, [calendar_of(after) for _, after in pairs])
    target = np.concatenate([after["target"] for _, after in pairs])
    missing = np.concatenate([np.isnan(before["target"]) for before, _ in pairs])
    items = Names([after.get("item_id") for _, after in pairs], lengths)
    table = dict(zip((*columns, "imputed"), (items, stamps, target, missing & ~np.isnan(target)), strict=True))
    write_columns(table, path, suffix)
    return pd.DataFrame({**table, columns[0]: items.array(), columns[1]: stamps.index()})


def _decimals(values: Floats, observed: Floats) -> list[int]:
    """Return the number of decimals that float32 resolves over the range of each window."""
    high, low = np.where(observed > 0, values, -np.inf).max(1), np.where(observed > 0, values, np.inf).min(1)
    spread = (high - low).astype(np.float64)
    return [7 - math.ceil(math.log10(each)) if each > 0 else 7 for each in spread.tolist()]


def _shared(gaps: Integers, span: int) -> list[tuple[int, int]]:
    """Join neighbouring gaps, given as (begin, end), while together they span at most `span` steps."""
    joined: list[tuple[int, int]] = []
    for begin, end in gaps.tolist():
        if joined and end - joined[-1][0] <= span:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined
