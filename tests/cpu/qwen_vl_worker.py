"""Qwen2.5-VL of megatron-bridge in stages against the whole model, in one process.

Usage: ``megatron_dip.launch --cpu qwen_vl_worker.py``; prints a line per check.
"""

from megatron_dip.integration import cpu_mode

# Of 64 bits: images and videos go through the tower in one call, not in two.
ROUNDING = 1e-12


def main() -> None:
    assert cpu_mode.is_enabled()
    import bridge_setup
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    bridge_setup.stand_in()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    check_stages()
    torch.distributed.destroy_process_group()


def step(iterator, model):
    """What ``vlm_step`` of megatron-bridge does with a batch, without its state."""
    batch = dict(next(iterator))
    visual = batch.pop("visual_inputs").normalized_for_model()
    output = model(input_ids=batch.pop("tokens"), **batch, **visual)
    mask = batch["loss_mask"]
    return output, lambda losses: ((losses * mask).sum(), int(mask.sum()))


CUTS = (
    {"vision": (4,), "language": (3,)},
    {"vision": (1, 3), "language": (1, 2)},
    {"vision": (0, 3, 1, 0), "language": (0, 2, 1, 0)},
)
SINGLE = {"vision": [[0], [3, 1], [2]], "language": [[1], [0]]}


def check_stages() -> None:
    from bridge_setup import finalized, tiny_batch, tiny_provider
    from megatron.bridge.models.qwen_vl.modeling_qwen25_vl import Qwen25VLModel
    from staged_loop import Setting, assert_same, run_stages, run_whole

    from megatron_dip.models.qwen_vl import StagedQwenVL

    batch = tiny_batch()
    setting = Setting(Qwen25VLModel, StagedQwenVL, {"config": finalized(tiny_provider())}, step)
    whole = run_whole(setting, batch)
    for cuts in CUTS:
        found = run_stages(setting, batch, cuts)
        assert found.loss == whole.loss
        assert_same(found, whole, tolerance=ROUNDING)
        print(f"equal: {cuts}")
        assert_same(
            run_stages(setting, batch, cuts, SINGLE), whole, tolerance=1e-6, loss_tolerance=1e-6
        )
        print(f"equal in single items: {cuts}")


if __name__ == "__main__":
    main()
