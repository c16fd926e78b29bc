"""What several families need: rules of boundaries, an index that all ranks share, checks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import mpu
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.data import load_tokenizer
from megatron_dip.errors import ConfigError, DataError
from megatron_dip.runtime import BoundaryRule

__all__ = ["check_vocabulary", "make_on_first_rank", "row_rule"]


def row_rule(
    config: TransformerConfig, width: int, *, tokens_per_row: int = 1, sharded: bool = True
) -> BoundaryRule:
    """Rows of ``width``; ``sharded``: sequence parallelism divides them among its ranks."""
    is_shared = sharded and config.sequence_parallel
    return BoundaryRule(
        width=width,
        dtype=config.pipeline_dtype or config.params_dtype,
        tokens_per_row=tokens_per_row,
        num_shards=mpu.get_tensor_model_parallel_world_size() if is_shared else 1,
    )


def make_on_first_rank(make: Callable[[], Path], folder: Path) -> Path:
    """The file that ``make`` writes into ``folder``, made by the first rank of the world.

    The folder must be visible to all ranks.

    Raises:
        DataError: The first rank failed to make it; raised on all ranks.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [str(make()), None]
        except DataError as error:
            outcome = [None, str(error)]
        except OSError as error:
            outcome = [
                None,
                f"the data index cannot be kept in {folder} ({error.strerror}): name a folder "
                f"that can be written to as data.cache_folder",
            ]
    dist.broadcast_object_list(outcome, src=0)
    shared_path, failure = outcome
    if failure is not None:
        raise DataError(failure)
    return Path(shared_path)


def check_vocabulary(tokenizer: Path, vocab_size: int, field: str = "language") -> None:
    """
    Raises:
        ConfigError: ``model.<field>.vocab_size`` has no room for all tokens of the tokenizer.
        DataError: The tokenizer cannot be read.
    """
    found = load_tokenizer(tokenizer).vocab_size
    if found > vocab_size:
        raise ConfigError(
            f"{tokenizer} has {found} tokens but model.{field}.vocab_size is {vocab_size} "
            f"(raise it)"
        )
