"""Rules about single arguments: which values a mode works with, and what to do about others."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_dip.errors import UnsupportedError

__all__ = ["LEAVE_OUT", "Rule", "check_rules"]

LEAVE_OUT = "leave the flag out"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The argument ``destination`` must hold one of ``allowed``; ``remedy`` says how to get there.

    A Megatron that does not have the argument keeps every rule about it.
    """

    flag: str
    destination: str
    allowed: tuple[Any, ...]
    remedy: str = LEAVE_OUT


def check_rules(args: argparse.Namespace, rules: Iterable[Rule], where: str) -> None:
    """Check ``args`` against ``rules``; ``where`` completes "... does not work".

    Raises:
        UnsupportedError: Names the first flag that breaks a rule, its value and the remedy.
    """
    for rule in rules:
        value = getattr(args, rule.destination, rule.allowed[0])
        if value not in rule.allowed:
            shown = rule.flag if isinstance(value, bool) else f"{rule.flag} {value}"
            raise UnsupportedError(f"{shown} does not work {where}: {rule.remedy}")
