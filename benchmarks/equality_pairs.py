"""Plans against Megatron's own schedule in every pair of layout, optimizer and precision, on CPU.

    .venv/bin/python benchmarks/equality_pairs.py [--output FILE]

Settings: two or four pipeline ranks; one tensor parallel rank, or two with sequence parallelism;
one replica or two; Adam, the distributed optimizer without and with ``--overlap-param-gather``; 32
and 16 bits.  Six runs have every pair of values (``tests/cpu/layout_pairs.py``).  Each is made of

- a user's GPT script, three iterations, and
- the vision-language model, twenty, where replicas have different plans and microbatches no image,

under a plan and under Megatron's schedule in the same layout, from the same weights.  In 32 bits
microbatches are split, and in 16 bits they stay whole and the weights change once.

Prints the largest relative difference of losses, gradient norms and validation losses, whatever it
is, and writes them as JSON.
"""

import json
import shlex
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "cpu"))

from any_model_runs import GPT_ARGUMENTS, GPT_SCRIPT, ScriptRuns  # noqa: E402
from equality_runs import Case, Cut, Layout, Runs, largest_difference  # noqa: E402
from layout_pairs import COMBINATIONS, Combination  # noqa: E402
from training_runs import TrainingRun  # noqa: E402

MEASURES = ("losses", "grad_norms", "validation_losses")
ADAM = "--optimizer adam --lr 0.002 --calculate-per-token-loss"

console = Console()


def main(
    output: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
) -> None:
    """Compare all of them."""
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "megatron-core": version("megatron-core"),
        "torch": version("torch"),
        "largest relative differences": {},
    }
    found = results["largest relative differences"]
    with tempfile.TemporaryDirectory(prefix="pairs-") as folder:
        gpt = GptRuns(Path(folder) / "gpt")
        vision = VisionRuns(Path(folder) / "vision")
        for case in COMBINATIONS:
            for name, (ours, theirs) in {"gpt": gpt.pair(case), "vlm": vision.pair(case)}.items():
                differences = {
                    measure: largest_difference(getattr(ours, measure), getattr(theirs, measure))
                    for measure in MEASURES
                }
                found[f"{name} {case.name}"] = differences
                shown = ", ".join(f"{key} {value:.1e}" for key, value in differences.items())
                console.print(f"{name} {case.name}: {shown}")
    path = output or ROOT / f"benchmarks/results/equality_pairs_{results['date']}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"written: {path}")


class GptRuns:
    """Of the script that tests run, with its checkpoint in ``folder``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        arguments = f"{GPT_ARGUMENTS} --untie-embeddings-and-output-weights --eval-iters 1"
        self._runs = ScriptRuns(folder, GPT_SCRIPT, arguments)

    def pair(self, case: Combination) -> tuple[TrainingRun, TrainingRun]:
        """Under a plan, and under Megatron's schedule."""
        planned = self._runs.run(case.num_processes, case.arguments, case.gpt_cut)
        return planned, self._runs.run(case.num_processes, case.arguments)


class VisionRuns:
    """Of the tiny vision-language model, with its data in ``folder``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._runs = Runs(folder)

    def pair(self, case: Combination) -> tuple[TrainingRun, TrainingRun]:
        """As of :class:`GptRuns`."""
        words = shlex.split(case.arguments)
        rate = "" if "--min-lr" in words else "--min-lr 0.002"
        layout = Layout(case.name, case.num_pipeline_ranks, case.num_processes, case.arguments)
        stock = Case(layout=layout, arguments=f"{ADAM} {rate}")
        cut = Cut(num_segments=2) if case.in_16_bits else Cut.split(2)
        return self._runs.of(stock.under(cut)), self._runs.of(stock)


if __name__ == "__main__":
    typer.run(main)
