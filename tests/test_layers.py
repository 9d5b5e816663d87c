"""What importing costs, and what stays out."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import gluonts_peft

PLUGINS = {
    *(f"gluonts_peft_{name}" for name in ("chronos", "moirai", "lag_llama", "moment")),
    "chronos",
    "uni2ts",
}
# Modules that must be cheap: none of them needs a model.
WITHOUT_TORCH = ["gluonts_peft", "registry", "checkpoint", "windows", "metrics", "data", "vitals"]
MODULES = sorted(
    module.name.removeprefix("gluonts_peft.")
    for module in pkgutil.walk_packages(gluonts_peft.__path__, "gluonts_peft.")
    # Ray is imported by the search alone.
    if module.name != "gluonts_peft.trials.search"
)


def imported(python: Callable[..., str], module: str) -> set[str]:
    """Top-level packages that are loaded after importing one module in a fresh process."""
    full = module if module == "gluonts_peft" else f"gluonts_peft.{module}"
    program = f"import sys, {full}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    return set(python(program).split())


def test_modules_are_found() -> None:
    assert {"registry", "backbone", "checkpoint", "windows", "training", "adapters.additive"} <= set(MODULES)


def test_neither_ray_nor_a_plug_in_is_imported(python: Callable[..., str]) -> None:
    """One process for all, since most of them load torch: whoever imports what it should not comes first."""
    program = (
        "import importlib, sys\n"
        f"for module in {MODULES}:\n"
        "    importlib.import_module(f'gluonts_peft.{module}')\n"
        f"    found = {{'ray', *{sorted(PLUGINS)}}} & set(sys.modules)\n"
        "    if found: sys.exit(f'{module} imports {sorted(found)}')\n"
    )

    assert python(program) == ""


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_cheap_modules_leave_torch_out(module: str, python: Callable[..., str]) -> None:
    assert imported(python, module) & {"torch", "peft", "transformers", "lightning"} == set()


def test_importing_the_package_is_cheap(python: Callable[..., str]) -> None:
    # The best of three: the machine may be busy with other things.
    program = "import time\nstart = time.perf_counter()\nimport gluonts_peft\nprint(time.perf_counter() - start)"

    assert min(float(python(program)) for _ in range(3)) < 1.0


def test_exports() -> None:
    """`__all__`, the table of lazy names and what is really there agree."""
    assert sorted(gluonts_peft.__all__) == sorted([*gluonts_peft._HOME, "__version__"])
    assert dir(gluonts_peft) == sorted(gluonts_peft.__all__)
    for name in gluonts_peft.__all__:
        value = getattr(gluonts_peft, name)
        if name in gluonts_peft._HOME:
            home = importlib.import_module(f"gluonts_peft.{gluonts_peft._HOME[name]}")
            assert getattr(home, name) is value
            assert name in home.__all__


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="^module 'gluonts_peft' has no attribute 'lorra'$"):
        gluonts_peft.lorra  # noqa: B018


@pytest.mark.parametrize("module", MODULES)
def test_all_of_a_module_exists(module: str) -> None:
    loaded = importlib.import_module(f"gluonts_peft.{module}")
    for name in getattr(loaded, "__all__", ()):
        assert hasattr(loaded, name)


def private_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith("gluonts_peft")):
            names = [alias.name for alias in node.names] + str(node.module).split(".")
            yield from (f"{path.name}: {name}" for name in names if name.startswith("_") and not name.endswith("__"))


def test_no_private_name_of_another_module_is_imported() -> None:
    root = Path(__file__).parents[1]
    files = [*root.glob("gluonts_peft/**/*.py"), *root.glob("plugins/*/gluonts_peft_*/**/*.py")]

    assert len(files) > 80
    assert [found for path in files for found in private_imports(path)] == []


def test_old_places_hand_on_to_the_new_ones() -> None:
    from gluonts_peft import registry
    from gluonts_peft.adapters import base, load

    with pytest.warns(DeprecationWarning, match="^gluonts_peft.registry.get_adapter is now gluonts_peft.adapters.load"):
        assert registry.get_adapter is load.get_adapter
    with pytest.warns(
        DeprecationWarning, match="^gluonts_peft.adapters.base.load_adapter is now gluonts_peft.adapters"
    ):
        assert base.load_adapter is load.load_adapter
    with pytest.raises(AttributeError, match="^module 'gluonts_peft.registry' has no attribute 'get_adaptor'$"):
        registry.get_adaptor  # noqa: B018
