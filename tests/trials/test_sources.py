"""A source of another distribution: installed it works like our own, broken it harms nobody."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gluonts_peft.registry import datasets
from gluonts_peft.trials import (
    DataSpec,
    SpecError,
    StudySpec,
    TrialSpec,
    load_data,
    load_results,
    run_study,
    write_report,
)

BASE = {"family": "chronos", "checkpoint": "bolt-nano", "adapter": "none", "prediction_length": 4, "context_length": 16}
WELLS = '''
import json
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pandas as pd

from gluonts_peft.trials import DataSpec


class Wells(DataSpec):
    """Levels of water in wells, several at each site."""

    default_group: ClassVar[Literal["patient", "item"]] = "patient"
    group_name: ClassVar[str] = "site"
    label_option: ClassVar[str | None] = "water"

    source: Literal["wells"] = "wells"
    path: str
    water: str | None = None

    def load(self):
        start, levels = pd.Period("2024-01-01", "D"), json.loads(Path(self.path).read_text())
        return [
            {"start": start, "target": np.asarray(level, np.float32), "item_id": name} for name, level in levels.items()
        ]

    def select(self, entries):
        return [entry for entry in entries if self.water is None or entry["item_id"].endswith(self.water)]

    def paths(self):
        return {"path": self.path}
'''
METADATA = "Metadata-Version: 2.1\nName: gluonts-peft-wells\nVersion: 0.1\n"


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Install a distribution that offers the source ``wells``; it is gone after the test."""

    def install(text: str) -> None:
        info = tmp_path / "site" / "gluonts_peft_wells-0.1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(METADATA)
        (info / "entry_points.txt").write_text("[gluonts_peft.datasets]\nwells = gluonts_peft_wells:Wells\n")
        (info.parent / "gluonts_peft_wells.py").write_text(text)
        monkeypatch.syspath_prepend(str(info.parent))
        datasets.forget()

    yield install
    sys.modules.pop("gluonts_peft_wells", None)
    datasets.forget()


@pytest.fixture
def wells(tmp_path: Path, offer: Callable[[str], None]) -> dict[str, Any]:
    """Ten sites with two wells each, of which the last has fresh water only."""
    offer(WELLS)
    write(tmp_path / "levels.json", 0)
    return {"source": "wells", "path": str(tmp_path / "levels.json"), "windows": 1}


def write(path: Path, level: int) -> None:
    names = [f"{site}/{water}" for site in range(10) for water in ("fresh", "salt")][:-1]
    levels = {name: [level + place + step % 7 for step in range(40)] for place, name in enumerate(names)}
    path.write_text(json.dumps(levels))


def sites(entries: list[dict[str, Any]]) -> set[str]:
    return {entry["item_id"].partition("/")[0] for entry in entries}


def test_its_groups_are_divided_alike_whatever_is_selected(wells: dict[str, Any], tmp_path: Path) -> None:
    data = load_data(DataSpec(**wells))
    assert data.unit == "site"
    assert [len(sites(part)) for part in (data.train, data.validation, data.test)] == [7, 1, 2]
    salt = load_data(DataSpec(**wells, water="salt"))
    for part in ("train", "validation", "test"):
        assert sites(getattr(salt, part)) == sites(getattr(data, part)) - {"9"}
    assert load_data(DataSpec(**wells, group="item")).unit == "series"
    assert load_data(DataSpec(**wells)) is data
    write(tmp_path / "levels.json", 1)
    assert load_data(DataSpec(**wells)).fingerprint != data.fingerprint


def test_a_study_runs_on_it_and_reports_in_its_words(wells: dict[str, Any], tmp_path: Path) -> None:
    study = StudySpec(base={**BASE, "data": {**wells, "water": "salt"}}, baselines=["last_value"])
    (naive, zero_shot) = run_study(study, tmp_path / "study")
    assert zero_shot.error is None
    assert zero_shot.spec.name() == "bolt-nano none salt seed 0"
    assert zero_shot.units == {"": "site"}
    assert zero_shot.spec.normal_form()["data"].keys() >= {"path", "water"}
    assert "patients" not in zero_shot.spec.normal_form()["data"]
    assert sorted(map(repr, load_results(tmp_path / "study"))) == sorted(map(repr, (naive, zero_shot)))
    report = write_report(tmp_path / "study").with_suffix(".md").read_text()
    assert "Study (data: levels.json)" in report
    assert "windows are of different sites." in report
    assert "salt: 2 windows of 2 series" in report


def test_its_options_are_its_own(wells: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="data: option 'watr' is unknown; did you mean 'water'"):
        TrialSpec(**BASE, data={**wells, "watr": "salt"})
    with pytest.raises(SpecError, match="data: patients 3 belongs to source 'hourly' or 'simulated', not to 'wells'"):
        TrialSpec(**BASE, data={**wells, "patients": 3})
    with pytest.raises(SpecError, match="data: water 'salt' belongs to source 'wells', not to 'simulated'; drop it"):
        TrialSpec(**BASE, data={"water": "salt"})
    with pytest.raises(SpecError, match="source 'well' is unknown; did you mean 'wells'"):
        TrialSpec(**BASE, data={**wells, "source": "well"})
    with pytest.raises(SpecError, match="data.path is missing"):
        TrialSpec(**BASE, data={"source": "wells"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import a_module_that_nobody_has", "cannot be loaded from 'gluonts_peft_wells:Wells': ModuleNotFoundError"),
        ("Wells = print", "is offered as <built-in function print>, which is no DataSpec with load()"),
        (WELLS.replace("def load", "def lod"), "which is no DataSpec with load() and a field source: Literal['wells']"),
        (WELLS.replace("wells", "wels"), "which is no DataSpec with load() and a field source: Literal['wells']"),
    ],
    ids=["import", "no-class", "no-load", "another-name"],
)
def test_a_broken_one_is_named_and_harms_nobody(offer: Callable[[str], None], text: str, message: str) -> None:
    offer(text)
    with pytest.raises(SpecError, match=re.escape(message)):
        TrialSpec(**BASE, data={"source": "wells", "path": "x"})
    with pytest.raises(SpecError, match=re.escape("hours 3 belongs to source 'simulated', not to 'synthetic'")):
        TrialSpec(**BASE, data={"source": "synthetic", "hours": 3})


def test_a_checkout_that_is_newer_than_its_installation_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_entry_points", dict)
    monkeypatch.setattr(datasets, "_known", set())
    with pytest.raises(SpecError, match="metadata of gluonts-peft are older than its code; install it again"):
        DataSpec()


def test_uninstalled_it_is_gone() -> None:
    with pytest.raises(SpecError, match="source 'wells' is unknown; known: file, hourly, simulated, synthetic"):
        DataSpec(source="wells")
