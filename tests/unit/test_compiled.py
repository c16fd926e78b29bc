"""Compiled functions: results, folders in which nothing can be kept, and damaged files in them."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numba
import pytest

from megatron_dip import code_cache
from megatron_dip.code_cache import CodeCache
from megatron_dip.compiled import compiled

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_dip"

SOURCE = """
from megatron_dip.compiled import compiled

@compiled
def double(number):
    return 2 * number

@compiled
def triple(number):
    return 3 * number
"""


def double(number: int) -> int:
    """Twice ``number``."""
    return 2 * number


class Functions:
    """Compiled functions in a module of their own, as often as wanted in a fresh dispatcher."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "functions.py"
        self.path.write_text(SOURCE)

    def load(self) -> dict[str, Callable[..., int]]:
        """As another process would find them; warnings are told anew."""
        code_cache._calls.cache_clear()
        found = {"__name__": "functions"}
        exec(compile(SOURCE, str(self.path), "exec"), found)
        return found

    def call(self) -> tuple[int, int]:
        """What they return, and how many of them came out of the cache."""
        double = self.load()["double"]
        return double(21), sum(double.stats.cache_hits.values())

    @property
    def files(self) -> dict[str, Path]:
        """The index, and the code, of ``double``."""
        folder = self.path.parent / "__pycache__"
        return {ending: next(folder.glob(f"*double*.{ending}")) for ending in ("nbi", "nbc")}


@pytest.fixture
def functions(tmp_path: Path) -> Functions:
    made = Functions(tmp_path)
    assert made.call() == (42, 0)
    assert made.call() == (42, 1), "nothing was kept"
    return made


def test_a_function_is_compiled_when_it_is_first_called():
    function = compiled(double)
    assert not function.signatures
    assert function(21) == 42
    assert len(function.signatures) == 1


def test_where_no_folder_can_be_written_to_a_process_compiles_for_itself(monkeypatch, caplog):
    monkeypatch.setattr(CodeCache._impl_class, "_locator_classes", [])
    assert compiled(double)(21) == 42
    assert "double is compiled anew by every process" in caplog.text


def flip(place: int) -> Callable[[bytes], bytes]:
    def flipped(content: bytes) -> bytes:
        where = place % len(content)
        return content[:where] + bytes([content[where] ^ 0x10]) + content[where + 1 :]

    return flipped


DAMAGES = {
    "nothing in it": lambda content: b"",
    "cut to half": lambda content: content[: len(content) // 2],
    "cut by a byte": lambda content: content[:-1],
    "too long": lambda content: content + b"\0",
    "no pickle": lambda content: b"not a pickle" * 20,
    "zeros": lambda content: bytes(len(content)),
    "first byte": flip(0),
    "last byte": flip(-1),
    **{
        f"byte at {share} %": (lambda c, s=share: flip(len(c) * s // 100)(c))
        for share in (1, 50, 75)
    },
}


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_a_damaged_file_is_never_run_and_is_written_anew(functions, caplog, ending):
    path = functions.files[ending]
    whole = path.read_bytes()
    for name, damage in DAMAGES.items():
        path.write_bytes(damage(whole))
        caplog.clear()
        assert functions.call() == (42, 0), name
        (record,) = caplog.records
        told = r"compiled code in \S*/__pycache__ cannot be used .*compiled anew"
        assert re.search(told, record.message)
    assert functions.call() == (42, 1)


def test_code_of_another_function_under_the_right_name_is_not_run(functions, caplog):
    """Two processes that write at the same time may give their code one name."""
    functions.load()["triple"](1)
    other = next(functions.path.parent.rglob("*triple*.nbc"))
    functions.files["nbc"].write_bytes(other.read_bytes())
    assert functions.call() == (42, 0)
    assert "is damaged" in caplog.text


def test_files_of_another_source_or_version_are_replaced_without_a_word(
    functions, caplog, monkeypatch
):
    functions.path.write_text(SOURCE + "# changed\n")
    assert functions.call() == (42, 0)
    assert functions.call() == (42, 1)
    monkeypatch.setattr(numba, "__version__", "0.0")
    assert functions.call() == (42, 0)
    assert functions.call() == (42, 1)
    assert not caplog.records


def test_code_without_index_and_index_without_code_are_made_again(functions, caplog):
    for ending in ("nbi", "nbc"):
        functions.files[ending].unlink()
        assert functions.call() == (42, 0)
        assert functions.call() == (42, 1)
    assert not caplog.records


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_a_folder_in_the_place_of_a_file_is_named_and_left_alone(functions, caplog, ending):
    path = functions.files[ending]
    path.unlink()
    (path / "inside").mkdir(parents=True)
    assert functions.call() == (42, 0)
    assert functions.call() == (42, 0)
    assert f"({path.name}: Is a directory)" in caplog.text
    assert "cannot be kept" in caplog.text


def test_a_file_that_cannot_be_opened_is_replaced(functions, caplog):
    path = functions.files["nbc"]
    path.unlink()
    path.symlink_to(path)
    assert functions.call() == (42, 0)
    assert "Too many levels of symbolic links" in caplog.text
    assert functions.call() == (42, 1)


def test_on_a_full_disk_functions_run_and_the_folder_is_named_once(tmp_path, caplog):
    functions = Functions(tmp_path)
    script = """
import resource, sys
import runpy
found = runpy.run_path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
print(found["double"](21), found["triple"](2))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(functions.path)],
        env={"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.returncode) == ("42 6\n", 0), done.stderr
    (line,) = done.stderr.splitlines()
    assert f"{tmp_path}/__pycache__ cannot be kept" in line
    assert "File too large" in line
    assert not list(tmp_path.rglob("*.tmp.*"))


@pytest.mark.parametrize("module", ["simulator.kernels", "planner.kernels"])
def test_importing_compiles_nothing(module):
    script = f"""
import megatron_dip.{module} as kernels
print([name for name in dir(kernels) if getattr(getattr(kernels, name), "signatures", None)])
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
