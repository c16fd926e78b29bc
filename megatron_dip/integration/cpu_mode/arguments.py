"""Megatron's arguments on the CPU: defaults that work there, refusals of what cannot."""

import argparse
import functools
from typing import Any, NamedTuple

from megatron_dip.errors import UnsupportedError

__all__ = ["CPU_DEFAULTS", "check_cpu_arguments", "wrap_argument_parsing"]

# Fused kernels and Transformer Engine need CUDA.  Workers of the data loader would compete with
# the ranks for the same cores.
CPU_DEFAULTS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "num_workers": 0,
}


class _Rule(NamedTuple):
    """``destination`` must hold one of ``allowed``; else ``remedy`` says what to do."""

    destination: str
    flag: str
    allowed: tuple[Any, ...]
    remedy: str


_LEAVE_OUT = "leave the flag out"
_RULES = (
    _Rule("transformer_impl", "--transformer-impl", ("local",), "use 'local', the default here"),
    _Rule("distributed_backend", "--distributed-backend", ("gloo",), "use 'gloo', the default here"),
    _Rule("fp8", "--fp8-format", (None,), "use --bf16 or 32-bit floats"),
    _Rule("fp4", "--fp4-format", (None,), "use --bf16 or 32-bit floats"),
    _Rule("gradient_accumulation_fusion", "--gradient-accumulation-fusion", (False,), _LEAVE_OUT),
    _Rule("cuda_graph_impl", "--cuda-graph-impl", ("none",), _LEAVE_OUT),
    _Rule("enable_cuda_graph", "--enable-cuda-graph", (False,), _LEAVE_OUT),
    _Rule("external_cuda_graph", "--external-cuda-graph", (False,), _LEAVE_OUT),
    _Rule("tp_comm_overlap", "--tp-comm-overlap", (False,), _LEAVE_OUT),
    _Rule("moe_grouped_gemm", "--moe-grouped-gemm", (False,), _LEAVE_OUT),
    _Rule("use_flash_attn", "--use-flash-attn", (False,), _LEAVE_OUT),
    _Rule("use_megatron_fsdp", "--use-megatron-fsdp", (False,), "use --use-distributed-optimizer"),
    _Rule("use_torch_fsdp2", "--use-torch-fsdp2", (False,), "use --use-distributed-optimizer"),
    _Rule("optimizer_cpu_offload", "--optimizer-cpu-offload", (False,), _LEAVE_OUT),
    _Rule("context_parallel_size", "--context-parallel-size", (1,), "use --context-parallel-size 1"),
    # Gloo cannot average.
    _Rule("ddp_average_in_collective", "--ddp-average-in-collective", (False,), _LEAVE_OUT),
    _Rule("nccl_ub", "--use-nccl-ub", (False,), _LEAVE_OUT),
)


def check_cpu_arguments(args: argparse.Namespace) -> None:
    """Refuse what was asked for and cannot work on the CPU.

    Raises:
        UnsupportedError: Names the flag, its value and what to use instead.
    """
    for rule in _RULES:
        value = getattr(args, rule.destination, rule.allowed[0])
        if value not in rule.allowed:
            shown = "" if value is True else f" {value}"
            raise UnsupportedError(
                f"{rule.flag}{shown} does not work on the CPU (--cpu): {rule.remedy}"
            )


def wrap_argument_parsing() -> None:
    """Set the defaults where Megatron makes its parser and check before it validates."""
    from megatron.training import arguments

    add_megatron_arguments = arguments.add_megatron_arguments
    validate_args = arguments.validate_args

    @functools.wraps(add_megatron_arguments)
    def add_with_cpu_defaults(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_megatron_arguments(parser)
        parser.set_defaults(**CPU_DEFAULTS)
        return parser

    @functools.wraps(validate_args)
    def validate_for_cpu(args: argparse.Namespace, defaults: dict[str, Any] | None = None) -> Any:
        check_cpu_arguments(args)
        return validate_args(args, defaults or {})

    arguments.add_megatron_arguments = add_with_cpu_defaults
    arguments.validate_args = validate_for_cpu
