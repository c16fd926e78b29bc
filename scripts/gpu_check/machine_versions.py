"""Versions of everything that matters, and whether NCCL lets several ranks share one GPU."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime, timedelta
from typing import Any

import torch
import torch.distributed as dist
from check_results import SEVERAL_RANKS, answers_of, part_arguments, report, start_ranks, tell

_PACKAGES = ("megatron-core", "megatron-dip", "transformer-engine", "numba", "triton")
_LIMIT_SECONDS = 40.0


def main() -> None:
    """Run the part."""
    parser = part_arguments(__doc__, _LIMIT_SECONDS)
    parser.add_argument("--as-rank", action="store_true")
    options = parser.parse_args()
    if options.as_rank:
        _meet(options.device)
        return
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda,
        **{name: _version(name) for name in _PACKAGES},
    }
    if options.device == "cuda":
        device = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": device.name,
            "number of gpus": torch.cuda.device_count(),
            "memory in GiB": device.total_memory / 2**30,
            "compute capability": f"{device.major}.{device.minor}",
            "driver": _driver(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    arguments = ["--as-rank", "--device", options.device, "--results", str(options.results)]
    ranks = start_ranks(
        __file__, arguments, 2, limit_seconds=options.limit_seconds, environment=SEVERAL_RANKS
    )
    answers = [answers_of(rank) for rank in ranks]
    found["two ranks on one device"] = {
        "allowed": all(answer.get("sum") == 3.0 for answer in answers),
        **{f"rank {rank}": answer for rank, answer in enumerate(answers)},
    }
    report(options.results, "versions", options.device, found)


def _meet(device: str) -> None:
    """Two ranks add their numbers, 1 and 2."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=_LIMIT_SECONDS))
    number = torch.tensor([float(os.environ["RANK"]) + 1], device=device)
    dist.all_reduce(number)
    tell({"sum": number.item()})
    dist.destroy_process_group()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=True
    ).stdout.split()[0]


if __name__ == "__main__":
    main()
