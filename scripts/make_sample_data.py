#!/usr/bin/env python3
"""Make a small real image-text data set from what ships with scikit-image and Python.

    python scripts/make_sample_data.py OUT_DIR

writes samples.json, images/, tokenizer.json and README.md.  No network is used.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megatron_dip.errors import DataError
from megatron_dip.families.sample_data.image_text import SampleDataOptions, make_sample_data


def main(
    out_dir: Annotated[Path, typer.Argument(help="Folder to write; files of its own are replaced")],
    num_images: Annotated[
        int, typer.Option(min=1, max=10**6, help="Image crops, and samples with images")
    ] = 300,
    num_texts: Annotated[int, typer.Option(min=0, max=10**6, help="Samples of text alone")] = 200,
    vocab_size: Annotated[int, typer.Option(help="Most tokens of the vocabulary")] = 3000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files")] = 1234,
) -> None:
    """Make a small real image-text data set in OUT_DIR."""
    options = SampleDataOptions(
        num_image_samples=num_images, num_text_samples=num_texts, vocab_size=vocab_size, seed=seed
    )
    console = Console(stderr=True)
    try:
        with Progress(console=console) as progress:
            task = progress.add_task("making images", total=num_images)
            summary = make_sample_data(out_dir, options, lambda: progress.advance(task))
    except (DataError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    table = Table(title=str(out_dir), show_header=False)
    table.add_row("samples", str(summary.num_samples))
    table.add_row("  with several images", str(summary.num_with_several_images))
    table.add_row("  of text alone", str(summary.num_text_only))
    table.add_row("images", f"{summary.num_images} ({summary.image_bytes / 2**20:.1f} MiB)")
    table.add_row("vocabulary", f"{summary.vocab_size} tokens")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
