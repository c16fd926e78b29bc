"""Stages of LaVIN's language tower: a causal backbone with routed adapters.

Rows of a batch: the modality rows of its samples, each a span of its own, and the samples.  The
first stage fills modality rows from the table and image rows from the neck, which turns the vision
tower's features into rows of this tower.  Both are whole on every tensor-parallel rank.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dip.families.lavin.adapter import AdapterOptions, Routing, initial_distribution
from megatron_dip.families.lavin.layers import adapted_block_submodules, routed_span_params
from megatron_dip.families.packed.attention import SpanParams
from megatron_dip.families.packed.language import LanguageStage
from megatron_dip.families.packed.stage import pad_rows

if TYPE_CHECKING:
    from megatron_dip.families.lavin.batches import RoutedBatch
    from megatron_dip.families.vlm.batches import LanguageBatch

__all__ = ["NUM_MODALITIES", "LavinLanguageStage", "Neck"]

NUM_MODALITIES = 2
"""Rows of the modality table: text, image."""


class Neck(torch.nn.Module):
    """Two linear layers with SiLU between: rows of the vision tower to rows of this one."""

    def __init__(
        self, feature_size: int, middle_size: int, hidden_size: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(feature_size, middle_size, dtype=dtype)
        self.outer = torch.nn.Linear(middle_size, hidden_size, dtype=dtype)

    def forward(self, features: Tensor) -> Tensor:
        """``[M, H_v]`` to ``[M, H]``."""
        rows: Tensor = self.outer(torch.nn.functional.silu(self.inner(features)))
        return rows


class LavinLanguageStage(LanguageStage):
    """As ``LanguageStage``, with adapters; its input from upstream is ``[M, 1, H_v]``.

    Args:
        config: The language module's config, of all its layers.
        adapter: Shape of the adapters.
        feature_size: H_v, the width of the vision tower.
        neck_size: Width between the two layers of the neck.
        more: As for ``LanguageStage``.

    Raises:
        PartitionError: The module does not have these layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        adapter: AdapterOptions,
        feature_size: int,
        neck_size: int,
        **more: Any,
    ) -> None:
        make_block = partial(adapted_block_submodules, options=adapter)
        super().__init__(config, make_block=make_block, **more)
        if self.pre_process:
            dtype = config.params_dtype
            self.adapter_neck = Neck(feature_size, neck_size, config.hidden_size, dtype)
            self.adapter_modality = torch.nn.Embedding(
                NUM_MODALITIES, config.hidden_size, dtype=dtype
            )

    def initial_distribution(self, name: str) -> Callable[[Tensor], object] | None:
        """Neck: Xavier; modality table: standard normal."""
        if name == "adapter_modality.weight":
            return torch.nn.init.normal_
        if name.startswith("adapter_neck."):
            is_weight = name.endswith("weight")
            return torch.nn.init.xavier_uniform_ if is_weight else torch.nn.init.zeros_
        return initial_distribution(name, self.config.hidden_size)

    def _spans(self, batch: "LanguageBatch", num_rows: int, device: torch.device) -> SpanParams:
        routed = cast("RoutedBatch", batch)
        # Rows of padding follow the first sample's gate; nothing is made of them.
        gate_of_row = pad_rows(routed.gate_of_row, num_rows)
        routing = Routing(source_rows=routed.modality_rows, gate_of_row=gate_of_row)
        return routed_span_params(
            batch.span_lengths,
            num_rows=num_rows,
            device=device,
            routing=routing,
            has_places=not self.config.apply_rope_fusion,
        )

    def _put_in(self, embedded: Tensor, batch: "LanguageBatch", upstream: Tensor | None) -> Tensor:
        routed = cast("RoutedBatch", batch)
        if upstream is not None:
            weight = self.adapter_neck.inner.weight
            features = upstream.reshape(-1, upstream.shape[-1]).to(weight.dtype)
            embedded = super()._put_in(embedded, batch, self.adapter_neck(features))
        rows: Tensor = self.adapter_modality(routed.modalities).unsqueeze(1).to(embedded.dtype)
        return embedded.index_copy(0, routed.modality_rows, rows)
