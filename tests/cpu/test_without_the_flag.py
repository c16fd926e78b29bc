"""With the hooks installed and without ``--dip-schedule``, Megatron does what it does alone."""

import json
import sys
from pathlib import Path

from launching import run_ranks

STOCK = Path(__file__).with_name("stock_setup.py")
HOOKED = {
    "megatron.core.parallel_state.initialize_model_parallel",
    "megatron.core.pipeline_parallel.get_forward_backward_func",
    "megatron.core.pipeline_parallel.schedules.get_forward_backward_func",
    "megatron.training.arguments.add_megatron_arguments",
    "megatron.training.models.dist_utils.build_virtual_pipeline_stages",
    "megatron.training.training.dummy_train_step",
    "megatron.training.training.get_forward_backward_func",
    "megatron.training.training.get_model",
}


def test_hooks_stand_before_few_functions_and_choose_megatrons_schedules() -> None:
    (rank,) = run_ranks(1, [sys.executable, str(STOCK), "--list-hooks"], 120.0)
    assert rank.returncode == 0, rank.output
    found = json.loads(rank.output.splitlines()[-1])
    assert set(found["changed"]) >= HOOKED
    by_function = {name.rpartition(".")[2] for name in found["changed"]}
    assert by_function == {name.rpartition(".")[2] for name in HOOKED}
    assert all(found["changed"].values()), "something else than the original stands behind a hook"
    assert found["chosen"] == [
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_without_interleaving",
        "forward_backward_pipelining_with_interleaving",
    ]
