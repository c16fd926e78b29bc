"""The executor and what it needs of torch: channels, stage runners, boundaries, measurement."""

from megatron_dip.runtime.agreement import agree_on_plan
from megatron_dip.runtime.boundary import BoundaryRule, BoundaryRules, message_shape
from megatron_dip.runtime.channels import Channels, create_channel_groups, pipeline_channels
from megatron_dip.runtime.executor import Executor
from megatron_dip.runtime.runner import (
    ForwardCall,
    ModuleRunner,
    SavedForward,
    StageInput,
    StageRunner,
    backward_inputs,
    backward_weights,
)
from megatron_dip.runtime.timeline import MeasuredSpan, Recorder

__all__ = [
    "BoundaryRule",
    "BoundaryRules",
    "Channels",
    "Executor",
    "ForwardCall",
    "MeasuredSpan",
    "ModuleRunner",
    "Recorder",
    "SavedForward",
    "StageInput",
    "StageRunner",
    "agree_on_plan",
    "backward_inputs",
    "backward_weights",
    "create_channel_groups",
    "message_shape",
    "pipeline_channels",
]
