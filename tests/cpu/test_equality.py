"""From one checkpoint with the same batches, plans and Megatron's own schedule train alike.

Compared are the loss and the gradient norm of every iteration and the validation loss at the end,
as Megatron's ``train_step`` and ``evaluate`` return them.  Dropout is off: it draws in the order
of execution, which is what a plan changes.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from equality_runs import (
    ADAM,
    DP2_PP2,
    MEAN,
    NUM_ITERATIONS,
    ONE_STEP,
    PER_TOKEN,
    PP1,
    PP2,
    PP4,
    SGD,
    TP2_PP2,
    Case,
    Cut,
    Layout,
    Runs,
    largest_difference,
    rounding,
)

from megatron_dip.plan import Plan

WHOLE_1, WHOLE_2 = Cut(num_segments=1), Cut(num_segments=2)
SPLIT_1, SPLIT_2 = Cut.split(1), Cut.split(2)
SPLIT_1_FALLBACK = Cut.split(1, planner="one_f_one_b")
# Both modules there and back: from the second rank on to itself, then to the first.  In both a
# first or last stage has no layers.
SNAKE = Cut(
    num_segments=3,
    vision_tokens=90,
    layers=(
        ("vision", ((3, 2), (0, 1), (2, 0))),
        ("language", ((0, 2), (0, 1), (4, 1))),
    ),
)
SGD_TOLERANCE, ADAM_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4, 1e-4
DISTRIBUTED = (
    "--overlap-grad-reduce --overlap-param-gather --use-distributed-optimizer "
    "--dist-ckpt-optim-fully-reshardable"
)
# Read by several tests: written once.
ADAM_STOCK = Case(layout=PP2, arguments=f"{ADAM} {PER_TOKEN}", saves=True)
ADAM_WHOLE_2 = ADAM_STOCK.under(WHOLE_2, saves=True)
ADAM_REPLICAS = Case(
    layout=DP2_PP2,
    cut=SPLIT_2,
    arguments=f"{ADAM} {PER_TOKEN}",
    own_arguments=DISTRIBUTED,
    saves=True,
)
SGD_REPLICAS = Case(
    layout=DP2_PP2,
    cut=replace(SPLIT_2, hardware_queues="one"),
    arguments=f"{SGD} {MEAN}",
    own_arguments="--overlap-grad-reduce",
)
MANY_IMAGES = 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    yield Runs(tmp_path_factory.mktemp("equality"))


def identify(value: object) -> str | None:
    """Short names for the parameters of a test."""
    if isinstance(value, Layout):
        return value.name
    if isinstance(value, Cut):
        split = "split" if value.is_split else "whole"
        fallback = "-1f1b" if value.planner != "dual_queue" else ""
        snake = "-snake" if value.layers else ""
        return f"{value.num_segments}-segments-{split}{snake}{fallback}"
    return None


def compare(
    runs: Runs,
    case: Case,
    expected: Case,
    loss_tolerance: float,
    norm_tolerance: float = NORM_TOLERANCE,
) -> None:
    """Assert that two runs agree in every iteration; the later part where one was resumed."""
    ours, theirs = runs.of(case), runs.of(expected)
    first = NUM_ITERATIONS // 2 if case.resumes else 0
    schedule = "stock" if case.cut is None else identify(case.cut)
    assert len(ours.losses) == NUM_ITERATIONS - first
    assert len(theirs.losses) == NUM_ITERATIONS
    loss = largest_difference(ours.losses, theirs.losses[first:])
    norm = largest_difference(ours.grad_norms, theirs.grad_norms[first:])
    validation = largest_difference(ours.validation_losses, theirs.validation_losses)
    print(
        f"{case.layout.name} {schedule} {case.arguments} {case.own_arguments}: largest differences "
        f"loss {loss:.1e}, norm {norm:.1e}, validation {validation:.1e}; "
        f"{ours.seconds:.1f} s against {theirs.seconds:.1f} s"
    )
    assert loss <= loss_tolerance, (ours.losses, theirs.losses[first:])
    assert norm <= norm_tolerance, (ours.grad_norms, theirs.grad_norms[first:])
    assert validation <= loss_tolerance, (ours.validation_losses, theirs.validation_losses)


def num_images(plan: Plan) -> list[int]:
    """Per microbatch, as its metadata has them."""
    return [len(microbatch.get("vision", ())) for microbatch in plan.problem.microbatches]


def most_parts(plans: list[Plan], module: str) -> int:
    """Sub-microbatches of ``module`` in the microbatch that was split most."""
    counts = [
        Counter(sub.microbatch for sub in plan.sub_microbatches if sub.module == module)
        for plan in plans
    ]
    return max(max(count.values()) for count in counts if count)


def check_data(plans: list[Plan], cut: Cut) -> None:
    """Assert that the run had what the comparison is about."""
    images = [number for plan in plans for number in num_images(plan)]
    assert images.count(0) >= 10, "text-only microbatches are missing"
    assert sum(number >= MANY_IMAGES for number in images) >= 5, "image-heavy ones are missing"
    parts = {module: most_parts(plans, module) for module in ("vision", "language")}
    if cut.is_split:
        assert parts["vision"] >= 3 and (parts["language"] >= 2 or not cut.language_tokens), parts
    else:
        assert parts == {"vision": 1, "language": 1}
    assert {stage.segment for plan in plans for stage in plan.partition.stages} == set(
        range(cut.num_segments)
    )


def test_runs_start_from_the_checkpoint_and_learn(runs: Runs) -> None:
    run = runs.of(Case(layout=PP2, arguments=f"{SGD} {MEAN}"))
    assert abs(run.losses[0] - runs.first.losses[0]) > 1e-3, "the weights are the initial ones"
    assert run.losses[-1] < 0.95 * run.losses[0]


@pytest.mark.parametrize(
    ("layout", "cut"),
    [
        (PP2, WHOLE_1),
        (PP2, SNAKE),
        (PP2, SPLIT_2),
        (PP4, WHOLE_1),
        (PP4, SPLIT_2),
        (TP2_PP2, SPLIT_2),
    ],
    ids=identify,
)
def test_plans_train_as_the_stock_schedule_with_sgd_and_the_mean_of_microbatches(
    runs: Runs, layout: Layout, cut: Cut
) -> None:
    stock = Case(layout=layout, arguments=f"{SGD} {MEAN}")
    compare(runs, stock.under(cut), stock, SGD_TOLERANCE)
    check_data(runs.plans(stock.under(cut))[0], cut)


@pytest.mark.parametrize(
    ("layout", "cut"),
    [
        (PP2, WHOLE_2),
        (PP2, SPLIT_1_FALLBACK),
        (PP4, SPLIT_1),
    ],
    ids=identify,
)
def test_plans_train_as_the_stock_schedule_with_adam_and_the_loss_per_token(
    runs: Runs, layout: Layout, cut: Cut
) -> None:
    stock = replace(ADAM_STOCK, layout=layout, saves=layout is PP2)
    case = ADAM_WHOLE_2 if (layout, cut) == (PP2, WHOLE_2) else stock.under(cut)
    compare(runs, case, stock, ADAM_TOLERANCE)
    check_data(runs.plans(case)[0], cut)


@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        (SGD_REPLICAS, SGD_TOLERANCE),
        (replace(SGD_REPLICAS, own_arguments=""), SGD_TOLERANCE),
        (ADAM_REPLICAS, ADAM_TOLERANCE),
    ],
    ids=["early", "at-the-end", "early-distributed-adam"],
)
def test_replicas_with_different_plans_reduce_gradients_and_train_alike(
    runs: Runs, case: Case, tolerance: float
) -> None:
    """Against replicas that reduce after the last backward, with an optimizer of their own each."""
    compare(runs, case, case.under(None), tolerance)
    num_chunks = 2 * SPLIT_2.num_segments
    expected = num_chunks * NUM_ITERATIONS if "--overlap-grad-reduce" in case.own_arguments else 0
    assert runs.of(case).num_early_reductions == (expected,) * case.layout.num_processes
    replicas = runs.plans(case)
    pairs = list(zip(replicas[0], replicas[1], strict=True))
    without_images = [(not any(num_images(a)), not any(num_images(b))) for a, b in pairs]
    assert (True, False) in without_images or (False, True) in without_images
    assert any(a.actions != b.actions for a, b in pairs)
    # Over gloo every stream has a queue, unless the configuration says otherwise.
    for plan in replicas[0]:
        assert (plan.queues is not None) == (case.cut.hardware_queues == "one")


@pytest.mark.parametrize("cut", [None, SNAKE], ids=["stock", "other-partition"])
def test_a_checkpoint_of_one_partition_goes_on_under_others(runs: Runs, cut: Cut | None) -> None:
    resumed = replace(ADAM_STOCK, cut=cut, saves=False, resumes=ADAM_WHOLE_2)
    compare(runs, resumed, ADAM_WHOLE_2, ADAM_TOLERANCE)


def test_a_checkpoint_of_the_stock_schedule_goes_on_under_plans(runs: Runs) -> None:
    resumed = replace(ADAM_STOCK, cut=SPLIT_2, saves=False, resumes=ADAM_STOCK)
    compare(runs, resumed, ADAM_STOCK, ADAM_TOLERANCE)


def test_a_distributed_optimizer_of_two_replicas_goes_on_in_one_under_another_partition(
    runs: Runs,
) -> None:
    resumed = replace(ADAM_REPLICAS, layout=PP2, cut=SNAKE, saves=False, resumes=ADAM_REPLICAS)
    compare(runs, resumed, ADAM_REPLICAS, ADAM_TOLERANCE)


def test_whole_microbatches_in_16_bits_train_as_under_the_stock_schedule(runs: Runs) -> None:
    """Every action computes what Megatron's does, bit for bit; sums over them are in 32 bits."""
    stock = Case(layout=PP2, arguments=f"{ONE_STEP} {MEAN} --bf16")
    compare(runs, stock.under(WHOLE_2), stock, SGD_TOLERANCE)


def test_split_microbatches_in_16_bits_round_no_worse_than_the_stock_schedule(runs: Runs) -> None:
    """Other packed rows round in other ways: judged by what Megatron's own schedule is off.

    The same steps in 32 bits tell what would be exact, so that the machine's own rounding is the
    measure, and all iterations start from the same weights, so that differences do not grow.
    """
    stock = Case(layout=PP2, arguments=f"{ONE_STEP} {MEAN} --bf16")
    exact = runs.of(replace(stock, arguments=f"{ONE_STEP} {MEAN}"))
    ours = rounding(runs.of(stock.under(SPLIT_2)), exact)
    theirs = [rounding(runs.of(replace(stock, layout=layout)), exact) for layout in (PP1, PP2)]
    print(f"split: {ours}; stock on one rank and on two: {theirs}")
    for name, value in ours.items():
        largest = max(one[name] for one in theirs)
        assert 0.0 < value <= 2.0 * largest, (name, ours, theirs)
