from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

import gluonts_peft
from gluonts_peft import registry
from gluonts_peft.adapters.base import Adapter
from gluonts_peft.registry import Entry, Registry

GROUP = "tests.parts"


@dataclass(frozen=True)
class Distribution:
    name: str
    version: str


@dataclass
class Point:
    """As much of an entry point as the registry asks for."""

    name: str
    value: str
    dist: Distribution | None
    result: Any = None
    loaded: list[str] = field(default_factory=list)

    def load(self) -> Any:
        self.loaded.append(self.name)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Registry]:
    """Registry over entry points that exist in this test only."""

    def install(*points: Point, kind: str = "family") -> Registry:
        def entry_points(*, group: str) -> Iterable[Point]:
            return list(points) if group == GROUP else []

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        return Registry(kind, GROUP)

    return install


ONE, TWO = Distribution("one-dist", "1.2"), Distribution("other-dist", "0.3")


def test_names_are_sorted_and_belong_to_the_group() -> None:
    assert gluonts_peft.list_adapters() == sorted(gluonts_peft.list_adapters())
    assert {"none", "full", "bitfit", "layernorm", "lora", "dora", "vera", "fourierft"} <= set(
        gluonts_peft.list_adapters()
    )
    assert "chronos" in gluonts_peft.list_families()
    assert not set(gluonts_peft.list_families()) & set(gluonts_peft.list_adapters())


def test_every_adapter_of_the_registry_is_built_under_its_own_name() -> None:
    for name in gluonts_peft.list_adapters():
        adapter = gluonts_peft.get_adapter(name)
        assert isinstance(adapter, Adapter)
        assert adapter.name == name
        assert adapter.spec == name
        assert (adapter.learning_rate > 0) == (name != "none")


def test_family_is_found_through_its_entry_point() -> None:
    entries = {entry.name: entry for entry in registry.families.describe()}

    assert entries["chronos"].distribution == "gluonts-peft-chronos"
    assert entries["chronos"].target == "gluonts_peft_chronos:ChronosEstimator"
    assert entries["chronos"].version == importlib.metadata.version("gluonts-peft-chronos")
    assert gluonts_peft.get_estimator("chronos").backbone_class.family == "chronos"


def test_listing_imports_neither_torch_nor_a_plug_in(python: Callable[..., str]) -> None:
    printed = python(
        "import sys, gluonts_peft\n"
        "from gluonts_peft.registry import adapters, families\n"
        "assert 'lora' in gluonts_peft.list_adapters() and 'chronos' in gluonts_peft.list_families()\n"
        "assert len(adapters.describe()) == len(adapters.names()) and len(families.describe()) >= 1\n"
        "repr(families)\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}\n"
        "    & {'torch', 'peft', 'transformers', 'gluonts', 'lightning', 'ray', 'chronos', 'gluonts_peft_chronos'}))"
    )

    assert printed.strip() == "[]"


def test_describing_loads_nothing(installed: Callable[..., Registry]) -> None:
    points = [Point("b", "two:B", TWO, 2), Point("a", "one:A", ONE, 1), Point("c", "three:C", None, 3)]
    found = installed(*points)

    assert found.names() == ["a", "b", "c"]
    assert found.describe() == [
        Entry("a", "one-dist", "1.2", "one:A"),
        Entry("b", "other-dist", "0.3", "two:B"),
        Entry("c", "unknown", "unknown", "three:C"),
    ]
    assert repr(found) == "Registry('family', ['a', 'b', 'c'])"
    assert [point.loaded for point in points] == [[], [], []]


def test_an_object_is_loaded_once_and_alone(installed: Callable[..., Registry]) -> None:
    points = [Point("a", "one:A", ONE, object()), Point("b", "two:B", TWO, object())]
    found = installed(*points)

    assert found.get("a") is points[0].result
    assert found.get("a") is points[0].result
    assert [point.loaded for point in points] == [["a"], []]


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("family", "moment", "family 'moment' is offered by both 'one-dist' and 'other-dist'; uninstall one"),
        ("adapter", "prompt", "adapter 'prompt' is offered by both 'one-dist' and 'other-dist'; uninstall one"),
    ],
)
def test_a_name_of_two_distributions_is_an_error(
    installed: Callable[..., Registry], kind: str, name: str, message: str
) -> None:
    found = installed(Point(name, "same:Target", ONE), Point(name, "same:Target", TWO), kind=kind)
    for ask in (found.names, found.describe, lambda: found.get(name)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            ask()
        assert str(caught.value) == message


def test_one_distribution_with_two_targets_of_a_name_is_an_error(installed: Callable[..., Registry]) -> None:
    found = installed(Point("a", "one:A", ONE), Point("a", "one:B", ONE))
    with pytest.raises(ValueError, match="^family 'a' is offered by both 'one-dist' and 'one-dist'; uninstall one$"):
        found.names()


def test_the_same_distribution_seen_twice_is_no_conflict(installed: Callable[..., Registry]) -> None:
    found = installed(Point("a", "one:A", ONE, 5), Point("a", "one:A", Distribution("one-dist", "1.2"), 5))

    assert found.names() == ["a"]
    assert found.get("a") == 5


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            "family",
            ModuleNotFoundError("No module named 'xyz'"),
            "family 'a' of one-dist 1.2 cannot be loaded from 'one:A': ModuleNotFoundError: No module named 'xyz'",
        ),
        (
            "adapter",
            AttributeError("no A here"),
            "adapter 'a' of one-dist 1.2 cannot be loaded from 'one:A': AttributeError: no A here",
        ),
    ],
    ids=["no-module", "no-attribute"],
)
def test_a_broken_plug_in_is_named(
    installed: Callable[..., Registry], kind: str, error: Exception, message: str
) -> None:
    found = installed(Point("a", "one:A", ONE, error), Point("b", "two:B", TWO, 7), kind=kind)
    with pytest.raises(ImportError) as caught:
        found.get("a")

    assert str(caught.value) == message
    assert caught.value.__cause__ is error
    # Others go on working, and the failure is not remembered as a success.
    assert found.get("b") == 7
    with pytest.raises(ImportError):
        found.get("a")


@pytest.mark.parametrize(
    ("kind", "known", "name", "message"),
    [
        (
            "family",
            ["moment", "chronos"],
            "cronos",
            "family 'cronos' is unknown; did you mean 'chronos'? known: chronos, moment",
        ),
        ("adapter", ["lora", "vera"], "veera", "adapter 'veera' is unknown; did you mean 'vera'? known: lora, vera"),
        ("adapter", ["lora", "vera"], "xyz", "adapter 'xyz' is unknown; known: lora, vera"),
        ("family", [], "chronos", "family 'chronos' is unknown; known: (none)"),
    ],
)
def test_an_unknown_name_lists_the_near_ones(
    installed: Callable[..., Registry], kind: str, known: list[str], name: str, message: str
) -> None:
    found = installed(*(Point(item, f"one:{item}", ONE) for item in known), kind=kind)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        found.get(name)

    assert str(caught.value) == message


def test_specs_are_names_mappings_lists_and_adapters() -> None:
    lora = gluonts_peft.get_adapter("lora", r=3)

    assert lora.spec == {"name": "lora", "r": 3}
    assert gluonts_peft.get_adapter({"name": "lora", "r": 3}).spec == lora.spec
    assert gluonts_peft.get_adapter({"name": "lora"}, r=3).spec == lora.spec
    assert gluonts_peft.get_adapter(lora) is lora
    hybrid = gluonts_peft.get_adapter(["layernorm", {"name": "lora", "r": 3}])
    assert hybrid.spec == ["layernorm", {"name": "lora", "r": 3}]
    assert gluonts_peft.get_adapter(hybrid.spec).spec == hybrid.spec


@pytest.mark.parametrize("spec", [{"r": 2}, {"lora_alpha": 4, "sites": ["q"]}])
def test_a_mapping_without_a_name_is_an_error(spec: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        gluonts_peft.get_adapter(spec)

    assert str(caught.value) == f"adapter {spec!r} has no 'name'; write e.g. {{'name': 'lora', 'r': 2}}"
