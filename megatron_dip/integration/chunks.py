"""Stages as Megatron model chunks.

``get_model`` accepts a list with attributes in place of a model, so a provider can return all
stages of a rank without Megatron's virtual pipeline being switched on.  Chunks may then differ in
number and kind between ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.families.packed.batches import StageData
from megatron_dip.partition import Stage

__all__ = ["ChunkList", "DipChunk", "StageBatch", "UpstreamRows", "order_features"]


class ChunkList(list[torch.nn.Module]):
    """The chunks of one rank; Megatron sets attributes on it as on a model."""


@dataclass(frozen=True, kw_only=True)
class UpstreamRows:
    """The rows of one upstream output: whose items are in it and how many rows each has."""

    module: str
    items: tuple[int, ...]
    num_rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StageBatch:
    """The data of one forward of one stage: what a script's ``get_batch`` hands on to the model."""

    data: StageData
    upstream: tuple[UpstreamRows, ...]
    """One per input tensor in a module's first stage; empty elsewhere."""
    recompute_layers: tuple[int, ...]

    @property
    def loss_mask(self) -> torch.Tensor:
        """[T], float; asked for where the loss is computed."""
        mask: torch.Tensor = self.data.loss_mask  # type: ignore[attr-defined]
        return mask

    @property
    def num_loss_units(self) -> int:
        """What the weighted losses are divided by; of families whose losses have weights."""
        units: int = self.data.num_loss_units  # type: ignore[attr-defined]
        return units


class DipChunk(MegatronModule):
    """One stage with what Megatron looks up through its wrappers.

    Args:
        stage_module: A stage of ``megatron_dip.models``.
        stage: Its place in the partition.
        config: The configuration that Megatron's training loop reads and writes; one object for
            all chunks of a rank.
        pipeline: What this rank needs to run plans; see :mod:`megatron_dip.integration.pipeline`.
    """

    def __init__(
        self, stage_module: Any, stage: Stage, config: TransformerConfig, pipeline: Any
    ) -> None:
        super().__init__(config=config)
        self.stage_module = stage_module
        self.stage = stage
        self.pipeline = pipeline
        self.pg_collection = stage_module.pg_collection
        self.pre_process = stage_module.pre_process
        self.post_process = stage_module.post_process
        # None: Megatron's own virtual pipeline is off, and it asserts that this agrees.
        self.vp_stage = None
        self.share_embeddings_and_output_weights = stage_module.share_embeddings_and_output_weights
        self._inputs: list[torch.Tensor] = []

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        weight: torch.Tensor | None = self.stage_module.shared_embedding_or_output_weight()
        return weight

    def set_input_tensor(self, input_tensor: Sequence[torch.Tensor]) -> None:
        """Keep what the next forward reads, in the order of its messages."""
        self._inputs = list(input_tensor)

    def forward(self, batch: StageBatch) -> torch.Tensor:
        """The stage's output: rows [T, 1, width], or losses [T] in the stage with the loss."""
        inputs, self._inputs = self._inputs, []
        hidden = upstream = None
        if batch.upstream:
            upstream = order_features(inputs, batch.upstream, batch.data.upstream_items)
        elif inputs:
            (hidden,) = inputs
        output: torch.Tensor = self.stage_module(
            hidden, batch.data, upstream, batch.recompute_layers
        )
        return output

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Mapping[str, Any]:
        """The stage's own: names in a checkpoint know nothing of chunks."""
        state: Mapping[str, Any] = self.stage_module.sharded_state_dict(
            prefix, sharded_offsets, metadata
        )
        return state

    def state_dict_for_save_checkpoint(
        self, prefix: str = "", keep_vars: bool = False
    ) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self.stage_module.state_dict(prefix=prefix, keep_vars=keep_vars)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        return self.stage_module.load_state_dict(state_dict, strict=strict)


def order_features(
    outputs: Sequence[torch.Tensor],
    rows: Sequence[UpstreamRows],
    wanted: Sequence[tuple[str, int]],
) -> torch.Tensor | None:
    """The rows of the ``wanted`` items, one after another, from several upstream outputs.

    Args:
        outputs: Per upstream sub-microbatch [rows, 1, width].
        rows: The items in each of them.
        wanted: Modules and numbers of items, in the order asked for.
    """
    if not wanted:
        return None
    features = outputs[0] if len(outputs) == 1 else torch.cat(list(outputs))
    features = features.squeeze(1)
    starts: dict[tuple[str, int], tuple[int, int]] = {}
    position = 0
    for part in rows:
        for item, count in zip(part.items, part.num_rows, strict=True):
            starts[part.module, item] = (position, count)
            position += count
    spans = [starts[item] for item in wanted]
    if spans == sorted(starts.values()):
        return features
    index = torch.cat([torch.arange(start, start + count) for start, count in spans])
    return features.index_select(0, index.to(features.device))
