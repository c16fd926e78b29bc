"""Megatron's arguments on the CPU: defaults that work there, refusals of what cannot."""

import argparse
import functools
from typing import Any

from megatron_dip.errors import UnsupportedError
from megatron_dip.integration.rules import LEAVE_OUT, Rule, check_rules
from megatron_dip.integration.versions import needed, rebind

__all__ = ["CPU_DEFAULTS", "CPU_RULES", "check_cpu_arguments", "wrap_argument_parsing"]

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


_USE_DISTRIBUTED = "use --use-distributed-optimizer"
_WITH_ENGINE = f"it needs Transformer Engine; {LEAVE_OUT}"
CPU_RULES = (
    Rule(
        flag="--transformer-impl",
        destination="transformer_impl",
        allowed=("local",),
        remedy="use 'local', the default here",
    ),
    Rule(
        flag="--distributed-backend",
        destination="distributed_backend",
        allowed=("gloo",),
        remedy="use 'gloo', the default here",
    ),
    Rule(flag="--fp8-format", destination="fp8", allowed=(None,), remedy="use --bf16 or nothing"),
    Rule(flag="--fp4-format", destination="fp4", allowed=(None,), remedy="use --bf16 or nothing"),
    *(
        Rule(flag=flag, destination=destination, allowed=(False,), remedy=_USE_DISTRIBUTED)
        for flag, destination in (
            ("--use-megatron-fsdp", "use_megatron_fsdp"),
            ("--use-torch-fsdp2", "use_torch_fsdp2"),
        )
    ),
    Rule(flag="--cuda-graph-impl", destination="cuda_graph_impl", allowed=("none",)),
    *(
        Rule(flag=flag, destination=destination, allowed=(False,))
        for flag, destination in (
            ("--enable-cuda-graph", "enable_cuda_graph"),
            ("--external-cuda-graph", "external_cuda_graph"),
            ("--tp-comm-overlap", "tp_comm_overlap"),
            ("--moe-grouped-gemm", "moe_grouped_gemm"),
            ("--use-flash-attn", "use_flash_attn"),
            ("--optimizer-cpu-offload", "optimizer_cpu_offload"),
            ("--use-nccl-ub", "nccl_ub"),
            # Gloo cannot average.
            ("--ddp-average-in-collective", "ddp_average_in_collective"),
            ("--use-sharp", "use_sharp"),
            ("--optimizer-cuda-graph", "optimizer_cuda_graph"),
        )
    ),
    *(
        Rule(flag=flag, destination=destination, allowed=(False,), remedy=_WITH_ENGINE)
        for flag, destination in (
            ("--moe-permute-fusion", "moe_permute_fusion"),
            ("--moe-router-fusion", "moe_router_fusion"),
            ("--use-precision-aware-optimizer", "use_precision_aware_optimizer"),
            ("--qk-clip", "qk_clip"),
            ("--log-max-attention-logit", "log_max_attention_logit"),
            ("--fp8-param-gather", "fp8_param_gather"),
            ("--fp4-param-gather", "fp4_param_gather"),
            ("--use-transformer-engine-op-fuser", "use_transformer_engine_op_fuser"),
            ("--use-te-activation-func", "use_te_activation_func"),
            ("--fine-grained-activation-offloading", "fine_grained_activation_offloading"),
        )
    ),
    Rule(
        flag="--cpu-offloading-num-layers",
        destination="cpu_offloading_num_layers",
        allowed=(0,),
        remedy=_WITH_ENGINE,
    ),
    Rule(
        flag="--symmetric-ar-type",
        destination="symmetric_ar_type",
        allowed=(None,),
        remedy=_WITH_ENGINE,
    ),
    Rule(
        flag="--moe-token-dispatcher-type",
        destination="moe_token_dispatcher_type",
        allowed=("allgather", "alltoall"),
        remedy="DeepEP, HybridEP and NCCL EP need GPUs; use 'alltoall'",
    ),
)


def check_cpu_arguments(args: argparse.Namespace) -> None:
    """Refuse what was asked for and cannot work on the CPU.

    Raises:
        UnsupportedError: Names the flag, its value and what to use instead.
    """
    check_rules(args, CPU_RULES, "on the CPU (--cpu)")
    repeated = getattr(args, "recompute_modules", None) or ()
    if getattr(args, "recompute_granularity", None) == "selective" and "layernorm" in repeated:
        raise UnsupportedError(
            "--recompute-modules layernorm does not work on the CPU (--cpu): Megatron repeats "
            "norms with Transformer Engine alone (leave layernorm out)"
        )
    if getattr(args, "use_distributed_optimizer", False) and args.optimizer != "adam":
        raise UnsupportedError(
            f"--optimizer {args.optimizer} with --use-distributed-optimizer does not work on the "
            "CPU (--cpu), because Megatron saves Adam's state only: leave out one of the two"
        )


def wrap_argument_parsing() -> None:
    """Set the defaults where Megatron makes its parser and check before it validates."""
    from megatron.training import arguments

    add_megatron_arguments = needed(arguments, "add_megatron_arguments")
    validate_args = needed(arguments, "validate_args")

    @functools.wraps(add_megatron_arguments)
    def add_with_cpu_defaults(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_megatron_arguments(parser)
        parser.set_defaults(**CPU_DEFAULTS)
        return parser

    @functools.wraps(validate_args)
    def validate_for_cpu(args: argparse.Namespace, defaults: dict[str, Any] | None = None) -> Any:
        check_cpu_arguments(args)
        return validate_args(args, defaults or {})

    rebind("add_megatron_arguments", add_megatron_arguments, add_with_cpu_defaults)
    rebind("validate_args", validate_args, validate_for_cpu)
