"""What keeps the package readable: small files and functions, no leftovers, a docstring on top."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_dip"
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80
# Written in two parts, so that this file does not hold what it looks for.
LEFTOVER = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
UNCLEAR_NAMES = {"mb", "nmb", "sch", "mbs"}


def sources() -> Iterator[tuple[str, str, ast.Module]]:
    """Yield (path, text, syntax tree) of every file of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield str(path.relative_to(PACKAGE.parent)), text, ast.parse(text)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_public(path: str) -> bool:
    """Whether a module is part of the interface: not private, not an entry point."""
    return not Path(path).name.startswith("_") or path.endswith("__init__.py")


def test_every_file_is_short():
    long = {path: text.count("\n") for path, text, _ in sources()}
    assert {path: lines for path, lines in long.items() if lines > MAX_FILE_LINES} == {}


def test_every_function_is_short():
    found = [
        f"{path}:{function.lineno} {function.name}"
        for path, _, tree in sources()
        for function in functions(tree)
        if (function.end_lineno or 0) - function.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert found == []


def test_every_module_says_what_it_is():
    assert [p for p, _, tree in sources() if is_public(p) and not ast.get_docstring(tree)] == []


def test_every_public_function_and_class_has_a_docstring():
    found = []
    for path, _, tree in sources():
        for node in tree.body if is_public(path) else []:
            is_definition = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if is_definition and not node.name.startswith("_") and not ast.get_docstring(node):
                found.append(f"{path}:{node.lineno} {node.name}")
    assert found == []


def test_every_public_module_lists_its_names():
    found = []
    for path, _, tree in sources():
        defines = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        public = any(not node.name.startswith("_") for node in defines)
        assigned = {
            ast.unparse(t) for n in tree.body if isinstance(n, ast.Assign) for t in n.targets
        }
        if public and is_public(path) and "__all__" not in assigned:
            found.append(path)
    assert found == []


def test_every_name_in_all_exists():
    found = []
    for path, text, tree in sources():
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names = [ast.literal_eval(item) for item in getattr(node.value, "elts", [])]
                rest = text.replace(ast.get_source_segment(text, node) or "", "")
                found += [
                    f"{path}: {name}" for name in names if not re.search(rf"\b{name}\b", rest)
                ]
    assert found == []


def test_nothing_is_left_for_later():
    found = [
        f"{path}:{number} {line.strip()}"
        for path, text, _ in sources()
        for number, line in enumerate(text.splitlines(), start=1)
        if LEFTOVER.search(line)
    ]
    assert found == []


def test_names_are_full_words():
    found = []
    for path, _, tree in sources():
        for function in functions(tree):
            arguments = function.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            found += [f"{path}:{a.lineno} {a.arg}" for a in every if a.arg in UNCLEAR_NAMES]
    assert found == []


def test_every_file_of_tests_has_a_name_of_its_own():
    # Files of tests are modules without a package: of two with one name, only one can be collected.
    names = [path.stem for path in Path(__file__).parents[1].rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []
