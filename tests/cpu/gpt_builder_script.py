"""A pretrain script as users have it: GPTModel from Megatron's builder, its data sets as dicts.

Only the first and the last pipeline rank have data, and of tensor-parallel ranks the first.
Context-parallel ranks take their rows of every sample.
"""

from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import broadcast_data
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


def reads_data() -> bool:
    """Whether this pipeline rank embeds tokens or has the loss."""
    return mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage()


def build_datasets(num_samples):  # type: ignore[no-untyped-def]
    """Training, validation and test data."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split="90,9,1",
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    is_built = reads_data() and mpu.get_tensor_model_parallel_rank() == 0
    builder = BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: is_built, config)
    return builder.build()


build_datasets.is_distributed = True  # type: ignore[attr-defined]


def read_batch(data_iterator):  # type: ignore[no-untyped-def]
    """Tokens, positions, labels and loss mask, each [samples, tokens]; nothing in between."""
    if not reads_data():
        return [None] * 4
    data = None if data_iterator is None else next(data_iterator)
    numbers = broadcast_data(["tokens", "position_ids", "labels"], data, torch.int64)
    mask = broadcast_data(["loss_mask"], data, torch.float32)
    batch = {**numbers, **mask}
    if mpu.get_context_parallel_world_size() > 1:
        group = mpu.get_context_parallel_group()
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return list(batch.values())


def compute_loss(loss_mask, losses):  # type: ignore[no-untyped-def]
    """Sum of the losses, number of tokens, and both for the log."""
    loss = (losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().int()
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def run_forward_step(data_iterator, model):  # type: ignore[no-untyped-def]
    """One microbatch through this rank's part of the model."""
    tokens, positions, labels, loss_mask = read_batch(data_iterator)
    output = model(tokens, positions, None, labels=labels)
    return output, partial(compute_loss, loss_mask)


if __name__ == "__main__":
    pretrain_args = parse_and_validate_args()
    pretrain(
        pretrain_cfg_container_from_args(pretrain_args, gpt_config_from_args(pretrain_args)),
        build_datasets,
        ModelType.encoder_or_decoder,
        run_forward_step,
    )
    torch.distributed.destroy_process_group()
