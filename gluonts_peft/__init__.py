"""Parameter-efficient fine-tuning of pretrained time-series forecasters, as a plug-in of GluonTS.

Pick a pretrained family, pick an adapter, hand over a GluonTS dataset, get back a GluonTS predictor together with an
honest answer whether tuning beat zero-shot. Names are loaded on first use, so importing the package is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .moved import loaded_on_use

if TYPE_CHECKING:
    from .adapters.base import Adapter
    from .adapters.load import get_adapter
    from .anomaly import detect
    from .backbone import Backbone, load_backbone
    from .backtesting import backtest
    from .checkpoint import Checkpoint
    from .estimator import PeftEstimator
    from .imputation import impute
    from .metrics import DTW, DTWPathError
    from .predictor import PeftPredictor
    from .registry import get_estimator, list_adapters, list_families
    from .series.store import SeriesStore
    from .series.windows import Windows
    from .training import Gate, TuningDidNotHelp

__version__ = "0.1.0"

_HOME = {
    "Adapter": "adapters.base",
    "Backbone": "backbone",
    "Checkpoint": "checkpoint",
    "DTW": "metrics",
    "DTWPathError": "metrics",
    "Gate": "training",
    "PeftEstimator": "estimator",
    "PeftPredictor": "predictor",
    "SeriesStore": "series.store",
    "TuningDidNotHelp": "training",
    "Windows": "series.windows",
    "backtest": "backtesting",
    "detect": "anomaly",
    "get_adapter": "adapters.load",
    "get_estimator": "registry",
    "impute": "imputation",
    "list_adapters": "registry",
    "list_families": "registry",
    "load_backbone": "backbone",
}

__all__ = [
    "DTW",
    "Adapter",
    "Backbone",
    "Checkpoint",
    "DTWPathError",
    "Gate",
    "PeftEstimator",
    "PeftPredictor",
    "SeriesStore",
    "TuningDidNotHelp",
    "Windows",
    "__version__",
    "backtest",
    "detect",
    "get_adapter",
    "get_estimator",
    "impute",
    "list_adapters",
    "list_families",
    "load_backbone",
]


__getattr__ = loaded_on_use(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)
