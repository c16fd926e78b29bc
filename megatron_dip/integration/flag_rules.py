"""Flags of Megatron that only its own schedule can honour."""

from typing import Any

from megatron_dip.integration.rules import LEAVE_OUT, Rule

__all__ = ["CHECKPOINT_RULES", "LATER_RULES", "SCHEDULE_RULES"]

_BY_PARTITION = f"{LEAVE_OUT}; the schedule of --dip-config says which layers a rank holds"

_IN_ORDER = f"{LEAVE_OUT}; a plan says when every rank computes, and Megatron's schedules do that"
_ONE_DIVISION = (
    f"{LEAVE_OUT}; it needs one pipeline rank, and plans divide every sample alike: use "
    f"--context-parallel-size"
)
_WHOLE_WEIGHTS = f"{LEAVE_OUT}; use --use-distributed-optimizer"
_SHAPES = f"{LEAVE_OUT}; it needs one shape and order for all batches"
_KEPT = f"{LEAVE_OUT}; plans count on what layers keep, and recompute layers where memory is short"
_GATHERED = (
    f"{LEAVE_OUT}; every forward would gather weights from other replicas, whose plans are in "
    f"another order"
)
_COUNTED = f"{LEAVE_OUT}; it counts the microbatches of a step in the order of Megatron's schedules"


def _rules(remedy: str, *flags: str, off: Any = False) -> tuple[Rule, ...]:
    """Rules for flags that must be as where they are not given: ``off``."""
    return tuple(
        Rule(
            flag=flag,
            destination=flag.removeprefix("--").replace("-", "_"),
            allowed=(off,),
            remedy=remedy,
        )
        for flag in flags
    )


SCHEDULE_RULES: tuple[Rule, ...] = (
    *(
        Rule(flag=flag, destination=destination, allowed=(None,), remedy=_BY_PARTITION)
        for flag, destination in (
            ("--decoder-first-pipeline-num-layers", "decoder_first_pipeline_num_layers"),
            ("--decoder-last-pipeline-num-layers", "decoder_last_pipeline_num_layers"),
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
    Rule(
        flag="--pipeline-model-parallel-comm-backend",
        destination="pipeline_model_parallel_comm_backend",
        allowed=(None,),
        remedy=f"{LEAVE_OUT}; plans have groups of their own for transfers",
    ),
    Rule(
        flag="--disable-gloo-process-groups",
        destination="use_gloo_process_groups",
        allowed=(True,),
        remedy=f"{LEAVE_OUT}; plans travel over gloo",
    ),
    *_rules(
        _BY_PARTITION,
        "--num-layers-per-virtual-pipeline-stage",
        "--num-virtual-stages-per-pipeline-rank",
        "--pipeline-model-parallel-layout",
        off=None,
    ),
    Rule(
        flag="--microbatch-group-size-per-virtual-pipeline-stage",
        destination="microbatch_group_size_per_vp_stage",
        allowed=(None,),
        remedy=_BY_PARTITION,
    ),
    *_rules(_BY_PARTITION, "--mtp-standalone"),
    *_rules(
        _IN_ORDER,
        "--overlap-param-gather-with-optimizer-step",
        "--overlap-moe-expert-parallel-comm",
        "--overlap-dispatch-backward-with-experts-wgrad",
        "--delay-wgrad-compute",
        "--defer-embedding-wgrad-compute",
        "--use-ring-exchange-p2p",
    ),
    Rule(
        flag="--overlap-p2p-communication-warmup-flush",
        destination="overlap_p2p_comm_warmup_flush",
        allowed=(False,),
        remedy=_IN_ORDER,
    ),
    Rule(
        flag="--timing-log-level",
        destination="timing_log_level",
        allowed=(0, 1),
        remedy="use 0 or 1; timers of level 2 stop the host inside a plan until the device has "
        "done all, also receives that were posted ahead, so that ranks would wait for each other: "
        "--dip-trace-dir records the times of stages",
    ),
    *_rules(_ONE_DIVISION, "--hybrid-context-parallel"),
    *_rules(_WHOLE_WEIGHTS, "--use-megatron-fsdp", "--use-torch-fsdp2"),
    *_rules(
        _GATHERED,
        "--tensor-parallel-num-weight-shards",
        "--expert-tensor-parallel-num-weight-shards",
        off=None,
    ),
    *_rules(_SHAPES, "--enable-cuda-graph", "--external-cuda-graph"),
    *_rules(_SHAPES, "--cuda-graph-impl", off="none"),
    *_rules(_KEPT, "--fine-grained-activation-offloading", "--moe-paged-stash"),
    *_rules(_KEPT, "--cpu-offloading-num-layers", off=0),
    *_rules(
        f"{LEAVE_OUT}; Megatron would run a plan's step again in parts",
        "--moe-expert-rank-capacity-factor",
        off=None,
    ),
    *_rules(_COUNTED, "--logits-save-dir", "--logits-load-dir", off=None),
    *_rules(
        f"{LEAVE_OUT}; what a stage holds is read off its weights when it is built",
        "--init-model-with-meta-device",
        "--moe-use-upcycling",
        "--freeze-all-layers",
    ),
    *_rules(
        f"{LEAVE_OUT}; the groups and planners of plans would outlive it: restart the job",
        "--inprocess-restart",
    ),
    *_rules(f"{LEAVE_OUT}; a plan is for batches that are there", "--perform-rl-step"),
    *_rules(f"{LEAVE_OUT}; the ranks of a plan must be there", "--fake-process-group"),
)

LATER_RULES: tuple[Rule, ...] = _rules(
    f"{LEAVE_OUT}; stages hand on one stream of rows, and these connections have several",
    "--enable-mhc-connections",
)
"""As the rules before, of flags of the main branch after 0.19."""

CHECKPOINT_RULES: tuple[Rule, ...] = (
    Rule(
        flag="--ckpt-format",
        destination="ckpt_format",
        allowed=("torch_dist",),
        remedy="use 'torch_dist'; other formats cannot be loaded under another partition",
    ),
    Rule(
        flag="--ckpt-convert-format",
        destination="ckpt_convert_format",
        allowed=(None,),
        remedy=f"{LEAVE_OUT}; only 'torch_dist' can be loaded",
    ),
)
"""Of runs that save or load checkpoints."""
