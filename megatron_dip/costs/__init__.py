"""What work costs: time and memory of a sub-microbatch in a stage, and problems from sizes.

``shapes`` says what a model is, ``layers`` what its layers compute and move, ``devices`` how
fast a GPU does it, ``analytic`` and ``profile`` how long that takes, ``memory`` what it keeps,
``boundary`` what it hands on; ``builder`` makes batch problems of it and ``machine`` builders from
configurations.
"""

from megatron_dip.costs.boundary import Boundary, shape_boundary
from megatron_dip.costs.builder import ProblemBuilder
from megatron_dip.costs.kernels import Kernels
from megatron_dip.costs.layers import Parallelism
from megatron_dip.costs.machine import (
    ClusterConfig,
    cluster_builder,
    config_builder,
    load_cluster,
)
from megatron_dip.costs.profile import Profile, load_profile
from megatron_dip.costs.shapes import ModelShape, ModuleShape, load_model
from megatron_dip.costs.sizes import BatchSizes, ItemSize, ItemSizes
from megatron_dip.costs.work import WorkCosts, static_bytes, work_costs

__all__ = [
    "BatchSizes",
    "Boundary",
    "ClusterConfig",
    "ItemSize",
    "ItemSizes",
    "Kernels",
    "ModelShape",
    "ModuleShape",
    "Parallelism",
    "ProblemBuilder",
    "Profile",
    "WorkCosts",
    "cluster_builder",
    "config_builder",
    "load_cluster",
    "load_model",
    "load_profile",
    "shape_boundary",
    "static_bytes",
    "work_costs",
]
