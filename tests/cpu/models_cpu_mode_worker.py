"""Under CPU mode: dropout with recomputed layers, and a checkpoint that is read into other cuts.

Usage: ``megatron_dip.launch --cpu models_cpu_mode_worker.py FOLDER``; prints a line per check.
"""

import sys

from megatron_dip.integration import cpu_mode


def main() -> None:
    assert cpu_mode.is_enabled()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from models_setup import base_config

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    base = base_config(torch.float32)
    # Unset, so that weights are made as on a GPU.
    base.use_cpu_initialization = False
    check_dropout_with_recomputed_layers(base)
    check_checkpoint_of_another_cut(base, sys.argv[1])
    torch.distributed.destroy_process_group()


def check_dropout_with_recomputed_layers(base) -> None:
    import copy

    import torch
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from models_setup import language_batch, language_stages, run_chain

    with_dropout = copy.copy(base)
    with_dropout.hidden_dropout = with_dropout.attention_dropout = 0.2
    stages = language_stages(with_dropout, (2,))
    batch = language_batch(images=())

    def gradients(recompute_layers):
        model_parallel_cuda_manual_seed(5, force_reset_rng=True)
        torch.cuda.manual_seed(5)
        for stage in stages:
            stage.zero_grad()
        losses = run_chain(stages, batch, None, recompute_layers)
        losses.sum().backward()
        return losses.detach(), [
            parameter.grad.clone() for stage in stages for parameter in stage.parameters()
        ]

    losses, stored = gradients([])
    undisturbed = run_chain([stage.eval() for stage in stages], batch).detach()
    assert not torch.allclose(losses, undisturbed), "dropout did nothing"
    for stage in stages:
        stage.train()
    again, recomputed = gradients([0, 1, 3])
    assert torch.equal(losses, again)
    assert all(torch.equal(one, two) for one, two in zip(stored, recomputed, strict=True))
    print("dropout repeats in recomputed layers")


def check_checkpoint_of_another_cut(base, folder) -> None:
    import torch
    from megatron.core import dist_checkpointing
    from models_setup import language_stages, vision_stages

    from megatron_dip.families.packed.initialization import named_global_parameters

    def sharded(stages):
        return {f"model{i}": stage.sharded_state_dict() for i, stage in enumerate(stages)}

    def weights(stages):
        return {name: value for stage in stages for name, value in named_global_parameters(stage)}

    written = [*vision_stages(base, (1,)), *language_stages(base, (0, 3))]
    dist_checkpointing.save(sharded(written), folder)
    read = [*vision_stages(base, (0, 2)), *language_stages(base, (2, 4))]
    for parameter in weights(read).values():
        parameter.data.fill_(-1.0)
    loaded = dist_checkpointing.load(sharded(read), folder)
    for index, stage in enumerate(read):
        stage.load_state_dict(loaded[f"model{index}"])
    expected, found = weights(written), weights(read)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    print("a checkpoint was read into another cut")


if __name__ == "__main__":
    main()
