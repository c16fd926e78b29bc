"""Configurations and specs of a module cut into stages, for Megatron's own constructors.

Megatron asks a config's pipeline layout how many layers to build and at which global layer they
start.  Its own layout answers for one module spread over all pipeline ranks; the layout here
answers for one stage, whatever rank builds it.  Layer numbers stay global, and with them
checkpoint keys, per-layer settings and the scaling of initial weights.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.errors import PartitionError, UnsupportedError
from megatron_dip.models.staged import Part

__all__ = ["StageLayout", "cut_config", "cut_spec"]


class StageLayout(PipelineParallelLayerLayout):
    """The layout of one stage, in the form in which Megatron asks for it.

    The base class parses a layout of the whole pipeline and demands exactly one embedding and one
    loss in it, so its constructor is not used; the attributes that Megatron reads are set here.

    Args:
        part: The stage.
        num_ranks: Pipeline ranks that Megatron may ask about.
        num_prediction_layers: Layers of multi-token prediction, which go with the last stage.
    """

    def __init__(self, part: Part, *, num_ranks: int, num_prediction_layers: int = 0) -> None:
        row = [LayerType.embedding] if part.first else []
        row += [LayerType.decoder] * part.num_layers
        row += [LayerType.mtp] * num_prediction_layers + [LayerType.loss] if part.last else []
        self.first_layer = part.first_layer
        self.input_data = f"layers [{part.layers.start}, {part.layers.stop})"
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
        """Layers of the module before this stage; layers of prediction are all in one stage."""
        return self.first_layer if layer_type == LayerType.decoder else 0

    def __repr__(self) -> str:
        return f"StageLayout({self.input_data})"


def cut_config(config: TransformerConfig, part: Part) -> Any:
    """A copy of ``config`` with which Megatron builds one stage of the module.

    The copy keeps the module's number of layers.

    Raises:
        PartitionError: The module does not have these layers.
    """
    start, stop = part.first_layer, part.first_layer + part.num_layers
    if start < 0 or part.num_layers < 0 or stop > config.num_layers:
        raise PartitionError(
            f"layers [{start}, {stop}) of a module of {config.num_layers} layers: a stage must lie "
            "inside its module"
        )
    # A shallow copy: constructing anew would check the layer count against the pipeline size.
    cut = copy.copy(config)
    # Megatron only asks for the offset where it believes that there is a pipeline, and this
    # field is read for nothing else in the layers; process groups carry the real size.
    cut.pipeline_model_parallel_size = max(config.pipeline_model_parallel_size, 2)
    cut.virtual_pipeline_model_parallel_size = None
    cut.num_layers_in_first_pipeline_stage = None
    cut.num_layers_in_last_pipeline_stage = None
    cut.pipeline_model_parallel_layout = StageLayout(
        part,
        num_ranks=cut.pipeline_model_parallel_size,
        num_prediction_layers=config.mtp_num_layers or 0,
    )
    return cut


def cut_spec(spec: Any, part: Part, num_layers: int) -> Any:
    """The specs of a stage's layers out of ``spec``, which a script made for the whole module.

    Args:
        spec: What Megatron's blocks take: the spec of any layer, which is returned as it is, or
            the submodules of a block with a spec per layer; also the spec of a block with such
            submodules, or the plain list of the layers' specs.
        part: The stage.
        num_layers: Of the module.

    Raises:
        UnsupportedError: The specs are not those of all layers: they were made for one rank of
            a pipeline, before there was a way to ask for all.
    """
    if isinstance(spec, TransformerBlockSubmodules):
        return replace(spec, layer_specs=_cut_list(spec.layer_specs or [], part, num_layers))
    if isinstance(spec, list | tuple):
        return _cut_list(spec, part, num_layers)
    if isinstance(spec, ModuleSpec) and isinstance(spec.submodules, TransformerBlockSubmodules):
        cut = copy.copy(spec)
        cut.submodules = cut_spec(spec.submodules, part, num_layers)
        return cut
    return spec


def _cut_list(specs: Sequence[Any], part: Part, num_layers: int) -> list[Any]:
    if len(specs) != num_layers:
        raise UnsupportedError(
            f"module {part.module}: the script made specs of {len(specs)} layers for a module of "
            f"{num_layers} (expected one per layer: make the config and its specs in the model "
            "provider, which runs when the stages are built)"
        )
    return list(specs[part.first_layer : part.first_layer + part.num_layers])
