"""A pretrain script as users have it: Megatron's LLaVAModel, a made-up image in every sequence.

The tower is on the first pipeline rank, as Megatron places it; every rank reads the data.  With
``--dataloader-type external`` the script has a loader of its own, and images are of one tile or of
``MOST_TILES``, as in ``examples/multimodal``.
"""

import copy
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, LLaVAModel
from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from torch.utils.data import DataLoader, Dataset, default_collate

IMAGE_SIZE, PATCH_SIZE = 8, 4
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
NUM_VISION_LAYERS, VISION_WIDTH = 3, 16
MOST_TILES = 5


class Pictures(Dataset):
    """Sequences of drawn tokens after one image; some of their tokens have no loss.

    Args:
        num_samples: How many.
        tiled: Whether the images of some sequences, four of eight, have many tiles.
    """

    def __init__(self, num_samples: int, *, tiled: bool = False) -> None:
        self._num_samples, self._tiled = num_samples, tiled

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        args = get_args()
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(args.vocab_size, (args.seq_length + 1,), generator=generator)
        tokens[index % 3] = DEFAULT_IMAGE_TOKEN_INDEX
        labels = tokens[1:].clone()
        mask = torch.ones(args.seq_length)
        mask[labels == DEFAULT_IMAGE_TOKEN_INDEX] = 0
        mask[args.seq_length - index % 5 :] = 0
        sample = {"tokens": tokens[:-1], "labels": labels.clamp(min=0), "loss_mask": mask}
        if not self._tiled:
            image = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
            return {"image": image, **sample}
        num_tiles = MOST_TILES if index % 8 < 4 else 1
        return {
            "image": torch.randn(num_tiles, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
            "num_tiles": torch.tensor([num_tiles], dtype=torch.int32),
            **sample,
        }


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A microbatch, its tiles one after another."""
    tiles = {name: torch.cat([one.pop(name) for one in samples]) for name in ("image", "num_tiles")}
    return {**default_collate(samples), **tiles}


def build_datasets(num_samples: list[int]) -> list[Any]:
    """Training, validation and test data, or the iterators of a loader of the script's own; every
    rank loads its own."""
    args = get_args()
    if args.dataloader_type != "external":
        return [Pictures(count) if count else None for count in num_samples]
    return [
        iter(
            DataLoader(
                Pictures(count, tiled=True), batch_size=args.micro_batch_size, collate_fn=collate
            )
        )
        if count
        else None
        for count in num_samples
    ]


build_datasets.is_distributed = True  # type: ignore[attr-defined]


def build_model(pre_process: bool = True, post_process: bool = True, **_: Any) -> LLaVAModel:
    """What belongs to this pipeline rank."""
    args = get_args()
    most_tiles = MOST_TILES if args.dataloader_type == "external" else 1
    num_rows = args.seq_length + most_tiles * NUM_PATCHES - 1
    # What a pipeline moves is as long as that.
    args.decoder_seq_length = num_rows
    language = core_transformer_config_from_args(args)
    vision = copy.deepcopy(language)
    vision.vision_model_type = "clip"
    vision.num_layers, vision.pipeline_model_parallel_size = NUM_VISION_LAYERS, 1
    vision.hidden_size, vision.ffn_hidden_size = VISION_WIDTH, 2 * VISION_WIDTH
    vision.kv_channels = VISION_WIDTH // vision.num_attention_heads
    projection = copy.deepcopy(language)
    projection.pipeline_model_parallel_size = 1
    layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=decoder_model_with_local_default_spec(None, False),
        language_vocab_size=args.padded_vocab_size,
        language_max_sequence_length=num_rows,
        vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=True,
        vision_projection_config=projection,
        vision_projection_layer_spec=layers,
        language_position_embedding_type="rope",
        pre_process=pre_process,
        post_process=post_process,
        add_encoder=mpu.is_pipeline_first_stage(),
        img_h=IMAGE_SIZE,
        img_w=IMAGE_SIZE,
        patch_dim=PATCH_SIZE,
    )


def compute_loss(loss_mask, losses):  # type: ignore[no-untyped-def]
    """Sum of the losses, number of tokens, and both for the log."""
    loss = (losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().int()
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def run_forward_step(data_iterator, model):  # type: ignore[no-untyped-def]
    """One microbatch through this rank's part of the model."""
    batch = {name: value.cuda() for name, value in next(data_iterator).items()}
    positions = torch.arange(batch["tokens"].shape[1]).expand_as(batch["tokens"])
    output, loss_mask = model(
        batch["image"],
        batch["tokens"],
        positions,
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        num_image_tiles=batch.get("num_tiles"),
    )
    return output, partial(compute_loss, loss_mask)


if __name__ == "__main__":
    pretrain(
        pretrain_cfg_container_from_args(parse_and_validate_args()),
        build_datasets,
        ModelType.encoder_or_decoder,
        run_forward_step,
        build_model,
    )
    torch.distributed.destroy_process_group()
