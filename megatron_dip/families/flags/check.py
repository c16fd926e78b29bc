"""Whether a run of the models of ``--dip-config`` may state the flags that it states."""

import argparse
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from megatron_dip.errors import ConfigError, UnsupportedError
from megatron_dip.families.flags.groups import LEAVE_OUT, FlagGroup, Verdict
from megatron_dip.families.flags.table import group_of
from megatron_dip.families.forms import FamilyConfig
from megatron_dip.integration.parser_flags import StatedFlag

__all__ = ["check_flags"]

_OPTIMIZERS = ("adam", "sgd", "lion")
_IMPLEMENTATIONS = ("local", "transformer_engine")
# Megatron's flag also offers report_stats, which its own state machine does not know.
_RERUN_MODES = ("disabled", "validate_results")
_PERSISTENT_WORKER = ("async_save", "use_persistent_ckpt_worker")


def check_flags(
    args: argparse.Namespace, stated: Sequence[StatedFlag], path: str, config: FamilyConfig
) -> None:
    """Refuse every flag of Megatron that would train as if it had not been stated.

    Args:
        args: As parsed, with what ``config``, the file ``path``, says.
        stated: Flags that the run states.

    Raises:
        ConfigError: A flag for which the model of ``config`` has no use.
        UnsupportedError: Names the flag, the reason and the remedy.
    """
    for flag in stated:
        _check_flag(flag, path, config)
    _check_values(args, {flag.destination: flag for flag in stated}, config)


def _check_flag(flag: StatedFlag, path: str, config: FamilyConfig) -> None:
    group = group_of(flag.destination)
    if group is None:
        raise UnsupportedError(
            f"{flag.shown} is a flag of Megatron that this version of megatron-dip does not know: "
            f"{LEAVE_OUT}"
        )
    if _asks_for_nothing(flag, group):
        return
    if group.verdict is Verdict.REFUSED:
        raise UnsupportedError(
            f"{flag.shown} does not work with the models of --dip-config: {group.reason}"
        )
    if group.verdict is Verdict.EXPERTS and not _has_experts(config):
        raise ConfigError(
            f"{flag.shown} says something of experts, and the model of {path} has none: state "
            f"them there (model.language.experts, of families vlm and omni), or {LEAVE_OUT}"
        )
    if group.verdict is Verdict.FILE and flag.destination not in config.megatron_arguments():
        raise ConfigError(
            f"{flag.shown} says something of the model, which is in {path}: state it there if the "
            f"model has it, and {LEAVE_OUT}"
        )


def _asks_for_nothing(flag: StatedFlag, group: FlagGroup) -> bool:
    return flag.value in group.harmless.get(flag.destination, ())


def _has_experts(config: FamilyConfig) -> bool:
    return any(module.experts is not None for module in config.model_shape().modules)


def _check_values(
    args: argparse.Namespace, stated: Mapping[str, StatedFlag], config: FamilyConfig
) -> None:
    """What depends on the value of a flag, on two of them, or on the modules of the model."""
    modules = config.model_shape().modules
    is_local = getattr(args, "transformer_impl", None) == "local"
    has_vocabulary_loss = any(module.has_head and module.vocab_size for module in modules)
    _require(stated, "optimizer", _OPTIMIZERS, "use adam, sgd or lion")
    _require(stated, "transformer_impl", _IMPLEMENTATIONS, "use transformer_engine or local")
    _require(stated, "rerun_mode", _RERUN_MODES, "use disabled or validate_results")
    if set(_PERSISTENT_WORKER) <= set(stated) and find_spec("nvidia_resiliency_ext") is None:
        raise UnsupportedError(
            f"{stated['use_persistent_ckpt_worker'].shown} needs nvidia-resiliency-ext, which is "
            f"not installed: pip install nvidia-resiliency-ext, or {LEAVE_OUT}"
        )
    backend = stated.get("attention_backend")
    if backend is not None and is_local and getattr(backend.value, "name", "auto") != "auto":
        raise UnsupportedError(
            f"{backend.shown} does not work with --transformer-impl local, which has one kernel of "
            f"attention: {LEAVE_OUT}, or use --transformer-impl transformer_engine"
        )
    for name in ("cross_entropy_loss_fusion", "cross_entropy_fusion_impl"):
        if name in stated and not has_vocabulary_loss:
            raise UnsupportedError(
                f"{stated[name].shown} does not work with a model whose loss is not over a "
                f"vocabulary: {LEAVE_OUT}"
            )
    _check_fusions(stated)
    _check_dropout(stated, config)
    _check_division(args, config)


def _require(
    stated: Mapping[str, StatedFlag], name: str, allowed: tuple[Any, ...], remedy: str
) -> None:
    flag = stated.get(name)
    if flag is not None and flag.value not in allowed:
        raise UnsupportedError(
            f"{flag.shown} does not work with the models of --dip-config: {remedy}"
        )


def _check_division(args: argparse.Namespace, config: FamilyConfig) -> None:
    num_ranks = getattr(args, "context_parallel_size", 1)
    if num_ranks == 1:
        return
    if not config.divides_rows:
        raise UnsupportedError(
            f"--context-parallel-size {num_ranks} does not work with this family of models, which "
            f"does not divide the rows of a sample: use 1; --tensor-model-parallel-size with "
            f"--sequence-parallel divides activations as well"
        )
    if not args.dip_schedule:
        raise UnsupportedError(
            f"--context-parallel-size {num_ranks} with the models of --dip-config needs "
            f"--dip-schedule: Megatron's own schedule has one shape for all microbatches, and "
            f"samples that are filled up to be divided have others"
        )


def _check_fusions(stated: Mapping[str, StatedFlag]) -> None:
    """Megatron's configuration has one switch, which one of the flags sets: for all modules."""
    pair = {name for name in ("bias_gelu_fusion", "bias_swiglu_fusion") if name in stated}
    values = {stated[name].value for name in pair}
    if pair and (len(pair) == 1 or len(values) > 1) and False in values:
        flag = stated[sorted(pair)[0]]
        raise UnsupportedError(
            f"{flag.shown} alone does not work with the models of --dip-config, whose modules have "
            f"one choice for both activations: state --no-bias-gelu-fusion and "
            f"--no-bias-swiglu-fusion, or neither"
        )


def _check_dropout(stated: Mapping[str, StatedFlag], config: FamilyConfig) -> None:
    """A diffusion transformer has no dropout, and what is frozen does not draw."""
    modules = config.model_shape().modules
    has_none = all(module.kind == "dit" or not module.trainable for module in modules)
    for name in ("hidden_dropout", "attention_dropout"):
        if has_none and name in stated and stated[name].value:
            raise UnsupportedError(
                f"{stated[name].shown} does not work with this model, none of whose modules that "
                f"are trained has dropout: use 0, or {LEAVE_OUT}"
            )
