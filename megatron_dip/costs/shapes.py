"""Shapes of the modules of a model: all that the cost of its layers depends on.

A model is a list of modules, upstream modules first.  Four kinds of layer exist:

- ``vit``: full attention over each span, biases, GELU; patch embedding with learned or without
  positions before the first layer, a final norm and optionally a projector after the last.
- ``causal``: causal attention with grouped queries over packed spans, gated MLP, RMSNorm;
  an embedding before the first layer, a final norm and optionally a head with loss after the last.
- ``dit``: full self-attention over each clip, cross-attention to the upstream module's tokens,
  GELU, AdaLN modulation; patch embedding, caption projection and timestep embedding before the
  first layer, the output layer after the last.
- ``generic``: any layers, known by their widths and, once stages are built, by their weights.

A ``causal`` layer may have experts in place of its MLP.  Tied embeddings are not modelled.
"""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_dip.costs.shape_parts import (
    TIMESTEP_VALUES,
    AdapterShape,
    ExpertsShape,
    GenericLayers,
    NeckShape,
    ProjectorShape,
    linear_parameters,
)
from megatron_dip.costs.trained_parts import LAYERS, Trainable, TrainedParts, trained_parts
from megatron_dip.costs.weights import ModuleWeights
from megatron_dip.errors import ConfigError, shown
from megatron_dip.forms import Form
from megatron_dip.limits import Count, InnerWidth, Layers, Positive, Size, Vocabulary, Width
from megatron_dip.reading import read_yaml

__all__ = [
    "AdapterShape",
    "ExpertsShape",
    "GenericLayers",
    "ModelShape",
    "ModuleShape",
    "NeckShape",
    "ProjectorShape",
    "load_model",
]


class ModuleShape(Form):
    """One modality model."""

    name: Annotated[str, Field(min_length=1)]
    kind: Literal["vit", "causal", "dit", "generic"]
    num_layers: Layers
    hidden_size: Width
    ffn_hidden_size: InnerWidth
    num_attention_heads: Size
    num_query_groups: Size | None = None
    """Heads of keys and values; as many as of queries where not given."""
    upstream: tuple[str, ...] = ()
    trainable: Trainable = True
    """Which parts are trained, see ``megatron_dip.costs.trained_parts``; ``part_names`` are those
    that there are."""
    vocab_size: Vocabulary | None = None
    """Of ``causal`` modules, and of ``generic`` ones that embed tokens."""
    has_head: bool = True
    """Of ``causal`` and ``generic`` modules: an encoder of text has none."""
    qkv_bias: bool = False
    """Of ``causal`` modules."""
    patch_values: Positive | None = None
    """Of ``vit`` and ``dit`` modules: values of one patch (channels x frames x rows x columns)."""
    num_positions: Count = 0
    """Rows of the learned table of positions."""
    positions: Literal["table", "rotary_2d"] = "table"
    """Of ``vit`` modules; rotary ones have no table, as in Qwen2-VL (arXiv 2409.12191)."""
    num_mels: Positive | None = None
    """Of ``vit`` modules whose embedding are two convolutions over log-mel frames."""
    projector: ProjectorShape | None = None
    """Of ``vit`` modules."""
    context_size: Width | None = None
    """Of ``dit`` modules: hidden size of what cross-attention reads."""
    adapter: AdapterShape | None = None
    """Of ``vit`` and ``causal`` modules whose layers are frozen and tuned through adapters."""
    neck: NeckShape | None = None
    """Of ``causal`` modules with adapters."""
    experts: ExpertsShape | None = None
    """Of ``causal`` modules: what every layer has in place of its MLP."""
    modulation: Literal["shared", "per_layer"] = "shared"
    """Of ``dit`` modules: one modulation network for all layers and a table per layer
    (AdaLN-single, arXiv 2310.00426), or one network in every layer (AdaLN-Zero, arXiv 2212.09748).
    """
    generic: GenericLayers | None = None
    """Of ``generic`` modules."""
    weights: ModuleWeights | None = Field(default=None, exclude_if=lambda value: value is None)
    """As built stages hold them; they then decide what is trained and what a layer takes."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "generic") != (self.generic is not None):
            raise ValueError("generic is needed by generic modules, and only by them")
        if self.weights is not None and len(self.weights.layers) != self.num_layers:
            raise ValueError(
                f"weights are of {len(self.weights.layers)} layers (expected {self.num_layers})"
            )
        if self.kind != "generic" and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_attention_heads % self.query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.query_groups}"
            )
        required = {"vit": "patch_values", "causal": "vocab_size", "dit": "patch_values"}
        if self.kind in required and getattr(self, required[self.kind]) is None:
            raise ValueError(f"{required[self.kind]} is missing (a {self.kind} module needs it)")
        if (self.kind == "dit") != (self.context_size is not None):
            raise ValueError("context_size is needed by dit modules, and only by them")
        if self.positions == "rotary_2d" and (self.kind != "vit" or self.num_positions):
            raise ValueError("rotary_2d belongs to vit modules without num_positions")
        if self.projector is not None and self.kind != "vit":
            raise ValueError(f"projector belongs to vit modules (this one is {self.kind})")
        if self.adapter is not None and self.kind == "dit":
            raise ValueError("adapter belongs to vit and causal modules (this one is dit)")
        if self.experts is not None and (self.kind != "causal" or self.adapter is not None):
            raise ValueError("experts belong to causal modules without adapters")
        if self.neck is not None and (self.kind != "causal" or self.adapter is None):
            raise ValueError("neck belongs to causal modules with adapters")
        if self.adapter is not None and not isinstance(self.trainable, bool):
            raise ValueError("trainable: expected true or false in a module with adapters")
        # Parts that do not exist are found here, not when something asks for them.
        trained_parts(self.trainable, self.part_names, self.num_layers)
        return self

    @property
    def part_names(self) -> tuple[str, ...]:
        """What the module is made of: parts before the first layer, layers, parts after them."""
        return (*self.first_part_parameters(), LAYERS, *self.last_part_parameters())

    @cached_property
    def trained(self) -> TrainedParts:
        """What is trained of the module's own weights; adapters and neck are beside them.

        Of ``generic`` modules as their weights say, else as ``trainable`` does.
        """
        if self.generic is not None and self.weights is not None:
            layers, before, after = (
                self.weights.trained_layers(),
                self.weights.before.is_trained,
                self.weights.after.is_trained,
            )
            named = zip(self.part_names, (before, bool(layers), after), strict=True)
            return TrainedParts(frozenset(name for name, is_in in named if is_in), layers)
        is_tuned = self.adapter is not None and not self.adapter.tunes_layers
        trainable = False if is_tuned else self.trainable
        return trained_parts(trainable, self.part_names, self.num_layers)

    def trained_layers(self) -> tuple[range, ...]:
        """Layers with something trained in them: own weights or an adapter."""
        if self.weights is not None:
            return self.weights.trained_layers()
        return (range(self.num_layers),) if self.trains_adapters else self.trained.layers

    @property
    def has_experts(self) -> bool:
        """Whether any of its layers has experts."""
        return self.experts is not None or (self.generic is not None and self.generic.has_experts)

    @property
    def divides_rows(self) -> bool:
        """Whether context-parallel ranks divide the rows of its items; they do not of encoders."""
        return self.kind != "vit" if self.generic is None else self.generic.is_causal

    @property
    def trains_any(self) -> bool:
        """Whether anything in the module is trained."""
        if self.weights is not None:
            ends = self.weights.before.is_trained or self.weights.after.is_trained
            return ends or bool(self.weights.trained_layers())
        return bool(self.trained.parts) or self.trains_adapters

    @property
    def trains_adapters(self) -> bool:
        """Whether it has adapters, and a neck perhaps, that are trained."""
        return self.adapter is not None and bool(self.trainable)

    @property
    def trains_layers(self) -> bool:
        """Whether own weights of layers are trained, and not only adapters in them."""
        return LAYERS in self.trained.parts

    @property
    def is_only_used(self) -> bool:
        """Whether nothing in its layers or before them is trained: such layers draw no dropout."""
        return not (self.trains_layers or self.trains_adapters or self.trains_first_extra)

    @property
    def trains_first_extra(self) -> bool:
        """Whether anything before the first layer is trained."""
        if self.weights is not None:
            return self.weights.before.is_trained
        has_neck = self.neck is not None and self.trains_adapters
        return has_neck or not self.trained.parts.isdisjoint(self.first_part_parameters())

    @property
    def trains_last_extra(self) -> bool:
        """Whether anything after the last layer is trained."""
        if self.weights is not None:
            return self.weights.after.is_trained
        return not self.trained.parts.isdisjoint(self.last_part_parameters())

    def adapter_parameters(self) -> int:
        """Of the adapter of one layer."""
        return 0 if self.adapter is None else self.adapter.num_parameters(self.hidden_size)

    def neck_parameters(self) -> int:
        """Of the neck and the modality table."""
        return 0 if self.neck is None else self.neck.num_parameters(self.hidden_size)

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def output_size(self) -> int:
        """Width of the rows that modules which read this one get."""
        if self.generic is not None:
            return self.generic.output_size or self.hidden_size
        return self.projector.output_size if self.projector else self.hidden_size

    @property
    def key_value_size(self) -> int:
        """Width of the keys, and of the values, of one token."""
        return self.hidden_size // self.num_attention_heads * self.query_groups

    @property
    def is_clip(self) -> bool:
        """A tower whose features are rows between its layers: no final norm, a GELU in steps."""
        return self.kind == "vit" and self.adapter is not None

    @property
    def is_rotary(self) -> bool:
        """Whether queries and keys are turned by their places."""
        return self.kind in ("causal", "dit") or self.positions == "rotary_2d"

    @property
    def is_gated(self) -> bool:
        return self.kind == "causal"

    @property
    def conditioning_rows(self) -> int:
        """Of a ``dit`` module: rows per clip that its stages hand on beside patches and text: the
        embedded time, and the six vectors of a shared modulation."""
        return 7 if self.modulation == "shared" else 1

    def layer_linear_parameters(self) -> int:
        """Weights of the linear layers of one layer: what tensor parallelism divides.

        Of ``generic`` modules those that a token meets.
        """
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        if self.generic is not None:
            widths = 2 * self.generic.attention_size + self.generic.key_value_size
            return hidden * (widths + (3 if self.generic.is_gated else 2) * ffn)
        attention = 2 * hidden * hidden + 2 * hidden * self.key_value_size
        cross = 4 * hidden * hidden if self.kind == "dit" else 0
        if self.experts is not None:
            shared = 3 * hidden * (self.experts.shared_ffn_hidden_size or 0)
            return attention + shared + self.layer_expert_parameters()
        return attention + cross + (3 if self.is_gated else 2) * hidden * ffn

    def layer_expert_parameters(self) -> int:
        """Those of ``layer_linear_parameters`` that expert parallelism divides as well."""
        if self.experts is None:
            return 0
        return 3 * self.hidden_size * self.experts.ffn_hidden_size * self.experts.num_experts

    def layer_other_parameters(self) -> int:
        """Norms, biases, router and modulation of one layer."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        if self.kind == "generic":
            return 2 * hidden
        if self.kind == "causal":
            bias = hidden + 2 * self.key_value_size if self.qkv_bias else 0
            router = hidden * self.experts.num_experts if self.experts is not None else 0
            return 2 * hidden + bias + router
        biases = 2 * hidden + 2 * self.key_value_size + hidden + ffn
        if self.kind == "vit":
            return biases + 4 * hidden
        network = 6 * hidden * (hidden + 1) if self.modulation == "per_layer" else 0
        return biases + 4 * hidden + 6 * hidden + network

    def first_part_parameters(self) -> dict[str, int]:
        """Parameters of every part before the first layer."""
        hidden = self.hidden_size
        if self.kind == "generic":
            return {"before": (self.vocab_size or hidden) * hidden}
        if self.kind == "causal":
            return {"embedding": (self.vocab_size or 0) * hidden}
        embedding = linear_parameters(self.patch_values or 0, hidden) + self.num_positions * hidden
        if self.kind == "vit":
            return {"embedding": embedding}
        shared = linear_parameters(hidden, 6 * hidden) if self.modulation == "shared" else 0
        return {
            "embedding": embedding,
            "text_projection": linear_parameters(self.context_size or 0, hidden),
            "time": linear_parameters(TIMESTEP_VALUES, hidden)
            + linear_parameters(hidden, hidden)
            + shared,
        }

    def last_part_parameters(self) -> dict[str, int]:
        """Parameters of every part after the last layer."""
        hidden = self.hidden_size
        if self.generic is not None:
            has_head = self.vocab_size is not None and self.has_head
            width = self.vocab_size if has_head else self.generic.output_size
            return {"after": hidden + (width or 0) * hidden}
        if self.kind == "causal":
            head = {"head": (self.vocab_size or 0) * hidden} if self.has_head else {}
            return {"norm": hidden} | head
        if self.kind == "dit":
            modulation = linear_parameters(hidden, 2 * hidden)
            return {"output": modulation + linear_parameters(hidden, self.patch_values or 0)}
        if self.projector is None:
            return {"norm": 2 * hidden}
        middle = self.projector.intermediate_size
        merged = linear_parameters(self.projector.merge * hidden, middle)
        return {
            "norm": 2 * hidden,
            "projector": merged + linear_parameters(middle, self.projector.output_size),
        }

    def layer_parameters(self) -> int:
        """Own parameters of one layer, without those of an adapter."""
        return self.layer_linear_parameters() + self.layer_other_parameters()

    def first_parameters(self) -> int:
        """Parameters before the first layer."""
        return sum(self.first_part_parameters().values())

    def last_parameters(self) -> int:
        """Parameters after the last layer."""
        return sum(self.last_part_parameters().values())

    def num_parameters(self) -> int:
        """All parameters of the module."""
        layers = self.num_layers * (self.layer_parameters() + self.adapter_parameters())
        return layers + self.first_parameters() + self.last_parameters() + self.neck_parameters()

    def num_trained_parameters(self) -> int:
        """Those that are trained."""
        extras = self.first_part_parameters() | self.last_part_parameters()
        own = sum(extras.get(part, 0) for part in self.trained.parts)
        own += self.layer_parameters() * sum(map(len, self.trained.layers))
        if self.trains_adapters:
            own += self.num_layers * self.adapter_parameters() + self.neck_parameters()
        return own


class ModelShape(Form):
    """The modules of a model, upstream modules first."""

    name: Annotated[str, Field(min_length=1)]
    modules: Annotated[tuple[ModuleShape, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        known: dict[str, ModuleShape] = {}
        for number, module in enumerate(self.modules):
            where = f"modules.{number}"
            if module.name in known:
                raise ValueError(f"{where}.name: {shown(module.name)} repeats")
            unknown = [name for name in module.upstream if name not in known]
            if unknown:
                raise ValueError(
                    f"{where}.upstream: {unknown} not among the modules before it ({list(known)})"
                )
            for name in module.upstream:
                self._check_edge(where, known[name], module)
            known[module.name] = module
        return self

    @staticmethod
    def _check_edge(where: str, upstream: ModuleShape, module: ModuleShape) -> None:
        if upstream.generic is not None and upstream.generic.output_size is None:
            return
        expected, field = module.hidden_size, "hidden_size"
        if module.kind == "dit":
            expected, field = module.context_size or 0, "context_size"
        elif module.neck is not None:
            expected, field = module.neck.input_size, "neck.input_size"
        if upstream.output_size != expected:
            raise ValueError(
                f"{where}.{field}: {expected}, but {upstream.name} gives rows of "
                f"{upstream.output_size} "
                "(make them equal, or give the upstream module a projector)"
            )

    def module(self, name: str) -> ModuleShape:
        """The module called ``name``.

        Raises:
            ConfigError: There is none.
        """
        for module in self.modules:
            if module.name == name:
                return module
        names = [module.name for module in self.modules]
        raise ConfigError(
            f"model {self.name} has no module {shown(name)} (expected one of {names})"
        )

    def first_with_backward(self) -> dict[str, int]:
        """Where backwards of a module end, in modules that have one: as
        :attr:`megatron_dip.workload.Problem.first_with_backward`."""
        found: dict[str, int] = {}
        for module in self.modules:
            trained = module.trained_layers()
            if module.trains_first_extra or not found.keys().isdisjoint(module.upstream):
                found[module.name] = -1
            elif trained:
                found[module.name] = trained[0].start
            elif module.trains_last_extra:
                found[module.name] = module.num_layers
        return found

    def modules_with_backward(self) -> frozenset[str]:
        """Modules with something trainable in them or upstream of them."""
        return frozenset(self.first_with_backward())

    def num_parameters(self) -> int:
        """All parameters of the model."""
        return sum(module.num_parameters() for module in self.modules)

    def num_trained_parameters(self) -> int:
        """Those that are trained."""
        return sum(module.num_trained_parameters() for module in self.modules)


def load_model(path: str | Path) -> ModelShape:
    """The model in a YAML file.

    Raises:
        ConfigError: The file cannot be read, or a field is missing, unknown or contradicts another.
    """
    return ModelShape.parse(read_yaml(path), ConfigError, str(path))
