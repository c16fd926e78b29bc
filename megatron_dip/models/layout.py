"""Build layers ``[first_layer, first_layer + num_layers)`` of a module with Megatron's own blocks.

Megatron asks a config's pipeline layout how many layers to build and at which global layer they
start.  Its own layout answers for one module spread over all pipeline ranks; the layout here
answers for one stage, whatever rank builds it.  Layer numbers stay global, and with them
checkpoint keys, per-layer settings and the scaling of initial weights.
"""

import copy
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.errors import PartitionError

__all__ = ["SegmentLayout", "slice_config"]


class SegmentLayout(PipelineParallelLayerLayout):
    """The layout of one stage, in the form in which Megatron asks for it.

    The base class parses a layout of the whole pipeline and demands exactly one embedding and one
    loss in it, so its constructor is not used; the attributes that Megatron reads are set here.
    """

    def __init__(
        self, *, first_layer: int, num_layers: int, num_ranks: int, first: bool, last: bool
    ) -> None:
        row = [LayerType.embedding] if first else []
        row += [LayerType.decoder] * num_layers
        row += [LayerType.loss] if last else []
        self.first_layer = first_layer
        self.input_data = f"layers [{first_layer}, {first_layer + num_layers})"
        self.pipeline_model_parallel_size = num_ranks
        self.virtual_pipeline_model_parallel_size = 1
        # The same row for every rank: the answer is about this stage, not about the rank.
        self.layout = [[row] for _ in range(num_ranks)]
        self.flatten_layout = row

    def get_num_layers_to_build(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """Layers of ``layer_type`` in this stage."""
        return self.flatten_layout.count(layer_type)

    def get_layer_offset(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """Layers of the module before this stage."""
        return self.first_layer if layer_type == LayerType.decoder else 0

    def __repr__(self) -> str:
        return f"SegmentLayout({self.input_data})"


def slice_config(
    config: TransformerConfig, *, first_layer: int, num_layers: int, first: bool, last: bool
) -> Any:
    """A copy of ``config`` with which Megatron builds one stage of the module.

    ``first`` and ``last`` tell whether the stage carries what sits before the module's first and
    after its last layer.  The copy keeps the module's number of layers.

    Raises:
        PartitionError: The module does not have these layers.
    """
    if first_layer < 0 or num_layers < 0 or first_layer + num_layers > config.num_layers:
        raise PartitionError(
            f"layers [{first_layer}, {first_layer + num_layers}) of a module of "
            f"{config.num_layers} layers: a stage must lie inside its module"
        )
    # A shallow copy: constructing anew would check the layer count against the pipeline size.
    sliced = copy.copy(config)
    # Megatron only asks for the offset where it believes that there is a pipeline, and this
    # field is read for nothing else in the layers; process groups carry the real size.
    sliced.pipeline_model_parallel_size = max(config.pipeline_model_parallel_size, 2)
    sliced.virtual_pipeline_model_parallel_size = None
    sliced.num_layers_in_first_pipeline_stage = None
    sliced.num_layers_in_last_pipeline_stage = None
    sliced.pipeline_model_parallel_layout = SegmentLayout(
        first_layer=first_layer,
        num_layers=num_layers,
        num_ranks=sliced.pipeline_model_parallel_size,
        first=first,
        last=last,
    )
    return sliced
