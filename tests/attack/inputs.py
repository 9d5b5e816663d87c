"""What a person hands over: tables, entries, options and specs."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from engine import WrongError
from values import hostile, mutate

FREQUENCIES = ("h", "D", "5min", "MS", "W-MON", "B", "30s", "2h", "QE", "ME")
GARBAGE = ("abc", "12;5", "1e400", "inf", "-inf", "0x10", "--", "1_000", "١٢")


def _truth(generator: np.random.Generator) -> tuple[pd.DataFrame, str, dict[str, pd.Series]]:
    freq = str(generator.choice(FREQUENCIES))
    tables, truth = [], {}
    for item in range(int(generator.integers(1, 4))):
        steps = int(generator.integers(8, 40))
        stamps = pd.date_range("2023-01-02 00:00", periods=steps, freq=freq)
        scale = 10.0 ** float(generator.integers(-6, 9))
        values = pd.Series(generator.standard_normal(steps) * scale, index=stamps)
        values[generator.random(steps) < 0.1] = np.nan
        values.iloc[[0, -1]] = 1.5
        name = f"item {item}" if generator.random() < 0.5 else f"0{item}"
        truth[name] = values
        tables.append(pd.DataFrame({"item_id": name, "timestamp": stamps, "target": values.to_numpy()}))
    return pd.concat(tables, ignore_index=True), freq, truth


def tables(number: int, generator: np.random.Generator, folder: Path) -> str:
    """Tables with something wrong, or with nothing wrong in an unusual form."""
    from gluonts_peft.series.table import read_dataset

    frame, freq, truth = _truth(generator)
    given: dict[str, Any] = {"freq": None if generator.random() < 0.5 else freq}
    path = folder / "table.csv"
    fine = generator.random() < 0.4
    way = ""
    if fine:
        if generator.random() < 0.5:
            frame = frame.sample(frac=1.0, random_state=int(generator.integers(1000)))
        # What is missing may also be a row that is missing, but for the first and the last of an item.
        if generator.random() < 0.5:
            frame = frame[frame["target"].notna() | frame.index.isin([0])]
        if generator.random() < 0.3:
            frame = frame.rename(columns={"target": "y", "timestamp": "ds", "item_id": "unique_id"})
            given |= {"target": "y", "timestamp": "ds", "item_id": "unique_id"}
        if generator.random() < 0.3:
            path = folder / "table.parquet"
        elif generator.random() < 0.3:
            path = folder / "table.csv.gz"
    else:
        frame = frame.astype({"target": object, "timestamp": object})
        frame["timestamp"] = frame["timestamp"].astype(str)
        row = int(generator.integers(len(frame)))
        way = str(generator.choice(["value", "stamp", "duplicate", "name", "column", "bytes", "gzip", "off", "freq"]))
        if way == "value":
            frame.loc[row, "target"] = str(generator.choice(GARBAGE))
        elif way == "stamp":
            frame.loc[row, "timestamp"] = str(generator.choice(["", "soon", "13/13/2023", "2023-02-30", "1e9", "NaT"]))
        elif way == "duplicate":
            frame = pd.concat([frame, frame.iloc[[row]]], ignore_index=True)
        elif way == "name":
            frame.loc[row, "item_id"] = ""
        elif way == "column":
            frame = frame.rename(columns={str(generator.choice(["item_id", "timestamp", "target"])): "other"})
        elif way == "off":
            moved = pd.Timestamp(frame.loc[row, "timestamp"]) + pd.Timedelta("7s")
            frame.loc[row, "timestamp"] = str(moved)
        elif way == "freq":
            given["freq"] = hostile(generator)
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        frame.to_csv(path, index=False)
    if way in ("bytes", "gzip"):
        content = path.read_bytes()
        if way == "gzip":
            path = folder / "table.csv.gz"
            whole = gzip.compress(content)
            content = whole[: int(generator.integers(1, min(400, len(whole))))]
        else:
            content = bytearray(content)
            for _ in range(int(generator.integers(1, 6))):
                content[int(generator.integers(len(content)))] = int(generator.integers(256))
        path.write_bytes(bytes(content))
    entries = read_dataset(path, dtype=np.float64, **given)
    if fine:
        _same(entries, truth, freq)
    elif way in ("value", "duplicate", "name", "column", "gzip"):
        raise WrongError(f"{way} was accepted: {frame.iloc[[row]].to_dict('records')}")
    return "right"


def _same(entries: list[dict[str, Any]], truth: dict[str, pd.Series], freq: str) -> None:
    found = {str(entry["item_id"]): entry for entry in entries}
    if set(found) != set(truth):
        raise WrongError(f"items {sorted(found)} in place of {sorted(truth)}")
    for name, values in truth.items():
        entry = found[name]
        if not np.array_equal(entry["target"], values.to_numpy(), equal_nan=True):
            raise WrongError(f"values of {name!r} at {freq} differ")
        if not entry["start"].start_time <= values.index[0] <= entry["start"].end_time:
            raise WrongError(f"{name!r} at {freq} starts at {entry['start']}, not {values.index[0]}")


@cache
def _zero_shot() -> Any:
    import gluonts_peft

    backbone = gluonts_peft.load_backbone("chronos", checkpoint="bolt-nano", prediction_length=4, context_length=24)
    return gluonts_peft.PeftPredictor(backbone, device="cpu")


def entries(number: int, generator: np.random.Generator, folder: Path) -> str:
    """Entries of which something is missing, of another type, too short, not finite or of the wrong shape."""
    start = pd.Period("2024-01-01", freq=str(generator.choice(["h", "D", "W-MON", "M"])))
    data: Any = []
    for item in range(int(generator.integers(1, 4))):
        target = generator.standard_normal(int(generator.integers(5, 60))) * 10.0 ** generator.integers(-8, 9)
        data.append({"item_id": f"i{item}", "start": start, "target": target})
    way = str(generator.choice(["fine", "field", "remove", "values", "shape", "container", "freq", "extra"]))
    entry = data[int(generator.integers(len(data)))]
    if way == "field":
        entry[str(generator.choice(["start", "target"]))] = hostile(generator)
    elif way == "remove":
        del entry[str(generator.choice(["start", "target", "item_id"]))]
    elif way == "values":
        chosen = float(generator.choice([np.nan, np.inf, -np.inf, 3e38, 1e308, 0.0]))
        entry["target"][generator.random(len(entry["target"])) < generator.random()] = chosen
    elif way == "shape":
        entry["target"] = entry["target"].reshape(1, -1) if generator.random() < 0.5 else entry["target"][:0]
    elif way == "container":
        data = [data[0], pd.DataFrame({"a": [1]}), "text", {}, [data], 7, [None], iter([])][generator.integers(8)]
    elif way == "freq":
        entry["start"] = pd.Period("2024-01-01", freq="15min")
    elif way == "extra":
        entry[str(generator.choice(["feat_dynamic_real", "feat_static_cat", "info"]))] = hostile(generator)
    given = list(data) if isinstance(data, list) else data
    forecasts = list(_zero_shot().predict(given))
    if len(forecasts) != len(given):
        raise WrongError(f"{len(forecasts)} forecasts of {len(given)} series")
    for forecast, each in zip(forecasts, given, strict=True):
        if not np.isfinite(forecast.forecast_array).all():
            raise WrongError(f"a forecast of {way} is not finite")
        if forecast.start_date != pd.Period(each["start"], freq=forecast.start_date.freq) + len(each["target"]):
            raise WrongError(f"a forecast starts at {forecast.start_date}: {way}")
    return "right"


@cache
def _bare() -> tuple[Any, dict[str, torch.Tensor], list[str]]:
    import gluonts_peft

    backbone = gluonts_peft.load_backbone("chronos", checkpoint="bolt-nano", prediction_length=4, context_length=24)
    state = {name: tensor.clone() for name, tensor in backbone.network.state_dict().items()}
    return backbone, state, [name for name, _ in backbone.network.named_modules()]


def options(number: int, generator: np.random.Generator, folder: Path) -> str:
    """Options of adapters and of the estimator; what is accepted attaches and detaches without a trace."""
    import gluonts_peft
    from gluonts_peft.registry import get_estimator

    if generator.random() < 0.3:
        names = list(_signature())
        given = {str(generator.choice(names)): hostile(generator) for _ in range(int(generator.integers(1, 3)))}
        get_estimator("chronos")(**{"prediction_length": 4, "checkpoint": "bolt-nano", **given})
        return "right"
    backbone, state, modules = _bare()
    spec = _spec(generator)
    try:
        adapter = gluonts_peft.get_adapter(spec)
        try:
            adapter.attach(backbone)
            adapter.detach()
        finally:
            if backbone.adapter is not None:
                backbone.adapter.detach()
    finally:
        now = backbone.network.state_dict()
        if [name for name, _ in backbone.network.named_modules()] != modules:
            _bare.cache_clear()
            raise WrongError(f"{spec!r} leaves other modules behind")
        if list(now) != list(state) or not all(torch.equal(now[name], state[name]) for name in state):
            _bare.cache_clear()
            raise WrongError(f"{spec!r} leaves other weights behind")
    return "right"


@cache
def _signature() -> tuple[str, ...]:
    import inspect

    from gluonts_peft.estimator import PeftEstimator

    return tuple(inspect.signature(PeftEstimator.__init__).parameters)[1:]


@cache
def _adapters() -> dict[str, tuple[str, ...]]:
    import gluonts_peft

    found = {}
    for name in gluonts_peft.list_adapters():
        known = getattr(gluonts_peft.get_adapter(name), "known_options", None)
        found[name] = tuple(sorted(known())) if known is not None else ("kind", "output", "width")
    return found


def _spec(generator: np.random.Generator) -> Any:
    table = _adapters()
    name = str(generator.choice(sorted(table)))
    spec: Any = {"name": name}
    for _ in range(int(generator.integers(1, 3))):
        spec[str(generator.choice(table[name]))] = hostile(generator)
    if generator.random() < 0.1:
        return [spec, "bitfit"]
    return hostile(generator) if generator.random() < 0.05 else spec


STUDY: dict[str, Any] = {
    "title": "Ranks",
    "base": {
        "family": "chronos",
        "checkpoint": "bolt-nano",
        "adapter": {"name": "lora", "r": 2},
        "prediction_length": 6,
        "context_length": 24,
        "training": {"max_epochs": 1, "num_batches_per_epoch": 2, "learning_rate": 0.001},
        "data": {"source": "simulated", "patients": 10, "hours": 8, "vital": "hr", "windows": 1},
    },
    "grid": {"adapter.r": [1, 2], "seed": [0, 1]},
    "baselines": ["last_value"],
}
SEARCH: dict[str, Any] = {
    "base": STUDY["base"],
    "space": {"training.learning_rate": {"space": "loguniform", "lower": 1e-4, "upper": 1e-2}},
    "num_samples": 2,
    "scheduler": {"name": "asha", "grace_period": 1, "reduction_factor": 2},
}


def specs(number: int, generator: np.random.Generator, folder: Path) -> str:
    """Specs of studies and searches, as mappings and as files."""
    from gluonts_peft.trials import expand, load_search, load_study

    search = bool(generator.random() < 0.4)
    tree = SEARCH if search else STUDY
    for _ in range(int(generator.integers(1, 3))):
        tree, _, _ = mutate(tree, generator)
    file = folder / "spec.yaml"
    text = yaml.safe_dump(_plain(tree), allow_unicode=True)
    if generator.random() < 0.2:
        place = int(generator.integers(len(text)))
        text = text[:place] + str(generator.choice(["\t", "&a [*a]", "{", "!!python/object:os.system", "\x00", ": :"]))
        text += "\n" * 2
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    if search:
        load_search(file)
    else:
        study = load_study(file)
        again = type(study)(**json.loads(json.dumps(study.normal_form())))
        if [trial.hash() for trial in expand(again)] != [trial.hash() for trial in expand(study)]:
            raise WrongError("a study that is written and read again has other trials")
    return "right"


def _plain(tree: Any, depth: int = 0) -> Any:
    """Return values that YAML writes; its writer gives up where the reader has to."""
    if depth > 60:
        return 1
    if isinstance(tree, dict):
        return {str(key): _plain(value, depth + 1) for key, value in tree.items()}
    return [_plain(value, depth + 1) for value in tree] if isinstance(tree, list) else tree
