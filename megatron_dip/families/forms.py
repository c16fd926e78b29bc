"""Forms of the modules that several families are made of, and of a family's whole file."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, TypedDict

from pydantic import Field, model_validator

from megatron_dip.config import DipConfig, build_partition
from megatron_dip.costs.shapes import ExpertsShape, ModelShape, ModuleShape, ProjectorShape
from megatron_dip.costs.trained_parts import (
    LAYERS,
    Trainable,
    TrainedParts,
    by_part,
    trained_parts,
)
from megatron_dip.families.token_forms import TokensForm
from megatron_dip.forms import Form
from megatron_dip.limits import (
    InnerWidth,
    Layers,
    Patch,
    Positive,
    PositiveNumber,
    Size,
    Tokens,
    Vocabulary,
    Width,
)
from megatron_dip.partition import Partition
from megatron_dip.text_form import OUR_TEXT_FORM, SpecialTokens, TextForm

__all__ = [
    "BackboneConfig",
    "DataForm",
    "FamilyConfig",
    "LanguageConfig",
    "MegatronArguments",
    "TextConfig",
    "TransformerForm",
    "TransformerSizes",
    "VisionConfig",
]

MegatronArguments = dict[str, int | float | str | bool | None]
"""Arguments of Megatron by their names in ``args``."""


class TransformerSizes(TypedDict):
    """What the size of all transformers is made of."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int


class TransformerForm(Form):
    """What all transformers have."""

    num_layers: Layers
    hidden_size: Width
    ffn_hidden_size: InnerWidth
    num_attention_heads: Size
    trainable: Trainable = True
    """Which parts are trained: true, false, a list of parts, or a mapping that may also choose
    layers; see ``docs/training_parts.md``."""
    learning_rate_factor: PositiveNumber | dict[str, PositiveNumber] = 1.0
    """By what the run's learning rate is multiplied: in the whole module, or part by part."""
    norm_epsilon: PositiveNumber | None = None
    """Added to variances in the module's norms; that of --norm-epsilon where not given."""

    part_names: ClassVar[tuple[str, ...]]
    """The parts that ``trainable`` and ``learning_rate_factor`` may name."""

    @property
    def trained(self) -> TrainedParts:
        """What of the module is trained."""
        return trained_parts(self.trainable, self.part_names, self.num_layers)

    @property
    def is_only_used(self) -> bool:
        """Whether nothing in its layers or before them is trained."""
        return self.trained.parts.isdisjoint(self.part_names[: self.part_names.index(LAYERS) + 1])

    @property
    def learning_rate_factors(self) -> dict[str, float]:
        """Of every part that has one."""
        factor = self.learning_rate_factor
        if isinstance(factor, dict):
            return by_part(factor, self.part_names, "learning_rate_factor")
        return dict.fromkeys(self.part_names, factor)

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        trained = self.trained.parts
        if isinstance(self.learning_rate_factor, dict):
            frozen = sorted(set(self.learning_rate_factors) - trained)
            if frozen:
                raise ValueError(
                    f"learning_rate_factor names {frozen[0]}, which is not trained (train it, or "
                    f"leave its factor out)"
                )
        elif not trained and "learning_rate_factor" in self.model_fields_set:
            raise ValueError(
                "learning_rate_factor is given but nothing in the module is trained (train some of "
                "its parts, or leave the factor out)"
            )
        return self

    def sizes(self) -> TransformerSizes:
        """Under the names that Megatron, too, has for them."""
        return TransformerSizes(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
        )

    def norm_arguments(self) -> MegatronArguments:
        """``norm_epsilon`` for a model whose last module this is; nothing where it has none."""
        return {} if self.norm_epsilon is None else {"norm_epsilon": self.norm_epsilon}

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        return self


class VisionConfig(TransformerForm):
    """A vision transformer over images of any size."""

    part_names = ("embedding", "layers", "norm", "projector")
    patch_size: Patch = 14
    merge_size: Annotated[int, Field(gt=0, le=64)] = 2
    """Patches along each side of the square that becomes one language token."""
    positions: Literal["table", "rotary_2d"] = "table"
    """``table``: learned, added to what is embedded; ``rotary_2d``: queries and keys of every layer
    are turned, half of a head's channels by the patch's row, half by its column (Qwen2-VL)."""
    position_grid: Patch = 32
    """Side of the learned table of positions, which is interpolated to each image's grid."""

    @model_validator(mode="after")
    def _check_positions(self) -> Self:
        if self.positions == "table":
            return self
        if "position_grid" in self.model_fields_set:
            raise ValueError(
                "position_grid is given but positions are rotary_2d, which have no table (leave it "
                "out, or set positions: table)"
            )
        channels = self.hidden_size // self.num_attention_heads
        if channels % 4:
            raise ValueError(
                f"positions: rotary_2d turns pairs of channels by row and by column, but a head "
                f"has hidden_size / num_attention_heads = {channels} (expected a multiple of 4)"
            )
        return self

    @property
    def patches_per_token(self) -> int:
        """Patches that become one language token."""
        return self.merge_size**2

    @property
    def position_table_side(self) -> int | None:
        """That of the learned table; None where there is none."""
        return self.position_grid if self.positions == "table" else None

    def shape(self, name: str, output_size: int) -> ModuleShape:
        """What its cost depends on; ``output_size`` is the width of the module that reads it."""
        return ModuleShape(
            name=name,
            kind="vit",
            **self.sizes(),
            trainable=self.trainable,
            patch_values=3 * self.patch_size**2,
            num_positions=(self.position_table_side or 0) ** 2,
            positions=self.positions,
            projector=ProjectorShape(
                merge=self.patches_per_token,
                intermediate_size=4 * self.hidden_size,
                output_size=output_size,
            ),
        )


class LanguageConfig(TransformerForm):
    """A causal language model: RMSNorm, SwiGLU, rotary positions, grouped queries."""

    part_names: ClassVar[tuple[str, ...]] = ("embedding", "layers", "norm", "head")
    num_query_groups: Size
    vocab_size: Vocabulary
    seq_length: Tokens
    rotary_base: Positive = 10000
    qkv_bias: bool = False
    """Biases of queries, keys and values, as Qwen2.5 has them."""

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.num_query_groups}"
            )
        return self

    def shape(
        self, name: str, upstream: tuple[str, ...] = (), *, has_head: bool = True
    ) -> ModuleShape:
        """What its cost depends on."""
        return ModuleShape(
            name=name,
            kind="causal",
            **self.sizes(),
            num_query_groups=self.num_query_groups,
            upstream=upstream,
            trainable=self.trainable,
            vocab_size=self.vocab_size,
            has_head=has_head,
            qkv_bias=self.qkv_bias,
        )

    def megatron_arguments(self) -> MegatronArguments:
        """Megatron's arguments for a model whose last module this is, see :class:`FamilyConfig`."""
        return self.norm_arguments() | {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "group_query_attention": self.num_query_groups != self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "seq_length": self.seq_length,
            "max_position_embeddings": self.seq_length,
            "rotary_base": self.rotary_base,
            "position_embedding_type": "rope",
            "normalization": "RMSNorm",
            "swiglu": True,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias,
            "untie_embeddings_and_output_weights": True,
            "tokenizer_type": "NullTokenizer",
            "vocab_size": self.vocab_size,
        }


class TextConfig(LanguageConfig):
    """A language model whose last features are read by another module: it has no head."""

    part_names = ("embedding", "layers", "norm")


class BackboneConfig(LanguageConfig):
    """A language model whose layers may have experts."""

    experts: ExpertsShape | None = None
    """In place of the MLP of every layer, whose ``ffn_hidden_size`` is then not used."""

    def shape(
        self, name: str, upstream: tuple[str, ...] = (), *, has_head: bool = True
    ) -> ModuleShape:
        """What its cost depends on."""
        dense = super().shape(name, upstream, has_head=has_head)
        return dense.model_copy(update={"experts": self.experts})

    def megatron_arguments(self) -> MegatronArguments:
        """Those of the language model, and what the experts are."""
        dense = super().megatron_arguments()
        if self.experts is None:
            return dense
        return dense | {
            "num_experts": self.experts.num_experts,
            "moe_router_topk": self.experts.top_k,
            "moe_ffn_hidden_size": self.experts.ffn_hidden_size,
            "moe_shared_expert_intermediate_size": self.experts.shared_ffn_hidden_size,
        }


class DataForm(Form):
    """What the data sets of all families have in common."""

    used_tokens: ClassVar[frozenset[str]] = frozenset({"pad", "bos", "eos"})
    """Special tokens that the family writes."""

    path: Path
    """JSON list of samples."""
    tokenizer: Path
    """A tokenizer file of the ``tokenizers`` library."""
    tokens: TokensForm | None = None
    """What it calls its special tokens; those of this package's own where not given."""
    cache_folder: Path | None = None
    """Where the index of the data set is kept; beside the data where not given."""
    skip_bad_samples: bool = False
    """Go on without samples that cannot be used, and count them; also --skip-bad-samples."""
    valid_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the samples that is kept for validation."""

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        stated = self.tokens.model_fields_set if self.tokens is not None else frozenset[str]()
        unread = sorted(stated - self.used_tokens)
        if unread:
            raise ValueError(
                f"tokens.{unread[0]} is not written by this family (expected only "
                f"{', '.join(sorted(self.used_tokens))})"
            )
        return self

    @property
    def needed_tokens(self) -> frozenset[str]:
        """Special tokens that the tokenizer must have, unless the configuration says null."""
        return frozenset({"bos", "eos"})

    def _special_tokens(self) -> SpecialTokens:
        return (self.tokens or TokensForm()).special_tokens(self.needed_tokens)

    def text_form(self) -> TextForm:
        """How texts are written for the tokenizer.

        Raises:
            ConfigError: A file that it names cannot be used.
        """
        if self.tokens is None:
            return OUR_TEXT_FORM
        return TextForm(tokens=self._special_tokens())

    def implied_files(self) -> Mapping[str, Path]:
        """Files that are read although no key names them, by what they are."""
        return {}


class FamilyConfig(DipConfig, ABC):
    """A whole configuration file; every family of models has a subclass with its own forms.

    A subclass declares ``family`` (a literal, its name), ``model`` and a narrower ``data``.
    """

    divides_rows: ClassVar[bool] = False
    """Whether context-parallel ranks divide the rows of its samples."""

    data: DataForm

    @abstractmethod
    def model_shape(self) -> ModelShape:
        """The modules with all that their cost depends on; the one with the loss is the last."""

    @abstractmethod
    def megatron_arguments(self) -> MegatronArguments:
        """Megatron's arguments that the configuration states, by their names in ``args``.

        Those who write the model in YAML need not repeat it on the command line.
        """

    @abstractmethod
    def module_forms(self) -> Mapping[str, TransformerForm]:
        """What the configuration says of every module, by its name."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        shape = self.model_shape()
        if not any(module.trains_any for module in shape.modules):
            names = [module.name for module in shape.modules]
            raise ValueError(
                f"model: nothing is trained, {' and '.join(names)} are frozen (expected something "
                f"to train: say which parts under model.{names[-1]}.trainable)"
            )
        num_ranks = self.schedule.num_ranks
        # Where the file of a partition is, only the reader of this file knows.
        if num_ranks is not None and self.schedule.partition is None:
            self.partition(num_ranks)
        return self

    def num_layers(self) -> Mapping[str, int]:
        """Layers per module, upstream modules first."""
        return {module.name: module.num_layers for module in self.model_shape().modules}

    def partition(self, num_ranks: int) -> Partition:
        """See :func:`build_partition`."""
        return build_partition(self.schedule, self.num_layers(), num_ranks)
