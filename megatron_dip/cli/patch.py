"""``megatron-dip patch``: the hooks in a Megatron tree of one's own."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_dip.errors import ConfigError
from megatron_dip.integration.versions import check_version, version_of
from megatron_dip.tree_patch import PatchState, TreePatch, patch_file

__all__ = ["patch_tree"]


def patch_tree(
    tree: Annotated[Path, typer.Argument(metavar="PATH", help="The folder that holds megatron/.")],
    check: Annotated[bool, typer.Option("--check", help="Say what is found, change nothing.")] = (
        False
    ),
    revert: Annotated[bool, typer.Option("--revert", help="Take the patch out again.")] = False,
) -> None:
    """Put the hooks into a tree of Megatron, whose scripts then need no launcher."""
    if check and revert:
        raise ConfigError("--check and --revert: expected at most one of them")
    found = TreePatch(patch_file(), tree)
    core = tree / "megatron" / "core"
    version = version_of(core)
    if not revert:
        check_version(version, str(core))
    typer.echo(f"Megatron-Core {version} in {tree}: the patch {found.state.value}")
    if check:
        return
    wanted = PatchState.ABSENT if revert else PatchState.APPLIED
    if found.state is wanted:
        typer.echo("nothing was changed")
        return
    if revert:
        found.revert()
    else:
        found.apply()
    for name in found.files:
        typer.echo(f"{'restored' if revert else 'changed'}: {tree / name}")
