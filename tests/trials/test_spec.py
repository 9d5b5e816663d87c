from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from gluonts_peft import list_adapters, list_families
from gluonts_peft.registry import datasets
from gluonts_peft.trials import SpecError, StudySpec, TrainingSpec, TrialResult, TrialSpec, expand, load_study
from gluonts_peft.trials.baselinespec import BOOSTED, NAIVE, STATISTICAL, TRAINED, missing_package
from gluonts_peft.trials.dataspec import DataSpec
from gluonts_peft.trials.spec import describe_adapter

FAMILIES = ", ".join(sorted(["baseline", *list_families()]))
ADAPTERS = ", ".join(sorted(list_adapters()))
TRIAL_FIELDS = (
    "adapter, also, backbone_options, checkpoint, context_length, data, ensemble, family, prediction_length, seed,"
    " training"
)
DATA_FIELDS = (
    "fold, folds, fractions, group, hours, patients, season, seed, source, split_seed, train_series, train_steps,"
    " vital, windows"
)
SOURCES = ", ".join(datasets.names())
BASELINES = ", ".join(sorted([*NAIVE, *STATISTICAL, *BOOSTED, *TRAINED]))
ROOT = Path(__file__).parents[2]


def spec(**changes: Any) -> TrialSpec:
    return TrialSpec(**{"family": "chronos", "checkpoint": "bolt-nano", "prediction_length": 12, **changes})


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "cronos"}, "family 'cronos' is unknown; did you mean 'chronos'? known: " + FAMILIES),
        ({"adapter": "lorra"}, f"adapter 'lorra' is unknown; did you mean 'lora'? known: {ADAPTERS}"),
        ({"adapter": ["layernorm", {"name": "dorra"}]},
         f"adapter 'dorra' is unknown; did you mean 'dora'? known: {ADAPTERS}"),
        ({"adapter": {"r": 2}}, "adapter {'r': 2} has no 'name'; write e.g. {'name': 'lora', 'r': 2}"),
        ({"adapter": 3}, "adapter 3 is not a name, a mapping with a name and options, or a list of these"),
        ({"adapter": []}, "adapter [] is not a name, a mapping with a name and options, or a list of these"),
        ({"trainig": {}}, f"option 'trainig' is unknown; did you mean 'training'? known: {TRIAL_FIELDS}"),
        ({"data": {"patiens": 3}}, f"data: option 'patiens' is unknown; did you mean 'patients'? known: {DATA_FIELDS}"),
        ({"prediction_length": 0}, "prediction_length 0: input should be greater than 0"),
        ({"training": {"max_epochs": -2}}, "training.max_epochs -2: input should be greater than 0"),
        ({"training": {"max_epochs": True}}, "training.max_epochs: true is neither a number nor a name"),
        ({"prediction_length": True}, "prediction_length: true is neither a number nor a name"),
        ({"checkpoint": False}, "checkpoint: false is neither a number nor a name"),
        ({"data": {"source": "hourly"}}, "data: source 'hourly' needs a path; name the file as data.path"),
        ({"data": {"source": "file", "path": "x", "patients": 5}},
         "data: patients 5 belongs to source 'hourly' or 'simulated', not to 'file'; drop it, or name that source"),
        ({"data": {"patients": 0}}, "data.patients: 0 is not a number of patients; give a whole number from 1"),
        ({"data": {"patients": True}}, "data.patients: True is not a number of patients; give a whole number from 1"),
        ({"data": {"patients": "x.csv"}},
         "data.patients: 'x.csv' is not a number of patients; give one, or name source 'hourly' for a table"),
        ({"data": {"source": "hourly", "path": "x", "patients": 5}},
         "data.patients: 5 is no path of a table that maps stays to patients; give one, or name source 'simulated' for"
         " a number of them"),
        ({"data": {"path": "x.csv"}},
         "data: path 'x.csv' belongs to source 'file' or 'hourly', not to 'simulated'; drop it, or name that source"),
        ({"data": {"source": "hourley"}},
         f"data: source 'hourley' is unknown; did you mean 'hourly'? known: {SOURCES}"),
        ({"also": {"x": {"source": ["file"]}}},
         f"also.x: source ['file'] is unknown; did you mean 'file'? known: {SOURCES}"),
        ({"data": 5}, "data: 5 is not a mapping of options"),
        # A name that is one of the data's options, too.
        ({"also": {"windows": {"source": "file", "path": "x", "frek": 1}}},
         "also.windows: option 'frek' is unknown; did you mean 'freq'? known: fold, folds, fractions, freq, group,"
         " path, season, source, split_seed, train_series, train_steps, vital, windows"),
        ({"data": {"fractions": [0.5, 0.1, 0.1]}},
         "data: fractions (0.5, 0.1, 0.1) must be shares of training, validation and test that add up to 1, training"
         " and test above 0, as (0.7, 0.1, 0.2) are"),
        ({"data": {"folds": 1}}, "data.folds 1: input should be greater than or equal to 2"),
        ({"data": {"folds": 5}},
         "data: folds 5: a trial tests one of them; name it as data.fold, from 0 to 4, or run a study, which tests"
         " all"),
        ({"data": {"folds": 5, "fold": 5}}, "data: fold 5 is none of the folds: there are those from 0 to 4"),
        ({"data": {"fold": 0}}, "data: fold 0 is none of the folds: data.folds is not given"),
        ({"data": {"folds": 5, "fold": 0}, "also": {"x": {"folds": 3, "fold": 0}}},
         "also.x: folds and fold are those of data, for further data too; drop them"),
        ({"family": "baseline", "checkpoint": "last_valu", "adapter": "none"},
         f"baseline 'last_valu' is unknown; did you mean 'last_value'? known: {BASELINES}"),
        ({"family": "baseline", "checkpoint": "nhits", "adapter": "none"},
         "baseline 'nhits' has no context_length of its own; name one"),
        ({"ensemble": 1.5}, "ensemble 1.5: input should be less than 1"),
        ({"also": {"x": {"patiens": 3}}},
         f"also.x: option 'patiens' is unknown; did you mean 'patients'? known: {DATA_FIELDS}"),
        ({"also": {"a/b": {}}}, "also: name 'a/b' must be there and hold no '/'"),
        ({"data": {"source": "synthetic", "hours": 3}},
         "data: hours 3 belongs to source 'simulated', not to 'synthetic'; drop it, or name that source"),
        ({"data": {"source": "synthetic", "vital": "hr"}},
         "data: vital 'hr' belongs to source 'file', 'hourly' or 'simulated', not to 'synthetic'; drop it, or name that"
         " source"),
        ({"family": "baseline", "checkpoint": "last_value"},
         "adapter 'lora' cannot tune a baseline; write adapter 'none'"),
    ],
)  # fmt: skip
def test_a_wrong_trial_is_refused_with_the_way_out(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=exactly(f"trial cannot be used: {message}")):
        spec(**changes)


def test_data_that_name_no_table_of_patients_keep_their_hash() -> None:
    hourly = {"source": "hourly", "path": "stays.parquet"}
    assert spec(data=hourly).normal_form()["data"]["patients"] is None
    assert spec(data=hourly).hash() == "d40431ae048a85149a7dbcb82f9da20cd11ef8ff9c0d4106c8963a0b41c361cf"
    assert spec().hash() == "fd0420738734d538f952116e8e539d6723b0151bc5f9428e363bbdcec701625a"
    assert spec(data={"patients": "200"}).hash() == spec().hash()
    table = spec(data={**hourly, "patients": "patient.csv"}, also={"same": hourly, "other": {**hourly, "path": "x"}})
    assert (table.also["same"].patients, table.also["other"].patients) == ("patient.csv", None)
    assert TrialSpec(**table.normal_form()).hash() == table.hash() != spec(data=hourly).hash()


def test_results_of_earlier_versions_know_no_patients_of_hourly_tables() -> None:
    hourly = {"source": "hourly", "path": "stays.parquet"}
    trial = spec(data=hourly, also={"made": {}, "all": {**hourly, "group": "item"}})
    old = TrialResult(spec=trial, status="finished")
    assert [old.unit(name) for name in ("", "made", "all")] == ["stay", "patient", "series"]
    assert TrialResult(spec=trial, status="finished", units={"": "patient"}).unit() == "patient"


def test_all_faults_are_listed_at_once() -> None:
    message = (
        "trial cannot be used: 3 faults\n- family is missing\n- training.max_epochs 0: input should be greater than 0\n"
        f"- option 'sed' is unknown; did you mean 'seed'? known: {TRIAL_FIELDS}"
    )
    with pytest.raises(SpecError, match=exactly(message)):
        TrialSpec(checkpoint="x", prediction_length=1, training={"max_epochs": 0}, sed=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"name": "lora"}},
        {"adapter": ["lora"]},
        {"seed": 0, "training": {"max_epochs": 10, "learning_rate": None}},
        {"data": {"source": "simulated", "patients": 200, "fractions": [0.7, 0.1, 0.2], "group": "patient"}},
        {"data": DataSpec(), "training": TrainingSpec()},
        {"prediction_length": "12"},
    ],
)
def test_defaults_spelled_out_give_the_same_trial(changes: dict[str, Any]) -> None:
    assert spec(**changes) == spec()
    assert spec(**changes).hash() == spec().hash()


@pytest.mark.parametrize(
    "changes",
    [{"adapter": {"name": "lora", "r": 4}}, {"seed": 1}, {"data": {"vital": "hr"}}, {"training": {"max_epochs": 2}}],
)
def test_another_trial_has_another_hash(changes: dict[str, Any]) -> None:
    assert spec(**changes).hash() != spec().hash()


def test_the_order_of_adapter_options_does_not_matter() -> None:
    one, other = ({"name": "lora", "r": 4, "lora_alpha": 8}, {"lora_alpha": 8, "r": 4, "name": "lora"})
    assert spec(adapter=one).hash() == spec(adapter=other).hash()


def test_the_hash_is_that_of_the_normal_form_in_any_process() -> None:
    code = (
        "import json, sys; from gluonts_peft.trials import TrialSpec;"
        "print(TrialSpec(**json.loads(sys.argv[1])).hash()); assert 'torch' not in sys.modules"
    )
    form = spec(adapter=["layernorm", "lora"]).normal_form()
    done = subprocess.run([sys.executable, "-c", code, json.dumps(form)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == spec(adapter=["layernorm", "lora"]).hash()


def test_options_without_effect_do_not_make_another_trial() -> None:
    assert spec(adapter="none", training={"max_epochs": 3}) == spec(adapter="none")
    baseline = {"family": "baseline", "checkpoint": "last_value", "adapter": "none"}
    assert spec(**baseline, seed=3, training={"max_epochs": 3}) == spec(**baseline)


def test_training_options_and_their_defaults_are_those_of_the_estimator() -> None:
    from gluonts_peft import PeftEstimator

    parameters = inspect.signature(PeftEstimator.__init__).parameters
    found = {name: parameters[name].default for name in TrainingSpec.model_fields}
    # What the units of a trial are, its data say.
    assert found | {"verdict_unit": None} == dict(TrainingSpec())


def test_folds_are_a_part_of_the_trial_and_trials_without_keep_their_hash() -> None:
    assert not {"folds", "fold"} & set(spec().normal_form()["data"])
    folded = spec(data={"folds": 4, "fold": 1, "fractions": [0.6, 0.2, 0.2]}, also={"x": {"source": "synthetic"}})
    # The test part is a fold; training and validation share the others as before.
    assert folded.data.fractions == pytest.approx((0.5625, 0.1875, 0.25))
    assert (folded.also["x"].folds, folded.also["x"].fold) == (4, 1)
    assert TrialSpec(**folded.normal_form()) == folded
    assert folded.name() == "bolt-nano lora seed 0 fold 1"
    assert folded.hash() != spec(data={"folds": 4, "fold": 0, "fractions": [0.6, 0.2, 0.2]}).hash()


def test_a_study_runs_every_fold_of_every_cell() -> None:
    form = {"family": "chronos", "checkpoint": "bolt-nano", "prediction_length": 12, "data": {"folds": 3}}
    study = StudySpec(base=form, grid={"adapter": ["none", "lora"]}, baselines=("last_value",))
    cells = [(trial.checkpoint, trial.adapter, trial.data.fold) for trial in expand(study)]
    names = [("last_value", "none"), ("bolt-nano", "none"), ("bolt-nano", "lora")]
    assert cells == [(*name, fold) for name in names for fold in range(3)]
    some = StudySpec(base=form, grid={"data.fold": [0, 2]})
    assert [trial.data.fold for trial in expand(some)] == [0, 2]
    with pytest.raises(SpecError, match=exactly("study cannot be used: data.folds 'x': input should be a valid integer,"
                                                " unable to parse string as an integer")):  # fmt: skip
        StudySpec(base={**form, "data": {"folds": "x"}})


def test_names_are_for_people() -> None:
    assert spec(adapter=["layernorm", {"name": "lora", "r": 4}]).name() == "bolt-nano layernorm + lora(r=4) seed 0"
    assert spec(family="baseline", checkpoint="last_value", adapter="none", data={"vital": "hr"}).name() == (
        "last_value hr"
    )
    assert describe_adapter({"name": "lora", "r": 4, "lora_alpha": 8}) == "lora(r=4, lora_alpha=8)"


STUDY = """
title: A study
base:
  family: chronos
  checkpoint: bolt-nano
  prediction_length: 6
  data: {patients: 10, hours: 12}
baselines: [last_value]
grid:
  adapter: [none, lora]
  seed: [0, 1]
"""


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def test_a_study_is_read_and_expanded_baselines_first(study_file: Path) -> None:
    names = [trial.name() for trial in expand(load_study(study_file))]
    assert names == ["last_value", *(f"bolt-nano {a} seed {s}" for a in ("none", "lora") for s in (0, 1))]


def test_overrides_replace_values_of_base_and_grid(study_file: Path) -> None:
    overrides = {"title": "B", "baselines": [], "seed": 4, "adapter": ["vera"], "training.max_epochs": 2}
    study = load_study(study_file, overrides)
    (trial,) = expand(study)
    assert (study.title, trial.seed, trial.adapter, trial.training.max_epochs) == ("B", 4, "vera", 2)


def test_another_source_drops_the_options_of_the_old_one(study_file: Path) -> None:
    study = load_study(study_file, {"data.source": "hourly", "data.path": "stays.parquet"})
    data = expand(study)[0].data
    assert (data.source, data.path, data.patients, data.min_hours) == ("hourly", "stays.parquet", None, 48)
    # Which series are meant stays: nothing is left out or added in silence.
    text = study_file.read_text().replace("hours: 12", "hours: 12, seed: 3, vital: hr, windows: 2")
    study_file.write_text(text)
    data = expand(load_study(study_file, {"data.source": "file", "data.path": "x.csv"}))[0].data
    assert (data.vital, data.windows, data.seed) == ("hr", 2, None)
    with pytest.raises(SpecError, match="vital 'hr' belongs to source 'file', 'hourly' or 'simulated'"):
        load_study(study_file, {"data.source": "synthetic"})


def test_an_option_of_an_adapter_can_be_varied() -> None:
    base = {"family": "chronos", "checkpoint": "bolt-nano", "prediction_length": 6, "adapter": "lora"}
    study = StudySpec(base=base, grid={"adapter.r": [1, 2]})
    assert [trial.adapter for trial in expand(study)] == [{"name": "lora", "r": 1}, {"name": "lora", "r": 2}]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"adapter": ["lorra", "lora"]}, f"adapter 'lorra' is unknown; did you mean 'lora'? known: {ADAPTERS}"),
        ({"sed": 1}, f"option 'sed' is unknown; did you mean 'seed'? known: {TRIAL_FIELDS}"),
        ({"seed": []}, "grid path 'seed' has no values; name at least one"),
        ({"checkpoint.x": 1}, "'checkpoint.x' leads into 'checkpoint', which is not a mapping"),
        (
            {"baselines": ["naive"]},
            f"baselines: baseline 'naive' is unknown; known: {BASELINES}",
        ),
        (
            {"baseline_training.max_epoch": 3},
            "baseline_training: option 'max_epoch' is unknown; did you mean 'max_epochs'? known: "
            + ", ".join(sorted(TrainingSpec.model_fields)),
        ),
        ({"baselines": ["tft"]}, "baseline 'tft' has no context_length of its own; name one"),
    ],
)
def test_a_wrong_study_is_refused_with_the_way_out(study_file: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=exactly(f"study '{study_file}' cannot be used: {message}")):
        load_study(study_file, overrides)


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    missing, broken, other = (tmp_path / name for name in ("missing.yaml", "broken.yaml", "other.yaml"))
    broken.write_text("base: [")
    other.write_text("- 1")
    with pytest.raises(
        SpecError, match=exactly(f"study '{missing}' cannot be used: it cannot be read: No such file or directory")
    ):
        load_study(missing)
    with pytest.raises(SpecError, match=re.escape(f"study '{broken}' cannot be used: it is not YAML: while parsing")):
        load_study(broken)
    message = f"study '{other}' cannot be used: expected a mapping with the keys base, grid, baselines and title"
    with pytest.raises(SpecError, match=exactly(message)):
        load_study(other)


def test_data_limits_are_no_matter_where_nothing_trains() -> None:
    limited = {"train_series": 3, "train_steps": 20}
    assert spec(adapter="none", data=limited) == spec(adapter="none")
    assert spec(data=limited) != spec()
    assert spec(also={"x": limited}) == spec(also={"x": {}})


def test_an_ensemble_needs_two_models() -> None:
    assert spec(adapter="none", ensemble=0.5) == spec(adapter="none")
    assert spec(ensemble=0.5).name() == "bolt-nano lora with weight 0.5 seed 0"


def test_each_source_has_its_own_options() -> None:
    data = DataSpec(source="synthetic")
    assert (data.series, data.steps, data.seed, data.patients, data.group) == (100, 200, 0, None, "item")
    assert DataSpec().series is None
    with pytest.raises(SpecError, match="^data cannot be used: source 'hourley' is unknown; did you mean 'hourly'"):
        DataSpec(source="hourley")
    with pytest.raises(AttributeError, match="seris"):
        _ = data.seris


@pytest.mark.parametrize("form", [{}, {"source": "synthetic", "folds": 4, "fold": 1}, {"source": "file", "path": "x"}])
def test_data_travel(form: dict[str, Any]) -> None:
    data = DataSpec(**form)
    assert pickle.loads(pickle.dumps(data)) == copy.deepcopy(data) == DataSpec(**data.normal_form()) == data
    assert json.loads(data.model_dump_json()) == data.normal_form() == spec(data=data).normal_form()["data"]
    assert data.model_copy(update={"windows": 9}).windows == 9


def test_trained_baselines_run_once_a_seed_and_naive_ones_once() -> None:
    training = {"max_epochs": 2, "batch_size": 8, "validation_windows": 4, "learning_rate": 0.5, "device": "cpu"}
    base = {"family": "chronos", "checkpoint": "bolt-nano", "prediction_length": 6, "context_length": 12}
    study = StudySpec(
        base={**base, "training": training},
        grid={"adapter": ["none", "lora"], "seed": [0, 1, 2]},
        baselines=["last_value", "nhits"],
        baseline_training={"patience": 2},
    )
    baselines = [trial for trial in expand(study) if trial.family == "baseline"]
    assert [(trial.checkpoint, trial.seed) for trial in baselines] == [("last_value", 0)] + [
        ("nhits", seed) for seed in (0, 1, 2)
    ]
    # What decides the windows is the trials'; how long and how fast is the baselines' own.
    trained = baselines[1].training
    assert (trained.batch_size, trained.validation_windows, trained.device) == (8, 4, "cpu")
    assert (trained.max_epochs, trained.patience, trained.learning_rate) == (40, 2, None)
    assert baselines[1].name() == "nhits seed 0"


def test_baselines_have_options_in_the_manner_of_adapters() -> None:
    base = {"family": "chronos", "checkpoint": "bolt-nano", "prediction_length": 6, "context_length": 12}
    trees = [{"num_leaves": 7, "name": "lightgbm"}, {"name": "lightgbm"}]
    study = StudySpec(base=base, grid={"seed": [0, 1]}, baselines=[*trees, {"name": "auto_ets", "model": "AZZ"}])
    assert study.baselines == ({"name": "lightgbm", "num_leaves": 7}, "lightgbm", {"name": "auto_ets", "model": "AZZ"})
    assert StudySpec(**study.normal_form()) == study
    found = [(trial.checkpoint, trial.backbone_options, trial.seed) for trial in expand(study)[:5]]
    assert found == [
        *(("lightgbm", options, seed) for options in ({"num_leaves": 7}, {}) for seed in (0, 1)),
        ("auto_ets", {"model": "AZZ"}, 0),
    ]


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ({"name": "lightgmb"}, "baseline 'lightgmb' is unknown; did you mean 'lightgbm'"),
        (
            {"nam": "lightgbm"},
            "baseline {'nam': 'lightgbm'} has no 'name'; write e.g. {'name': 'lightgbm', 'num_leaves': ",
        ),
        ({"name": "last_value", "steps": 2}, "baseline 'last_value' takes no options, not steps; drop them"),
        (3, "baseline 3 is neither a name nor a mapping with a name and options"),
    ],
)
def test_wrong_baselines_are_refused(baseline: Any, message: str) -> None:
    base = {"family": "chronos", "checkpoint": "bolt-nano", "prediction_length": 6}
    with pytest.raises(SpecError, match=re.escape(message)):
        StudySpec(base=base, baselines=[baseline])


def test_a_package_that_is_missing_is_known_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    assert missing_package("lightgbm") == missing_package({"name": "lightgbm", "num_leaves": 7}) == "lightgbm"
    assert missing_package("seasonal_naive") is missing_package("deepar") is missing_package([1]) is None


def test_budgets_of_baselines_are_overridden_by_their_path(study_file: Path) -> None:
    overrides = {"baselines": ["tft"], "context_length": 12, "baseline_training.max_epochs": 3}
    assert expand(load_study(study_file, overrides))[0].training.max_epochs == 3


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_studies_can_be_used_on_simulated_and_real_data(path: Path) -> None:
    simulated = expand(load_study(path))
    real = expand(load_study(path, {"data.source": "hourly", "data.path": "stays.parquet"}))
    assert len(real) == len(simulated) > 3
    assert {trial.data.source for trial in simulated} == {"simulated"}
    assert {(trial.data.source, trial.data.path) for trial in real} == {("hourly", "stays.parquet")}
    assert "none" in [trial.adapter for trial in real]
    assert "full" in [trial.adapter for trial in real]


def test_the_great_study_has_every_adapter_and_baseline() -> None:
    study = load_study(ROOT / "examples" / "studies" / "vitals.yaml")
    assert set(study.baselines) == {*NAIVE, *STATISTICAL, *BOOSTED, *TRAINED}
    assert study.grid["data.vital"] == ["hr", "map"]
    assert len(study.grid["seed"]) == 5


def test_the_study_over_all_patients_has_every_adapter_too() -> None:
    great, all_patients = (load_study(ROOT / f"examples/studies/{name}.yaml") for name in ("vitals", "all_patients"))
    assert {"seasonal_naive", "nbeats", "tft"} < set(all_patients.baselines) <= set(great.baselines)
    assert all_patients.grid["adapter"] == great.grid["adapter"]
    assert all_patients.base["data"]["folds"] == 5


def test_the_demo_has_every_adapter_and_stays_small() -> None:
    from gluonts_peft import list_adapters

    trials = expand(load_study(ROOT / "examples" / "demo.yaml"))
    shown = {trial.adapter for trial in trials if isinstance(trial.adapter, str)}
    assert set(list_adapters()) == shown
    assert ["layernorm", "lora"] in [trial.adapter for trial in trials]
    assert len(trials) == 8 + 6 + 19 * 2 * 3


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = TrialResult(spec=spec(adapter=["layernorm", "lora"]), status="finished", scores={"MAE[0.5]": None})
    result.write(tmp_path)
    assert TrialResult.read(tmp_path) == result
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("{")
    with pytest.raises(SpecError, match=re.escape(f"'{path}' cannot be used: ")):
        TrialResult.read(tmp_path)
    assert TrialResult.read(tmp_path / "nowhere") is None


def test_names_of_version_0_1_are_still_in_the_module_of_the_specs() -> None:
    from gluonts_peft.trials import spec as old

    names = "BASELINE BOOSTED FROM_SCRATCH NAIVE PACKAGES STATISTICAL TRAINED DataSpec SpecError StudySpec"
    names += " TrainingSpec TrialResult TrialSpec describe_adapter load_study missing_package"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert all(getattr(old, name) is not None for name in names.split())
    assert "gluonts_peft.trials.spec.load_study is now gluonts_peft.trials.studyspec.load_study" in " ".join(
        str(each.message) for each in caught
    )
