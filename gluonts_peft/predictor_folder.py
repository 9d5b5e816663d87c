"""The folder of a stored predictor: what its JSON record says, and the base weights that it refers to."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters.base import versions
from .backbone import Backbone, Source
from .calibration import Calibration
from .checkpoint import Checkpoint, CheckpointError
from .files import NewerFormat, as_integer, load_json, opened, typed
from .items import Items
from .registry import families
from .series.season import unit_of
from .training import Fit

if TYPE_CHECKING:
    from .predictor import PeftPredictor

__all__ = [
    "ADAPTER",
    "CONFIG",
    "TYPE",
    "PredictorError",
    "StoredPredictor",
    "check_steps",
    "check_type",
    "describe",
    "load_base",
    "read_predictor",
]

#: File that makes a folder a predictor for GluonTS, the record, and the folder of the adapter.
TYPE, CONFIG, ADAPTER = "gluonts-config.json", "predictor.json", "adapter"
_KEYS = (
    "family",
    "base",
    "base_places",
    "prediction_length",
    "model_prediction_length",
    "context_length",
    "backbone_options",
    "adapter",
    "batch_size",
    "seed",
    "freq",
    "calibration",
    "fit",
    "items",
    "versions",
)
# Far beyond what these models can do: a damaged record must not make them allocate more.
_LONGEST = 1_000_000


class PredictorError(ValueError):
    """A predictor cannot be stored or loaded."""


@dataclass(frozen=True)
class StoredPredictor:
    """What the record of a stored predictor says.

    Parameters
    ----------
    family
        Name in the registry.
    base
        Source of the base weights.
    places
        Folders where the base weights were when the predictor was stored: as an absolute path, and relative to it.
    lengths
        ``prediction_length`` and ``context_length`` of the model.
    backbone_options
        Options of the family.
    adapter
        Specification of the adapter; None for zero-shot.
    settings
        Further arguments of :class:`gluonts_peft.PeftPredictor`.
    fit, items
        What training found out, and the weights of items; None if there are none.
    """

    family: str
    base: Source
    places: list[Path]
    lengths: dict[str, Any]
    backbone_options: dict[str, Any]
    adapter: Any
    settings: dict[str, Any]
    fit: Fit | None
    items: Items | None


def check_steps(calibration: Calibration | None, steps: int) -> None:
    """Raise a ValueError if a calibration is of another number of steps than the model forecasts."""
    if calibration is not None and calibration.steps != steps:
        raise ValueError(f"the calibration is of {calibration.steps} steps, and the model forecasts {steps}")


def describe(predictor: PeftPredictor, path: Path) -> dict[str, Any]:
    """Return the record of a predictor that is stored in a folder, but for the weights of its items."""
    backbone = predictor.backbone
    adapter, own, place = backbone.adapter, backbone.prediction_length, backbone.place
    places = {} if place is None or backbone.source.kind != "folder" else _places(place, path)
    return {
        "family": backbone.family,
        "base": asdict(backbone.source),
        **({"base_places": places} if places else {}),
        "prediction_length": predictor.prediction_length,
        **({} if own == predictor.prediction_length else {"model_prediction_length": own}),
        "context_length": backbone.context_length,
        "backbone_options": backbone.options,
        "adapter": None if adapter is None or not adapter.num_parameters() else adapter.spec,
        "batch_size": predictor.batch_size,
        "seed": predictor.seed,
        **({} if predictor.freq is None else {"freq": predictor.freq}),
        **({} if predictor.calibration is None else {"calibration": asdict(predictor.calibration)}),
        "fit": None if predictor.fit is None else asdict(predictor.fit),
        "versions": versions(),
    }


def _places(base: Path, path: Path) -> dict[str, str]:
    """Return the absolute path of a base folder, and that relative to the predictor: both may be moved together."""
    places = {"absolute": str(base)}
    # There is no relative path to another drive.
    with suppress(ValueError):
        places["relative"] = os.path.relpath(base, path.absolute())
    return places


def check_type(folder: Path, kind: type[PeftPredictor], root: type[PeftPredictor]) -> None:
    """Refuse the folder of another program's predictor, without importing what it names.

    Parameters
    ----------
    folder
        Folder of the predictor.
    kind, root
        The class that opens it, and the base of the classes whose folders it may be.
    """
    file = folder / TYPE
    try:
        named = str(load_json(file)["type"])
    except FileNotFoundError:
        if (folder / CONFIG).exists():
            raise PredictorError(
                f"folder {str(folder)!r} holds an unfinished predictor: it has no {TYPE}, which is written last; write"
                " it again"
            ) from None
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PredictorError(f"{str(file)!r} is damaged: {type(error).__name__}: {error}") from error
    own = {f"{each.__module__}.{each.__qualname__}" for each in kind.__mro__ if issubclass(each, root)}
    if named not in own:
        raise PredictorError(
            f"folder {str(folder)!r} holds a predictor of type {named!r}, not {kind.__qualname__}; nothing of it was"
            " loaded. If you trust it, open it with gluonts.model.Predictor.deserialize"
        )


def read_predictor(folder: Path) -> StoredPredictor:
    """Read the record that :meth:`gluonts_peft.PeftPredictor.serialize` wrote.

    Raises
    ------
    PredictorError
        If there is no record, or it is damaged.
    """
    file = folder / CONFIG
    try:
        config = opened(load_json(file), _KEYS)
        fit, options, places = config["fit"], config["backbone_options"], config.get("base_places") or {}
        base = typed(Source, dict(config["base"].items()), "base")
        if base.kind not in ("bundled", "folder", "hub"):
            raise ValueError(f"base.kind is {base.kind!r}, not bundled, folder or hub")
        if config.get("items") is not None and config["adapter"] is None:
            raise ValueError("items have weights, and there is no adapter that they could be weights of")
        if not isinstance(options, dict):
            raise TypeError(f"backbone_options is {options!r}, not a mapping")
        # The model itself refuses lengths that are too small.
        length = as_integer(config["prediction_length"], "prediction_length", -_LONGEST, _LONGEST)
        whole = as_integer(config.get("model_prediction_length", length), "model_prediction_length", length, _LONGEST)
        return StoredPredictor(
            family=_text(config["family"], "family"),
            base=base,
            places=[
                Path(os.path.normpath(folder.absolute() / _text(places[name], f"base_places.{name}")))
                for name in ("absolute", "relative")
                if name in places
            ],
            lengths={
                "prediction_length": whole,
                "context_length": as_integer(config["context_length"], "context_length", -_LONGEST, _LONGEST),
            },
            backbone_options=options,
            adapter=config["adapter"],
            settings={
                "batch_size": as_integer(config["batch_size"], "batch_size", 1),
                "seed": as_integer(config["seed"], "seed", 0, 2**63 - 1),
                "prediction_length": length,
                "freq": _known_freq(config.get("freq")),
                "calibration": _calibration(config.get("calibration"), whole),
            },
            fit=None if fit is None else typed(Fit, fit, "fit"),
            items=None if config.get("items") is None else Items.load(folder, config["items"]),
        )
    except FileNotFoundError as error:
        raise PredictorError(f"folder {str(folder)!r} holds no predictor: it has no {CONFIG}") from error
    except NewerFormat as error:
        raise PredictorError(f"{str(file)!r} was {error}") from None
    except OSError as error:
        raise PredictorError(f"{str(file)!r} cannot be read: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PredictorError(f"{str(file)!r} is damaged: {type(error).__name__}: {error}") from error


def _calibration(value: Any, steps: int) -> Calibration | None:
    if value is None:
        return None
    found = typed(Calibration, value, "calibration")
    check_steps(found, steps)
    return found


def _known_freq(value: Any) -> str | None:
    if value is not None:
        unit_of(_text(value, "freq"))
    return value  # type: ignore[no-any-return]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, not text")
    return value


def load_base(stored: StoredPredictor, path: Path, checkpoint: str | Path | None) -> Backbone:
    """Load the base of a stored predictor, without its adapter.

    Parameters
    ----------
    stored
        The record.
    path
        Folder of the predictor.
    checkpoint
        Where the base weights are now; where they were if None.

    Raises
    ------
    PredictorError
        If they cannot be loaded, or are not those that the predictor was tuned on.
    """
    base = stored.base
    try:
        backbone_class: type[Backbone] = families.get(stored.family).backbone_class
    except ValueError as error:
        raise PredictorError(f"{error} (as {str(path / CONFIG)!r} says)") from error
    if checkpoint is not None:
        places: list[Any] = [checkpoint]
    else:
        # With its kind, so that a folder that no longer exists is not looked up on the hub.
        named = [base.checkpoint, *(str(place) for place in stored.places if place.is_dir())]
        places = [Checkpoint(base.kind, name, base.revision) for name in dict.fromkeys(named)]
    faults: list[PredictorError] = []
    for where in places:
        try:
            backbone = backbone_class.from_checkpoint(where, **stored.lengths, **stored.backbone_options)
        except CheckpointError as error:
            fault = PredictorError(
                f"base weights of the predictor in {str(path)!r} cannot be loaded: {error}; if they lie elsewhere"
                " now, name the place with checkpoint=..."
            )
            fault.__cause__ = error
            faults.append(fault)
            continue
        except (ValueError, TypeError) as error:
            fault = PredictorError(f"{error} (as {str(path / CONFIG)!r} says)")
            fault.__cause__ = error
            faults.append(fault)
            continue
        if backbone.source.fingerprint == base.fingerprint:
            return backbone
        faults.append(
            PredictorError(
                f"predictor in {str(path)!r} rests on base weights with fingerprint {base.fingerprint[:12]}…, but"
                f" {str(where)!r} has {backbone.source.fingerprint[:12]}…; name the right weights with"
                " checkpoint=..."
            )
        )
    raise faults[0]
