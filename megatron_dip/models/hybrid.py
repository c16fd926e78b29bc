"""Stages of Megatron's ``HybridModel``: layers of attention, MLP, experts and state space models.

Batches are those of ``pretrain_hybrid.py``, the same as of ``pretrain_gpt.py``.  A pattern says
what each layer is; where it divides the layers among ranks, a schedule's segments do so instead.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from megatron_dip.errors import UnsupportedError
from megatron_dip.models.gpt import StagedGpt
from megatron_dip.models.layout import cut_config
from megatron_dip.models.registry import register
from megatron_dip.models.staged import Part

__all__ = ["StagedHybrid", "clone_if_empty", "hybrid_layers"]


@register("megatron.core.models.hybrid.hybrid_model.HybridModel")
class StagedHybrid(StagedGpt):
    """A language model of one module, whose layers a pattern names."""

    def stage_arguments(self, part: Part) -> dict[str, Any]:
        """Config cut, and whether embedding and output layer are there.

        Raises:
            UnsupportedError: The stage shares its embedding with another one of the same rank.
        """
        self.check_tied(part)
        return {
            "config": cut_config(self.arguments["config"], part),
            "pre_process": part.first,
            "post_process": part.last,
            "vp_stage": None,
        }

    @property
    def predicts_several_tokens(self) -> bool:
        """Whether the pattern has layers of multi-token prediction."""
        names = ("hybrid_layer_pattern", "hybrid_override_pattern")
        return any("/" in (self.arguments.get(name) or "") for name in names)

    def constructing(self, part: Part) -> AbstractContextManager[None]:
        """The stage's layers are taken out of the pattern."""
        return hybrid_layers(part, self.arguments["config"].num_layers)

    def finish(self, model: torch.nn.Module, part: Part) -> None:
        """A stage without layers gives a tensor of its own."""
        clone_if_empty(model.decoder, part)


@contextmanager
def hybrid_layers(part: Part, num_layers: int) -> Iterator[None]:
    """While in it, a ``HybridModel`` has the layers of ``part``, whatever rank builds it.

    Args:
        part: The stage.
        num_layers: Of the module.
    """
    from megatron.core.models.hybrid import hybrid_layer_allocation

    def select(main_pattern: str, *_: Any, **__: Any) -> tuple[list[str], int]:
        symbols = main_pattern.replace(hybrid_layer_allocation.Symbols.PIPE, "")
        layers = hybrid_layer_allocation.validate_segment_layers(symbols)
        if len(layers) != num_layers:
            raise UnsupportedError(
                f"module {part.module}: the pattern {main_pattern} has {len(layers)} layers and "
                f"the configuration {num_layers} (expected the same number)"
            )
        return layers[part.first_layer : part.first_layer + part.num_layers], part.first_layer

    # HybridModel looks it up in its module when it is constructed.
    own = hybrid_layer_allocation.select_pipeline_segment
    hybrid_layer_allocation.select_pipeline_segment = select
    try:
        yield
    finally:
        hybrid_layer_allocation.select_pipeline_segment = own


def clone_if_empty(stack: Any, part: Part) -> None:
    """Let a stage of no layers give a tensor of its own, as a ``TransformerBlock`` does: what a
    stage gave is freed once it was sent, what it got is not."""
    if not (part.num_layers or part.first or part.last):
        stack.register_forward_hook(lambda module, args, output: output.clone())
