"""Sources of series of any kind: tables and GluonTS datasets on disk, and series drawn from a recipe."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from .dataspec import FirstSource, PathSource

__all__ = ["File", "Synthetic"]

DataEntry = dict[str, Any]


class File(PathSource):
    """A table or a GluonTS dataset (:func:`gluonts_peft.series.table.read_dataset`).

    Parameters
    ----------
    path
        File or folder.
    freq
        Frequency, where it cannot be inferred.
    """

    source: Literal["file"] = "file"
    freq: str | None = None

    def load(self) -> list[DataEntry]:
        from ..series.table import read_dataset

        return read_dataset(self.path, freq=self.freq)


class Synthetic(FirstSource):
    """Series that a recipe draws, taken as hourly (:func:`gluonts_peft.synthetic.sample_series`).

    Bundled checkpoints were pretrained on others of the same recipe.

    Parameters
    ----------
    series, steps
        How many, and how long.
    seed
        Of the draw.
    """

    made: ClassVar[bool] = True

    source: Literal["synthetic"] = "synthetic"
    series: int = Field(default=100, gt=0)
    steps: int = Field(default=200, gt=0)
    seed: int = Field(default=0, ge=0)

    def load(self) -> list[DataEntry]:
        import numpy as np
        import pandas as pd

        from ..synthetic import sample_series

        values = sample_series(np.random.default_rng(self.seed), self.series, self.steps)
        start = pd.Period("2000-01-01 00:00", freq="h")
        # What is missing everywhere is no series.
        return [
            {"start": start, "target": target, "item_id": f"synthetic-{number}"}
            for number, target in enumerate(values)
            if np.isfinite(target).any()
        ]
