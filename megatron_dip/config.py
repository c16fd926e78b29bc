"""The YAML configuration of a run: the model, its schedule and its data.

``--dip-config FILE`` reads one.  It states the model once, for Megatron's own schedule as well as
for ours; see ``configs/vlm_tiny.yaml`` for a commented example.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, model_validator

from megatron_dip.errors import ConfigError
from megatron_dip.forms import Form
from megatron_dip.partition import Partition, cut_evenly, partition_from_layers

__all__ = [
    "CostConfig",
    "DataConfig",
    "DipConfig",
    "LanguageConfig",
    "ModelConfig",
    "ModuleSchedule",
    "ScheduleConfig",
    "VisionConfig",
    "build_partition",
    "load_config",
    "megatron_arguments",
]

Positive = Annotated[int, Field(gt=0)]
PositiveNumber = Annotated[float, Field(gt=0)]


class VisionConfig(Form):
    """A vision transformer over images of any size."""

    num_layers: Positive
    hidden_size: Positive
    ffn_hidden_size: Positive
    num_attention_heads: Positive
    patch_size: Positive = 14
    position_grid: Positive = 32
    """Side of the learned table of positions, which is interpolated to each image's grid."""
    trainable: bool = True


class LanguageConfig(Form):
    """A causal language model: RMSNorm, SwiGLU, rotary positions, grouped queries."""

    num_layers: Positive
    hidden_size: Positive
    ffn_hidden_size: Positive
    num_attention_heads: Positive
    num_query_groups: Positive
    vocab_size: Positive
    seq_length: Positive
    rotary_base: Positive = 10000
    trainable: bool = True


class ModelConfig(Form):
    """The modules of a vision-language model."""

    vision: VisionConfig
    language: LanguageConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, module in (("vision", self.vision), ("language", self.language)):
            if module.hidden_size % module.num_attention_heads:
                raise ValueError(
                    f"{name}.hidden_size {module.hidden_size} is not a multiple of its "
                    f"{module.num_attention_heads} attention heads"
                )
        if self.language.num_attention_heads % self.language.num_query_groups:
            raise ValueError(
                f"language.num_attention_heads {self.language.num_attention_heads} is not a "
                f"multiple of num_query_groups {self.language.num_query_groups}"
            )
        return self

    def num_layers(self) -> dict[str, int]:
        """Layers per module, upstream modules first."""
        return {"vision": self.vision.num_layers, "language": self.language.num_layers}


class ModuleSchedule(Form):
    """How one module is cut, and its share of a microbatch split."""

    num_segments: Positive = 1
    layers: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] | None = None
    """Layers per segment and rank; cut evenly where not given."""
    sub_microbatch_tokens: Positive | None = None
    """Most tokens in a sub-microbatch; a microbatch is not split where not given."""
    flops_per_us: PositiveNumber | None = None
    """What one rank achieves on this module; ``costs.flops_per_us`` where not given."""


class CostConfig(Form):
    """Rates of the machine that the planner assumes; only their proportions shape a schedule."""

    flops_per_us: PositiveNumber = 4.0e8
    """Floating-point operations per microsecond that one rank achieves."""
    layer_overhead_us: Annotated[float, Field(ge=0)] = 60.0
    transfer_latency_us: Annotated[float, Field(ge=0)] = 20.0
    transfer_bytes_per_us: PositiveNumber = 40000.0


class ScheduleConfig(Form):
    """What ``--dip-schedule`` runs."""

    num_ranks: Positive
    """Pipeline ranks the cut is made for; must equal --pipeline-model-parallel-size."""
    planner: Literal["dual_queue", "one_f_one_b"] = "dual_queue"
    evaluations: Annotated[int, Field(ge=0)] = 64
    """Orders of a batch that the dual queue tries before it takes the best; 0 tries one."""
    modules: dict[str, ModuleSchedule]
    memory_limit_gib: PositiveNumber = 80.0
    """Per rank, weights included."""
    costs: CostConfig = CostConfig()


class DataConfig(Form):
    """A data set in LLaVA's form."""

    path: Path
    """JSON list of conversations."""
    image_folder: Path
    tokenizer: Path
    """A tokenizer file of the ``tokenizers`` library."""
    cache_folder: Path | None = None
    """Where the index of the data set is kept; beside the data where not given."""
    min_image_tokens: Positive = 4
    """Least language tokens that an image stands for, after the 2x2 merge."""
    max_image_tokens: Positive = 256
    skip_bad_samples: bool = False
    """Go on without samples that cannot be used, and count them; also --skip-bad-samples."""
    separation: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the samples that are packed only with their own kind, with images or without: how
    much microbatches differ."""
    valid_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the samples that is kept for validation."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_image_tokens > self.max_image_tokens:
            raise ValueError(
                f"min_image_tokens {self.min_image_tokens} is above max_image_tokens "
                f"{self.max_image_tokens}"
            )
        return self


class DipConfig(Form):
    """A whole configuration file."""

    model: ModelConfig
    schedule: ScheduleConfig
    data: DataConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        modules = self.model.num_layers()
        if set(self.schedule.modules) != set(modules):
            raise ValueError(
                f"schedule.modules names {sorted(self.schedule.modules)} (expected "
                f"{sorted(modules)}: one entry per module of the model)"
            )
        build_partition(self)
        return self


def build_partition(config: DipConfig) -> Partition:
    """The partition that ``config.schedule`` describes.

    Raises:
        PartitionError: Layer counts do not fit the module or the number of ranks.
    """
    num_ranks = config.schedule.num_ranks
    layers = {}
    for name, count in config.model.num_layers().items():
        module = config.schedule.modules[name]
        cut = module.layers or cut_evenly(count, module.num_segments, num_ranks)
        total = sum(sum(segment) for segment in cut)
        if total != count or len(cut) != module.num_segments:
            raise ConfigError(
                f"schedule.modules.{name}.layers: {len(cut)} segments with {total} layers "
                f"(expected num_segments {module.num_segments} with {count} layers)"
            )
        layers[name] = cut
    return partition_from_layers(layers, num_ranks)


def load_config(path: str | Path) -> DipConfig:
    """The configuration in a YAML file; relative paths in it start at the file's folder.

    Raises:
        ConfigError: The file cannot be read, or a key is missing, unknown or out of range.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({error})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected the keys model, schedule and data at top level")
    config = DipConfig.parse(data, ConfigError, str(path))
    folder = path.resolve().parent
    resolved = {
        name: folder / value
        for name, value in config.data
        if isinstance(value, Path) and not value.is_absolute()
    }
    return config.model_copy(update={"data": config.data.model_copy(update=resolved)})


def megatron_arguments(config: DipConfig) -> dict[str, int | float | str | bool]:
    """Megatron's arguments that the configuration states, by their names in ``args``.

    Those who write the model in YAML need not repeat it on the command line.
    """
    language = config.model.language
    return {
        "num_layers": language.num_layers,
        "hidden_size": language.hidden_size,
        "ffn_hidden_size": language.ffn_hidden_size,
        "num_attention_heads": language.num_attention_heads,
        "group_query_attention": language.num_query_groups != language.num_attention_heads,
        "num_query_groups": language.num_query_groups,
        "seq_length": language.seq_length,
        "max_position_embeddings": language.seq_length,
        "rotary_base": language.rotary_base,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": language.vocab_size,
        # Megatron's own loaders have no place for a function that puts microbatches together.
        "dataloader_type": "external",
    }
