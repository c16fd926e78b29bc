"""megatron-bridge's own training loop under plans, where megatron-bridge is installed."""

import importlib.util
import re
from pathlib import Path

import pytest
from forked_ranks import fork_ranks

from megatron_dip.report.steps import read_records

SCRIPT = Path(__file__).with_name("bridge_script.py")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None,
    reason="megatron-bridge is not installed (pip install -e '.[bridge]')",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Its own schedule on one rank, and plans on two."""
    folder = tmp_path_factory.mktemp("bridge")
    return folder, *(
        fork_ranks(
            folder / name, num_ranks, [str(SCRIPT), str(folder), *flags], timeout_seconds=250
        )
        for name, num_ranks, flags in (("stock", 1, []), ("plans", 2, ["--dip"]))
    )


def numbers(name, ranks):
    """What the log says of ``name``, from whichever rank prints it."""
    output = "".join(rank.output for rank in ranks)
    assert all(rank.returncode == 0 for rank in ranks), output
    return [float(number) for number in re.findall(rf"{name}: (\S+)", output)]


def test_training_under_plans_gives_the_numbers_of_the_loops_own_schedule(runs):
    _, stock, plans = runs
    # Six and three decimals are printed, of 32 bits.
    for name, count, tolerance in (
        ("lm loss", 3, 2e-6),
        ("lm loss value", 2, 2e-6),
        ("grad norm", 3, 2e-3),
    ):
        expected = numbers(name, stock)
        assert len(expected) == count
        assert numbers(name, plans) == pytest.approx(expected, abs=tolerance)


def test_hugging_face_weights_go_into_stages_and_come_out_as_they_were(runs):
    _, _, plans = runs
    found = [re.findall(r"exported as loaded: (\d+) tensors of (\d+)", one.output) for one in plans]
    assert found == [[("93", "93")]] * 2


def test_steps_are_recorded_where_the_loop_has_no_arguments_of_megatron(runs):
    folder, _, _ = runs
    assert [record.iteration for record in read_records(folder / "traces")] == [1, 2]
