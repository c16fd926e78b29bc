"""When does a kernel that waits hold up computing?  By CUDA_DEVICE_MAX_CONNECTIONS: 1, 8, 32.

On some streams kernels run that do nothing for a while, like transfers whose peer has not come; on
another one a small kernel follows.  It ends at once, or when the others do.
"""

import os
import time
from collections.abc import Callable

import torch
from check_results import answers_of, part_arguments, report, start_ranks, tell

_CONNECTIONS = (1, 8, 32)
_WAIT_SECONDS = 0.03
_NUMBERS_OF_STREAMS = (1, 2, 4, 7, 8, 15, 16, 28)
"""torch hands out at most 32 streams of one priority."""
_LIMIT_SECONDS = 30.0


def main() -> None:
    """Run the part."""
    parser = part_arguments(__doc__, _LIMIT_SECONDS)
    parser.add_argument("--as-rank", action="store_true")
    options = parser.parse_args()
    if options.device == "cpu":
        report(options.results, "queues", "cpu", {"not run": "there are no hardware queues"})
        return
    if options.as_rank:
        tell(_measured())
        return
    arguments = ["--as-rank", "--results", str(options.results)]
    found = {}
    for connections in _CONNECTIONS:
        variables = {"CUDA_DEVICE_MAX_CONNECTIONS": str(connections)}
        (rank,) = start_ranks(
            __file__, arguments, 1, limit_seconds=options.limit_seconds, environment=variables
        )
        found[f"{connections} connections"] = answers_of(rank)
    report(options.results, "queues", "cuda", found)


def _measured() -> dict[str, object]:
    cycles = cycles_of(_WAIT_SECONDS)
    low, high = 0, -1

    def held(num_streams: int, kernels: int, waiting: int = low, computing: int = low) -> bool:
        delay = delay_seconds(num_streams, kernels, cycles, waiting, computing)
        return is_held_up(delay, _WAIT_SECONDS * kernels)

    held(1, 1)  # The first launch of a kernel loads its code.
    return {
        "connections": os.environ["CUDA_DEVICE_MAX_CONNECTIONS"],
        "held up by one waiting kernel": held(1, 1),
        "held up by a kernel queued behind it": held(1, 2),
        "held up by one of high priority": held(1, 2, waiting=high),
        "held up though computing has high priority": held(1, 2, computing=high),
        "fewest waiting streams that hold up": first_true(
            lambda number: held(number, 2), _NUMBERS_OF_STREAMS
        ),
        "fewest of high priority that hold up": first_true(
            lambda number: held(number, 2, waiting=high), _NUMBERS_OF_STREAMS
        ),
    }


def cycles_of(seconds: float) -> int:
    """Of the device's clock, as ``torch.cuda._sleep`` counts."""
    trial = 20_000_000
    torch.cuda._sleep(trial)
    torch.cuda.synchronize()
    start = time.perf_counter()
    torch.cuda._sleep(trial)
    torch.cuda.synchronize()
    return int(trial * seconds / (time.perf_counter() - start))


def delay_seconds(
    num_streams: int, kernels: int, cycles: int, waiting_priority: int, computing_priority: int
) -> float:
    """From the first launch to the end of a small kernel on a stream of its own."""
    number = torch.zeros(1, device="cuda")
    waiting = [torch.cuda.Stream(priority=waiting_priority) for _ in range(num_streams)]
    computing = torch.cuda.Stream(priority=computing_priority)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for stream in waiting:
        with torch.cuda.stream(stream):
            for _ in range(kernels):
                torch.cuda._sleep(cycles)
    with torch.cuda.stream(computing):
        number.add_(1)
        done = torch.cuda.Event()
        done.record()
    done.synchronize()
    delay = time.perf_counter() - start
    torch.cuda.synchronize()
    return delay


def is_held_up(delay: float, waiting: float) -> bool:
    """Whether a kernel came only when others had waited; they need not be the very last ones."""
    return delay > waiting / 3


def first_true(holds: Callable[[int], bool], numbers: tuple[int, ...]) -> int | None:
    """The first of ``numbers`` for which ``holds``; None where none does."""
    return next((number for number in numbers if holds(number)), None)


if __name__ == "__main__":
    main()
