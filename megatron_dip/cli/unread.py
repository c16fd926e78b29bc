"""Options that are given and would have no effect: refused, so that nobody believes in them."""

from collections.abc import Sequence

import typer

from megatron_dip.errors import ConfigError

__all__ = ["given_options", "refuse_unread"]


def given_options(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Those of the parameters ``names`` that the command line states, as it spells them; one at its
    default, stated or not, is told apart by where it comes from."""
    spelled = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    # By name: typer has a copy of click of its own from some version on.
    sources = {name: context.get_parameter_source(name) for name in names}
    return [
        spelled[name]
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    ]


def refuse_unread(context: typer.Context, names: Sequence[str], reason: str) -> None:
    """Raise ConfigError if some of the parameters ``names`` are given.

    Args:
        reason: Why they have no effect, and the remedy.
    """
    given = given_options(context, names)
    if given:
        raise ConfigError(f"{', '.join(given)} {reason}")
