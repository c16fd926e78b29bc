"""Plans: actions, dependencies, lowering, validation, and the forms in files."""

from megatron_dip.plan.actions import Action, ActionType, format_actions, parse_actions
from megatron_dip.plan.channels import Channel, one_queue_model, pipeline_channels
from megatron_dip.plan.graph import Message, PipelineGraph, Work
from megatron_dip.plan.plan import (
    Estimate,
    Offload,
    Plan,
    Recompute,
    load_plan,
    parse_plan,
    save_plan,
)
from megatron_dip.plan.queues import QueueModel

__all__ = [
    "Action",
    "ActionType",
    "Channel",
    "Estimate",
    "Message",
    "Offload",
    "PipelineGraph",
    "Plan",
    "QueueModel",
    "Recompute",
    "Work",
    "format_actions",
    "load_plan",
    "one_queue_model",
    "parse_actions",
    "parse_plan",
    "pipeline_channels",
    "save_plan",
]
