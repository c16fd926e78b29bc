"""Tune LaVIN's adapters, in the style of Megatron's own scripts.

    torchrun ... -m megatron_dip.launch examples/finetune_lavin.py --dip-config CONFIG ...

``--load`` brings the towers' weights, ``--load-adapters`` adapters to go on from, and
``--save-adapters`` names the file that gets the adapters alone at the end.
"""

import torch
from megatron.core.utils import StragglerDetector

from megatron_dip.families.iterators import data_sets, get_batch
from megatron_dip.families.lavin.adapter_files import AdapterFiles, add_adapter_arguments
from megatron_dip.families.loss_checks import check_loss
from megatron_dip.families.provider import build_model
from megatron_dip.integration.versions import parse_arguments, pretrain

stimer = StragglerDetector()


def loss_func(
    weights: torch.Tensor, num_units: int, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted sum of the losses of a microbatch, what to divide it by, and both for the log.

    Args:
        weights: [T], of every row's loss; see ``data.loss`` of the configuration.
        num_units: Supervised tokens, or samples.
        losses: [T].
    """
    loss = torch.sum(losses.float() * weights)
    check_loss(loss)
    units = torch.full((), num_units, dtype=torch.int, device=losses.device)
    return loss, units, {"lm loss": torch.stack([loss.detach(), units.float()])}


def forward_step(data_iterator, model):  # type: ignore[no-untyped-def]
    """One forward of what this rank holds; weights are asked for where the loss is."""
    with stimer(bdata=True):
        batch = get_batch(data_iterator)
    with stimer:
        output = model(batch)
    return output, lambda losses: loss_func(batch.loss_mask, batch.num_loss_units, losses)


if __name__ == "__main__":
    args = parse_arguments(add_adapter_arguments)
    with AdapterFiles(load=args.load_adapters, save=args.save_adapters):
        pretrain(args, data_sets, build_model, forward_step)
