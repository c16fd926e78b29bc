"""What a module of a model may have in its layers, before them or after them."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from megatron_dip.forms import Form
from megatron_dip.limits import InnerWidth, Size, Width

__all__ = [
    "NUM_EXPERTS",
    "TIMESTEP_VALUES",
    "AdapterShape",
    "ExpertsShape",
    "GenericLayers",
    "NeckShape",
    "ProjectorShape",
    "linear_parameters",
]

NUM_EXPERTS = 2
"""Of an adapter."""

TIMESTEP_VALUES = 256
"""Sines and cosines that a timestep is embedded with (arXiv 2212.09748)."""


def linear_parameters(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with a bias."""
    return (inputs + 1) * outputs


class ProjectorShape(Form):
    """Two linear layers after a vision tower, on groups of merged tokens."""

    merge: Size = 4
    """Tokens that become one row: of images n^2, where n x n patches are merged."""
    intermediate_size: InnerWidth
    output_size: Width
    """Hidden size of the module that reads the rows."""


class AdapterShape(Form):
    """Routed adapters of two experts in every layer: a narrow layer, two wide ones, a router.

    The module is trainable through them: its layers only pass gradients on, unless
    ``tunes_layers``.
    """

    bottleneck: InnerWidth = 8
    num_groups: Size = 2
    tunes_layers: bool = False

    def num_parameters(self, hidden_size: int) -> int:
        """Of one layer."""
        down = self.bottleneck * hidden_size + self.bottleneck
        up = hidden_size * (self.bottleneck // self.num_groups) + hidden_size
        router = NUM_EXPERTS * (hidden_size + 1)
        return down + NUM_EXPERTS * up + router


class ExpertsShape(Form):
    """Several MLPs in every layer, of which a router picks some for every token."""

    num_experts: Size
    top_k: Size = 2
    """Experts that a token goes to."""
    ffn_hidden_size: InnerWidth
    """Of one expert."""
    shared_ffn_hidden_size: InnerWidth | None = None
    """Of an MLP beside them that all tokens go through."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is above num_experts {self.num_experts}")
        return self


class NeckShape(Form):
    """Two linear layers with biases before the first layer, on rows of the upstream module, and a
    table with a row per modality (text, image)."""

    input_size: Width
    intermediate_size: InnerWidth

    def num_parameters(self, hidden_size: int) -> int:
        """Of neck and table."""
        inner = self.intermediate_size * (self.input_size + 1)
        return inner + hidden_size * (self.intermediate_size + 1) + 2 * hidden_size


class GenericLayers(Form):
    """What decides the cost of any layer beside its weights."""

    attention_size: Width
    """Channels of the queries of all heads."""
    key_value_size: Width
    """Channels of keys and values together."""
    is_causal: bool = False
    """Whether a token attends to those before it alone."""
    is_gated: bool = False
    """Whether the MLP has two inner parts, of which one is the gate of the other."""
    has_experts: bool = False
    expert_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the weights of a layer's experts, those that a token meets: experts it is sent to over
    experts there are."""
    output_size: InnerWidth | None = None
    """Width of the rows that other modules read; the hidden size where not given."""
