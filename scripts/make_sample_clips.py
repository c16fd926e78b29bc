#!/usr/bin/env python3
"""Make a small real video-text data set from what ships with scikit-image.

    python scripts/make_sample_clips.py OUT_DIR

writes samples.json, videos/, tokenizer.json and README.md.  No network is used.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from megatron_dip.errors import DataError
from megatron_dip.families.sample_data.clips import SampleClipOptions, make_sample_clips


def main(
    out_dir: Annotated[Path, typer.Argument(help="Folder to write; files of its own are replaced")],
    num_clips: Annotated[
        int, typer.Option(min=1, max=10**6, help="Clips, some of them still pictures")
    ] = 120,
    seed: Annotated[int, typer.Option(help="The same seed gives the same clips")] = 1234,
) -> None:
    """Make a small real video-text data set in OUT_DIR."""
    options = SampleClipOptions(num_clips=num_clips, seed=seed)
    console = Console(stderr=True)
    try:
        with Progress(console=console) as progress:
            task = progress.add_task("making clips", total=num_clips)
            num_bytes = make_sample_clips(out_dir, options, lambda: progress.advance(task))
    except (DataError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    Console().print(f"{out_dir}: {num_clips} clips, {num_bytes / 2**20:.1f} MiB", markup=False)


if __name__ == "__main__":
    typer.run(main)
