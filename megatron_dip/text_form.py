"""How texts are written for a tokenizer: names of special tokens, and how turns begin and end.

Without more, a tokenizer has the marks of this package, each a token of its own::

    <bos> <human> question <gpt> answer <eos> <human> question <gpt> answer <eos>

Tokenizers of other projects call theirs otherwise, and write turns as *markup*: text in which the
names of special tokens become those tokens, ``<|im_start|>user\\n``.
"""

from dataclasses import dataclass

__all__ = [
    "BOS",
    "EOS",
    "GPT",
    "HUMAN",
    "IMAGE",
    "OUR_TEXT_FORM",
    "PAD",
    "SPECIAL_TOKENS",
    "SYSTEM_ROLE",
    "SpecialTokens",
    "TextForm",
    "TurnMarkup",
]

PAD, BOS, EOS, IMAGE, HUMAN, GPT = "<pad>", "<bos>", "<eos>", "<image>", "<human>", "<gpt>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE, HUMAN, GPT)
"""In the order of their ids when this package trains the tokenizer: ``<pad>`` is 0."""
SYSTEM_ROLE = "system"


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The names of special tokens; None for what the tokenizer does not have or need."""

    pad: str | None = PAD
    bos: str | None = BOS
    """Stands before a text; none does where the tokenizer has none."""
    eos: str | None = EOS
    """Ends an answer, and is learned with it."""
    image: str | None = IMAGE
    """Stands for every row of an image."""
    image_start: str | None = None
    image_end: str | None = None
    audio: str | None = None
    """Stands for every row of a sound; ``image`` does where not given."""
    audio_start: str | None = None
    audio_end: str | None = None
    human: str | None = HUMAN
    """Begins a turn, where there is no other markup."""
    gpt: str | None = GPT


@dataclass(frozen=True, kw_only=True)
class TurnMarkup:
    """What is written around the text of a turn."""

    role: str
    """``human``, ``gpt`` or ``system``, as samples have it."""
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class TextForm:
    """All that a tokenizer's file does not say of how texts are written for it."""

    tokens: SpecialTokens = SpecialTokens()
    turns: tuple[TurnMarkup, ...] = ()
    """One for each role; where there are none and no template, ``tokens`` begin and end turns."""
    template: str | None = None
    """A chat template of Jinja, as ``tokenizer_config.json`` has it, instead of ``turns``."""


OUR_TEXT_FORM = TextForm()
"""Of the tokenizers that this package trains."""
