"""``megatron-dip export-adapters``: adapters of a run as a released checkpoint has them."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["export_to_released"]


def export_to_released(
    adapters: Annotated[Path, typer.Argument(help="A file of --save-adapters.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the released form goes (torch.save).")
    ],
) -> None:
    """Write LaVIN's adapters with the names and shapes of released checkpoints.

    The other way needs no command: --load-adapters reads released checkpoints.
    """
    from megatron_dip.families.lavin.adapter_file import export_adapters

    count = export_adapters(adapters, output)
    typer.echo(f"wrote {output} ({count} adapter parameters)")
