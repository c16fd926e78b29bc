"""Our arguments in Megatron's parser, and what they change in its validation.

``add_arguments`` is all that is needed: the hooks call it where Megatron makes its parser, and so
does the line that ``patches/`` adds there.  The values in ``args`` are plain ones only, because
Megatron pickles them into checkpoints.
"""

import argparse
from collections.abc import Callable
from typing import Any

from megatron_dip.config import DipConfig, load_config
from megatron_dip.errors import ConfigError, UnsupportedError, shown
from megatron_dip.integration.evaluation import (
    check_data_arguments,
    complete_evaluation,
    complete_full_validation,
)
from megatron_dip.integration.expert_rules import check_expert_arguments
from megatron_dip.integration.rules import LEAVE_OUT, Rule, check_rules

__all__ = ["ArgumentValidation", "add_arguments", "check_schedule_arguments"]

DEFAULT_TIMEOUT_SECONDS = 300.0
_MOST_ITERATIONS = 10**9
_MOST_SECONDS = 1e7

_BY_PARTITION = f"{LEAVE_OUT}; the partition of --dip-config says which layers a rank holds"
_SCHEDULE_RULES = (
    *(
        Rule(flag=flag, destination=destination, allowed=(None,), remedy=_BY_PARTITION)
        for flag, destination in (
            ("--num-layers-per-virtual-pipeline-stage", "num_layers_per_virtual_pipeline_stage"),
            ("--num-virtual-stages-per-pipeline-rank", "num_virtual_stages_per_pipeline_rank"),
            ("--pipeline-model-parallel-layout", "pipeline_model_parallel_layout"),
            ("--decoder-first-pipeline-num-layers", "decoder_first_pipeline_num_layers"),
            ("--decoder-last-pipeline-num-layers", "decoder_last_pipeline_num_layers"),
            ("--hybrid-layer-pattern", "hybrid_layer_pattern"),
        )
    ),
    *(
        Rule(flag=flag, destination=destination, allowed=(False,), remedy=_BY_PARTITION)
        for flag, destination in (
            (
                "--account-for-embedding-in-pipeline-split",
                "account_for_embedding_in_pipeline_split",
            ),
            ("--account-for-loss-in-pipeline-split", "account_for_loss_in_pipeline_split"),
        )
    ),
    *(
        Rule(flag=flag, destination=destination, allowed=(False,))
        for flag, destination in (
            ("--overlap-moe-expert-parallel-comm", "overlap_moe_expert_parallel_comm"),
            ("--delay-wgrad-compute", "delay_wgrad_compute"),
            ("--defer-embedding-wgrad-compute", "defer_embedding_wgrad_compute"),
            ("--enable-cuda-graph", "enable_cuda_graph"),
            ("--external-cuda-graph", "external_cuda_graph"),
            (
                "--overlap-param-gather-with-optimizer-step",
                "overlap_param_gather_with_optimizer_step",
            ),
            ("--fine-grained-activation-offloading", "fine_grained_activation_offloading"),
            ("--tp-comm-overlap", "tp_comm_overlap"),
            ("--use-megatron-fsdp", "use_megatron_fsdp"),
            ("--use-torch-fsdp2", "use_torch_fsdp2"),
        )
    ),
    Rule(
        flag="--overlap-param-gather",
        destination="overlap_param_gather",
        allowed=(False,),
        remedy="leave it out; replicas run different plans and would gather in different orders",
    ),
    Rule(flag="--cuda-graph-impl", destination="cuda_graph_impl", allowed=("none",)),
    Rule(
        flag="--moe-expert-rank-capacity-factor",
        destination="moe_expert_rank_capacity_factor",
        allowed=(None,),
    ),
    Rule(flag="--mtp-num-layers", destination="mtp_num_layers", allowed=(None, 0)),
    Rule(
        flag="--context-parallel-size",
        destination="context_parallel_size",
        allowed=(1,),
        remedy="use 1; tensor parallelism with --sequence-parallel also divides the activations",
    ),
    Rule(
        flag="--ckpt-format",
        destination="ckpt_format",
        allowed=("torch_dist",),
        remedy="use 'torch_dist'; other formats cannot be loaded under another partition",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``megatron-dip`` group, once per parser, and check it in Megatron's validation."""
    if "--dip-schedule" not in parser._option_string_actions:
        group = parser.add_argument_group(title="megatron-dip")
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
    check_rules(args, _SCHEDULE_RULES, "with --dip-schedule")
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
        self.parser: argparse.ArgumentParser | None = None

    def __call__(self, args: argparse.Namespace, defaults: dict[str, Any] | None = None) -> Any:
        """As ``validate_args``; see there.

        Raises:
            ConfigError: The file of ``--dip-config`` cannot be used, or contradicts a flag.
            UnsupportedError: See ``check_schedule_arguments``.
        """
        config_path = getattr(args, "dip_config", None)
        if config_path is not None:
            config = load_config(config_path)
            explicit = self._explicit_arguments()
            _apply_config(args, config_path, config, explicit)
            check_expert_arguments(args, config_path, config)
            complete_evaluation(args, explicit)
            check_data_arguments(args, explicit)
            if getattr(args, "dip_schedule", False):
                _check_num_ranks(args, config)
        result = self._validate(args, defaults or {})
        if config_path is not None:
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

    def _explicit_arguments(self) -> dict[str, Any]:
        """What the command line states, without defaults, by destination."""
        parser = self.parser
        if parser is None:
            return {}
        kept = [(action, action.default) for action in parser._actions]
        parser_defaults = dict(parser._defaults)
        try:
            for action in parser._actions:
                action.default = argparse.SUPPRESS
            parser._defaults.clear()
            return vars(parser.parse_known_args()[0])
        finally:
            parser._defaults.update(parser_defaults)
            for action, default in kept:
                action.default = default


def _install_validation(parser: argparse.ArgumentParser) -> None:
    from megatron.training import arguments

    if not isinstance(arguments.validate_args, ArgumentValidation):
        arguments.validate_args = ArgumentValidation(arguments.validate_args)
    arguments.validate_args.parser = parser


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
