"""One of two tensor-parallel ranks: both modules, one step per mode, everything saved.

Usage: ``models_tensor_parallel_worker.py FOLDER MODE...`` in CPU mode; a mode is some of the
words ``rotary`` (positions), ``sequence`` (parallelism) and ``recompute``, joined by ``+``, or
``plain``.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
from megatron.core import parallel_state
from megatron.core.distributed.finalize_model_grads import (
    _allreduce_non_tensor_model_parallel_grads,
)
from models_setup import (
    ROTARY,
    TABLE,
    base_config,
    language_batch,
    language_stages,
    megatron_on_cpu,
    run_chain,
    vision_batch,
    vision_stages,
)

from megatron_dip.costs import Boundary, ItemSize
from megatron_dip.families.packed.initialization import named_global_parameters
from megatron_dip.integration.divided_rows import all_rows, own_rows

_MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride")


def main() -> None:
    folder, *modes = sys.argv[1:]
    with megatron_on_cpu(tensor_parallel=2):
        rank = torch.distributed.get_rank()
        for mode in modes:
            torch.save(run(2, set(mode.split("+"))), f"{folder}/{mode}-{rank}.pt")


def run(tensor_parallel, mode):
    """One step, features handed on as between pipeline ranks.

    39 tokens do not divide by 2: with sequence parallelism rows are padded.  Nor do the features.
    """
    base = base_config(tensor_parallel=tensor_parallel, sequence_parallel="sequence" in mode)
    tower = ROTARY if "rotary" in mode else TABLE
    vision, language = vision_stages(base, (1,), tower), language_stages(base, (2,))
    stages = [*vision, *language]
    weights = collect(stages, "data")
    images, text = vision_batch(tower), language_batch()
    if parallel_state.get_tensor_model_parallel_rank() > 0:
        # As a rank's data set has it: one decode for all ranks.
        images = replace(images, patches=None)
    recompute = "recompute" in mode
    features = run_chain(vision, images, recompute_layers=[1] if recompute else [])
    features.retain_grad()
    group = parallel_state.get_tensor_model_parallel_group()
    width, is_divided = features.shape[-1], tensor_parallel > 1
    rule = Boundary("packed", width, num_shards=tensor_parallel, is_gathered=is_divided)
    sent = own_rows(features, rule, group)
    arrived = sent.detach().requires_grad_()
    num_rows = features.shape[0]
    sizes = [ItemSize(tokens=num_rows, spans=(num_rows,))]
    read = all_rows(arrived, rule, sizes, group)
    losses = run_chain(language, text, read, [0, 3] if recompute else [])
    (losses * text.loss_mask).sum().backward()
    sent.backward(arrived.grad)
    add_partial_gradients(stages, base)
    return {
        "features": read.detach(),
        "sent rows": sent.shape[0],
        "features gradient": features.grad,
        "losses": losses.detach(),
        "weights": weights,
        "gradients": collect(stages, "main_grad"),
        "marks": {
            name: {mark: vars(parameter)[mark] for mark in _MARKS if mark in vars(parameter)}
            for stage in stages
            for name, parameter in named_global_parameters(stage)
        },
    }


def add_partial_gradients(stages, config) -> None:
    """What Megatron does before the optimizer's step."""
    for stage in stages:
        # What Megatron's wrapper for data parallelism would add.
        stage.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
        for parameter in stage.parameters():
            parameter.main_grad = parameter.grad
    _allreduce_non_tensor_model_parallel_grads(
        stages, config, parallel_state.get_tensor_model_parallel_group()
    )


def collect(stages, attribute):
    return {
        name: getattr(parameter, attribute).detach().clone()
        for stage in stages
        for name, parameter in named_global_parameters(stage)
    }


if __name__ == "__main__":
    main()
