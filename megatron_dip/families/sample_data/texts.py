"""Text-only conversations from the documentation that ships with Python."""

import ast
import inspect
import random
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["excerpt", "python_texts", "text_samples"]

_MODULES = [
    "argparse",
    "base64",
    "bisect",
    "calendar",
    "collections",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "dis",
    "email",
    "enum",
    "fractions",
    "functools",
    "gzip",
    "hashlib",
    "heapq",
    "html",
    "inspect",
    "io",
    "json",
    "logging",
    "mimetypes",
    "operator",
    "optparse",
    "os",
    "pathlib",
    "pdb",
    "pickle",
    "pprint",
    "queue",
    "random",
    "re",
    "sched",
    "shelve",
    "shutil",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "tokenize",
    "trace",
    "traceback",
    "turtle",
    "typing",
    "unittest",
    "urllib",
    "uuid",
    "warnings",
    "wave",
    "weakref",
    "zipfile",
]
_SHORTEST_TEXT = 60


def _module_file(name: str) -> Path | None:
    folder = Path(sysconfig.get_path("stdlib"))
    for path in (folder / f"{name}.py", folder / name / "__init__.py"):
        if path.exists():
            return path
    return None


def _docstrings(name: str) -> list[tuple[str, str]]:
    """(subject, text) of the documented parts of a module, without importing it."""
    path = _module_file(name)
    if path is None:
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = [(f"the module {name}", ast.get_docstring(tree))]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            texts.append((f"{name}.{node.name}", ast.get_docstring(node)))
    return [(subject, text) for subject, text in texts if text and len(text) >= _SHORTEST_TEXT]


def _topics() -> list[tuple[str, str]]:
    """The topics of Python's interactive help, read without importing them."""
    found = find_spec("pydoc_data")
    if found is None or not found.submodule_search_locations:
        return []
    path = Path(found.submodule_search_locations[0]) / "topics.py"
    if not path.exists():
        return []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [(f"the topic '{name}'", inspect.cleandoc(topics[name])) for name in topics]
    return []


def python_texts() -> list[tuple[str, str]]:
    """(subject, text) of everything that is used, in a fixed order."""
    texts = [text for name in _MODULES for text in _docstrings(name)]
    return sorted({*texts, *_topics()})


def excerpt(text: str, num_characters: int) -> str:
    """``text`` cut to ``num_characters``, at the end of a line or sentence if there is one."""
    if len(text) <= num_characters:
        return text
    cut = text[:num_characters]
    end = max(cut.rfind("\n"), cut.rfind(". ") + 1)
    return cut[: end if end > 0 else num_characters].rstrip()


def text_samples(
    num_samples: int, max_characters: int, generator: random.Random
) -> list[dict[str, Any]]:
    """Samples without images: questions about Python, answered by its documentation.

    Their lengths are spread evenly in logarithm from 80 characters to ``max_characters``.
    """
    texts = python_texts()
    samples = []
    for number in range(num_samples):
        length = round(80 * (max_characters / 80) ** generator.random())
        subject, text = generator.choice([t for t in texts if len(t[1]) >= length] or texts)
        question = generator.choice(
            (
                f"What does the documentation of Python say about {subject}?",
                f"Explain {subject} of Python.",
                f"Quote Python's documentation of {subject}.",
            )
        )
        samples.append(
            {
                "id": f"text-{number:04d}",
                "conversations": [
                    {"from": "human", "value": question},
                    {"from": "gpt", "value": excerpt(text, length)},
                ],
            }
        )
    return samples
