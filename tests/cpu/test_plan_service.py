"""The plan service with real planner processes: what training gets, whatever becomes of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_vlm import write_config

from megatron_dip.costs import ItemSize, ItemSizes, Kernels, ProblemBuilder, config_builder
from megatron_dip.errors import PlanningError
from megatron_dip.families.configs import load_config
from megatron_dip.partition import Partition, partition_from_layers
from megatron_dip.plan import Plan
from megatron_dip.planner import Batch, PlannerSettings, make_plan, unpack_plan
from megatron_dip.runtime import (
    ObtainedPlan,
    Origin,
    PlannerPool,
    PlanService,
    ProcessLimits,
    ServiceLimits,
)
from megatron_dip.workload import Problem, TransferCost

EVALUATIONS = 256
PATIENCE_SECONDS = 240.0
LIMITS = ProcessLimits(memory_bytes=4 * 2**30, nice=0)


def run_of(folder: Path, num_segments: int = 1) -> tuple[ProblemBuilder, Partition]:
    path = write_config(folder / "config.yaml", folder, num_ranks=2, num_segments=num_segments)
    config = load_config(path)
    partition = config.partition(2)
    kernels = Kernels(is_fp32=True)
    model = config.model_shape()
    made = config_builder(config.schedule, model, partition, num_ranks=2, kernels=kernels)
    return made, partition


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProblemBuilder, Partition]:
    folder = tmp_path_factory.mktemp("config")
    builder, partition = run_of(folder, num_segments=2)
    # Before anything is waited for, what is not compiled yet is.
    make_plan(builder.build(sizes(0)), partition, evaluations=EVALUATIONS)
    return builder, partition


def sizes(number: int, num_microbatches: int = 6) -> tuple[ItemSizes, ...]:
    """Batches that differ by ``number``."""
    return tuple(
        {
            "vision": [ItemSize(tokens=40 + 8 * index + number, spans=(40 + 8 * index + number,))],
            "language": [ItemSize(tokens=90 + index, spans=(90 + index,), needs={"vision": (0,)})],
        }
        for index in range(num_microbatches)
    )


def with_other_request(batch: Batch, microbatches: tuple[ItemSizes, ...]) -> Batch:
    """The problem of ``batch``, of which planner processes hear something else."""
    other = replace(batch, replicas=(microbatches,))
    vars(other).update(problem=batch.problem, digests=batch.digests, pack=batch.pack)
    return other


class Planning:
    """A service, and what its plans ought to be."""

    def __init__(self, run: tuple[ProblemBuilder, Partition], service: PlanService) -> None:
        self.builder, self.partition = run
        self.service = service

    @property
    def pool(self) -> PlannerPool:
        return self.service._pool

    def batch(self, number: int, num_microbatches: int = 6) -> Batch:
        return Batch(replicas=(sizes(number, num_microbatches),), builder=self.builder)

    def searched(self, batch: Batch) -> bytes:
        """The plan that a search of all evaluations ends with."""
        plans = [
            make_plan(batch.problem, self.partition, evaluations=count)
            for count in (None, 64, EVALUATIONS)
        ]
        return batch.pack(min(plans, key=lambda plan: plan.estimate.makespan_us))

    def until(self, condition: Callable[[], bool]) -> None:
        """As training does, come by again and again."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "nothing happened"
            self.service._poll()
            time.sleep(0.01)

    def until_ready(self) -> None:
        self.until(lambda: all(member.is_ready for member in self.pool._members))

    def taken(self, batch: Batch) -> ObtainedPlan:
        """What is taken as soon as its planning is over, with no other call in between."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (obtained := self.service.take_ready(batch)) is None:
            assert time.monotonic() < deadline, "planning does not end"
            time.sleep(0.01)
        return obtained


@contextmanager
def planning(
    run: tuple[ProblemBuilder, Partition],
    *,
    workers: int = 1,
    evaluations: int = EVALUATIONS,
    wait_ms: float = 1000 * PATIENCE_SECONDS,
    limits: ProcessLimits = LIMITS,
    silence_seconds: float = PATIENCE_SECONDS,
) -> Iterator[Planning]:
    service = PlanService(
        builder=run[0],
        partition=run[1],
        settings=PlannerSettings(algorithm="dual_queue", evaluations=evaluations),
        pool=PlannerPool(workers, limits, silence_seconds=silence_seconds),
        limits=ServiceLimits(wait_ms=wait_ms, search_ms=1000 * PATIENCE_SECONDS, steps_ahead=1),
    )
    try:
        yield Planning(run, service)
    finally:
        pids = service._pool.process_ids
        service.close()
        assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    """Whether a process exists and has not ended; one whose parent has not asked yet counts not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_plan_that_was_requested_in_time_is_there_without_waiting(run) -> None:
    with planning(run) as one:
        batches = [one.batch(number) for number in range(3)]
        for batch in batches:
            one.service.request(batch)
        for batch in batches:
            obtained = one.taken(batch)
            assert obtained.waited_ms == 0.0 and obtained.packed == one.searched(batch)
            assert obtained.origin is Origin.SEARCHED and obtained.planning_ms > 0
        assert one.service.counts.num_plans == 3 and one.service.counts.num_lesser == 0
        assert one.service.take_ready(batches[0]) is None, "a plan is handed out once"


def test_before_a_process_is_ready_the_owner_plans_itself_and_finds_the_same(run) -> None:
    with planning(run) as one:
        batch = one.batch(0)
        assert one.service.obtain(batch).packed == one.searched(batch)
        assert one.service.counts.planned_by_owner == 1


def test_new_costs_hold_for_the_requests_that_follow(run) -> None:
    with planning(run) as one:
        one.until_ready()
        before = one.service.obtain(one.batch(0)).packed
        slow = TransferCost(latency_us=50_000.0, bytes_per_us=1.0)
        one.builder = replace(one.builder, transfer=slow)
        one.service.set_builder(one.builder)
        batch = one.batch(0)
        after = one.service.obtain(batch).packed
        assert after != before and after == one.searched(batch)
        assert one.service.counts.planned_by_owner == 0


def test_a_search_that_takes_too_long_gives_its_best_so_far_within_the_limit(run, caplog) -> None:
    with planning(run, evaluations=10**7, wait_ms=300.0) as one:
        one.until_ready()
        batch = one.batch(0)
        one.service.request(batch)
        one.until(lambda: one.service._jobs[batch.digests].best is not None)
        obtained = one.service.obtain(batch)
        assert (
            obtained.origin is Origin.CUT_SHORT
            and 290 < obtained.waited_ms < 1000 * PATIENCE_SECONDS
        )
        plan, _ = unpack_plan(obtained.packed, one.builder.build, one.partition)
        first = make_plan(batch.problem, one.partition)
        assert plan.estimate.makespan_us <= first.estimate.makespan_us
        assert "the best plan so far (1 of 1 batches so far" in caplog.text


def test_a_search_is_limited_by_the_time_of_a_step(run) -> None:
    with planning(run, evaluations=10**7) as one:
        one.service._limits = replace(one.service._limits, search_ms=None)
        for _ in range(3):
            one.service.note_step()
            time.sleep(0.1)
        one.until_ready()
        obtained = one.service.obtain(one.batch(0))
        assert (
            obtained.origin is Origin.CUT_SHORT
            and 50 < obtained.planning_ms < 1000 * PATIENCE_SECONDS
        )


def test_a_process_that_is_stuck_means_an_unsearched_plan_after_the_limit_and_is_replaced(
    run, caplog
) -> None:
    with planning(run, wait_ms=200.0, silence_seconds=1.0) as one:
        one.until_ready()
        (stuck,) = one.pool.process_ids
        os.kill(stuck, signal.SIGSTOP)
        patient = replace(one.service._limits, wait_ms=1000 * PATIENCE_SECONDS)
        one.service._limits = replace(one.service._limits, search_ms=100.0)
        obtained = one.service.obtain(one.batch(0))
        assert (
            obtained.origin is Origin.FALLBACK
            and 190 < obtained.waited_ms < 1000 * PATIENCE_SECONDS
        )
        one.service.request(one.batch(1))
        one.until(lambda: one.pool.process_ids != (stuck,))
        assert "was stuck, and was ended" in caplog.text
        one.pool._silence_seconds = PATIENCE_SECONDS
        one.until_ready()
        one.service._limits = patient
        assert one.service.obtain(one.batch(2)).packed == one.searched(one.batch(2))


def test_a_plan_in_case_of_need_is_made_before_it_is_needed(run) -> None:
    with planning(run, wait_ms=0.0) as one:
        one.until_ready()
        os.kill(one.pool.process_ids[0], signal.SIGSTOP)
        batch = one.batch(0)
        one.service.request(batch)
        assert one.service.take_ready(batch) is None
        one.service._settings = Broken(algorithm="dual_queue", evaluations=EVALUATIONS)
        obtained = one.service.obtain(batch)
        assert obtained.packed == batch.pack(make_plan(batch.problem, one.partition))
        assert obtained.origin is Origin.FALLBACK


def test_a_planner_that_raises_means_an_unsearched_plan_and_says_why(run, caplog) -> None:
    with planning(run) as one:
        one.until_ready()
        good = one.batch(0)
        # Metadata that names a module which the model does not have.
        bad = with_other_request(good, ({"audio": [ItemSize(tokens=3, spans=(3,))]},))
        obtained = one.service.obtain(bad)
        assert obtained.origin is Origin.FALLBACK
        assert obtained.packed == good.pack(make_plan(good.problem, one.partition))
        assert "with a plan without a search (1 of 1 batches so far" in caplog.text
        assert "ProblemError: microbatches.0" in caplog.text
        assert one.service.obtain(one.batch(1)).origin is Origin.SEARCHED


def test_a_batch_that_fits_no_plan_is_planned_with_least_memory_and_a_warning(run, caplog) -> None:
    with planning(run) as one:
        one.until_ready()
        one.builder = replace(one.builder, memory_limit_bytes=1000)
        one.service.set_builder(one.builder)
        batch = one.batch(0)
        obtained = one.service.obtain(batch)
        assert obtained.origin is Origin.SEARCHED
        plan, _ = unpack_plan(obtained.packed, one.builder.build, one.partition)
        assert plan.estimate is not None and max(plan.estimate.peak_bytes) > 1000
        assert "no plan keeps the memory limit" in caplog.text
        assert one.service.counts.planned_by_owner == 0


class Broken(PlannerSettings):
    """With a mistake in the planner."""

    def first_plan(self, problem: Problem, partition: Partition) -> Plan:
        raise ZeroDivisionError("a bug")


def test_a_planner_that_fails_everywhere_means_1f1b(run, caplog) -> None:
    with planning(run) as one:
        one.until_ready()
        one.service._settings = Broken(algorithm="dual_queue", evaluations=EVALUATIONS)
        good = one.batch(0)
        bad = with_other_request(good, ({"audio": [ItemSize(tokens=3, spans=(3,))]},))
        obtained = one.service.obtain(bad)
        expected = make_plan(good.problem, one.partition, algorithm="one_f_one_b")
        assert obtained.packed == good.pack(expected) and obtained.origin is Origin.FALLBACK
        assert "no plan but 1F1B's: ZeroDivisionError: a bug" in caplog.text


def test_where_not_even_1f1b_can_be_planned_the_error_names_both_causes(run) -> None:
    with planning(run) as one:
        one.until_ready()
        one.service._partition = partition_from_layers({"vision": [[4, 4]]}, 2)
        bad = with_other_request(one.batch(0), ({"audio": [ItemSize(tokens=3, spans=(3,))]},))
        with pytest.raises(PlanningError, match=r"PartitionError: .*before that: ProblemError"):
            one.service.obtain(bad)


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_that_are_killed_change_no_plan(run, workers: int) -> None:
    with planning(run, workers=workers) as one:
        one.until_ready()
        batches = [one.batch(number) for number in range(4)]
        for number, batch in enumerate(batches):
            for coming in batches[number : number + 3]:
                one.service.request(coming)
            os.kill(one.pool.process_ids[number % workers], signal.SIGKILL)
            one.until(lambda number=number: one.pool.num_ended > number)
            if number % 2:
                # Else the owner plans, or the other process.
                one.until_ready()
            obtained = one.service.obtain(batch)
            assert obtained.packed == one.searched(batch) and obtained.origin is Origin.SEARCHED
        assert one.pool.num_ended == len(batches)


def test_a_batch_that_ends_every_process_is_given_up_and_others_go_on(run, caplog) -> None:
    """It takes more memory than a planner process may have."""
    limits = replace(LIMITS, memory_bytes=220 * 2**20)
    with planning(run, limits=limits) as one:
        one.until_ready()
        good = one.batch(0)
        spans = bytes(150 * 2**20)
        huge = ({"language": [ItemSize(tokens=3, spans=spans)]},)  # type: ignore[arg-type]
        one.service.request(with_other_request(good, huge))
        one.until(lambda: one.service._jobs[good.digests].is_over)
        obtained = one.service.obtain(with_other_request(good, huge))
        assert obtained.origin is Origin.FALLBACK
        assert "3 planner processes ended over it" in caplog.text
        one.until_ready()
        assert one.service.obtain(one.batch(1)).packed == one.searched(one.batch(1))
        assert one.service.counts.planned_by_owner == 0


def test_processes_that_cannot_start_leave_the_planning_to_the_owner(run, caplog) -> None:
    with planning(run, limits=replace(LIMITS, memory_bytes=2**20)) as one:
        one.until(lambda: one.pool.num_ended == 2)
        assert "ended with status" in caplog.text or "was killed" in caplog.text
        assert one.service.obtain(one.batch(0)).packed == one.searched(one.batch(0))
        assert one.service.counts.planned_by_owner == 1


_OWNER = """
import os, sys, time
sys.path.append("HERE")
import test_plan_service as cases
from pathlib import Path

folder = Path(sys.argv[1])
with cases.planning(cases.run_of(folder), workers=2, evaluations=10**7) as one:
    one.until_ready()
    for number in range(4):
        one.service.request(one.batch(number))
    if os.fork() == 0:
        # As a data loader's worker does, this holds the parent's side of the sockets open.
        time.sleep(600)
        os._exit(0)
    print(*one.pool.process_ids, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_planner_processes_end_with_their_owner(tmp_path: Path, number: signal.Signals) -> None:
    """While they plan, however the owner ends."""
    script = _OWNER.replace("HERE", str(Path(__file__).parent))
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as owner:
        try:
            assert owner.stdout is not None
            pids = [int(pid) for pid in owner.stdout.readline().split()]
            assert len(pids) == 2 and all(is_running(pid) for pid in pids)
            os.kill(owner.pid, number)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not any(is_running(pid) for pid in pids)
        finally:
            os.killpg(owner.pid, signal.SIGKILL)
