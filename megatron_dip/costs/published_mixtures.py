"""The workloads that DIP (arXiv 2504.14145) was measured on: packed samples, and grouped clips.

Published: all images have one size; sequences of a fixed length are packed greedily from three
data sets that differ in text per image; clips of similar length share a microbatch, which holds a
bounded number of them and of seconds.  What else is drawn is chosen here, see
``docs/workloads.md``.
"""

from random import Random
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_dip.costs.distributions import Counts, Range, Weight
from megatron_dip.costs.sizes import ItemSize, ItemSizes
from megatron_dip.forms import Form
from megatron_dip.limits import MOST_TOKENS, Positive, Tokens

__all__ = ["GroupedClips", "PackedSamples", "SampleSource", "dip_t2v", "dip_vlm"]

_Share = Annotated[float, Field(ge=0, le=1)]
_ImageCount = Annotated[int, Field(ge=0, le=1000)]


class SampleSource(Form):
    """A data set of samples with images and text."""

    weight: Weight = 1.0
    """Among all sources, in any unit."""
    images: Annotated[tuple[_ImageCount, ...], Field(min_length=1)]
    """Of a sample, all alike."""
    text_tokens: Range
    """Of a sample, for each of its images; those of one without images are as many."""

    def draw(self, random: Random) -> tuple[int, int]:
        """Images and text tokens of one sample."""
        num_images = random.choice(self.images)
        return num_images, max(1, round(self.text_tokens.draw(random) * max(1, num_images)))


class PackedSamples(Form):
    """Sequences that are filled with samples of several data sets, one data set or all of them."""

    format: Literal["megatron-dip/workload"] = "megatron-dip/workload"
    version: Literal[1] = 1
    kind: Literal["packed"]
    sequence_tokens: Annotated[Tokens, Field(le=2**20)]
    """Tokens of every packed sequence."""
    image_patches: Tokens
    image_tokens: Annotated[Tokens, Field(gt=0)]
    """That an image stands for in a sequence."""
    mixed_share: _Share = 0.0
    """Of the sequences: those whose samples are of all sources; others are of one."""
    sources: Annotated[tuple[SampleSource, ...], Field(min_length=1, max_length=100)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not sum(source.weight for source in self.sources) > 0:
            raise ValueError("weights of the sources sum to 0 (give one a positive weight)")
        return self

    def draw(self, random: Random) -> ItemSizes:
        """The items of one microbatch: its images, and a language item per sample.

        The first sample that does not fit whole ends the sequence: it is cut, keeps the images that
        fit, and takes what room is left.
        """
        is_mixed = random.random() < self.mixed_share
        source = self._source(random)
        samples: list[ItemSize] = []
        num_images, room = 0, self.sequence_tokens
        while room > 0:
            drawn, text = (self._source(random) if is_mixed else source).draw(random)
            wanted = drawn * self.image_tokens + text
            tokens = min(wanted, room)
            kept = min(drawn, room // self.image_tokens)
            needed = tuple(range(num_images, num_images + kept))
            samples.append(ItemSize(tokens=tokens, spans=(tokens,), needs={"vision": needed}))
            num_images += kept
            room -= tokens
        image = ItemSize(
            tokens=self.image_patches, spans=(self.image_patches,), output_tokens=self.image_tokens
        )
        return {"vision": [image] * num_images, "language": samples}

    def _source(self, random: Random) -> SampleSource:
        weights = [source.weight for source in self.sources]
        return random.choices(self.sources, weights)[0]


class GroupedClips(Form):
    """Microbatches of video clips that are alike in length, each with its caption."""

    format: Literal["megatron-dip/workload"] = "megatron-dip/workload"
    version: Literal[1] = 1
    kind: Literal["grouped"]
    seconds: Counts
    """Longest length of a group, one per microbatch."""
    shortest_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Length of the shortest clip of a group over that of its longest."""
    most_clips: Annotated[int, Field(gt=0, le=1000)]
    most_seconds: Positive
    """Of the clips of a microbatch together, by the longest length of their group."""
    frames_per_second: Annotated[int, Field(gt=0, le=1000)]
    """Latent frames."""
    patches_per_frame: Annotated[Tokens, Field(gt=0)]
    caption_tokens: Range

    @model_validator(mode="after")
    def _check(self) -> Self:
        longest = max(self.seconds.values)
        if min(self.seconds.values) < 1 or longest > self.most_seconds:
            raise ValueError(
                f"seconds.values are {min(self.seconds.values)} to {longest} (expected 1 to "
                f"most_seconds {self.most_seconds})"
            )
        tokens = self.most_seconds * self.frames_per_second * self.patches_per_frame
        if max(tokens, self.most_clips * self.caption_tokens.most) > MOST_TOKENS:
            raise ValueError(f"a microbatch may hold more than {MOST_TOKENS:,} tokens")
        return self

    def draw(self, random: Random) -> ItemSizes:
        """The items of one microbatch: captions and the clips that read them.

        At least half as many clips as would fit.
        """
        longest = self.seconds.draw(random)
        most = min(self.most_clips, self.most_seconds // longest)
        captions: list[ItemSize] = []
        clips: list[ItemSize] = []
        for number in range(random.randint(max(1, most // 2), most)):
            seconds = longest * random.uniform(self.shortest_share, 1.0)
            tokens = max(1, round(seconds * self.frames_per_second)) * self.patches_per_frame
            length = max(1, round(self.caption_tokens.draw(random)))
            captions.append(ItemSize(tokens=length, spans=(length,)))
            clips.append(
                ItemSize(
                    tokens=tokens,
                    spans=(tokens,),
                    context_tokens=length,
                    needs={"text": (number,)},
                )
            )
        return {"text": captions, "dit": clips}


def dip_vlm() -> PackedSamples:
    """Images of 728 x 728 pixels, with texts as in LAION-2B, OBELICS and ScienceQA."""
    return PackedSamples(
        kind="packed",
        sequence_tokens=8192,
        image_patches=2704,
        image_tokens=169,
        mixed_share=0.4,
        sources=(
            SampleSource(weight=2, images=(1,), text_tokens=Range(least=4, most=28.8)),
            SampleSource(
                weight=3, images=(1, 2, 3), text_tokens=Range(least=0.4, most=3115, scale="log")
            ),
            SampleSource(weight=3, images=(0, 1), text_tokens=Range(least=60, most=240)),
        ),
    )


def dip_t2v() -> GroupedClips:
    """Videos of 16 frames a second, 4 of them a latent frame of 512 patches."""
    return GroupedClips(
        kind="grouped",
        seconds=Counts(values=(2, 3, 4, 5, 8, 10, 12, 16)),
        shortest_share=0.85,
        most_clips=8,
        most_seconds=16,
        frames_per_second=4,
        patches_per_frame=512,
        caption_tokens=Range(least=60, most=500),
    )
