"""Experts under plans train as under Megatron's own schedule, alone and shared by replicas.

All runs start from the initial weights, which depend on no layout, and none loads the others'
batches: replicas read different ones.  The auxiliary loss is on, so that its scale counts, and so
that routers must leave out the rows with which Megatron's own schedule fills sequences up.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from equality_runs import MICRO_BATCH_SIZE, SGD, largest_difference
from tiny_vlm import make_tiny_data, write_config
from training_runs import TrainingRun, train

from megatron_dip.plan import Action, Plan, load_plan

NUM_ITERATIONS = 4
SAVED = 2
TOLERANCE = 1e-5
EXPERTS = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24, "shared_ffn_hidden_size": 16}
_COMMON = (
    f"--pipeline-model-parallel-size 2 --moe-token-dispatcher-type alltoall {SGD} "
    f"--moe-aux-loss-coeff 0.02 --train-iters {NUM_ITERATIONS} "
    f"--micro-batch-size {MICRO_BATCH_SIZE} --global-batch-size {4 * MICRO_BATCH_SIZE}"
)
SHARED = "--expert-model-parallel-size 2 --overlap-grad-reduce"


@dataclass(frozen=True)
class Experts:
    """Runs of one model with experts."""

    folder: Path

    def run(self, name: str, num_processes: int, arguments: str, *, dip: bool) -> TrainingRun:
        config = write_config(
            self.folder / f"{name}.yaml",
            self.folder / "data",
            num_ranks=2,
            num_segments=2 if dip else 1,
            sub_microbatch_tokens=(90, None),
            experts=EXPERTS,
        )
        flags = f"--dip-schedule --dip-trace-dir {self.folder / name / 'trace'}" if dip else ""
        text = f"--dip-config {config} {_COMMON} {arguments} {flags}"
        return train(self.folder / name, num_processes, *shlex.split(text))

    def plans(self, name: str, replica: int) -> list[Plan]:
        paths = (self.folder / name / "trace").glob(f"plan-replica{replica}-*.json")
        return [load_plan(path) for path in sorted(paths)]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Experts:
    folder = tmp_path_factory.mktemp("experts")
    make_tiny_data(folder / "data")
    return Experts(folder)


@pytest.fixture(scope="module")
def stock(experts: Experts) -> TrainingRun:
    return experts.run("stock", 2, "", dip=False)


@pytest.fixture(scope="module")
def shared(experts: Experts) -> TrainingRun:
    """Two replicas with half of the experts each."""
    saved = f"--save {experts.folder / 'saved'} --save-interval {SAVED}"
    return experts.run("shared", 4, f"{SHARED} {saved}", dip=True)


def has_images(plan: Plan) -> list[bool]:
    """Per microbatch."""
    return [bool(microbatch.get("vision")) for microbatch in plan.problem.microbatches]


def language_actions(plan: Plan) -> list[list[Action]]:
    """What meets in the layers with experts, per rank in order."""
    stages = {stage.stage for stage in plan.partition.stages if stage.module == "language"}
    return [
        [action for action in actions if action.stage in stages and action.type.is_compute]
        for actions in plan.actions
    ]


def check(ours: TrainingRun, stock: TrainingRun, first: int = 0, end: int = NUM_ITERATIONS) -> None:
    assert len(stock.losses) == NUM_ITERATIONS
    loss = largest_difference(ours.losses, stock.losses[first:end])
    norm = largest_difference(ours.grad_norms, stock.grad_norms[first:end])
    print(
        f"largest differences: loss {loss:.1e}, norm {norm:.1e}; "
        f"{ours.seconds:.1f} s against {stock.seconds:.1f} s"
    )
    assert loss <= TOLERANCE, (ours.losses, stock.losses)
    assert norm <= TOLERANCE, (ours.grad_norms, stock.grad_norms)


def test_replicas_that_share_experts_train_as_one_pipeline_under_the_stock_schedule(
    shared: TrainingRun, stock: TrainingRun
) -> None:
    check(shared, stock)


def test_replicas_that_share_experts_run_their_layers_in_one_order(
    experts: Experts, shared: TrainingRun
) -> None:
    pairs = list(zip(experts.plans("shared", 0), experts.plans("shared", 1), strict=True))
    assert len(pairs) == NUM_ITERATIONS and shared.losses
    assert any(has_images(a) != has_images(b) for a, b in pairs)
    assert any(a.actions != b.actions for a, b in pairs)
    for a, b in pairs:
        assert language_actions(a) == language_actions(b)


def test_experts_of_several_ranks_go_on_in_one_under_another_layout(
    experts: Experts, shared: TrainingRun, stock: TrainingRun
) -> None:
    """One step: Megatron keeps the state of shared experts in an optimizer of its own."""
    load = f"--load {experts.folder / 'saved'} --ckpt-step {SAVED} --exit-on-missing-checkpoint"
    end = f"--no-load-optim --train-iters {SAVED + 1}"
    assert shared.losses
    check(experts.run("resumed", 2, f"{load} {end}", dip=True), stock, SAVED, SAVED + 1)
