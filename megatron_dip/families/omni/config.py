"""The configuration of models that see and hear; see ``configs/omni_tiny.yaml``."""

from pathlib import Path
from typing import ClassVar, Literal

from megatron_dip.costs.shapes import ModelShape, ModuleShape, ProjectorShape
from megatron_dip.families.conversation_forms import ConversationForm
from megatron_dip.families.forms import (
    BackboneConfig,
    FamilyConfig,
    MegatronArguments,
    Positive,
    TransformerForm,
    VisionConfig,
)
from megatron_dip.families.omni.audio import TOKENS_PER_ROW
from megatron_dip.forms import Form
from megatron_dip.limits import Size, Tokens

__all__ = ["AudioConfig", "OmniConfig", "OmniDataConfig", "OmniModelConfig"]


class AudioConfig(TransformerForm):
    """An encoder of log-mel frames, after Whisper."""

    part_names = ("embedding", "layers", "norm", "projector")
    num_mels: Size = 80

    def shape(self, name: str, output_size: int) -> ModuleShape:
        """What its cost depends on; ``output_size`` is the width of the module that reads it.

        The two convolutions have the weights of one embedding of so many values.
        """
        return ModuleShape(
            name=name,
            kind="vit",
            **self.sizes(),
            trainable=self.trainable,
            patch_values=3 * self.num_mels + 3 * self.hidden_size + 1,
            num_mels=self.num_mels,
            projector=ProjectorShape(
                merge=TOKENS_PER_ROW,
                intermediate_size=4 * self.hidden_size,
                output_size=output_size,
            ),
        )


class OmniModelConfig(Form):
    """Two encoders before one backbone."""

    vision: VisionConfig
    audio: AudioConfig
    language: BackboneConfig


class OmniDataConfig(ConversationForm):
    """Questions about images and sounds: ``path`` is as ``data/omni_samples.py`` has it."""

    used_tokens: ClassVar[frozenset[str]] = ConversationForm.used_tokens | {
        *("audio", "audio_start", "audio_end")
    }

    media_folder: Path
    min_image_tokens: Tokens = 4
    max_image_tokens: Tokens = 256
    audio_rate: Positive = 16000
    """Samples per second of all audio files."""


class OmniConfig(FamilyConfig):
    """A model that sees and hears, its schedule and its data."""

    divides_rows: ClassVar[bool] = True

    family: Literal["omni"]
    model: OmniModelConfig
    data: OmniDataConfig

    def model_shape(self) -> ModelShape:
        """Two encoders that do not know of each other, and the backbone that reads both."""
        vision, audio, language = self.model.vision, self.model.audio, self.model.language
        return ModelShape(
            name="omni",
            modules=(
                vision.shape("vision", language.hidden_size),
                audio.shape("audio", language.hidden_size),
                language.shape("language", ("vision", "audio")),
            ),
        )

    def module_forms(self) -> dict[str, TransformerForm]:
        """See :class:`FamilyConfig`."""
        return {
            "vision": self.model.vision,
            "audio": self.model.audio,
            "language": self.model.language,
        }

    def megatron_arguments(self) -> MegatronArguments:
        """See :class:`FamilyConfig`."""
        return self.model.language.megatron_arguments()
