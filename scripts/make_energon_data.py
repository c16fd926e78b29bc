#!/usr/bin/env python3
"""Put a data set in LLaVA's form into webdataset shards that megatron-energon has prepared.

    python scripts/make_energon_data.py samples.json images runs/sample-shards

Afterwards the configuration says ``format: energon`` and ``path: runs/sample-shards``.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from megatron_dip.errors import DataError
from megatron_dip.families.data.energon import write_energon


def main(
    samples: Annotated[Path, typer.Argument(help="JSON list of samples")],
    image_folder: Annotated[Path, typer.Argument(help="What names of images are relative to")],
    out_dir: Annotated[Path, typer.Argument(help="Folder to write; shards in it are replaced")],
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
    valid_shards: Annotated[
        int, typer.Option(min=0, help="The last shards, kept for validation as the split val")
    ] = 0,
) -> None:
    """Put a data set in LLaVA's form into shards in OUT_DIR."""
    console = Console(stderr=True)
    try:
        with Progress(console=console) as progress:
            task = progress.add_task("writing samples", total=None)
            summary = write_energon(
                samples,
                image_folder,
                out_dir,
                samples_per_shard=samples_per_shard,
                num_valid_shards=valid_shards,
                advance=lambda: progress.advance(task),
            )
    except (DataError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    Console().print(
        f"{out_dir}: {summary.num_samples} samples with {summary.num_images} images in "
        f"{summary.num_shards} shards ({summary.size_bytes / 2**20:.1f} MiB)"
    )


if __name__ == "__main__":
    typer.run(main)
