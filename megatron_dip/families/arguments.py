"""The arguments of the scripts of ``examples/``: a file of ``--dip-config`` that states the model.

``add_arguments`` is what a script gives to Megatron as ``extra_args_provider``.  The file then says
in one place what Megatron has flags for: the model, and more where the family says so.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_dip.errors import ConfigError, UnsupportedError
from megatron_dip.families.assignment_rules import check_assignment
from megatron_dip.families.configs import FAMILIES, load_config
from megatron_dip.families.evaluation import (
    check_data_arguments,
    complete_evaluation,
    complete_full_validation,
)
from megatron_dip.families.expert_rules import check_expert_arguments
from megatron_dip.families.flags import check_flags
from megatron_dip.families.forms import FamilyConfig
from megatron_dip.integration.arguments import ArgumentValidation
from megatron_dip.integration.parser_flags import StatedFlag
from megatron_dip.integration.same_inputs import Input, file_input, form_inputs
from megatron_dip.integration.versions import complete_arguments

__all__ = ["ModelArguments", "add_arguments"]

_STAGED = "megatron_dip.families.staged"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron's ``extra_args_provider`` of a script whose model ``--dip-config`` states.

    Raises:
        UnsupportedError: The script was started without the launcher, or the hooks, of this
            package.
    """
    from megatron.training import arguments

    validation = arguments.validate_args
    if not isinstance(validation, ArgumentValidation):
        raise UnsupportedError(
            "the model of this script is in the file of --dip-config, which only this package's "
            "launcher reads: start the script with python -m megatron_dip.launch"
        )
    group = parser.add_argument_group(title="models of megatron-dip")
    group.add_argument(
        "--skip-bad-samples",
        action="store_true",
        help="Leave out samples that cannot be used, and count them; "
        "also data.skip_bad_samples of --dip-config.",
    )
    validation.read_by(ModelArguments())
    parser.set_defaults(dip_models=[_STAGED])
    return parser


class ModelArguments:
    """The part of these scripts in Megatron's arguments, see ``ScriptPart``."""

    keys = frozenset(key for form in FAMILIES.values() for key in form.model_fields)

    def check_parsed(self, args: argparse.Namespace, stated: Sequence[StatedFlag]) -> None:
        """
        Raises:
            ConfigError: The file cannot be used, or a flag contradicts it.
            UnsupportedError: A flag that would change nothing, see ``check_flags``.
        """
        if args.dip_config is not None:
            check_flags(args, stated, args.dip_config, load_config(args.dip_config))
        elif getattr(args, "skip_bad_samples", False):
            raise UnsupportedError(
                "--skip-bad-samples is for the data of --dip-config FILE, which was not given"
            )

    def prepare(
        self,
        args: argparse.Namespace,
        explicit: Mapping[str, Any],
        defaults: Sequence[StatedFlag],
    ) -> None:
        """
        Raises:
            ConfigError: The file cannot be used, does not fit the pipeline ranks, or contradicts a
                flag.
            UnsupportedError: A flag that does not work with its model or data.
        """
        path = args.dip_config
        config = load_config(path)
        _apply_config(args, path, config, explicit)
        check_flags(args, defaults, path, config)
        check_expert_arguments(args, path, config)
        check_assignment(args, path, config)
        complete_evaluation(args, explicit)
        check_data_arguments(args, explicit)

    def finish(self, args: argparse.Namespace) -> None:
        """What Megatron's validation leaves open: arguments that this version lacks, and those of
        an evaluation of all samples."""
        complete_arguments(args)
        complete_full_validation(args)

    def inputs(self, path: str) -> Iterator[tuple[str, Input]]:
        """The family, every key, and files that are read although no key names them."""
        config = load_config(path)
        yield "family", Input(type(config).__name__, type(config).__name__)
        yield from form_inputs(config)
        for name, file in config.data.implied_files().items():
            yield name, file_input(file)


def _apply_config(
    args: argparse.Namespace, path: str, config: FamilyConfig, explicit: Mapping[str, Any]
) -> None:
    for destination, value in config.megatron_arguments().items():
        if destination in explicit and explicit[destination] != value:
            flag = "--" + destination.replace("_", "-")
            raise ConfigError(
                f"{flag} {explicit[destination]} contradicts {path}, where it is {value}: "
                f"leave the flag out or change the file"
            )
        setattr(args, destination, value)
