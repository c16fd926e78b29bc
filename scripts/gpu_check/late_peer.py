"""Two ranks, the second one late: does posting a transfer hold the first one's host?

Over a group that is used for the first time, and over the same group again.
"""

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from check_results import SEVERAL_RANKS, answers_of, part_arguments, report, start_ranks, tell

_LATE_SECONDS = {"cuda": 1.0, "cpu": 0.1}
_LIMIT_SECONDS = 60.0


def main() -> None:
    """Run the part."""
    parser = part_arguments(__doc__, _LIMIT_SECONDS)
    parser.add_argument("--as-rank", action="store_true")
    options = parser.parse_args()
    if options.as_rank:
        tell(_measured(options.device))
        return
    arguments = ["--as-rank", "--device", options.device, "--results", str(options.results)]
    ranks = start_ranks(
        __file__, arguments, 2, limit_seconds=options.limit_seconds, environment=SEVERAL_RANKS
    )
    found = {"seconds that the peer is late": _LATE_SECONDS[options.device], **answers_of(ranks[0])}
    report(options.results, "late peer", options.device, found)


def _measured(device: str) -> dict[str, Any]:
    """Seconds that each call holds the host of rank 0."""
    rank = int(os.environ["RANK"])
    place = torch.device(device)
    if device == "cuda":
        place = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
    limit = timedelta(seconds=_LIMIT_SECONDS)
    dist.init_process_group("gloo", timeout=limit)
    backend = "nccl" if device == "cuda" else "gloo"
    found: dict[str, Any] = {"backend": backend}
    for name in ("isend", "irecv"):
        group = dist.new_group([0, 1], backend=backend, timeout=limit)
        for turn in ("first", "again"):
            found[f"{name}, {turn}"] = _post(name, group, place, rank)
    dist.destroy_process_group()
    return found


def _post(name: str, group: Any, place: torch.device, rank: int) -> float:
    """Rank 0 posts ``name``, rank 1 its counterpart, late; seconds of the call on this rank."""
    element = torch.zeros(1, device=place)
    if place.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    sends = (name == "isend") == (rank == 0)
    if rank == 1:
        time.sleep(_LATE_SECONDS[place.type])
    start = time.perf_counter()
    work = (dist.isend if sends else dist.irecv)(element, 1 - rank, group=group)
    held = time.perf_counter() - start
    assert work is not None
    work.wait()
    if place.type == "cuda":
        torch.cuda.synchronize()
    return held


if __name__ == "__main__":
    main()
