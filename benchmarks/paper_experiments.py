"""The experiments of the paper, repeated in the simulator: one of them, or all.

What they found is shown in ``docs/paper_experiments.md``, beside what was published.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from paper import (
    ablation,
    changing_load,
    exact_solver,
    large_clusters,
    memory_over_time,
    search_progress,
    sub_microbatches,
)
from paper.results import Result, write_page, write_result
from paper.setting import ROOT

EXPERIMENTS: Mapping[str, Callable[[bool], Result]] = {
    "ablation": ablation.run,
    "changing_load": changing_load.run,
    "sub_microbatches": sub_microbatches.run,
    "memory_over_time": memory_over_time.run,
    "search_progress": search_progress.run,
    "exact_solver": exact_solver.run,
    "large_clusters": large_clusters.run,
}
RESULTS = ROOT / "benchmarks" / "results" / "paper"
PAGE = ROOT / "docs" / "paper_experiments.md"


def main() -> None:
    """Run what is asked for; results of full runs go into the page too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--quick", action="store_true", help="a small form, seconds; not kept")
    parser.add_argument("--output", type=Path, help=f"folder for results; else {RESULTS}")
    arguments = parser.parse_args()
    if arguments.quick and arguments.output is None:
        parser.error("--quick: give --output too (full results are not replaced by small ones)")
    names = list(EXPERIMENTS) if arguments.name == "all" else [arguments.name]
    for name in names:
        started = time.process_time()
        result = EXPERIMENTS[name](arguments.quick)
        write_result(arguments.output or RESULTS, name, result)
        if arguments.output is None:
            write_page(PAGE, name, result)
        print(f"{name}: {time.process_time() - started:.0f} s of processor time\n{result.table}\n")


if __name__ == "__main__":
    main()
