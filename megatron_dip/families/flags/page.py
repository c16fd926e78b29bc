"""The tables of ``docs/flags.md``, from the rules and the groups of flags.

    python -m megatron_dip.families.flags.page docs/flags.md

writes it anew between the marks of that page, with the flags of the installed Megatron.
"""

import argparse
import sys
from pathlib import Path

from megatron_dip.errors import ConfigError
from megatron_dip.families.flags.groups import FlagGroup, Verdict
from megatron_dip.families.flags.table import GROUPS
from megatron_dip.integration.cpu_mode.arguments import CPU_RULES
from megatron_dip.integration.flag_groups import CONDITIONS, PARSER_GROUPS
from megatron_dip.integration.flag_rules import CHECKPOINT_RULES, SCHEDULE_RULES
from megatron_dip.reading import read_text

__all__ = ["main", "put_between", "tables"]

_BEGIN, _END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"
_SHOWN = {
    Verdict.MEGATRON: "honoured by Megatron",
    Verdict.MODULES: "honoured by all modules",
    Verdict.EXPERTS: "honoured by modules with experts; refused without",
    Verdict.FILE: "stated by the file; must agree with it",
    Verdict.DATA: "honoured by the loader, or refused by it",
    Verdict.REFUSED: "refused",
}


def tables(parser: argparse.ArgumentParser) -> str:
    """What ``docs/flags.md`` says of the flags of ``parser``, which is Megatron's."""
    lines = _by_parser_group(parser)
    lines += ["", "## In the scripts of `examples/`", ""]
    lines += ["| flags | | what becomes of them |", "|---|---|---|"]
    for group in GROUPS:
        flags = [flag for name in group.destinations for flag in _flags_of(parser, name, group)]
        if flags:
            shown = _SHOWN[group.verdict]
            what = f"{shown}: {group.reason}"
            lines.append(f"| {group.title} | {', '.join(flags)} | {what} |")
    lines += ["", "## Refused with `--dip-schedule`", "", "In scripts of your own, too:", ""]
    lines += ["| flag | works with | what to do |", "|---|---|---|"]
    for rule in (*SCHEDULE_RULES, *CHECKPOINT_RULES):
        has_several = len(rule.allowed) > 1
        stated = [one for one in rule.allowed if has_several or isinstance(one, str)]
        allowed = ", ".join(f"`{one}`" for one in stated)
        when = ", with --save or --load" if rule in CHECKPOINT_RULES else ""
        lines.append(f"| `{rule.flag}`{when} | {allowed or 'not stated'} | {rule.remedy} |")
    return "\n".join(lines) + "\n"


def _by_parser_group(parser: argparse.ArgumentParser) -> list[str]:
    """What becomes of every group of the parser under a plan, with any script."""
    refused = {rule.flag for rule in (*SCHEDULE_RULES, *CHECKPOINT_RULES)}
    on_gpus = {rule.flag for rule in CPU_RULES}
    lines = ["## By group of Megatron's parser", "", "With any script under `--dip-schedule`:", ""]
    lines += ["| group | | refused ([why](#refused-with---dip-schedule)) | when | GPU only |"]
    lines += ["|---|---|---|---|---|"]
    for group in parser._action_groups:
        options = [option for action in group._group_actions for option in action.option_strings]
        row = PARSER_GROUPS.get(group.title or "")
        if row is None:
            continue
        answer, note = row
        conditions = [f"`{one}`: {CONDITIONS[one]}" for one in options if one in CONDITIONS]
        cells = [
            f"{answer}: {note}",
            ", ".join(f"`{option}`" for option in options if option in refused),
            "; ".join(conditions),
            ", ".join(f"`{option}`" for option in options if option in on_gpus - refused),
        ]
        lines.append(f"| {group.title} | {' | '.join(cells)} |")
    return lines


def _flags_of(parser: argparse.ArgumentParser, name: str, group: FlagGroup) -> list[str]:
    actions = [action for action in parser._actions if action.dest == name]
    options = [option for action in actions for option in action.option_strings[:1]]
    harmless = [f"{value}" for value in group.harmless.get(name, ())]
    but = f" (but {', '.join(harmless)})" if harmless and group.verdict is Verdict.REFUSED else ""
    return [f"`{option}`{but}" for option in options if option != "-h"]


def put_between(page: str, text: str) -> str:
    """``page`` with ``text`` between its marks."""
    before, rest = page.split(_BEGIN)
    return before + _BEGIN + text + _END + rest.split(_END)[1]


def main(path: str) -> None:
    """Write the tables into the page at ``path``."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    page = Path(path)
    text = put_between(read_text(page, ConfigError), tables(add_megatron_arguments(parser)))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
