"""The configuration of vision-language models; see ``configs/vlm_tiny.yaml``."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from megatron_dip.costs.shapes import ModelShape
from megatron_dip.families.conversation_forms import ConversationForm
from megatron_dip.families.forms import (
    BackboneConfig,
    FamilyConfig,
    MegatronArguments,
    TransformerForm,
    VisionConfig,
)
from megatron_dip.forms import Form
from megatron_dip.limits import Tokens

__all__ = ["VlmConfig", "VlmDataConfig", "VlmModelConfig"]


class VlmModelConfig(Form):
    """The modules of a vision-language model."""

    vision: VisionConfig
    language: BackboneConfig


class VlmDataConfig(ConversationForm):
    """Conversations with images: ``path`` is a JSON list of them, or a folder of shards."""

    format: Literal["llava", "energon"] = "llava"
    """``llava``: a JSON list and a folder of images; ``energon``: webdataset shards that
    megatron-energon has prepared, read in their order."""
    image_folder: Path | None = None
    """The folder that image names are relative to; only of ``llava``, where it must be given."""
    min_image_tokens: Tokens = 4
    """Least language tokens that an image stands for, after the merge."""
    max_image_tokens: Tokens = 256
    separation: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the samples that are packed only with their own kind, with images or without: how
    much microbatches differ."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.format == "llava") != (self.image_folder is not None):
            raise ValueError(
                "image_folder is missing (expected the folder of the images)"
                if self.format == "llava"
                else "image_folder is given (expected none: the shards of energon hold the images)"
            )
        if self.min_image_tokens > self.max_image_tokens:
            raise ValueError(
                f"min_image_tokens {self.min_image_tokens} is above max_image_tokens "
                f"{self.max_image_tokens}"
            )
        return self


class VlmConfig(FamilyConfig):
    """A vision-language model, its schedule and its data."""

    divides_rows: ClassVar[bool] = True

    family: Literal["vlm"] = "vlm"
    model: VlmModelConfig
    data: VlmDataConfig

    def model_shape(self) -> ModelShape:
        """A vision tower with its projector, and the language backbone that reads it."""
        vision, language = self.model.vision, self.model.language
        return ModelShape(
            name="vision-language",
            modules=(
                vision.shape("vision", language.hidden_size),
                language.shape("language", ("vision",)),
            ),
        )

    def module_forms(self) -> dict[str, TransformerForm]:
        """See :class:`FamilyConfig`."""
        return {"vision": self.model.vision, "language": self.model.language}

    def megatron_arguments(self) -> MegatronArguments:
        """See :class:`FamilyConfig`."""
        return self.model.language.megatron_arguments()
