"""Features of a frozen backbone, computed once and kept for the whole training of a head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from .backbone import Backbone
    from .series.windows import Windows

__all__ = ["FeatureCache", "features_of", "shape_of_features", "with_features"]

# Features beyond this many bytes go to a file if there is a folder for it, and beyond the second need one.
_TO_DISK, _IN_MEMORY = 2**28, 2**32
_CHUNK = 128


def shape_of_features(backbone: Backbone) -> tuple[int, int]:
    """Return patches and width of a backbone's features."""
    length = backbone.past_length
    batch = {
        "past_target": torch.arange(float(length), device=backbone.device)[None],
        "past_observed_values": torch.ones(1, length, device=backbone.device),
    }
    if backbone.time_features:
        steps = length + backbone.prediction_length
        batch["time_feat"] = torch.zeros(1, steps, len(backbone.time_features), device=backbone.device)
    with backbone.inference():
        _, patches, d_model = backbone.features(batch).shape
    return patches, d_model


class FeatureCache:
    """Training windows together with their features, each computed once. Stands in for the windows it draws from.

    Parameters
    ----------
    backbone
        With the new head attached, in its final state but for the head.
    windows
        Where training windows come from.
    steps, batch_size
        Of the whole training.
    pool
        Draw this many windows once, and every batch from them; None draws as ``windows`` does.
    folder
        Where the features go if they are large.
    compute
        Keep features; else batches are drawn in the same way, without them.
    progress
        Show a progress bar.

    Raises
    ------
    ValueError
        If the features are too large for memory and there is no folder.
    """

    def __init__(
        self,
        backbone: Backbone,
        windows: Windows,
        *,
        steps: int,
        batch_size: int,
        pool: int | None = None,
        folder: Path | None = None,
        compute: bool = True,
        progress: bool = False,
    ) -> None:
        if pool is None:
            drawn = [np.stack(windows.pairs(step, batch_size), 1) for step in range(steps)]
            self.pairs, rows = np.unique(np.concatenate(drawn), axis=0, return_inverse=True)
            self._rows: np.ndarray | None = rows.reshape(steps, batch_size)
        else:
            self.pairs = np.unique(np.stack(windows.pairs(0, pool), 1), axis=0)
            self._rows = None
        self.windows = windows
        self._path: Path | None = None
        self.features: np.ndarray | None = None
        if not compute:
            return
        patches, d_model = shape_of_features(backbone)
        shape = (len(self.pairs), patches, d_model)
        size = 4 * int(np.prod(shape))
        if size > _TO_DISK and folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / "features.npy"
            self.features = np.lib.format.open_memmap(self._path, "w+", np.float32, shape)
        elif size > _IN_MEMORY:
            raise ValueError(
                f"features of {shape[0]} training windows take {size / 1e9:.1f} GB; name a folder to keep them in, or"
                " give the head fewer `windows`, or cache=False"
            )
        else:
            self.features = np.empty(shape, np.float32)
        starts = range(0, len(self.pairs), _CHUNK)
        for start in tqdm(starts, desc="features", unit="batch", leave=False, disable=not progress):
            part = slice(start, start + _CHUNK)
            self.features[part] = features_of(backbone, windows.read(*self.pairs[part].T))

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, step: int, batch_size: int) -> dict[str, Any]:
        """Return a batch as :meth:`Windows.sample` does, with ``features`` of shape ``(batch, patches, d_model)``."""
        if self._rows is None:
            seed = np.random.SeedSequence([self.windows.seed, step])
            rows = np.random.Generator(np.random.Philox(seed)).integers(0, len(self.pairs), batch_size)
        else:
            rows = self._rows[step]
        batch: dict[str, Any] = dict(self.windows.read(*self.pairs[rows].T))
        return batch if self.features is None else {**batch, "features": self.features[rows]}

    def close(self) -> None:
        """Give the features up, and delete their file."""
        self.features = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def features_of(backbone: Backbone, batch: Mapping[str, Any]) -> np.ndarray:
    """Return the features of a batch of arrays, in evaluation mode."""
    tensors = {name: torch.as_tensor(value).to(backbone.device) for name, value in batch.items()}
    with backbone.inference():
        found: np.ndarray = backbone.full_features(tensors).float().cpu().numpy()
    return found


def with_features(backbone: Backbone, batches: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Add their features to batches."""
    for batch in batches:
        yield {**batch, "features": features_of(backbone, batch)}
