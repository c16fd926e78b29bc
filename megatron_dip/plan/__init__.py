"""Plans: actions, dependencies, lowering, validation, and the forms in files."""

from megatron_dip.plan.actions import Action, ActionType, format_actions, parse_actions
from megatron_dip.plan.graph import Message, PipelineGraph, Work
from megatron_dip.plan.plan import Estimate, Plan, Recompute, load_plan, parse_plan, save_plan

__all__ = [
    "Action",
    "ActionType",
    "Estimate",
    "Message",
    "PipelineGraph",
    "Plan",
    "Recompute",
    "Work",
    "format_actions",
    "load_plan",
    "parse_actions",
    "parse_plan",
    "save_plan",
]
