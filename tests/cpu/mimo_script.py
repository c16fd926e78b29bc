"""A pretrain script as users have it: a small MimoModel, made-up data, nothing of megatron-dip.

Every rank reads the data.  Weights are set by name, so that they do not depend on the cut.
"""

from functools import partial

import torch
from megatron.core.enums import ModelType
from megatron.core.models.mimo import MimoModel
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from mimo_setup import IMAGE_TOKEN, NUM_TOKENS, ROWS_PER_SOUND, SOUND_TOKEN, mimo_config
from staged_loop import set_weights
from torch.utils._pytree import tree_map_only


class Samples(torch.utils.data.Dataset):
    """An image and a sound each, at places of their own."""

    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(1, 50, (NUM_TOKENS,), generator=generator)
        start = index % 3
        tokens[start : start + 5] = IMAGE_TOKEN
        tokens[start + 7 : start + 10] = SOUND_TOKEN
        return {
            "input_ids": tokens,
            "position_ids": torch.arange(NUM_TOKENS),
            "labels": torch.roll(tokens, -1).clamp(max=50),
            "loss_mask": (tokens < 50).float(),
            "modality_inputs": {
                "images": {"clip": {"x": torch.randn(3, 4, 4, generator=generator)}},
                "sounds": {
                    "frames": {"frames": torch.randn(ROWS_PER_SOUND, 4, generator=generator)}
                },
            },
        }


def build_datasets(num_samples):
    return [Samples(count) for count in num_samples]


build_datasets.is_distributed = True


def build_model(pg_collection=None, **_):
    given = mimo_config("images", "sounds", dtype=torch.float32)
    given.language_model_spec.params["config"].calculate_per_token_loss = True
    model = MimoModel(given)
    # Megatron's loop asks for it.
    model.pg_collection = pg_collection
    set_weights(model)
    return model


def compute_loss(loss_mask, losses):
    loss = (losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().int()
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    moved = tree_map_only(torch.Tensor, lambda one: one.cuda(non_blocking=True), batch)
    losses, loss_mask = model(**moved)
    return losses, partial(compute_loss, loss_mask)


if __name__ == "__main__":
    pretrain(
        pretrain_cfg_container_from_args(parse_and_validate_args()),
        build_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider=build_model,
    )
    torch.distributed.destroy_process_group()
