"""What all stages share: the call of the executor, and what Megatron looks up in a model chunk."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dip.errors import CheckpointError
from megatron_dip.families.packed.shapes import padded_rows
from megatron_dip.models.layout import cut_config
from megatron_dip.models.staged import Part

__all__ = ["StageLayers", "StageModule", "check_weights", "pad_rows", "row_multiple"]

_LARGEST_WEIGHT = 1e4


class StageLayers(TypedDict):
    """Which part of its module a stage is."""

    first_layer: int
    num_layers: int
    """From ``first_layer`` on; may be 0."""
    first: bool
    """Whether it has what sits before the module's first layer."""
    last: bool
    """Whether it has what comes after the last one."""


class StageModule(MegatronModule):
    """Some consecutive layers of one module, with what sits before or after them.

    Subclasses name their parts as ``LLaVAModel`` does, so that checkpoint keys are the same.  They
    take the module's config, of all its layers; ``self.config`` is that of the stage.

    ``pre_process`` and ``post_process`` tell whether this is the first and the last stage of its
    module.  ``vp_stage`` is None because Megatron's virtual pipeline is not used.
    """

    def __init__(self, config: TransformerConfig, **layers: Unpack[StageLayers]) -> None:
        """
        Raises:
            PartitionError: The module does not have these layers.
        """
        super().__init__(config=cut_config(config, Part(module="", **layers)))
        self.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group = self.pg_collection.tp
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage: int | None = None
        self.num_layers = layers["num_layers"]
        self.pre_process = layers["first"]
        self.post_process = layers["last"]
        self.share_embeddings_and_output_weights = False
        self._input_tensor: Tensor | None = None
        self.register_load_state_dict_post_hook(_check_loaded)

    @abstractmethod
    def forward(
        self,
        hidden: Tensor | None,
        batch: Any,
        upstream: Tensor | None = None,
    ) -> Tensor:
        """Run the stage on one sub-microbatch.

        Args:
            hidden: The output of the module's stage before; None on its first stage.
            batch: The ``VisionBatch`` or ``LanguageBatch`` of the sub-microbatch.
            upstream: What upstream modules contribute; None where that is nothing.
        """

    def set_input_tensor(self, input_tensor: Tensor | Sequence[Tensor | None] | None) -> None:
        """What ``forward`` takes where its ``hidden`` is None: Megatron's schedules hand it so."""
        if input_tensor is None or isinstance(input_tensor, Tensor):
            self._input_tensor = input_tensor
        else:
            (self._input_tensor,) = input_tensor

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The weight that embedding and head share, where they share one."""
        return None

    def initial_distribution(self, name: str) -> Callable[[Tensor], object] | None:
        """What fills the parameter ``name`` at first; None where Megatron's config says."""
        return None

    @property
    def num_shards(self) -> int:
        """Tensor-parallel ranks that share the rows: 1 without sequence parallelism."""
        return self.tp_group.size() if self.config.sequence_parallel else 1

    def _num_rows(self, num_tokens: int) -> int:
        return padded_rows(num_tokens, self.num_shards * row_multiple(self.config))

    def _take_input(self, hidden: Tensor | None) -> Tensor | None:
        """The input of this call; nothing is kept, so that its memory can be freed."""
        taken = self._input_tensor if hidden is None else hidden
        self._input_tensor = None
        if self.pre_process:
            return None
        if taken is None:
            raise ValueError("a stage after the first one of its module needs hidden states")
        return taken

    def _check_rows(self, hidden: Tensor, num_tokens: int) -> None:
        """Rows that do not fit would otherwise be silently attended to across spans.

        Raises:
            ValueError: The hidden states have another number of rows than the batch.
        """
        expected = self._num_rows(num_tokens) // self.num_shards
        if hidden.shape[0] != expected:
            raise ValueError(
                f"hidden states of {hidden.shape[0]} rows for {num_tokens} tokens; expected "
                f"{expected} rows (rows are shared by {self.num_shards} ranks)"
            )


def _check_loaded(stage: torch.nn.Module, _: object) -> None:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    check_weights(dict(stage.named_parameters()), f"the checkpoint, as rank {rank} has loaded it")


def check_weights(weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that no training has made: checkpoints have no checksums.

    Raises:
        CheckpointError: A weight is not finite or beyond all measure; names the first such tensor.
    """
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # Also of what is not a number: every comparison with it is false.
        if not bool(tensor.detach().abs().max() <= _LARGEST_WEIGHT):
            raise CheckpointError(
                f"{source}: {name} holds values that are no numbers, infinite or above "
                f"{_LARGEST_WEIGHT:,.0f}: it is damaged, or was saved after training had diverged "
                f"(load an earlier one)"
            )


def row_multiple(config: TransformerConfig) -> int:
    """Of which the rows that a rank computes on are a multiple: what 8-bit kernels want."""
    return int(get_fp8_align_size(config.fp8_recipe)) if config.fp8 else 1


def pad_rows(rows: Tensor, num_rows: int) -> Tensor:
    """``rows`` with zeros below, so that there are ``num_rows``."""
    missing = num_rows - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
