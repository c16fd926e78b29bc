"""What no schedule of a batch can beat, and what of its time is useful."""

from megatron_dip.simulator.tasks import TaskTable
from megatron_dip.workload import Problem

__all__ = ["backward_tails_us", "lower_bound_us", "tails_us", "useful_work_us"]


def lower_bound_us(table: TaskTable) -> float:
    """The longest chain of dependencies, or the busiest rank, whichever takes longer.

    A rank cannot begin before the first of its inputs can arrive, then has all of its work to do,
    and after its last action the shortest chain that follows it.  The bound holds for whole and for
    split backwards: a gradient may leave after ``I``, and ``W`` may be the last thing that a rank
    does.  Give a table without recomputation for a bound on every schedule.
    """
    heads = _heads_us(table)
    input_grad_tails = _input_grad_tails_us(table)
    tails = _forward_tails_us(table, input_grad_tails)
    bound = max((head + tail for head, tail in zip(heads, tails, strict=True)), default=0.0)
    for rank in range(table.num_ranks):
        numbers = [number for number, place in enumerate(table.rank) if place == rank]
        if not numbers:
            continue
        busy = sum(table.forward_us[n] + table.backward_us(n) for n in numbers)
        head = min(heads[n] for n in numbers)
        tail = min(_rest_after_us(table, n, tails, input_grad_tails) for n in numbers)
        bound = max(bound, head + busy + tail)
    return bound


def backward_tails_us(table: TaskTable) -> list[float]:
    """Per work, the longest chain of whole backwards that starts with its own; zero without."""
    tails = [0.0] * len(table.works)
    # Works are numbered upstream first: whoever receives a gradient comes before who sends it.
    for number in range(len(table.works)):
        longest = max(
            (tails[other] + delay for other, delay in table.gradients_to[number]), default=0.0
        )
        tails[number] = table.backward_us(number) + longest
    return tails


def tails_us(table: TaskTable) -> list[float]:
    """Per work, the longest chain that starts with its forward, with whole backwards."""
    return _forward_tails_us(table, backward_tails_us(table))


def _forward_tails_us(table: TaskTable, backward_tails: list[float]) -> list[float]:
    """Per work, the longest chain from the start of its forward to the end of the batch."""
    tails = [0.0] * len(table.works)
    for number in reversed(range(len(table.works))):
        longest = backward_tails[number] if table.has_backward[number] else 0.0
        for other, delay in table.feeds_to[number]:
            longest = max(longest, tails[other] + delay)
        tails[number] = table.forward_us[number] + longest
    return tails


def _heads_us(table: TaskTable) -> list[float]:
    """Per work, the earliest start of its forward."""
    heads = [0.0] * len(table.works)
    for number in range(len(table.works)):
        for other, delay in table.feeds_from[number]:
            heads[number] = max(heads[number], heads[other] + table.forward_us[other] + delay)
    return heads


def _input_grad_tails_us(table: TaskTable) -> list[float]:
    """Per work, the longest chain from the start of its ``I`` to the end of the batch."""
    tails = [0.0] * len(table.works)
    for number in range(len(table.works)):
        longest = table.weight_grad_us[number]
        for other, delay in table.gradients_to[number]:
            longest = max(longest, tails[other] + delay)
        tails[number] = table.input_grad_us[number] + longest
    return tails


def _rest_after_us(
    table: TaskTable, number: int, tails: list[float], input_grad_tails: list[float]
) -> float:
    """The shortest time from the end of the last action of a work to the end of the batch."""
    if table.has_weight_grad[number]:
        return 0.0
    if table.has_backward[number]:
        return input_grad_tails[number] - table.input_grad_us[number]
    return tails[number] - table.forward_us[number]


def useful_work_us(problem: Problem) -> float:
    """Times of all items in all layers with their extras, without overheads and recomputation."""
    total = 0.0
    for name in problem.module_order:
        layers = problem.module(name).num_layers
        for number in range(problem.num_microbatches):
            for item in problem.items(name, number):
                total += layers * item.forward_us
                total += item.first_extra_forward_us + item.last_extra_forward_us
                if name in problem.modules_with_backward:
                    total += layers * item.input_grad_us
                    total += item.first_extra_input_grad_us + item.last_extra_input_grad_us
                if problem.module(name).trainable:
                    total += layers * item.weight_grad_us
                    total += item.first_extra_weight_grad_us + item.last_extra_weight_grad_us
    return total
