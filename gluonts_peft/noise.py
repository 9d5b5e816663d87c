"""Remarks of libraries that say nothing to a user of this project; every other warning of theirs is passed on.

Each is a row of :data:`NOISE`, with the reason why it is left out.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["NOISE", "Remark", "without_noise"]


@dataclass(frozen=True)
class Remark:
    """A warning that is left out: whose it is, how its text begins (a regular expression), and why."""

    library: str
    text: str
    reason: str


NOISE: tuple[Remark, ...] = (
    Remark(
        "lightning",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        "of its own code, to its authors",
    ),
    Remark(
        "lightning",
        r"The '\w+' does not have many workers",
        "windows are read from memory, in the step itself",
    ),
    Remark(
        "lightning",
        r"The number of training batches \(\d+\) is smaller than the logging interval",
        "the epoch's mean loss is logged whatever the interval",
    ),
    Remark(
        "lightning",
        r"GPU available but not used",
        "the estimator was told which device to use",
    ),
    Remark(
        "peft",
        r"Specified to not save \w+_A and \w+_B within the state dictionary",
        "they are drawn again from a seed that is recorded, which is what makes the files small",
    ),
    Remark(
        "peft",
        r"Unsupported layer type '<class '[\w.]*Norm'>' encountered",
        "norms of other classes than torch's scale by a weight too; tests prove that they are tuned and folded rightly",
    ),
    Remark(
        "peft",
        r"Could not find a config file in ",
        "it asks the hub whether a vocabulary has grown; forecasters have none that is trained",
    ),
)

# What they say on the way is information: banners, devices, that a training has ended.
_CHATTY = ("lightning.pytorch", "lightning.fabric", "lightning", "lightning_fabric", "pytorch_lightning")


@contextmanager
def without_noise(library: str) -> Iterator[None]:
    """Suppress the remarks of a library in :data:`NOISE` within the context, and Lightning's below a warning."""
    loggers = [logging.getLogger(name) for name in _CHATTY] if library == "lightning" else []
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.getEffectiveLevel(), logging.WARNING))
    try:
        with warnings.catch_warnings():
            for remark in NOISE:
                if remark.library == library:
                    warnings.filterwarnings("ignore", remark.text)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
