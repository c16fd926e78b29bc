"""Compiled functions: results, and folders in which nothing can be kept."""

import subprocess
import sys
from pathlib import Path

import numba
import pytest

from megatron_dip.compiled import compiled

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_dip"


def double(number: int) -> int:
    """Twice ``number``."""
    return 2 * number


def test_a_function_is_compiled_when_it_is_first_called():
    function = compiled(double)
    assert not function.signatures
    assert function(21) == 42
    assert len(function.signatures) == 1


def test_where_no_folder_can_be_written_to_a_process_compiles_for_itself(monkeypatch, caplog):
    njit = numba.njit

    def refuse_to_cache(**options):
        if options.get("cache"):
            raise RuntimeError("no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", refuse_to_cache)
    assert compiled(double)(21) == 42
    assert "double is compiled anew by every process" in caplog.text


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
