"""What precisions demand of the ranks that compute in them."""

import argparse

from megatron_dip.errors import UnsupportedError

__all__ = ["check_scaling_of_replicas"]


def check_scaling_of_replicas(args: argparse.Namespace) -> None:
    """Refuse 8-bit scales that replicas agree on in every forward.

    The recipe ``delayed`` ends every forward and backward of layers with a reduction over tensor-,
    context- and data-parallel ranks.  Replicas run different plans, and under Megatron's own
    schedule skip encoders that a microbatch has nothing for: they would reduce different numbers
    of times, and wait for each other for good.  Where a script sets ``tp_only_amax_red`` (Megatron
    has no flag for it) ranks of one replica agree, and those run one plan.

    Raises:
        UnsupportedError: Names the flags, and what to use.
    """
    if not getattr(args, "fp8", None) or getattr(args, "fp8_recipe", "delayed") != "delayed":
        return
    if getattr(args, "tp_only_amax_red", False):
        return
    per_replica = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    per_replica *= getattr(args, "context_parallel_size", 1)
    num_replicas = args.world_size // per_replica
    if num_replicas > 1:
        raise UnsupportedError(
            f"--fp8-recipe delayed, the default, does not work with {num_replicas} data-parallel "
            f"replicas: it reduces scales over all of them in every forward, and they run "
            f"a different number of them (use --fp8-recipe tensorwise, blockwise or mxfp8)"
        )
