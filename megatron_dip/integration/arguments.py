"""Our arguments in Megatron's parser, and what they change in its validation.

``add_arguments`` is all that is needed: the hooks call it where Megatron makes its parser, and so
does the line that ``patches/`` adds there.  The values in ``args`` are plain ones only, because
Megatron pickles them into checkpoints.
"""

import argparse
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from megatron_dip.config import DipConfig
from megatron_dip.errors import ConfigError, DipError, UnsupportedError, shown
from megatron_dip.families.configs import load_config
from megatron_dip.families.evaluation import (
    check_data_arguments,
    complete_evaluation,
    complete_full_validation,
)
from megatron_dip.families.flags import OWN_GROUP, ParserFlags, StatedFlag, check_flags
from megatron_dip.integration.expert_rules import check_expert_arguments
from megatron_dip.integration.flag_rules import SCHEDULE_RULES
from megatron_dip.integration.rules import check_rules
from megatron_dip.integration.versions import build_helpers_where_they_can_be_built

__all__ = [
    "ArgumentValidation",
    "add_arguments",
    "check_schedule_arguments",
    "refusal_of_megatron",
    "validation_of",
]

DEFAULT_TIMEOUT_SECONDS = 300.0
_MOST_ITERATIONS = 10**9
_MOST_SECONDS = 1e7


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``megatron-dip`` group, once per parser, and check it in Megatron's validation."""
    if "--dip-schedule" not in parser._option_string_actions:
        group = parser.add_argument_group(title=OWN_GROUP)
        group.add_argument(
            "--dip-schedule",
            action="store_true",
            help="Run the pipeline by a plan made for every batch.",
        )
        group.add_argument(
            "--dip-config",
            metavar="FILE",
            default=None,
            help="YAML file with model, schedule and data; sets Megatron's model arguments too.",
        )
        group.add_argument(
            "--dip-timeout-seconds",
            metavar="SECONDS",
            type=_positive_seconds,
            default=DEFAULT_TIMEOUT_SECONDS,
            help="Limit of every wait for another rank or for a plan (default: %(default)s).",
        )
        group.add_argument(
            "--dip-trace-dir",
            metavar="DIR",
            default=None,
            help="Folder for measured timelines and per-iteration records.",
        )
        group.add_argument(
            "--dip-planner-cores",
            metavar="CORE",
            type=int,
            nargs="*",
            default=[],
            help="Cores for planner processes (default: those of the rank that starts them).",
        )
        group.add_argument(
            "--dip-trace-interval",
            metavar="N",
            type=_positive_count,
            default=20,
            help="After the first 20 iterations, timelines of every N-th (default: 20).",
        )
        group.add_argument(
            "--dip-trace-keep",
            metavar="N",
            type=_positive_count,
            default=None,
            help="Keep the newest N timelines and their plans (default: all).",
        )
        group.add_argument(
            "--skip-bad-samples",
            action="store_true",
            help="Leave out samples that cannot be used, and count them; "
            "also data.skip_bad_samples of --dip-config.",
        )
    _install_validation(parser)
    # Here, because this is what the hooks and a patched tree both call before Megatron starts.
    build_helpers_where_they_can_be_built()
    return parser


def check_schedule_arguments(args: argparse.Namespace) -> None:
    """Refuse what ``--dip-schedule`` cannot be combined with.

    Raises:
        UnsupportedError: Names the flag and the remedy.
    """
    if getattr(args, "dip_config", None) is None:
        raise UnsupportedError(
            "--dip-schedule needs a model and a schedule: name their file with --dip-config FILE"
        )
    check_rules(args, SCHEDULE_RULES, "with --dip-schedule")
    saves_shards = getattr(args, "use_distributed_optimizer", False) and args.save is not None
    if saves_shards and not args.dist_ckpt_optim_fully_reshardable:
        # Megatron's default stores the optimizer by gradient buffers, whose shape is that of the
        # partition, and its own check on loading compares parallel sizes alone.
        raise UnsupportedError(
            "--use-distributed-optimizer with --dip-schedule saves a state that only this very "
            "partition can load: add --dist-ckpt-optim-fully-reshardable"
        )


class ArgumentValidation:
    """Stands for Megatron's ``validate_args``: applies ``--dip-config`` and our rules before it."""

    def __init__(self, validate_args: Callable[..., Any]) -> None:
        self._validate_args = validate_args
        self.flags: ParserFlags | None = None
        self._explicit: dict[str, Any] = {}
        self._parsed = argparse.Namespace()
        self.validated: argparse.Namespace | None = None
        """The arguments that went through it last."""
        self._compared: argparse.Namespace | None = None

    def note_parsed(self, args: argparse.Namespace, words: Sequence[str] | None) -> None:
        """Check what a command line states as soon as it is read.

        Some of what is refused would change what Megatron does before it validates.

        Raises:
            ConfigError: The file of ``--dip-config`` cannot be used, or a flag contradicts it.
            UnsupportedError: A flag that would change nothing, see ``check_flags``.
        """
        assert self.flags is not None
        self._explicit = self.flags.explicit(words)
        self._parsed = argparse.Namespace(**vars(args))
        path = args.dip_config
        if path is not None:
            stated = self.flags.stated(args, self._explicit, words)
            check_flags(args, stated, path, load_config(path))
        elif args.skip_bad_samples:
            raise UnsupportedError(
                "--skip-bad-samples is for the data of --dip-config FILE, which was not given"
            )

    def __call__(self, args: argparse.Namespace, defaults: dict[str, Any] | None = None) -> Any:
        """As ``validate_args``; see there.

        Raises:
            ConfigError: The file of ``--dip-config`` cannot be used, or contradicts a flag; or
                Megatron's own validation fails in a run with that file.
            UnsupportedError: See ``check_schedule_arguments``.
        """
        defaults = defaults or {}
        config_path = getattr(args, "dip_config", None)
        if config_path is not None:
            config = load_config(config_path)
            _apply_config(args, config_path, config, self._explicit)
            check_flags(args, _defaults_of_script(args, defaults), config_path, config)
            check_expert_arguments(args, config_path, config)
            complete_evaluation(args, self._explicit)
            check_data_arguments(args, self._explicit)
            if getattr(args, "dip_schedule", False):
                _check_num_ranks(args, config)
        self.validated = args
        if config_path is None:
            return self._validate(args, defaults)
        try:
            result = self._validate(args, defaults)
        except (AssertionError, RuntimeError, ValueError) as error:
            if isinstance(error, DipError):
                raise
            raise refusal_of_megatron(error) from error
        complete_full_validation(args)
        return result

    def _validate(self, args: argparse.Namespace, defaults: dict[str, Any]) -> Any:
        if not getattr(args, "dip_schedule", False):
            return self._validate_args(args, defaults)
        check_schedule_arguments(args)
        # Megatron wants layers to divide by pipeline ranks unless a number for the first is given;
        # the partition needs no such thing, and the models read the partition.
        args.decoder_first_pipeline_num_layers = args.num_layers
        try:
            return self._validate_args(args, defaults)
        finally:
            args.decoder_first_pipeline_num_layers = None

    def compare_ranks(self) -> None:
        """Refuse ranks that were given different inputs, once per run of the models here.

        To be called when torch.distributed is there, and before what only ranks of one mind can do.

        Raises:
            ConfigError: Names what differs, and on which ranks.
            ChannelError: Another rank does not get as far.
        """
        args = self.validated
        if args is None or args is self._compared or getattr(args, "dip_config", None) is None:
            return
        from megatron_dip.integration.same_inputs import check_same_inputs

        assert self.flags is not None
        self._compared = args
        # As they were read: what Megatron derives from them would only say the same again.
        check_same_inputs(self._parsed, [action.dest for action in self.flags.parser._actions])


def validation_of(args: argparse.Namespace) -> ArgumentValidation | None:
    """Our validation, if it has seen ``args``; ``--yaml-cfg`` has one of Megatron's own."""
    from megatron.training import arguments

    validation = arguments.validate_args
    if isinstance(validation, ArgumentValidation) and validation.validated is args:
        return validation
    return None


def refusal_of_megatron(error: BaseException) -> ConfigError:
    """Megatron's complaint about the arguments in one line: its message, or the condition that a
    bare ``assert`` demands."""
    frames = traceback.extract_tb(error.__traceback__)
    reason = str(error) or (frames[-1].line if frames else None) or type(error).__name__
    return ConfigError(f"Megatron refuses the arguments: {reason}")


def _defaults_of_script(args: argparse.Namespace, defaults: dict[str, Any]) -> list[StatedFlag]:
    """What a script sets by ``args_defaults`` where the command line says nothing."""
    return [
        StatedFlag(destination=name, shown=f"args_defaults {name}={shown(value)}", value=value)
        for name, value in defaults.items()
        if getattr(args, name, None) is None
    ]


def _install_validation(parser: argparse.ArgumentParser) -> None:
    from megatron.training import arguments

    if not isinstance(arguments.validate_args, ArgumentValidation):
        arguments.validate_args = ArgumentValidation(arguments.validate_args)
    validation = arguments.validate_args
    if validation.flags is None or validation.flags.parser is not parser:
        validation.flags = ParserFlags(parser, validation.note_parsed)


def _apply_config(
    args: argparse.Namespace, path: str, config: DipConfig, explicit: dict[str, Any]
) -> None:
    for destination, value in config.megatron_arguments().items():
        if destination in explicit and explicit[destination] != value:
            flag = "--" + destination.replace("_", "-")
            raise ConfigError(
                f"{flag} {explicit[destination]} contradicts {path}, where it is {value}: "
                f"leave the flag out or change the file"
            )
        setattr(args, destination, value)


def _check_num_ranks(args: argparse.Namespace, config: DipConfig) -> None:
    if config.schedule.num_ranks != args.pipeline_model_parallel_size:
        raise ConfigError(
            f"schedule.num_ranks is {config.schedule.num_ranks} but the launch has "
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size} (make them equal)"
        )


def _positive_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:20]) <= _MOST_ITERATIONS:
        raise argparse.ArgumentTypeError(f"expected 1 to {_MOST_ITERATIONS:,}, not {shown(text)}")
    return int(text)


def _positive_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    # Infinity would be a wait without a limit; not a number compares as false.
    if not 0.0 < seconds <= _MOST_SECONDS:
        raise argparse.ArgumentTypeError(
            f"expected a positive number of seconds up to {_MOST_SECONDS:,.0f}, not {shown(text)}"
        )
    return seconds
