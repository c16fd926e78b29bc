"""What becomes of each group of Megatron's parser with any script under ``--dip-schedule``.

``flag_rules`` refuses single flags, and ``cpu_mode.arguments`` those that need a GPU; here a group
says who reads the rest of it.  A group is named by its title in the parser.
"""

from collections.abc import Mapping
from enum import StrEnum

__all__ = ["CONDITIONS", "PARSER_GROUPS", "Answer"]


class Answer(StrEnum):
    """Whether a run under a plan may use the flags of a group."""

    YES = "yes"
    """But for those that a rule refuses."""
    NO = "no"
    """A rule refuses the flag without which Megatron reads none of the others."""
    OTHERS = "not read"
    """Neither Megatron's training loop nor models that plans know read them."""


PARSER_GROUPS: Mapping[str, tuple[Answer, str]] = {
    "transformer configuration": (Answer.YES, "read by the script's model, whose stages are cut"),
    "network size": (Answer.YES, "read by the script's model"),
    "regularization": (Answer.YES, "Megatron's optimizers"),
    "profiling": (Answer.YES, "Megatron's loop; our own timelines are in --dip-trace-dir"),
    "training": (Answer.YES, "Megatron's loop and optimizers"),
    "rl": (Answer.NO, "a plan is for batches that are there"),
    "RNG and initialization": (
        Answer.YES,
        "dropout draws in the order in which a plan computes",
    ),
    "learning rate and weight decay": (Answer.YES, "Megatron's schedules of rates"),
    "checkpointing": (
        Answer.YES,
        "in torch_dist; activations and gradients that are dumped are named by chunk",
    ),
    "mixed precision": (Answer.YES, "Megatron's loss scale and buffers of gradients"),
    "distributed init": (Answer.YES, "Megatron's groups, reductions and gathers"),
    "validation": (Answer.YES, "Megatron's loop; a batch of evaluation has a plan of its own"),
    "data and dataloader": (Answer.YES, "read by the script's data sets"),
    "tokenizer": (Answer.YES, "read by the script"),
    "autoresume": (Answer.YES, "Megatron's loop"),
    "biencoder": (Answer.OTHERS, "a script of such a model is refused when it builds it"),
    "vision": (Answer.YES, "read by pretrain_vlm.py; classifiers of images are refused when built"),
    "moe": (Answer.YES, "read by the script's model"),
    "mla": (Answer.YES, "read by the script's model"),
    "experimental_attention_variant": (Answer.YES, "read by the script's model"),
    "heterogeneous architecture": (Answer.YES, "read by the script's model"),
    "logging": (Answer.YES, "Megatron's loop"),
    "Logits Distillation": (Answer.NO, "it counts microbatches in the order of 1F1B"),
    "straggler": (Answer.YES, "the script's forward step, which a plan calls"),
    "workload inspector": (Answer.YES, "Megatron's loop"),
    "inference": (Answer.OTHERS, "training reads none of them but those of CUDA graphs"),
    "Transformer-Engine": (Answer.YES, "layers of Transformer Engine"),
    "experimental": (Answer.YES, "Megatron's optimizer, and the script's model"),
    "one logger": (Answer.YES, "Megatron's loop"),
    "In-process restart": (Answer.NO, "groups and planners of plans would outlive it"),
    "ft_package": (Answer.YES, "Megatron's loop"),
    "rerun engine": (Answer.YES, "Megatron's loop; a step that is repeated keeps its plan"),
    "msc": (Answer.YES, "Megatron's files"),
    "sft": (Answer.YES, "packed documents are items with spans"),
    "fault injector": (Answer.YES, "Megatron's loop"),
}

_WHOLE = "with whole microbatches (no sub_microbatch_tokens)"
CONDITIONS: Mapping[str, str] = {
    "--moe-aux-loss-coeff": _WHOLE,
    "--moe-z-loss-coeff": _WHOLE,
    "--moe-expert-capacity-factor": _WHOLE,
    "--moe-router-load-balancing-type": (
        "not global_aux_loss; sinkhorn and quantile_balancing with whole microbatches"
    ),
    "--moe-token-dispatcher-type": (
        "alltoall, or flex with DeepEP (not run yet), where replicas share experts"
    ),
    "--mtp-num-layers": _WHOLE,
    "--dsa-indexer-loss-coeff": _WHOLE,
    "--tp-comm-overlap": f"a model of one module, {_WHOLE} (not run yet)",
    "--use-distributed-optimizer": "with --save also --dist-ckpt-optim-fully-reshardable",
    "--yaml-cfg": "refused: flags must be on the command line",
}
"""When a flag that no rule refuses as such works."""
