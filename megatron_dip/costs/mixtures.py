"""Batches drawn from distributions: what a data set looks like to the planner, without the data.

Kinds of workload.  ``vlm``: every microbatch is one packed sequence whose share of image tokens is
drawn first, so that batches range from nearly all text to nearly all images.  ``t2v``: every
microbatch holds clips of drawn frames and resolution, each with its captions.  ``packed`` and
``grouped``: see ``megatron_dip.costs.published_mixtures``.  Microbatches are drawn independently.
``docs/workloads.md`` describes the built-in mixtures and the file format.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from megatron_dip.costs import ItemSize, ItemSizes
from megatron_dip.costs.distributions import Counts, Shares
from megatron_dip.costs.published_mixtures import GroupedClips, PackedSamples, dip_t2v, dip_vlm
from megatron_dip.errors import ConfigError, shown
from megatron_dip.forms import Form, explain_validation_error
from megatron_dip.limits import MOST_ITEMS, MOST_MICROBATCHES, MOST_TOKENS, Tokens
from megatron_dip.reading import read_json

__all__ = [
    "BUILT_IN",
    "Clips",
    "ImagesAndText",
    "LanguageItems",
    "Workload",
    "built_in_mixture",
    "draw_microbatches",
    "load_workload",
]

_MOST_DRAWN = 10**6
"""Images, samples or captions of one microbatch."""

_IMAGE_MERGE = 4
"""Patches that stand for one language token, after the 2x2 merge."""
_LEAST_TEXT_TOKENS = 8
"""Of a sample with images: a question and an answer."""


class ImagesAndText(Form):
    """Packed sequences of text samples and of samples with images."""

    format: Literal["megatron-dip/workload"] = "megatron-dip/workload"
    version: Literal[1] = 1
    kind: Literal["vlm"]
    sequence_tokens: Tokens
    """Tokens of every packed sequence; samples are cut to fill it."""
    image_share: Shares
    """Of a sequence's tokens that stand for images, per sequence."""
    image_patches: Counts
    images_per_sample: Counts
    text_tokens: Counts
    """Of samples without images; those with images get text by the share."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        wrong = [patches for patches in self.image_patches.values if patches % _IMAGE_MERGE]
        if wrong:
            raise ValueError(f"image_patches.values: {wrong} are no multiples of {_IMAGE_MERGE}")
        least = min(1 + _LEAST_TEXT_TOKENS, *self.text_tokens.values)
        num_samples = -(-self.sequence_tokens // least)
        num_images = max(self.images_per_sample.values)
        if num_samples * num_images > _MOST_DRAWN:
            raise ValueError(
                f"a sequence of {self.sequence_tokens:,} tokens may hold {num_samples:,} samples "
                f"of {num_images:,} images each (expected at most {_MOST_DRAWN:,} images: fewer "
                f"sequence_tokens or images_per_sample, or longer text_tokens)"
            )
        return self

    def draw(self, random: Random) -> ItemSizes:
        """The items of one microbatch: its images, and a language item per sample."""
        share = self.image_share.draw(random)
        images: list[int] = []
        samples: list[ItemSize] = []
        room = self.sequence_tokens
        while room > 0:
            drawn: list[int] = []
            if share > 0:
                count = self.images_per_sample.draw(random)
                drawn = [self.image_patches.draw(random) for _ in range(count)]
            image_tokens, first = 0, len(images)
            for patches in drawn:
                # Images that no longer fit are left out; they are never cut.
                if image_tokens + patches // _IMAGE_MERGE + _LEAST_TEXT_TOKENS <= room:
                    image_tokens += patches // _IMAGE_MERGE
                    images.append(patches)
            if image_tokens:
                text = round(min(room, image_tokens * (1 - share) / share))
                text = max(_LEAST_TEXT_TOKENS, text)
            else:
                text = self.text_tokens.draw(random)
            tokens = min(room, image_tokens + text)
            needed = tuple(range(first, len(images)))
            samples.append(ItemSize(tokens=tokens, spans=(tokens,), needs={"vision": needed}))
            room -= tokens
        return {
            "vision": [ItemSize(tokens=patches, spans=(patches,)) for patches in images],
            "language": samples,
        }


class Clips(Form):
    """Video clips with captions."""

    format: Literal["megatron-dip/workload"] = "megatron-dip/workload"
    version: Literal[1] = 1
    kind: Literal["t2v"]
    clips_per_microbatch: Counts = Counts(values=(1,))
    frames: Counts
    """Latent frames of a clip; 1 is a picture."""
    patches_per_frame: Counts
    captions_per_clip: Counts
    caption_tokens: Counts

    @model_validator(mode="after")
    def _check(self) -> Self:
        most = max(self.frames.values) * max(self.patches_per_frame.values)
        if most > MOST_TOKENS:
            raise ValueError(
                f"clips have up to {most:,} patches (expected at most {MOST_TOKENS:,}: fewer "
                f"frames or patches_per_frame)"
            )
        most = max(self.clips_per_microbatch.values) * max(self.captions_per_clip.values)
        if most * max(self.caption_tokens.values) > MOST_TOKENS or most > _MOST_DRAWN:
            raise ValueError(
                f"a microbatch has up to {most:,} captions of {max(self.caption_tokens.values):,} "
                f"tokens (expected at most {_MOST_DRAWN:,}, of {MOST_TOKENS:,} tokens together)"
            )
        return self

    def draw(self, random: Random) -> ItemSizes:
        """The items of one microbatch: captions and the clips that read them."""
        captions: list[ItemSize] = []
        clips: list[ItemSize] = []
        for _ in range(self.clips_per_microbatch.draw(random)):
            tokens = self.frames.draw(random) * self.patches_per_frame.draw(random)
            count = self.captions_per_clip.draw(random)
            lengths = [self.caption_tokens.draw(random) for _ in range(count)]
            first = len(captions)
            captions += [ItemSize(tokens=length, spans=(length,)) for length in lengths]
            clips.append(
                ItemSize(
                    tokens=tokens,
                    spans=(tokens,),
                    context_tokens=sum(lengths),
                    needs={"text": tuple(range(first, len(captions)))},
                )
            )
        return {"text": captions, "dit": clips}


Workload = ImagesAndText | Clips | PackedSamples | GroupedClips
LanguageItems = Literal["sequences", "samples"]
"""What is an item of packed text: a whole sequence, or each of the samples in it."""


def _vlm() -> ImagesAndText:
    return ImagesAndText(
        kind="vlm",
        sequence_tokens=8192,
        image_share=Shares(values=(0.0, 0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)),
        image_patches=Counts(values=(196, 256, 676, 1296, 2704), weights=(1, 2, 3, 2, 2)),
        images_per_sample=Counts(values=(1, 2, 4, 8), weights=(4, 2, 1, 1)),
        text_tokens=Counts(values=(128, 512, 1024, 2048, 4096), weights=(3, 3, 2, 2, 1)),
    )


def _t2v() -> Clips:
    return Clips(
        kind="t2v",
        frames=Counts(values=(1, 8, 16, 24, 32)),
        patches_per_frame=Counts(values=(256, 576, 960), weights=(2, 2, 1)),
        captions_per_clip=Counts(values=(1, 2, 4)),
        caption_tokens=Counts(values=(64, 128, 256, 512)),
    )


class BuiltIn(NamedTuple):
    """A mixture that comes with the package."""

    make: Callable[[], Workload]
    num_microbatches: int
    """Of a batch, where nothing else is asked for."""


BUILT_IN: Mapping[str, BuiltIn] = {
    "vlm": BuiltIn(_vlm, 16),
    "t2v": BuiltIn(_t2v, 16),
    "dip-vlm": BuiltIn(dip_vlm, 64),
    "dip-t2v": BuiltIn(dip_t2v, 64),
}
"""By name; see ``docs/workloads.md``."""


def built_in_mixture(name: str) -> Workload:
    """The mixture called ``name``.

    Raises:
        ConfigError: There is none.
    """
    if name not in BUILT_IN:
        raise ConfigError(f"mixture {shown(name)} (expected one of {list(BUILT_IN)})")
    return BUILT_IN[name].make()


def load_workload(path: str | Path) -> Workload:
    """The distributions in a statistics file (JSON).

    Raises:
        ConfigError: The file cannot be read, or a field is missing, unknown or out of range.
    """
    data = read_json(path, ConfigError)
    adapter: TypeAdapter[Workload] = TypeAdapter(Annotated[Workload, Field(discriminator="kind")])
    try:
        return adapter.validate_python(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain_validation_error(error)}") from None


def draw_microbatches(
    workload: Workload,
    num_microbatches: int,
    seed: int,
    language_items: LanguageItems = "sequences",
) -> Sequence[ItemSizes]:
    """The items of a batch; the same for the same arguments.

    Args:
        language_items: Whether each packed sequence is an item, or each sample in one.

    Raises:
        ConfigError: ``num_microbatches`` is not positive or too large, or they hold too much; or
            there are no sequences whose samples could be items.
    """
    if language_items == "samples" and isinstance(workload, Clips | GroupedClips):
        raise ConfigError(
            "--language-items samples: a workload of clips packs no sequences (leave it out)"
        )
    if not 1 <= num_microbatches <= MOST_MICROBATCHES:
        raise ConfigError(f"{num_microbatches} microbatches (expected 1 to {MOST_MICROBATCHES:,})")
    random = Random(seed)
    drawn: list[ItemSizes] = []
    num_items = 0
    for _ in range(num_microbatches):
        samples = workload.draw(random)
        drawn.append(joined_sequences(samples) if language_items == "sequences" else samples)
        num_items += sum(len(size.spans) for sizes in drawn[-1].values() for size in sizes)
        if num_items > MOST_ITEMS:
            raise ConfigError(
                f"{num_microbatches:,} microbatches of these distributions hold more than "
                f"{MOST_ITEMS:,} items (give fewer microbatches, or shorter ones)"
            )
    return drawn


def joined_sequences(microbatch: ItemSizes) -> ItemSizes:
    """The same microbatch with one language item, in which samples do not see each other."""
    samples = microbatch.get("language", ())
    if not samples:
        return microbatch
    needed = tuple(number for sample in samples for number in sample.needs["vision"])
    sequence = ItemSize(
        tokens=sum(sample.tokens for sample in samples),
        spans=tuple(sample.tokens for sample in samples),
        needs={"vision": needed},
    )
    return {**microbatch, "language": [sequence]}
