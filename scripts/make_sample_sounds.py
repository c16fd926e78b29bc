#!/usr/bin/env python3
"""Make a small data set of images with sounds from what SciPy and scikit-image bring.

    python scripts/make_sample_sounds.py OUT_DIR

writes samples.json, media/ and tokenizer.json.  No network is used.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from megatron_dip.errors import DataError
from megatron_dip.families.sample_data.sounds import SampleSoundOptions, make_sample_sounds


def main(
    out_dir: Annotated[Path, typer.Argument(help="Folder to write; files of its own are replaced")],
    num_samples: Annotated[int, typer.Option(min=1, max=10**6, help="Questions")] = 160,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files")] = 1234,
) -> None:
    """Make a small data set of images with sounds in OUT_DIR."""
    console = Console(stderr=True)
    try:
        with Progress(console=console) as progress:
            task = progress.add_task("making samples", total=num_samples)
            options = SampleSoundOptions(num_samples=num_samples, seed=seed)
            make_sample_sounds(out_dir, options, lambda: progress.advance(task))
    except (DataError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    Console().print(f"{out_dir}: {num_samples} samples", markup=False)


if __name__ == "__main__":
    typer.run(main)
