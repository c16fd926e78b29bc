"""The two rules of the house: planning knows no torch; Megatron stays in integration and models."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_dip"
PLANNING = (
    "assignment",
    "config",
    "costs",
    "errors",
    "forms",
    "partition",
    "partitioner",
    "plan",
    "planner",
    "reading",
    "simulator",
    "text_form",
    "workload",
)
MAY_IMPORT_MEGATRON = {"families", "integration", "models"}
# A library of data sets, which shares the name of Megatron's package and nothing else.
MAY_IMPORT_ENERGON_IN_FUNCTIONS = {"families"}
MAY_IMPORT_TORCH = {"families", "integration", "launch", "models", "rehearsal", "runtime"}
# Verbs of the command line that need them load them, and the doctor in processes of their own.
MAY_IMPORT_TORCH_IN_FUNCTIONS = {"cli", "doctor"}


# What a configuration may say of a model of the families: numbers, as in all of planning.
FORMS_OF_FAMILIES = (
    "families.configs",
    "families.forms",
    *(f"families.{family}.config" for family in ("lavin", "omni", "t2v", "vlm")),
)


def existing_planning_parts() -> list[str]:
    """Those of the planning packages and modules that the tree holds."""
    return [
        name
        for name in PLANNING
        if (PACKAGE / name / "__init__.py").exists() or (PACKAGE / f"{name}.py").exists()
    ]


def module_names(part: str) -> list[str]:
    """Dotted names of a part of the package and of everything inside it."""
    names = [f"megatron_dip.{part}"]
    for path in sorted((PACKAGE / part.replace(".", "/")).rglob("*.py")):
        if path.name not in {"__init__.py", "__main__.py"}:
            inner = path.relative_to(PACKAGE.parent).with_suffix("")
            names.append(".".join(inner.parts))
    return names


def imported_names(node: ast.AST) -> list[str]:
    """Absolute modules that one node imports, by statement or by ``import_module("...")``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module or ""]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = ast.unparse(node.func)
        value = node.args[0].value
        if function.endswith(("import_module", "__import__")) and isinstance(value, str):
            return [value]
    return []


def walk_imports(tree: ast.AST, inside_function: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Yield (package, line, whether inside a function) for every import of a file."""
    for child in ast.iter_child_nodes(tree):
        for name in imported_names(child):
            top = "megatron.energon" if f"{name}.".startswith("megatron.energon.") else None
            yield top or name.split(".")[0], child.lineno, inside_function
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from walk_imports(child, inside_function or is_function)


def forbidden_imports(text: str, part: str) -> list[str]:
    """What a file of ``part`` (a package or module of megatron_dip) imports and must not."""
    found = []
    for package, line, inside_function in walk_imports(ast.parse(text)):
        if package == "megatron" and part not in MAY_IMPORT_MEGATRON:
            found.append(f"line {line}: megatron")
        if package == "megatron.energon" and not (
            inside_function and part in MAY_IMPORT_ENERGON_IN_FUNCTIONS
        ):
            found.append(f"line {line}: megatron.energon")
        may_import_torch = part in MAY_IMPORT_TORCH or (
            inside_function and part in MAY_IMPORT_TORCH_IN_FUNCTIONS
        )
        if package in {"torch", "torchvision"} and not may_import_torch:
            found.append(f"line {line}: {package}")
    return found


@pytest.mark.parametrize("part", [*existing_planning_parts(), *FORMS_OF_FAMILIES, "cli"])
def test_planning_and_the_command_line_start_without_torch_and_megatron(part: str):
    script = f"""
import importlib, sys
for name in {module_names(part)!r}:
    importlib.import_module(name)
loaded = sorted(set(sys.modules) & {{"torch", "megatron", "transformer_engine"}})
sys.exit(f"loaded: {{', '.join(loaded)}}" if loaded else 0)
"""
    # -P: without the current folder, which may hold files named like modules.
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_no_file_imports_what_its_package_must_not_know():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for problem in forbidden_imports(path.read_text(encoding="utf-8"), part):
            found.append(f"{path.relative_to(PACKAGE.parent)}, {problem}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "part", "expected"),
    [
        ("import torch.distributed", "planner", ["line 1: torch"]),
        ("import torch", "runtime", []),
        ("from megatron.core import mpu", "runtime", ["line 1: megatron"]),
        ("from megatron.core import mpu", "integration", []),
        ("from megatron_dip.plan import Plan", "planner", []),
        ("def f():\n    import megatron.energon", "families", []),
        ("def f():\n    from megatron import core", "runtime", ["line 2: megatron"]),
        ("import megatron.energon", "families", ["line 1: megatron.energon"]),
        ("def f():\n    import megatron.energon", "runtime", ["line 2: megatron.energon"]),
        ("import numpy\ndef f():\n    import torch", "planner", ["line 3: torch"]),
        ("def f():\n    import torch", "cli", []),
        ("import torch", "cli", ["line 1: torch"]),
        ("import importlib\nimportlib.import_module('megatron.core')", "cli", ["line 2: megatron"]),
    ],
)
def test_the_check_sees_every_form_of_import(text: str, part: str, expected: list[str]):
    assert forbidden_imports(text, part) == expected


# The command about adapters of one of these models.
MAY_IMPORT_FAMILIES = {"cli/adapters.py"}
KNOWN_CLASSES = ("megatron.core.models", "megatron_dip.families")


def imports_of_models(text: str) -> list[str]:
    """What a file imports of the classes that Megatron or this package's own models have."""
    return [
        name
        for node in ast.walk(ast.parse(text))
        for name in imported_names(node)
        if f"{name}.".startswith(tuple(f"{known}." for known in KNOWN_CLASSES))
    ]


def test_nothing_in_the_package_knows_the_models_of_the_families():
    """They are examples, which scripts import; all else would do without them."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        if place.parts[0] != "families" and str(place) not in MAY_IMPORT_FAMILIES:
            names = imports_of_models(path.read_text(encoding="utf-8"))
            found[str(place)] = [name for name in names if "families" in name]
    assert {place: names for place, names in found.items() if names} == {}


def test_the_loop_under_megatron_knows_no_class_of_models():
    """Which classes there are, ``models`` knows; CPU mode repairs one of Megatron's."""
    folder = PACKAGE / "integration"
    files = [path for path in folder.rglob("*.py") if "cpu_mode" not in path.parts]
    found = {}
    for path in files:
        if str(path.relative_to(PACKAGE)) not in MAY_IMPORT_FAMILIES:
            found[path.name] = imports_of_models(path.read_text(encoding="utf-8"))
    assert {name: names for name, names in found.items() if names} == {}


def test_the_check_for_models_sees_both_kinds():
    text = "def f():\n    import megatron.core.models.gpt\nfrom megatron_dip.families import base"
    assert sorted(imports_of_models(text)) == ["megatron.core.models.gpt", "megatron_dip.families"]
    assert imports_of_models("from megatron_dip.models import register") == []
