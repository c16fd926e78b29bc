"""Our arguments in Megatron's parser, and what they change in its validation.

``add_arguments`` is all that is needed: the hooks call it where Megatron makes its parser, and so
does the line that ``patches/`` adds there.  The values in ``args`` are plain ones only, because
Megatron pickles them into checkpoints.
"""

import argparse
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

from megatron_dip.config import DipConfig, load_dip_config
from megatron_dip.errors import ConfigError, DipError, UnsupportedError, shown
from megatron_dip.integration import cpu_mode
from megatron_dip.integration.flag_rules import CHECKPOINT_RULES, LATER_RULES, SCHEDULE_RULES
from megatron_dip.integration.gpu_requirements import check_gpu_requirements
from megatron_dip.integration.hooks import hook_models
from megatron_dip.integration.options import DEFAULT_TIMEOUT_SECONDS, DipOptions
from megatron_dip.integration.parser_flags import OWN_GROUP, ParserFlags, StatedFlag
from megatron_dip.integration.precision_rules import check_scaling_of_replicas
from megatron_dip.integration.rules import check_rules
from megatron_dip.integration.same_inputs import Input, check_same_inputs, form_inputs
from megatron_dip.integration.versions import (
    build_helpers_where_they_can_be_built,
    needed,
    rebind,
)

__all__ = [
    "ArgumentValidation",
    "ScriptPart",
    "add_arguments",
    "check_schedule_arguments",
    "optimizer_shards",
    "options_of",
    "refusal_of_megatron",
    "validation_of",
]

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
            help="YAML file with the schedule and its planning; scripts may read more of it.",
        )
        group.add_argument(
            "--dip-models",
            metavar="MODULE",
            nargs="*",
            default=[],
            help="Python modules that register models of your own.",
        )
        group.add_argument(
            "--dip-check-parts",
            action="store_true",
            help="Compare the loss of the first split microbatch with that of the whole one.",
        )
        group.add_argument(
            "--dip-vary-parts",
            action="store_true",
            help="Split microbatches now one way, now another, for times that differ in size.",
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
    _install_validation(parser)
    # Here, because this is what the hooks and a patched tree both call before Megatron starts.
    build_helpers_where_they_can_be_built()
    hook_models()
    return parser


def check_schedule_arguments(args: argparse.Namespace) -> None:
    """Refuse what ``--dip-schedule`` cannot be combined with.

    Raises:
        UnsupportedError: Names the flag and the remedy.
    """
    check_rules(args, (*SCHEDULE_RULES, *LATER_RULES), "with --dip-schedule")
    if any(getattr(args, name, None) for name in ("save", "load", "pretrained_checkpoint")):
        check_rules(args, CHECKPOINT_RULES, "with --dip-schedule")
    saves_shards = getattr(args, "use_distributed_optimizer", False) and args.save is not None
    if saves_shards and not args.dist_ckpt_optim_fully_reshardable:
        # Megatron's default stores the optimizer by gradient buffers, whose shape is that of the
        # partition, and its own check on loading compares parallel sizes alone.
        raise UnsupportedError(
            "--use-distributed-optimizer with --dip-schedule saves a state that only this very "
            "partition can load: add --dist-ckpt-optim-fully-reshardable"
        )


class ScriptPart(Protocol):
    """What a script reads of the file of ``--dip-config``, and makes of Megatron's arguments by it.

    Megatron lets a script add flags (``extra_args_provider``): there it says that it has a part, by
    :meth:`ArgumentValidation.read_by`.
    """

    @property
    def keys(self) -> Collection[str]:
        """Of the file, at its top."""
        ...

    def check_parsed(self, args: argparse.Namespace, stated: Sequence[StatedFlag]) -> None:
        """Look at ``args`` as soon as the command line is read.

        Some of what is refused would change what Megatron does before it validates.

        Args:
            stated: Flags of Megatron that the command line states, or a script by a default.
        """

    def prepare(
        self,
        args: argparse.Namespace,
        explicit: Mapping[str, Any],
        defaults: Sequence[StatedFlag],
    ) -> None:
        """Complete ``args`` before Megatron's validation; only called with ``--dip-config``.

        Args:
            explicit: What the command line states, by destination.
            defaults: What the script sets where the command line says nothing.
        """

    def finish(self, args: argparse.Namespace) -> None:
        """Complete ``args`` after Megatron's validation; only called with ``--dip-config``."""

    def inputs(self, path: str) -> Iterator[tuple[str, Input]]:
        """All that the file ``path`` gives to a rank, the schedule included, by name."""
        ...


class ArgumentValidation:
    """Stands for Megatron's ``validate_args``: applies ``--dip-config`` and our rules before it."""

    def __init__(self, validate_args: Callable[..., Any]) -> None:
        self._validate_args = validate_args
        self.flags: ParserFlags | None = None
        self.script: ScriptPart | None = None
        self._explicit: dict[str, Any] = {}
        self._parsed = argparse.Namespace()
        self.validated: argparse.Namespace | None = None
        """The arguments that went through it last."""
        self._compared: argparse.Namespace | None = None

    def watch(self, parser: argparse.ArgumentParser) -> None:
        """Be told of what ``parser``, Megatron's, reads; of the newest one only.

        Megatron makes another one later, without the script's flags (``ft_integration``).
        """
        if self.flags is None or self.flags.parser is not parser:
            self.flags = ParserFlags(parser, self.note_parsed)

    def read_by(self, script: ScriptPart) -> None:
        """Let ``script`` have its part in the arguments from now on."""
        self.script = script

    def note_parsed(self, args: argparse.Namespace, words: Sequence[str] | None) -> None:
        """Check what a command line states as soon as it is read.

        Raises:
            ConfigError: The file of ``--dip-config`` cannot be used, or a flag contradicts it.
            UnsupportedError: A flag that the script refuses.
        """
        assert self.flags is not None
        self._explicit = self.flags.explicit(words)
        self._parsed = argparse.Namespace(**vars(args))
        if args.dip_config is not None:
            self.load(args.dip_config)
        if self.script is not None:
            self.script.check_parsed(args, self.flags.stated(args, self._explicit, words))

    def __call__(self, args: argparse.Namespace, defaults: dict[str, Any] | None = None) -> Any:
        """As ``validate_args``; see there.

        Raises:
            ConfigError: The file of ``--dip-config`` cannot be used, or contradicts a flag; or
                Megatron's own validation fails in a run with that file or with a plan.
            UnsupportedError: See ``check_schedule_arguments``.
        """
        defaults = defaults or {}
        path = getattr(args, "dip_config", None)
        script = None if path is None else self.script
        if script is not None:
            script.prepare(args, self._explicit, _defaults_of_script(args, defaults))
        if path is not None and getattr(args, "dip_schedule", False):
            _check_num_ranks(args, self.load(path))
        self.validated = args
        if not _is_ours(args):
            return self._validate(args, defaults)
        if not cpu_mode.is_enabled():
            check_gpu_requirements(args)
        check_scaling_of_replicas(args)
        try:
            result = self._validate(args, defaults)
        except (AssertionError, RuntimeError, ValueError) as error:
            if isinstance(error, DipError):
                raise
            raise refusal_of_megatron(error) from error
        if script is not None:
            script.finish(args)
        return result

    def load(self, path: str) -> DipConfig:
        """The schedule in the file ``path``, of which the script may read more.

        Raises:
            ConfigError: It cannot be used.
        """
        return load_dip_config(path, self.script.keys if self.script is not None else ())

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
        """Refuse ranks that were given different inputs, once per run with our arguments.

        To be called when torch.distributed is there, and before what only ranks of one mind can do.

        Raises:
            ConfigError: Names what differs, and on which ranks.
            ChannelError: Another rank does not get as far.
        """
        args = self.validated
        if args is None or args is self._compared or not _is_ours(args):
            return
        assert self.flags is not None
        self._compared = args
        # As they were read: what Megatron derives from them would only say the same again.
        check_same_inputs(
            self._parsed,
            [action.dest for action in self.flags.parser._actions],
            self._config_inputs(args.dip_config),
        )

    def _config_inputs(self, path: str | None) -> Iterator[tuple[str, Input]]:
        if path is None:
            return iter(())
        if self.script is not None:
            return self.script.inputs(path)
        return form_inputs(self.load(path))


def _is_ours(args: argparse.Namespace) -> bool:
    """Whether a run asks for something of this package that all of its ranks must agree on."""
    return bool(getattr(args, "dip_config", None) or getattr(args, "dip_schedule", False))


def validation_of(args: argparse.Namespace) -> ArgumentValidation | None:
    """Our validation, if it has seen ``args``; ``--yaml-cfg`` has one of Megatron's own."""
    from megatron.training import arguments

    validation = arguments.validate_args
    if isinstance(validation, ArgumentValidation) and validation.validated is args:
        return validation
    return None


def options_of(args: argparse.Namespace) -> DipOptions | None:
    """What ``args`` ask for; None where they have no ``--dip-schedule``.

    Raises:
        ConfigError: The file of ``--dip-config`` cannot be used.
        UnsupportedError: The arguments were not checked by us.
    """
    if not getattr(args, "dip_schedule", False):
        return None
    validation = validation_of(args)
    if validation is None:
        raise UnsupportedError(
            "the arguments come from another place than the command line (--yaml-cfg?): give them "
            "as flags, so that they can be checked"
        )
    return DipOptions(
        config=DipConfig() if args.dip_config is None else validation.load(args.dip_config),
        models=tuple(args.dip_models),
        timeout_seconds=args.dip_timeout_seconds,
        planner_cores=tuple(args.dip_planner_cores),
        check_parts=args.dip_check_parts,
        vary_parts=args.dip_vary_parts,
        optimizer_shards=optimizer_shards(args),
    )


def optimizer_shards(args: argparse.Namespace) -> int:
    """Ranks that share one optimizer state: replicas, and the context-parallel ranks in each."""
    if not args.use_distributed_optimizer:
        return 1
    return int(args.data_parallel_size * args.context_parallel_size)


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

    validate_args = needed(arguments, "validate_args")
    if not isinstance(validate_args, ArgumentValidation):
        rebind("validate_args", validate_args, ArgumentValidation(validate_args))
    arguments.validate_args.watch(parser)


def _check_num_ranks(args: argparse.Namespace, config: DipConfig) -> None:
    if config.schedule.num_ranks not in (None, args.pipeline_model_parallel_size):
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
