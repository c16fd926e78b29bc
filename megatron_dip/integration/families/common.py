"""What several families need: rules of boundaries, stock models, an index that all ranks share."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.data import load_tokenizer
from megatron_dip.errors import ConfigError, DataError
from megatron_dip.models.stage import StageModule
from megatron_dip.runtime import BoundaryRule

__all__ = ["StockModel", "check_vocabulary", "make_on_first_rank", "row_rule"]


def row_rule(
    config: TransformerConfig, width: int, *, sharded: bool = True, **more: Any
) -> BoundaryRule:
    """Rows of ``width``; ``sharded``: sequence parallelism divides them among its ranks.

    ``more`` are further fields of the rule.
    """
    is_shared = sharded and config.sequence_parallel
    return BoundaryRule(
        width=width,
        dtype=config.pipeline_dtype or config.params_dtype,
        num_shards=mpu.get_tensor_model_parallel_world_size() if is_shared else 1,
        **more,
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


class StockModel(MegatronModule):
    """What one rank holds under Megatron's own schedule: whole modules, and a run of layers of one.

    Checkpoints have the stages' own names, as under ``--dip-schedule``.
    """

    def __init__(self, config: TransformerConfig, *, pre_process: bool, post_process: bool) -> None:
        super().__init__(config=config)
        self.pre_process, self.post_process = pre_process, post_process
        self.vp_stage = None
        self.share_embeddings_and_output_weights = False
        self._input: torch.Tensor | None = None

    @abstractmethod
    def stages(self) -> list[StageModule]:
        """The parts of modules that this rank holds, that with the loss last."""

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        return self.stages()[-1].shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: list[torch.Tensor | None]) -> None:
        (self._input,) = input_tensor

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The stages' own names: the same checkpoint as under ``--dip-schedule``."""
        state: dict[str, Any] = {}
        for stage in self.stages():
            state.update(stage.sharded_state_dict(prefix, sharded_offsets, metadata))
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> None:
        for stage in self.stages():
            names = tuple(f"{name}." for name, _ in stage.named_children())
            own = {key: value for key, value in state_dict.items() if key.startswith(names)}
            stage.load_state_dict(own, strict=strict)
