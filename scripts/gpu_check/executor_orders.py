"""Four ranks execute plans of toy modules; loss and gradients against a plain loop.

With a hardware queue for every stream, receives posted one action early and in the plan's own
order; and with one queue, under plans made for that.  The ranks share one GPU where NCCL allows
that; where it does not, messages go through host memory, over gloo.
"""

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from check_results import (
    SEVERAL_RANKS,
    answers_of,
    part_arguments,
    read_results,
    report,
    start_ranks,
    tell,
)

_CONNECTIONS = {"early": "32", "plan": "32", "one queue": "1"}
"""By order of receives: how many hardware queues the device has."""
_NUM_RANKS = 4
_LIMIT_SECONDS = 38.0


def main() -> None:
    """Run the part."""
    parser = part_arguments(__doc__, _LIMIT_SECONDS)
    parser.add_argument("--as-rank", action="store_true")
    parser.add_argument(
        "--orders", nargs="+", choices=list(_CONNECTIONS), default=list(_CONNECTIONS)
    )
    parser.add_argument("--order", choices=list(_CONNECTIONS), default="early")
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="gloo")
    options = parser.parse_args()
    if options.as_rank:
        tell(_executed(options.device, options.order, options.backend))
        return
    backend = _backend(options.device, read_results(options.results, "versions"))
    found: dict[str, Any] = {"backend": backend}
    for order in options.orders:
        arguments = [
            *("--as-rank", "--order", order, "--backend", backend),
            *("--device", options.device, "--results", str(options.results)),
        ]
        ranks = start_ranks(
            __file__,
            arguments,
            _NUM_RANKS,
            limit_seconds=options.limit_seconds,
            environment={**SEVERAL_RANKS, "CUDA_DEVICE_MAX_CONNECTIONS": _CONNECTIONS[order]},
        )
        answers = [answers_of(rank) for rank in ranks]
        failed = {f"rank {n}": one for n, one in enumerate(answers) if "failed" in one}
        found[order] = failed or {
            "largest relative error": max(one["error"] for one in answers),
            "seconds": max(one["seconds"] for one in answers),
        }
    report(options.results, "executor", options.device, found)


def _backend(device: str, versions: dict[str, Any]) -> str:
    if device == "cpu":
        return "gloo"
    shared = bool(versions.get("two ranks on one device", {}).get("allowed"))
    return "nccl" if shared or torch.cuda.device_count() >= _NUM_RANKS else "gloo"


def _executed(device: str, order: str, backend: str) -> dict[str, Any]:
    import executor_program

    from megatron_dip.plan import QueueModel
    from megatron_dip.runtime import program

    if order == "plan":
        program.posted_early = lambda actions: actions
    place = torch.device(device)
    if device == "cuda":
        place = torch.device("cuda", int(os.environ["RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(place)
    dist.init_process_group("gloo", timeout=timedelta(seconds=_LIMIT_SECONDS))
    queues = QueueModel(communicators=2) if order == "one queue" else None
    start = time.perf_counter()
    errors = [
        executor_program.run_case(case, _NUM_RANKS, queues=queues, device=place, backend=backend)
        for case in executor_program.CASES[_NUM_RANKS]
    ]
    seconds = time.perf_counter() - start
    dist.destroy_process_group()
    return {"error": max(errors), "seconds": seconds}


if __name__ == "__main__":
    main()
