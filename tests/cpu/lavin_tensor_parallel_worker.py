"""One of two ranks of LaVIN's tensor-parallel comparison; everything saved.

Usage: ``lavin_tensor_parallel_worker.py FOLDER MODE...`` in CPU mode; a mode is a router's
name, with ``+sequence`` (parallelism) and ``+recompute`` behind it, or not.
"""

import sys

import torch
from lavin_setup import clip_stages, gradients, language_stages, loss_of, microbatch, move_adapters
from models_setup import base_config, megatron_on_cpu
from models_tensor_parallel_worker import add_partial_gradients

from megatron_dip.families.lavin.checkpoint import base_digest, gather_adapters


def main() -> None:
    folder, *modes = sys.argv[1:]
    with megatron_on_cpu(tensor_parallel=2):
        rank = torch.distributed.get_rank()
        for mode in modes:
            torch.save(run(2, mode.split("+")), f"{folder}/{mode}-{rank}.pt")


def run(tensor_parallel, mode):
    """One step on cut towers; the numbers of rows do not divide by 2."""
    base = base_config(tensor_parallel=tensor_parallel, sequence_parallel="sequence" in mode)
    vision, language = clip_stages(base, (1,), gates=mode[0]), language_stages(base, (2,))
    stages = [*vision, *language]
    move_adapters(stages)
    recompute = ((0, 2), (0, 3)) if "recompute" in mode else ((), ())
    losses = loss_of(vision, language, microbatch(), recompute)
    losses.sum().backward()
    for stage in stages:
        for parameter in stage.parameters():
            parameter.requires_grad_(parameter.grad is not None)
    add_partial_gradients(stages, base)
    return {
        "losses": losses.detach(),
        "gradients": gradients(stages),
        "adapters": gather_adapters(stages),
        "digest": base_digest(stages),
    }


if __name__ == "__main__":
    main()
