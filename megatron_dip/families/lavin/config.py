"""The configuration of LaVIN: frozen CLIP and LLaMA towers with routed adapters.

See ``configs/lavin_tiny.yaml`` for a commented example, ``docs/lavin.md`` for what it means.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_dip.costs.shapes import AdapterShape, ModelShape, ModuleShape, NeckShape
from megatron_dip.families.forms import (
    DataForm,
    FamilyConfig,
    LanguageConfig,
    MegatronArguments,
    Positive,
    PositiveNumber,
    TransformerForm,
)
from megatron_dip.forms import Form
from megatron_dip.limits import InnerWidth, Patch, Size

__all__ = [
    "ClipConfig",
    "LavinAdapterConfig",
    "LavinConfig",
    "LavinDataConfig",
    "LavinModelConfig",
    "LlamaConfig",
    "PublishedOptimizer",
]


class ClipConfig(TransformerForm):
    """CLIP's vision transformer over square images of one size."""

    part_names = ("embedding", "layers", "norm")
    patch_size: Patch = 14
    image_size: Patch = 224
    """Pixels per side."""
    feature_layers: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """After how many layers the class row becomes a row of the language tower, ascending."""
    norm_epsilon: PositiveNumber = 1e-5
    """CLIP's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        is_ascending = list(self.feature_layers) == sorted(set(self.feature_layers))
        if not is_ascending or self.feature_layers[-1] > self.num_layers:
            raise ValueError(
                f"feature_layers {list(self.feature_layers)}: expected ascending numbers from 1 "
                f"to num_layers {self.num_layers}"
            )
        return self

    @property
    def rows_per_image(self) -> int:
        """The class row and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


class LlamaConfig(LanguageConfig):
    """LLaMA's decoder."""

    norm_epsilon: PositiveNumber = 1e-6
    """LLaMA's, as its ``params.json`` has it."""


class LavinAdapterConfig(Form):
    """The adapters of both towers, the neck between them, and what is tuned."""

    bottleneck: InnerWidth = 8
    num_groups: Size = 2
    temperature: PositiveNumber = 10.0
    """Divides the router's logits; published: 10 for 7B, 5 for 13B."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    neck_size: InnerWidth = 128
    gates: Literal["token", "cls", "public_code"] = "token"
    """Whose gates weigh a row of the vision tower: its own; its image's class row's; or, as in the
    released code, those of the first image of the microbatch."""
    tuning: Literal["adapters", "full"] = "adapters"
    """``full`` also trains both towers, for comparison."""


class LavinModelConfig(Form):
    """The two towers and their adapters."""

    vision: ClipConfig
    language: LlamaConfig
    adapter: LavinAdapterConfig = LavinAdapterConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.vision.trainable is not True or self.language.trainable is not True:
            raise ValueError(
                "trainable is not for this family, which tunes adapters in both towers and freezes "
                "the rest (leave it out; see adapter.tuning)"
            )
        for name, tower in (("vision", self.vision), ("language", self.language)):
            if isinstance(tower.learning_rate_factor, dict):
                raise ValueError(
                    f"{name}.learning_rate_factor: expected one number in this family, for all "
                    f"that is trained in the tower"
                )
        adapter = self.adapter
        for name, width in (
            ("adapter.bottleneck", adapter.bottleneck),
            ("vision.hidden_size", self.vision.hidden_size),
            ("language.hidden_size", self.language.hidden_size),
        ):
            if width % adapter.num_groups:
                raise ValueError(
                    f"{name} {width} is not a multiple of adapter.num_groups {adapter.num_groups}"
                )
        return self


class LavinDataConfig(DataForm):
    """ScienceQA (``path`` is its problems.json) or a chat file."""

    form: Literal["scienceqa", "chat"] = "scienceqa"
    image_folder: Path
    splits: Path | None = None
    """ScienceQA's pid_splits.json; beside ``path`` where not given."""
    train_split: str = "train"
    valid_split: str = "val"
    packed: bool = False
    """Several samples in a sequence; published: one."""
    loss: Literal["mean_of_means", "per_token"] = "mean_of_means"
    """Published: the mean over microbatches of the mean over their supervised tokens."""
    samples_per_mean: Positive = 4
    """Samples in a microbatch of the published code."""

    @property
    def splits_file(self) -> Path:
        """The splits of ScienceQA, also where their file is not named."""
        return self.splits or self.path.with_name("pid_splits.json")

    def implied_files(self) -> Mapping[str, Path]:
        """See :class:`DataForm`."""
        return {"data.splits": self.splits_file} if self.form == "scienceqa" else {}


class PublishedOptimizer(Form):
    """The published optimizer and schedule, as arguments of Megatron.

    AdamW, decay of all but biases and one-dimensional weights, linear warm-up and a cosine to zero
    by iteration, no clipping.  The published learning rate is per 256 samples of a batch.
    """

    num_train_samples: Positive = 12726
    """ScienceQA's training split."""
    num_epochs: Annotated[float, Field(gt=0, le=1e6)] = 20
    num_warmup_epochs: Annotated[float, Field(ge=0, le=1e6)] = 2
    """Chat: 15 epochs and 0.2 of warm-up."""
    global_batch_size: Positive = 32
    base_learning_rate: PositiveNumber = 9e-3
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.02

    def megatron_arguments(self) -> MegatronArguments:
        """By their names in ``args``."""
        per_epoch = self.num_train_samples // self.global_batch_size
        iterations = round(self.num_epochs * per_epoch)
        return {
            "optimizer": "adam",
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "weight_decay": self.weight_decay,
            "clip_grad": 0.0,
            "global_batch_size": self.global_batch_size,
            "lr": self.base_learning_rate * self.global_batch_size / 256,
            "min_lr": 0.0,
            "lr_decay_style": "cosine",
            "lr_warmup_iters": round(self.num_warmup_epochs * per_epoch),
            "lr_decay_iters": iterations,
            "train_iters": iterations,
        }


class LavinConfig(FamilyConfig):
    """LaVIN, its schedule and its data."""

    family: Literal["lavin"] = "lavin"
    model: LavinModelConfig
    data: LavinDataConfig
    optimizer: PublishedOptimizer | None = None
    """Sets Megatron's optimizer and schedule; where not given, its flags do."""

    @model_validator(mode="after")
    def _check_gates(self) -> Self:
        vision = self.schedule.modules.get("vision")
        is_split = vision is not None and vision.sub_microbatch_tokens is not None
        if self.model.adapter.gates == "public_code" and is_split:
            raise ValueError(
                "schedule.modules.vision.sub_microbatch_tokens does not work with "
                "model.adapter.gates: public_code, where the first image of a microbatch weighs "
                "all others (leave it out, or use gates: token)"
            )
        return self

    def model_shape(self) -> ModelShape:
        """Both towers; the neck belongs to the language tower."""
        vision, language, adapter = self.model.vision, self.model.language, self.model.adapter
        is_full = adapter.tuning == "full"
        shape = AdapterShape(
            bottleneck=adapter.bottleneck, num_groups=adapter.num_groups, tunes_layers=is_full
        )
        return ModelShape(
            name="lavin",
            modules=(
                ModuleShape(
                    name="vision",
                    kind="vit",
                    **vision.sizes(),
                    patch_values=3 * vision.patch_size**2,
                    num_positions=vision.rows_per_image,
                    adapter=shape,
                ),
                language.shape("language", ("vision",)).model_copy(
                    update={
                        "adapter": shape,
                        "neck": NeckShape(
                            input_size=vision.hidden_size, intermediate_size=adapter.neck_size
                        ),
                    }
                ),
            ),
        )

    def module_forms(self) -> dict[str, TransformerForm]:
        """See :class:`FamilyConfig`."""
        return {"vision": self.model.vision, "language": self.model.language}

    def megatron_arguments(self) -> MegatronArguments:
        """See :class:`FamilyConfig`; the towers have no dropout, adapters their own."""
        arguments = self.model.language.megatron_arguments()
        arguments |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        return arguments | (self.optimizer.megatron_arguments() if self.optimizer else {})
