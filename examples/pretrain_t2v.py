"""Pretrain a text-to-video diffusion model, in the style of Megatron's own scripts.

    torchrun ... -m megatron_dip.launch examples/pretrain_t2v.py --dip-config CONFIG ...

What the model is, the configuration says: this differs from ``pretrain_vlm.py`` in the name of the
loss.  Without ``--dip-schedule`` it runs Megatron's own schedule with its own placement: the whole
text encoder with the first layers of the transformer on the first pipeline rank.
"""

import pretrain_vlm
import torch
from pretrain_vlm import stimer

from megatron_dip.families.iterators import get_batch


def loss_func(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """As for tokens, for the patches of a microbatch: [T] each, one where a patch counts."""
    loss, num_patches, report = pretrain_vlm.loss_func(loss_mask, losses)
    return loss, num_patches, {"velocity loss": report["lm loss"]}


def forward_step(data_iterator, model):  # type: ignore[no-untyped-def]
    """One forward of what this rank holds; the loss mask is asked for where the loss is."""
    with stimer(bdata=True):
        batch = get_batch(data_iterator)
    with stimer:
        output = model(batch)
    return output, lambda losses: loss_func(batch.loss_mask, losses)


if __name__ == "__main__":
    pretrain_vlm.main(forward_step)
