from __future__ import annotations

import inspect
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml

from gluonts_peft.trials import SearchSpec, SpecError, TrialSpec, load_search, search_schema
from gluonts_peft.trials.proposer import Proposer
from gluonts_peft.trials.searchspec import is_mutable
from gluonts_peft.trials.space import Kind, Space

ROOT = Path(__file__).parents[2]
SEARCHES = ROOT / "ray_configs" / "searches"
BASE: dict[str, Any] = {
    "family": "chronos",
    "checkpoint": "bolt-nano",
    "prediction_length": 12,
    "context_length": 36,
    "training": {"max_epochs": 2, "num_batches_per_epoch": 3, "batch_size": 8, "device": "cpu"},
    "data": {"patients": 20, "hours": 12, "vital": "hr", "windows": 2},
}
RATE = {"space": "loguniform", "lower": 1.0e-4, "upper": 1.0e-2}
SPACE = {
    "training.learning_rate": RATE,
    "adapter.name": {"space": "choice", "categories": ["lora", "dora", "bitfit"]},
    "adapter.r": {"space": "choice", "categories": [2, 4, 8], "when": {"adapter.name": ["lora", "dora"]}},
}


def spec(**changes: Any) -> SearchSpec:
    return SearchSpec(**{"base": BASE, "space": SPACE, "num_samples": 8, **changes})


def points(wanted: SearchSpec, count: int) -> list[dict[str, Any] | None]:
    proposer = Proposer(wanted)
    return [proposer.propose() for _ in range(count)]


def space(path: str = "training.learning_rate", **fields: Any) -> dict[str, Any]:
    return {"space": {path: fields}}


KNOWN = (
    "DTW, DTW path error, DTWPathError[0.5], DTW[0.5], MAE, MAE[0.5], MAPE, MAPE[0.5], MASE, MASE[0.5], MSE, MSE[0.5],"
    " mean_weighted_sum_quantile_loss, quantile loss"
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sample": 3}, "option 'num_sample' is unknown; did you mean 'num_samples'?"),
        ({"space": {}}, "space is empty; name at least one path, as training.learning_rate, and its values"),
        ({"objective": "MAR"}, f"objective 'MAR' is unknown; did you mean 'MAE'? known: {KNOWN}"),
        ({"objective": "coverage[0.9]"}, f"objective 'coverage[0.9]' is unknown; known: {KNOWN}"),
        ({"objective": []}, f"objective names no metric; known: {KNOWN}"),
        ({"objective": ["MAE", "MAE"]}, "objective ['MAE', 'MAE'] names a metric more than once"),
        ({"num_samples": None}, "num_samples is missing: searcher 'random' never ends by itself"),
        ({"max_failures": 1}, "max_failures 1: input should be greater than or equal to 2"),
        ({"resources": {"gpus": 1}}, "resources: option 'gpus' is unknown; did you mean 'gpu'? known: cpu, gpu"),
        ({"searcher": "optunna"}, "searcher.name 'optunna': input should be 'random', 'grid' or 'optuna'"),
        ({"searcher": {"name": "grid", "n_startup_trials": 3}},
         "searcher: n_startup_trials 3 belongs to searcher 'optuna'; drop it"),
        ({"scheduler": {"name": "asha", "grace_perod": 3}},
         "scheduler: option 'grace_perod' is unknown; did you mean 'grace_period'?"),
        ({"scheduler": {"name": "hyperband", "grace_period": 3}},
         "scheduler: grace_period 3 has no effect with scheduler 'hyperband'; drop it"),
        (space(space="unifrm", lower=0, upper=1),
         "space.training.learning_rate.space 'unifrm': input should be 'uniform', 'quniform', 'loguniform',"),
        (space(space="uniform", lower=0), "space.training.learning_rate: space 'uniform' needs 'upper'"),
        (space(space="uniform", lowr=0, upper=1),
         "space.training.learning_rate: option 'lowr' is unknown; did you mean 'lower'?"),
        (space(space="uniform", lower=0, upper=1, q=0.1),
         "space.training.learning_rate: q 0.1 has no effect in space 'uniform'; drop it"),
        (space(space="uniform", lower=1, upper=1),
         "space.training.learning_rate: lower 1 must be below upper 1, both finite"),
        (space(space="uniform", lower=0, upper=math.inf),
         "space.training.learning_rate: lower 0 must be below upper inf, both finite"),
        (space(space="loguniform", lower=0, upper=1),
         "space.training.learning_rate: lower 0 must be above 0 in space 'loguniform'"),
        (space("training.patience", space="randint", lower=0.5, upper=3),
         "space.training.patience: lower, upper and q of space 'randint' must be whole numbers"),
        (space(space="quniform", lower=0.1, upper=1, q=0.3),
         "space.training.learning_rate: lower 0.1 and upper 1 must be multiples of q 0.3, which is above 0"),
        (space("adapter", space="choice", categories=[]),
         "space.adapter: categories has no values; name at least one"),
        (space("adapter", space="choice", categories=["lora", "lora"]),
         "space.adapter: categories ['lora', 'lora'] has a value more than once"),
        (space("adapter", space="choice", categories=["lorra"]),
         'space with {"adapter": "lorra"}: adapter \'lorra\' is unknown; did you mean \'lora\'?'),
        (space("training.learning_rat", **RATE),
         'space with {"training.learning_rat": 0.0001}: training: option \'learning_rat\' is unknown; did you mean'
         " 'learning_rate'?"),
        (space("training.max_epochs", space="randint", lower=-3, upper=2),
         'space with {"training.max_epochs": -3}: training.max_epochs -3: input should be greater than 0'),
        (space("data.vital", space="choice", categories=["hr", "map"]),
         "space 'data.vital': trials that differ there cannot be compared; a study can vary it"),
        (space("seed", space="randint", lower=0, upper=9),
         "space 'seed': trials that differ there cannot be compared; a study can vary it"),
        (space("adapter.r", space="choice", categories=[2], when={"adapter.name": "lora"}),
         "space 'adapter.r': when names 'adapter.name', which is not an earlier path of the space"),
        ({"space": {**SPACE, "adapter.r": {"space": "choice", "categories": [2], "when": {"adapter.name": "vera"}}}},
         "space 'adapter.r': when has 'adapter.name' at 'vera', which is none of its categories"),
        ({"searcher": "grid"},
         "space 'training.learning_rate' is 'loguniform'; searcher 'grid' tries every value, so write a 'choice' of"
         " them, or name searcher 'random'"),
        ({"base": {**BASE, "famly": "chronos"}}, "base: option 'famly' is unknown; did you mean 'family'?"),
        ({"base": {**BASE, "family": "baseline", "checkpoint": "last_value", "adapter": "none"},
          **space("context_length", space="choice", categories=[24, 36])},
         "base: family 'baseline' has nothing to adapt; name a model family"),
        ({"base": {**BASE, "data": {**BASE["data"], "fractions": [0.8, 0.0, 0.2]}}},
         "base: data.fractions (0.8, 0.0, 0.2) have no validation part, and trials are not chosen by their test scores;"
         " name three shares above 0"),
        ({"base": {**BASE, "data": {**BASE["data"], "folds": 5}}},
         "base: data: folds 5: a trial tests one of them; name it as data.fold, from 0 to 4, or run a study, which"
         " tests all"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_with_the_way_out(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=rf"(?m)^(search cannot be used: |- ){re.escape(message)}"):
        spec(**changes)


def test_all_faults_are_listed_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        spec(objective="MAR", searcher="grid", space={**SPACE, "seed": {"space": "choice", "categories": [1]}})
    assert [fault.split(" ")[0] for fault in caught.value.faults] == ["objective", "space", "space"]


def test_population_based_training_changes_rates_and_dropouts_only() -> None:
    with pytest.raises(SpecError, match=r"space 'adapter\.name' does not go with scheduler 'pbt': a copy of another"):
        spec(scheduler="pbt")
    dropout = {"space": "uniform", "lower": 0.0, "upper": 0.3}
    allowed = {"training.learning_rate": RATE, "adapter.lora_dropout": dropout}
    with pytest.raises(
        SpecError, match=r"base has no adapter\.lora_dropout, which scheduler 'pbt' changes step by step"
    ):
        spec(scheduler="pbt", space=allowed)
    start = {**BASE, "adapter": {"name": "lora", "lora_dropout": 0.1}}
    start["training"] = {**BASE["training"], "learning_rate": 1e-3}
    assert spec(scheduler="pbt", space=allowed, base=start).scheduler.name == "pbt"
    assert [path for path in ("training.weight_decay", "adapter.r", "adapter.vera_dropout") if is_mutable(path)] == [
        "adapter.vera_dropout"
    ]


def test_spaces_are_those_of_tune() -> None:
    tune = pytest.importorskip("ray.tune")
    examples: dict[str, dict[str, Any]] = {
        "uniform": {"lower": 0.1, "upper": 0.9},
        "quniform": {"lower": 0.0, "upper": 1.0, "q": 0.25},
        "loguniform": {"lower": 1e-4, "upper": 1e-1},
        "qloguniform": {"lower": 0.5, "upper": 8.0, "q": 0.5},
        "randint": {"lower": 1, "upper": 5},
        "qrandint": {"lower": 2, "upper": 8, "q": 2},
        "lograndint": {"lower": 1, "upper": 65},
        "qlograndint": {"lower": 2, "upper": 64, "q": 2},
        "choice": {"categories": ["a", "b"]},
    }
    assert set(examples) == set(get_args(Kind))
    for name, arguments in examples.items():
        domain = getattr(tune, name)(**arguments)
        ours = Space(space=name, **arguments)
        assert ours.arguments() == arguments
        assert list(inspect.signature(getattr(tune, name)).parameters)[: len(arguments)] == list(arguments)
        for value in ours.corners():
            assert domain.is_valid(value), (name, value)


def test_draws_follow_the_distribution() -> None:
    path = "training.learning_rate"
    drawn = {
        kind: np.array([values[path] for values in points(spec(**space(space=kind, lower=0.001, upper=1.0)), 401)[1:]])
        for kind in ("uniform", "loguniform")
    }
    assert np.median(drawn["uniform"]) == pytest.approx(0.5, abs=0.08)
    assert np.median(np.log10(drawn["loguniform"])) == pytest.approx(-1.5, abs=0.2)
    for values in drawn.values():
        assert values.min() >= 0.001
        assert values.max() <= 1.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"space": "randint", "lower": 2, "upper": 5}, {2, 3, 4}),
        ({"space": "qrandint", "lower": 2, "upper": 6, "q": 2}, {2, 4, 6}),
        ({"space": "lograndint", "lower": 1, "upper": 4}, {1, 2, 3}),
        ({"space": "qlograndint", "lower": 3, "upper": 9, "q": 3}, {3, 6, 9}),
        ({"space": "choice", "categories": [3, 9]}, {3, 9}),
    ],
)
def test_integers_reach_all_values_and_then_there_are_no_more(fields: dict[str, Any], expected: set[int]) -> None:
    path = "training.batch_size"
    found = points(spec(**space(path, **fields)), 6)
    assert {values[path] for values in found[1:] if values is not None} == expected
    assert found[-1] is None
    assert all(type(values[path]) is int for values in found[1:] if values is not None)


def test_steps_are_exact() -> None:
    path = "training.warmup"
    found = points(spec(**space(path, space="quniform", lower=0.0, upper=0.3, q=0.1)), 5)
    assert {json.dumps(values[path]) for values in found if values} == {"0.0", "0.1", "0.2", "0.3"} - {"0.1"}
    # 0.1 is the default, so that the base has it.
    assert found[0] == {}


def test_the_base_comes_first_and_points_differ() -> None:
    found = points(spec(), 30)
    assert found[0] == {}
    hashes = [spec().trial(values or {}).hash() for values in found]
    assert hashes[0] == TrialSpec(**BASE).hash()
    assert len(set(hashes)) == 30


def test_an_option_is_there_only_under_its_condition() -> None:
    wanted = spec(base={**BASE, "adapter": {"name": "lora", "r": 16}})
    found = [values for values in points(wanted, 30)[1:] if values is not None]
    seen = Counter(values["adapter.name"] for values in found)
    assert set(seen) == {"lora", "dora", "bitfit"}
    for values in found:
        adapter = wanted.trial(values).adapter
        if values["adapter.name"] == "bitfit":
            assert "adapter.r" not in values
            assert adapter == "bitfit"
        else:
            assert adapter == {"name": values["adapter.name"], "r": values["adapter.r"]}


def test_conditions_can_follow_from_conditions() -> None:
    nested = {
        "adapter.name": {"space": "choice", "categories": ["bitfit", "lora"]},
        "adapter.r": {"space": "choice", "categories": [2, 4], "when": {"adapter.name": "lora"}},
        "adapter.lora_dropout": {"space": "choice", "categories": [0.1], "when": {"adapter.r": 4}},
    }
    wanted = spec(space=nested)
    assert list(wanted.corners())[-1] == {"adapter.name": "lora", "adapter.r": 4, "adapter.lora_dropout": 0.1}
    assert list(wanted.grid()) == [
        {"adapter.name": "bitfit"},
        {"adapter.name": "lora", "adapter.r": 2},
        {"adapter.name": "lora", "adapter.r": 4, "adapter.lora_dropout": 0.1},
    ]


def test_a_grid_is_all_cells_and_the_base() -> None:
    cells = {key: value for key, value in SPACE.items() if key != "training.learning_rate"}
    wanted = spec(searcher="grid", num_samples=None, space=cells)
    found = points(wanted, 10)
    # The base is the plain lora adapter, whose rank is the default, under no name in the grid.
    assert found[0] == {}
    assert len([values for values in found if values is not None]) == 1 + 3 + 3 + 1
    assert found[8:] == [None, None]


def test_the_same_seed_proposes_the_same() -> None:
    assert points(spec(seed=3), 12) == points(spec(seed=3), 12)
    assert points(spec(seed=3), 12)[1:] != points(spec(seed=4), 12)[1:]


def test_what_was_proposed_before_changes_nothing() -> None:
    found = points(spec(), 12)
    resumed = Proposer(spec(), [values for values in found[:5] if values is not None])
    assert [resumed.propose() for _ in range(7)] == found[5:]


def learn(seed: int, searcher: str) -> list[float]:
    wanted = spec(seed=seed, searcher=searcher, **space(space="loguniform", lower=1e-6, upper=1.0))
    proposer = Proposer(wanted)
    errors = []
    for _ in range(40):
        values = proposer.propose()
        assert values is not None
        rate = values.get("training.learning_rate", 1.0)
        errors.append(abs(math.log10(rate) + 3))
        proposer.tell(values, [errors[-1]])
    return errors[20:]


def test_optuna_learns_from_what_it_is_told() -> None:
    learned = np.mean([learn(seed, "optuna") for seed in range(3)])
    drawn = np.mean([learn(seed, "random") for seed in range(3)])
    assert learned < 0.6 * drawn


def test_optuna_goes_on_with_what_is_on_record() -> None:
    wanted = spec(searcher={"name": "optuna", "n_startup_trials": 2}, objective=["MAE", "DTW"])
    first = Proposer(wanted)
    told: list[tuple[dict[str, Any], list[float]]] = []
    for number in range(6):
        values = first.propose()
        assert values is not None
        told.append((values, [float(number), math.inf if number == 3 else -float(number)]))
        first.tell(*told[-1])
    again = Proposer(wanted, [values for values, _ in told])
    for values, scores in told:
        again.tell(values, scores)
    assert [again.propose() for _ in range(3)] == [first.propose() for _ in range(3)]


def test_a_spec_survives_its_normal_form() -> None:
    wanted = spec(objective=["MAE", "DTW"], searcher="optuna", scheduler={"name": "asha", "reduction_factor": 2})
    assert SearchSpec(**json.loads(json.dumps(wanted.normal_form()))) == wanted
    assert wanted.same_trials(spec(**{**wanted.normal_form(), "num_samples": 20, "title": "Other"}))
    assert not wanted.same_trials(spec(**{**wanted.normal_form(), "seed": 1}))


def test_a_file_and_its_overrides(tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump({"base": BASE, "space": SPACE, "num_samples": 8, "scheduler": "asha"}))
    assert load_search(path) == spec(scheduler="asha")
    changed = load_search(
        path,
        {
            "num_samples": 3,
            "scheduler.grace_period": 2,
            "seed": 5,
            "base.seed": 7,
            "training.max_epochs": 9,
            "adapter.name": {"space": "choice", "categories": ["lora", "dora"]},
            "training.learning_rate": 0.01,
        },
    )
    assert (changed.num_samples, changed.seed, changed.scheduler.grace_period) == (3, 5, 2)
    assert (changed.base["seed"], changed.base["training"]["max_epochs"]) == (7, 9)
    assert changed.base["training"]["learning_rate"] == 0.01
    assert list(changed.space) == ["adapter.name", "adapter.r"]
    assert changed.space["adapter.name"].categories == ["lora", "dora"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "it cannot be read: No such file or directory"),
        ("a: [", "it is not YAML: "),
        (
            "base:\n  family: chronos\n  training:\n    max_epochs: 5\n    max_epochs: 7\n",
            "line 5: key 'max_epochs' is there already, on line 4; drop one",
        ),
        ("base: {a: [{b: 1, b: 2}]}", "line 1: key 'b' is there already, on line 1; drop one"),
        ("space: {}", "expected a mapping with the keys base, space, objective and num_samples"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "search.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpecError, match=re.escape(f"search '{path}' cannot be used: {message}")):
        load_search(path)


def test_the_published_schema_is_current_and_agrees_with_the_files() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = search_schema()
    published = json.loads((SEARCHES / "schema.json").read_text())
    assert published == json.loads(json.dumps(schema)), "run: python -m gluonts_peft.trials.searchspec > the file"
    validator = jsonschema.Draft202012Validator(schema)
    for path in SEARCHES.glob("*.yaml"):
        validator.validate(yaml.safe_load(path.read_text()))
    wrong = {"base": {**BASE, "famly": 1}, "space": {"x": {"space": "unifrm"}}, "num_sample": 3}
    assert len(list(validator.iter_errors(wrong))) == 3


@pytest.mark.parametrize("path", sorted(SEARCHES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_ready_searches_can_be_used(path: Path) -> None:
    wanted = load_search(path)
    assert wanted.base["data"].get("path", "/").startswith("/")
    from gluonts_peft import get_adapter

    for values in ({}, *wanted.corners()):
        get_adapter(wanted.trial(values).adapter)
    text = path.read_text()
    assert f"gluonts-peft search ray_configs/searches/{path.name}" in text
    assert "# yaml-language-server: $schema=schema.json" in text
