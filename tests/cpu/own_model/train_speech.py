"""A pretrain script of somebody's own, for SpeechModel; nothing of megatron-dip in it."""

import copy
from functools import partial
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from my_models import FRAMES_PER_ROW, SpeechModel
from torch.utils.data import Dataset

NUM_FEATURES = 8
NUM_FRAMES = 12


class Speech(Dataset):
    """Frames whose mean says with which token a sequence begins."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        args = get_args()
        random = torch.Generator().manual_seed(index)
        frames = torch.randn(NUM_FRAMES, NUM_FEATURES, generator=random)
        first = int(torch.randint(args.vocab_size, (1,), generator=random))
        tokens = (first + torch.arange(args.seq_length + 1)) % args.vocab_size
        loss_mask = torch.ones(args.seq_length)
        loss_mask[: NUM_FRAMES // FRAMES_PER_ROW + index % 3] = 0.0
        return {
            "frames": frames + first / args.vocab_size,
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": loss_mask,
        }


def build_datasets(num_samples: list[int]) -> list[Speech]:
    """Training, validation and test data, on every rank."""
    return [Speech(max(1, count)) for count in num_samples]


build_datasets.is_distributed = True  # type: ignore[attr-defined]


def build_model(pre_process: bool = True, post_process: bool = True, **_: Any) -> SpeechModel:
    """What this pipeline rank holds."""
    args = get_args()
    config = core_transformer_config_from_args(args)
    encoder_config = copy.deepcopy(config)
    encoder_config.num_layers = 3
    encoder_config.pipeline_model_parallel_size = 1
    return SpeechModel(
        config,
        encoder_config,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        num_features=NUM_FEATURES,
        pre_process=pre_process,
        post_process=post_process,
        add_encoder=pre_process,
    )


def compute_loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> Any:
    """Sum of the losses, number of tokens, and both for the log."""
    loss = (losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def run_forward_step(data_iterator: Any, model: torch.nn.Module) -> Any:
    """One microbatch through this rank's part of the model."""
    batch = {name: value.cuda() for name, value in next(data_iterator).items()}
    loss_mask = batch.pop("loss_mask")
    return model(**batch), partial(compute_loss, loss_mask)


if __name__ == "__main__":
    pretrain(
        pretrain_cfg_container_from_args(parse_and_validate_args()),
        build_datasets,
        ModelType.encoder_or_decoder,
        run_forward_step,
        model_provider=build_model,
    )
    torch.distributed.destroy_process_group()
