#!/usr/bin/env python3
"""Make a small real data set in the layout of ScienceQA, without a network.

    python scripts/make_scienceqa_data.py OUT_DIR

writes problems.json, pid_splits.json, images/<split>/<qid>/image.png and tokenizer.json, from what
ships with scikit-image and Python.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from megatron_dip.errors import DataError
from megatron_dip.families.sample_data.questions import QuestionOptions, make_sample_questions


def main(
    out_dir: Annotated[Path, typer.Argument(help="Folder to write; files of its own are replaced")],
    num_problems: Annotated[
        int, typer.Option(min=20, max=10**6, help="Problems, half of them with image")
    ] = (300),
    vocab_size: Annotated[int, typer.Option(help="Most tokens of the vocabulary")] = 2000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files")] = 1234,
) -> None:
    """Make a small real data set in the layout of ScienceQA in OUT_DIR."""
    options = QuestionOptions(num_problems=num_problems, vocab_size=vocab_size, seed=seed)
    console = Console(stderr=True)
    try:
        with Progress(console=console) as progress:
            task = progress.add_task("making problems", total=num_problems)
            splits = make_sample_questions(out_dir, options, lambda: progress.advance(task))
    except (DataError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    counts = ", ".join(f"{len(qids)} {split}" for split, qids in splits.items())
    Console().print(f"{out_dir}: {counts} problems")


if __name__ == "__main__":
    typer.run(main)
