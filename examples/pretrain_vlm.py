"""Pretrain a vision-language model, in the style of Megatron's own scripts.

    torchrun ... -m megatron_dip.launch examples/pretrain_vlm.py --dip-config CONFIG ...

Without ``--dip-schedule`` it runs Megatron's own schedule with its own placement: the whole vision
tower with the first language layers on the first pipeline rank.
"""

import torch
from megatron.core.utils import StragglerDetector

from megatron_dip.families.arguments import add_arguments
from megatron_dip.families.iterators import data_sets, get_batch
from megatron_dip.families.loss_checks import check_loss
from megatron_dip.families.provider import build_model
from megatron_dip.integration.versions import parse_arguments, pretrain

stimer = StragglerDetector()


def loss_func(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the losses of a microbatch, its number of tokens, and both for the log.

    Args:
        loss_mask: [T], one where a token's loss counts.
        losses: [T].
    """
    loss = torch.sum(losses.float() * loss_mask)
    num_tokens = loss_mask.sum().to(torch.int)
    check_loss(loss)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator, model):  # type: ignore[no-untyped-def]
    """One forward of what this rank holds; the loss mask is asked for where the loss is."""
    with stimer(bdata=True):
        batch = get_batch(data_iterator)
    with stimer:
        output = model(batch)
    return output, lambda losses: loss_func(batch.loss_mask, losses)


def main(forward_step=forward_step):  # type: ignore[no-untyped-def]
    """Train the model of the configuration."""
    args = parse_arguments(add_arguments)
    pretrain(args, data_sets, build_model, forward_step)


if __name__ == "__main__":
    main()
