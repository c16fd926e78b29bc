"""What a command line states, flag by flag, and what to answer where it cannot be read.

A parser of Megatron has some 800 flags.  Which of them a run states is more than which values
differ from their defaults: ``--moe-layer-freq 1`` states something, too.
"""

import argparse
import difflib
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Never

from megatron_dip.errors import one_line
from megatron_dip.standard_error import print_error

__all__ = ["OWN_GROUP", "ParserFlags", "StatedFlag"]

OWN_GROUP = "megatron-dip"
"""The title of the group of our own flags, which have checks of their own."""

_EXIT_USER_ERROR = 2
_NUM_SUGGESTIONS = 3
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class StatedFlag:
    """A destination with its value and what it was stated by, as a message shows it."""

    destination: str
    shown: str
    value: Any


class ParserFlags:
    """The flags that Megatron's parser has when this is made; a script may add its own later.

    Its errors become short from now on.

    Args:
        parser: With all of Megatron's flags and ours.
        parsed: Is told of what the parser has read, with the words it was given, if any.
    """

    def __init__(
        self,
        parser: argparse.ArgumentParser,
        parsed: Callable[[argparse.Namespace, Sequence[str] | None], None],
    ) -> None:
        self.parser = parser
        groups = [group for group in parser._action_groups if group.title == OWN_GROUP]
        ours = {action for group in groups for action in group._group_actions}
        self.actions: tuple[argparse.Action, ...] = tuple(
            action for action in parser._actions if action not in ours and action.dest != "help"
        )
        self._defaults: dict[str, Any] = {}
        for action in self.actions:
            # Of two flags for one destination argparse takes the default of the first.
            self._defaults.setdefault(action.dest, action.default)
            if action.type is not None and not isinstance(action.type, type):
                action.type = _readable(action.type)
        self._parse_known_args = parser.parse_known_args
        self._parsed = parsed
        # Scripts call a function of Megatron's that makes its parser itself.
        parser.parse_known_args = self._parse  # type: ignore[assignment]
        parser.error = self._explain  # type: ignore[method-assign]

    def _parse(
        self, words: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        args, unknown = self._parse_known_args(words, namespace)
        self._parsed(args, words)
        return args, unknown

    def explicit(self, words: Sequence[str] | None = None) -> dict[str, Any]:
        """What the command line states, by destination, without defaults.

        ``words`` are those of this process where not given.
        """
        parser = self.parser
        kept = [(action, action.default) for action in parser._actions]
        parser_defaults = dict(parser._defaults)
        try:
            for action in parser._actions:
                action.default = argparse.SUPPRESS
            parser._defaults.clear()
            return vars(self._parse_known_args(words)[0])
        finally:
            parser._defaults.update(parser_defaults)
            for action, default in kept:
                action.default = default

    def stated(
        self,
        args: argparse.Namespace,
        explicit: Mapping[str, Any],
        words: Sequence[str] | None = None,
    ) -> list[StatedFlag]:
        """Megatron's flags in ``args`` that the command line states, or a script by a default.

        ``explicit`` and ``words`` are those of :meth:`explicit`.
        """
        words = sys.argv[1:] if words is None else words
        found = {}
        for action in self.actions:
            destination = action.dest
            if destination in explicit:
                value = explicit[destination]
            elif hasattr(args, destination):
                value = getattr(args, destination)
                if _equal(value, self._defaults[destination]):
                    continue
            else:
                continue
            shown = self._written(destination, words) or f"{self.flag_of(destination)} {value}"
            found[destination] = StatedFlag(
                destination=destination, shown=one_line(shown, _SHOWN_CHARACTERS), value=value
            )
        return list(found.values())

    def flag_of(self, destination: str) -> str:
        """The flag of a destination, as a user writes it."""
        actions = [action for action in self.actions if action.dest == destination]
        options = [option for action in actions for option in action.option_strings]
        return options[0] if options else "--" + destination.replace("_", "-")

    def _written(self, destination: str, words: Sequence[str]) -> str | None:
        """The flag with its values as the command line has them."""
        actions = [action for action in self.actions if action.dest == destination]
        options = {option for action in actions for option in action.option_strings}
        for start, word in enumerate(words):
            if word.split("=")[0] in options:
                values = takewhile(lambda value: not value.startswith("--"), words[start + 1 :])
                takes_none = all(action.nargs == 0 for action in actions)
                return word if takes_none or "=" in word else " ".join([word, *values])
        return None

    def _explain(self, message: str) -> Never:
        """Stands for ``parser.error``: a few lines instead of the usage of all flags."""
        lines = [one_line(message, _SHOWN_CHARACTERS)]
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            words = message.removeprefix(prefix).split()
            lines += self._suggestions([word.split("=")[0] for word in words])
        print_error("\n".join(lines))
        sys.exit(_EXIT_USER_ERROR)

    def _suggestions(self, words: Sequence[str]) -> list[str]:
        known = list(self.parser._option_string_actions)
        lines = []
        for word in words:
            near = difflib.get_close_matches(word, known, n=_NUM_SUGGESTIONS)
            if word.startswith("-") and near:
                lines.append(f"  near to {one_line(word, _SHOWN_CHARACTERS)}: {', '.join(near)}")
        return [*lines, "  all flags: the same command with --help"]


def _readable(read: Any) -> Callable[[str], Any]:
    """``read`` with errors that argparse turns into a message: names of enums raise KeyError."""

    @functools.wraps(read)
    def read_or_explain(text: str) -> Any:
        try:
            return read(text)
        except KeyError:
            raise argparse.ArgumentTypeError(f"invalid value: {text!r}") from None

    return read_or_explain


def _equal(value: Any, default: Any) -> bool:
    return bool(type(value) is type(default) and value == default)
