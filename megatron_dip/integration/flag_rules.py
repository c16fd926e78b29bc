"""Flags of Megatron that only its own schedule can honour."""

from megatron_dip.integration.rules import LEAVE_OUT, Rule

__all__ = ["SCHEDULE_RULES"]

_BY_PARTITION = f"{LEAVE_OUT}; the partition of --dip-config says which layers a rank holds"

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
        flag="--overlap-param-gather",
        destination="overlap_param_gather",
        allowed=(False,),
        remedy=f"{LEAVE_OUT}; replicas run different plans and would gather in different orders",
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
