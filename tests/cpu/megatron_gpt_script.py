"""A pretrain script as users have it: a small GPT, made-up data, nothing of megatron-dip in it."""

from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from torch.utils.data import Dataset


class CountingDataset(Dataset):
    """Sequences that count upwards from a random token: what comes next can be learnt."""

    def __init__(self, num_samples: int, seq_length: int, vocab_size: int) -> None:
        self._num_samples = num_samples
        self._seq_length = seq_length
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # A draw from torch's default generator, as augmentations make it: how often data is
        # loaded must not change the dropout masks.
        torch.rand(1 + index % 3)
        first = (index * 37) % self._vocab_size
        tokens = (first + torch.arange(self._seq_length + 1)) % self._vocab_size
        return {"tokens": tokens[:-1], "labels": tokens[1:]}


def build_datasets(num_samples: list[int]) -> list[CountingDataset]:
    """Training, validation and test data; every rank loads its own."""
    args = get_args()
    return [CountingDataset(count, args.seq_length, args.vocab_size) for count in num_samples]


build_datasets.is_distributed = True  # type: ignore[attr-defined]


def build_model(
    pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **_: object
) -> GPTModel:
    """The slice of the model that belongs to this pipeline rank."""
    args = get_args()
    config = core_transformer_config_from_args(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        vp_stage=vp_stage,
    )


def compute_loss(
    num_tokens: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the losses, number of tokens, and both for the log."""
    loss = losses.float().sum()
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def run_forward_step(data_iterator, model):  # type: ignore[no-untyped-def]
    """One microbatch through this rank's part of the model."""
    batch = {name: value.cuda() for name, value in next(data_iterator).items()}
    tokens = batch["tokens"]
    positions = torch.arange(tokens.shape[1], device="cuda").expand_as(tokens)
    length = tokens.shape[1]
    mask = torch.ones((1, 1, length, length), dtype=torch.bool, device="cuda").triu(1)
    output = model(tokens, positions, mask, labels=batch["labels"])
    num_tokens = torch.tensor(tokens.numel(), dtype=torch.int, device=torch.cuda.current_device())
    return output, partial(compute_loss, num_tokens)


if __name__ == "__main__":
    pretrain_args = parse_and_validate_args()
    pretrain(
        pretrain_cfg_container_from_args(pretrain_args),
        build_datasets,
        ModelType.encoder_or_decoder,
        run_forward_step,
        model_provider=build_model,
    )
    if torch.distributed.get_rank() == 0:
        print(f"tensor parallel size was {parallel_state.get_tensor_model_parallel_world_size()}")
    torch.distributed.destroy_process_group()
