"""The GluonTS predictor: forecasting, storing, exchanging and merging of tuned models."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from gluonts.dataset.common import Dataset
from gluonts.model.forecast import Forecast
from gluonts.model.predictor import Predictor
from numpy.typing import NDArray

from . import __version__
from .adapters.base import AdapterError
from .adapters.load import load_adapter
from .backbone import Backbone
from .calibration import Calibration
from .files import FolderInUse, delivering, record
from .forecasts import forecasts_of
from .items import ITEMS, Items
from .predictor_folder import (
    ADAPTER,
    CONFIG,
    TYPE,
    PredictorError,
    check_steps,
    check_type,
    describe,
    load_base,
    read_predictor,
)
from .scores import LEVELS
from .series.batches import context_batches
from .series.entries import Door, nothing_seen
from .series.frames import from_dataframe, to_dataframe
from .training import Fit, Gate, resolve_device, to_device
from .units import refuse_nonfinite
from .verdict import Verdict
from .weights import Snapshot

__all__ = ["PeftPredictor", "PredictorError"]


class PeftPredictor(Predictor):  # type: ignore[misc]
    """Forecast with a backbone and the adapter that is attached to it, if any.

    Parameters
    ----------
    backbone
        Pretrained model, with or without an adapter.
    fit
        Record of the training, if there was one.
    batch_size
        Series at a time.
    seed
        Seed of sample paths: each call of :meth:`predict` draws the same ones.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
    prediction_length
        Steps to hand over of those that the model forecasts; all of them if None.
    freq
        Frequency of the data that the model was tuned on, as ``pandas.Period`` spells it; other data are refused. None,
        as of pretrained models, takes any.
    calibration
        Correction of the quantiles that the model forecasts, see :mod:`gluonts_peft.calibration`; None leaves them.
    items
        Weights of items that differ from the common weight, which the attached adapter has, see
        :mod:`gluonts_peft.items`; None forecasts all items with the common weight.

    Raises
    ------
    ValueError
        If the model does not forecast that many steps, or the calibration is of another number of steps.
    """

    __version__: str = __version__

    def __init__(
        self,
        backbone: Backbone,
        *,
        fit: Fit | None = None,
        batch_size: int = 64,
        seed: int = 0,
        device: str = "auto",
        prediction_length: int | None = None,
        freq: str | None = None,
        calibration: Calibration | None = None,
        items: Items | None = None,
    ) -> None:
        own = backbone.prediction_length
        if prediction_length is not None and not 0 < prediction_length <= own:
            raise ValueError(f"prediction_length {prediction_length} is not from 1 to {own}, what the model forecasts")
        check_steps(calibration, own)
        super().__init__(prediction_length=own if prediction_length is None else prediction_length)
        place = resolve_device(device)
        self.backbone = backbone if backbone.device == place else backbone.to(place)
        self.fit = fit
        self.batch_size = batch_size
        self.seed = seed
        self.freq = freq
        self.calibration = calibration
        self.items = items

    def __repr__(self) -> str:
        return f"PeftPredictor({self.backbone!r}, prediction_length={self.prediction_length})"

    @property
    def merged(self) -> bool:
        """Whether an adapter was folded into the weights of the base."""
        return self.backbone.merged

    @property
    def verdict(self) -> Verdict | None:
        """Whether tuning helped, and how certain that is; None if this predictor was not trained, or there was no
        zero-shot forecast to compare with.
        """
        return None if self.fit is None else self.fit.verdict

    @property
    def gate(self) -> Gate | None:
        """Scores of zero-shot and of the kept weights on the windows that chose these weights, if this predictor was
        trained; :attr:`verdict` says what they are worth.
        """
        return None if self.fit is None else self.fit.gate

    def predict(
        self,
        dataset: Dataset,
        num_samples: int | None = None,
        *,
        unusable: str = "raise",
        any_freq: bool = False,
    ) -> Iterator[Forecast]:
        """Forecast the steps after the end of each series, lazily and in order.

        Parameters
        ----------
        dataset
            GluonTS dataset.
        num_samples
            Sample paths per series, for families that sample; ignored by those that forecast quantiles.
        unusable
            How to treat series without an observed value in their context: ``"raise"``, or ``"skip"``, which yields
            nothing for them and warns with their names.
        any_freq
            Accept data of another frequency than the model was tuned on.

        Yields
        ------
        QuantileForecast or SampleForecast
            As the family forecasts, with the ``calibration`` applied if there is one; each with the unchanged
            ``item_id`` of its entry.

        Raises
        ------
        EntryError
            If `dataset` is not a dataset, or an entry is wrong, see :mod:`gluonts_peft.series.entries`: raised by the
            call for a list, else when the entry is reached, before its batch is forecast. A ValueError and a TypeError.
        ValueError
            If a series is unusable, or its forecast is not finite; the message names it.
        """
        context = self.backbone.past_length
        door = Door(
            "forecast",
            backbone=self.backbone,
            horizon=self.backbone.prediction_length,
            lacks=partial(nothing_seen, steps=context),
            unusable=unusable,
            freq=self.freq,
            any_freq=any_freq,
        )
        return self._predict(door.open(dataset), num_samples)

    def predict_df(
        self,
        frame: Any,
        *,
        future: Any = None,
        quantile_levels: Sequence[float] = LEVELS,
        item_id: str | None = "item_id",
        timestamp: str = "timestamp",
        target: str = "target",
        known: Sequence[str] = (),
        past: Sequence[str] = (),
        freq: str | None = None,
        num_samples: int | None = None,
        unusable: str = "raise",
        any_freq: bool = False,
    ) -> pd.DataFrame:
        """Forecast the steps after the end of each series of a data frame.

        Parameters
        ----------
        frame, future, item_id, timestamp, target, known, past, freq
            One row per item and time, and the `known` columns after the end of each series, see
            :func:`gluonts_peft.series.frames.from_dataframe`.
        quantile_levels
            Between 0 and 1, see :func:`gluonts_peft.series.frames.to_dataframe`.
        num_samples, unusable, any_freq
            As of :meth:`predict`.

        Returns
        -------
        pandas.DataFrame
            One row per item and step: `item_id`, `timestamp`, ``target_name``, ``predictions`` (the median) and a
            column for each level, as Chronos's ``predict_df`` has them.

        Raises
        ------
        ValueError
            As of :meth:`predict` and :func:`~gluonts_peft.series.frames.from_dataframe`.
        """
        columns: dict[str, Any] = dict(item_id=item_id, timestamp=timestamp, target=target, known=known, past=past)
        entries = from_dataframe(frame, future=future, freq=freq, **columns)
        forecasts = self.predict(entries, num_samples=num_samples, unusable=unusable, any_freq=any_freq)
        return to_dataframe(
            forecasts, quantile_levels, item_id=item_id or "item_id", timestamp=timestamp, target=target
        )

    def _predict(self, dataset: Iterable[Mapping[str, Any]], num_samples: int | None) -> Iterator[Forecast]:
        backbone = self.backbone
        generator = torch.Generator(device=backbone.device).manual_seed(self.seed)
        batches = context_batches(
            dataset,
            context_length=backbone.past_length,
            batch_size=self.batch_size,
            prediction_length=backbone.prediction_length,
            features="covariates" in backbone.capabilities,
            multivariate="multivariate" in backbone.capabilities,
            time_features=backbone.time_features,
            exact=True,
        )
        position = 0
        for entries, batch in batches:
            names = [entry.get("item_id", f"at position {position + i}") for i, entry in enumerate(entries)]
            position += len(entries)
            values, levels = self._values(entries, batch, num_samples, generator)
            if self.calibration is not None:
                values = self.calibration.apply(values, levels, self.calibration.scales(entries))
            refuse_nonfinite(values, names.__getitem__, "forecast")
            yield from forecasts_of(entries, values, levels)

    def _values(
        self,
        entries: list[Mapping[str, Any]],
        batch: Mapping[str, Any],
        num_samples: int | None,
        generator: torch.Generator,
    ) -> tuple[NDArray[Any], tuple[float, ...] | None]:
        """Forecast a batch, each entry with its weight; return values in the order of the entries, and their levels."""
        backbone = self.backbone
        with ExitStack() as readers:
            # Entered for each batch: between batches another thread may swap or merge the adapter.
            with backbone.weights.lock if self.items is not None else nullcontext():
                items = self.items
                if items is None:
                    parts = [(slice(None), readers.enter_context(backbone.reading()))]
                else:
                    weights = np.array([items.weight(entry.get("item_id")) for entry in entries])
                    parts = [
                        (weights == weight, readers.enter_context(items.reading(backbone, weight)))
                        for weight in np.unique(weights).tolist()
                    ]
            found: NDArray[Any] | None = None
            for rows, reader in parts:
                tensors = to_device({name: value[rows] for name, value in batch.items()}, reader.device)
                result = reader.forecast(tensors, num_samples=num_samples, generator=generator)
                own = result.values[:, :, : self.prediction_length].cpu()
                values = (own if own.dtype == torch.float64 else own.float()).numpy()
                if len(parts) == 1:
                    return values, result.levels
                if found is None:
                    found = np.empty((len(entries), *values.shape[1:]), values.dtype)
                # One part may need float64 though others do not.
                found = found.astype(np.result_type(found, values), copy=False)
                found[rows] = values
        assert found is not None, "a batch has entries"
        return found, result.levels

    def shorten(self, prediction_length: int) -> PeftPredictor:
        """Return a predictor of the same model that hands over the first steps of each forecast.

        Known future covariates must still cover all steps that the model forecasts.

        Raises
        ------
        ValueError
            If the model does not forecast that many steps.
        """
        return PeftPredictor(
            self.backbone,
            fit=self.fit,
            batch_size=self.batch_size,
            seed=self.seed,
            device=str(self.backbone.device),
            prediction_length=prediction_length,
            freq=self.freq,
            calibration=self.calibration,
            items=self.items,
        )

    def serialize(self, path: Path) -> None:
        """Write the predictor into a folder: JSON and the adapter's tensors, never the base weights.

        A calibration is part of the JSON, not of the adapter that plain PEFT opens.

        Parameters
        ----------
        path
            Folder; created if need be. It must not hold a predictor already.

        Raises
        ------
        PredictorError
            If the folder is in use, or the adapter was merged into the base weights.
        OSError
            If the disk is full or the folder cannot be written; nothing is left behind.
        """
        path = Path(path)
        if self.merged:
            raise PredictorError(
                "a merged predictor has no adapter to store; write the whole model with export(folder)"
            )
        # The file that makes the folder a predictor is written last.
        names = (ADAPTER, ITEMS, CONFIG, TYPE)

        def check() -> None:
            if used := [name for name in names if (path / name).exists()]:
                raise PredictorError(f"folder {str(path)!r} is in use: it holds {used[0]!r}; name another folder")

        try:
            with delivering(path, "predictor's serialization", names=names, check=check) as partial:
                partial.mkdir()
                adapter = self.backbone.adapter
                if adapter is not None and adapter.num_parameters():
                    adapter.save(partial / ADAPTER)
                config = describe(self, path)
                if self.items is not None:
                    config["items"] = self.items.save(partial)
                (partial / CONFIG).write_text(json.dumps(record(config), indent=1) + "\n")
                super().serialize(partial)
        except FolderInUse as error:
            raise PredictorError(str(error)) from None

    @classmethod
    def deserialize(
        cls, path: Path, device: str = "auto", checkpoint: str | Path | None = None, **unknown_options: Any
    ) -> PeftPredictor:
        """Load what :meth:`serialize` wrote; ``gluonts.model.Predictor.deserialize`` ends here too.

        Parameters
        ----------
        path
            Folder.
        device
            ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        checkpoint
            Where the base weights are now, if they were moved. They must be the same weights.

        Raises
        ------
        PredictorError
            If the folder is damaged, or the base weights are not those that the adapter was trained on.
        """
        if unknown_options:
            raise TypeError(
                f"deserialize() has no option {next(iter(unknown_options))!r}; it has device and checkpoint"
            )
        path = Path(path)
        check_type(path, cls, PeftPredictor)
        stored = read_predictor(path)
        backbone = load_base(stored, path, checkpoint)
        if stored.adapter is not None:
            try:
                adapter = load_adapter(path / ADAPTER, backbone)
                if stored.items is not None:
                    stored.items.check(adapter)
            except AdapterError as error:
                if str(path) in str(error):
                    raise
                raise AdapterError(f"{error} (adapter in {str(path / ADAPTER)!r})") from error
        return cls(backbone, fit=stored.fit, device=device, items=stored.items, **stored.settings)

    def swap(self, adapter: str | Path) -> None:
        """Swap the adapter in place; the base weights stay in memory.

        ``fit``, ``freq``, ``calibration`` and ``items`` become those of the predictor that holds the adapter, or None
        for a bare adapter.

        Parameters
        ----------
        adapter
            Folder of a saved adapter, or of a saved predictor, on the same base.

        Raises
        ------
        AdapterError, PredictorError
            If it does not fit or is damaged; the current adapter then stays.
        """
        if self.merged:
            raise AdapterError("a merged predictor cannot exchange its adapter: it is part of the weights now")
        folder, fit, freq, calibration, items = Path(adapter), None, None, None, None
        if (folder / CONFIG).is_file():
            stored = read_predictor(folder)
            folder, fit, freq = folder / ADAPTER, stored.fit, stored.settings["freq"]
            calibration, items = stored.settings["calibration"], stored.items
            try:
                check_steps(calibration, self.backbone.prediction_length)
            except ValueError as error:
                raise PredictorError(f"predictor in {str(adapter)!r} does not fit here: {error}") from None
        backbone = self.backbone
        with backbone.weights.changing():
            before = Snapshot(backbone, backbone.adapter)
            try:
                if backbone.adapter is not None:
                    backbone.adapter.detach()
                own = load_adapter(folder, backbone)
                if items is not None:
                    items.check(own)
            except BaseException:
                before.restore()
                raise
            self.fit, self.freq, self.calibration, self.items = fit, freq, calibration, items

    def merge(self) -> None:
        """Merge the adapter into the base weights, in place: same forecasts, no adapter left.

        Items with their own weights get the common weight, with a warning.

        Raises
        ------
        AdapterError
            If the method cannot be merged.
        """
        if self.backbone.adapter is not None:
            with self.backbone.weights.lock:
                self.backbone.adapter.merge()
                items, self.items = self.items, None
            if items is not None:
                items.warn("what was merged has")

    def export(self, folder: str | Path) -> None:
        """Write base and adapter, merged, in the family's own layout, for use without this project.

        A calibration is not exported, which a warning says: the quantiles are those of the network. If items have their
        own weights, the export has the common weight, with a warning.

        Parameters
        ----------
        folder
            New or empty folder.

        Raises
        ------
        PredictorError
            If the folder is in use.
        AdapterError
            If the method cannot be merged.
        """
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise PredictorError(f"folder {str(folder)!r} is not empty; name a new one")
        adapter = self.backbone.adapter
        if adapter is not None and not adapter.mergeable:
            raise AdapterError(f"adapter {adapter.name!r} cannot be merged: its effect is not a change of the weights")
        if self.calibration is not None and not self.calibration.empty:
            warnings.warn(
                f"the export forecasts without the calibration of this predictor ({self.calibration})", stacklevel=2
            )
        try:
            with delivering(folder, "model's export") as partial, self.backbone.reading() as reader:
                partial.mkdir()
                reader.export(partial)
        except FolderInUse as error:
            raise PredictorError(str(error)) from None
        if self.items is not None:
            self.items.warn("what was exported has")
