"""The patch for trees of Megatron that people keep themselves, on a copy of the installed one."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from gpt_runs import GPT_ARGUMENTS, SCRIPT, losses_of
from launching import REPOSITORY, CompletedRank, run_ranks

from megatron_dip.tree_patch import TreePatch, patch_file

# What a user of a patched tree writes: nothing of the launcher, CPU mode only because of the CPU.
DRIVER = """
import runpy, sys, types
from megatron_dip.integration import cpu_mode
cpu_mode.enable()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from megatron.training import get_args
print("stock:", get_forward_backward_func().__name__, "from", schedules.__file__)
ours = types.SimpleNamespace(forward_backward_dip="the schedule of the plan")
sys.modules["megatron_dip.integration.forward_backward"] = ours
get_args().dip_schedule = True
print("selected:", get_forward_backward_func())
"""


@pytest.fixture(scope="module")
def patched_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the installed package with the patch applied."""
    tree = tmp_path_factory.mktemp("tree")
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations is not None
    installed = Path(next(iter(spec.submodule_search_locations))).parent
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(installed, tree / "megatron", ignore=ignored)
    return tree


def run_driver(tree: Path, *arguments: str) -> CompletedRank:
    driver = tree / "driver.py"
    driver.write_text(DRIVER)
    command = [sys.executable, str(driver), str(SCRIPT), *GPT_ARGUMENTS, "--train-iters", "2"]
    paths = f"{tree}:{REPOSITORY}"
    return run_ranks(1, [*command, *arguments], 180, env={"PYTHONPATH": paths})[0]


def test_a_patched_tree_trains_and_selects_our_schedule(
    patched_tree: Path,
) -> None:
    TreePatch(patch_file(), patched_tree).apply()

    trained = run_driver(patched_tree, "--dip-timeout-seconds", "20")
    assert trained.returncode == 0, trained.output
    assert set(losses_of(trained)) == {1, 2}
    assert f"stock: forward_backward_no_pipelining from {patched_tree}" in trained.output
    assert "selected: the schedule of the plan" in trained.output

    planned = run_driver(patched_tree, "--dip-schedule")
    assert planned.returncode == 0, planned.output
    assert losses_of(planned) == losses_of(trained)
