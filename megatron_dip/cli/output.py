"""Writing files for the commands."""

from collections.abc import Callable
from pathlib import Path

import typer

from megatron_dip.errors import ConfigError

__all__ = ["write_file"]


def write_file(path: Path, write: Callable[[], object], *, quiet: bool = False) -> None:
    """Have ``write`` make ``path``, and say so unless ``quiet``.

    Raises:
        ConfigError: The file cannot be written.
    """
    try:
        write()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
    if not quiet:
        typer.echo(f"wrote {path}")
