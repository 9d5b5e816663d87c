"""``show``: what a folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import app, example
from .output import facts, stopped

__all__ = ["show"]


@app.command(epilog=example("show model"))
def show(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A saved predictor or adapter.")]) -> None:
    """Say what a saved predictor or adapter is."""
    predictor, adapter = "predictor.json", "gluonts_peft.json"
    file = next((folder / name for name in (predictor, adapter) if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{str(folder)!r} holds neither a predictor ({predictor}) nor an adapter ({adapter})")

    from ..calibration import Calibration
    from ..files import NewerFormat, load_json, opened, typed
    from ..training import Fit

    try:
        record = opened(load_json(file))
        base, run = record["base"], typed(Fit, record["fit"], "fit") if record.get("fit") else None
        stored = record.get("calibration")
        calibration = [("calibration", typed(Calibration, stored, "calibration"))] if stored else []
        lengths = [(name, record[name]) for name in ("prediction_length", "context_length") if name in record]
        rows = [
            ("what", "predictor" if file.name == predictor else "adapter"),
            ("family", base["family"]),
            ("base", f"{base['checkpoint']} ({base['kind']})"),
            ("revision", base["revision"] or "-"),
            ("fingerprint", base["fingerprint"]),
            ("adapter", json.dumps(record["adapter"] or "none")),
            *lengths,
            ("verdict", (run.verdict or run.gate) if run else "-"),
            *calibration,
            *(stopped(run) if run else []),
            ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
        ]
    except NewerFormat as error:
        raise ValueError(f"{str(file)!r} was {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {type(error).__name__}: {error}") from None
    rows.append(("adapter on disk", f"{sum(path.stat().st_size for path in folder.rglob('*.safetensors')):,} bytes"))
    facts(rows)
