"""The tokenizer: byte-level BPE with the marks of a conversation.

It is one JSON file of the ``tokenizers`` library, kept with the run.  A conversation is written

    <bos> <human> question <gpt> answer <eos> <human> question <gpt> answer <eos>

The marks are single tokens.  Text never becomes a mark: a user who types ``<eos>`` gets the
tokens of five ordinary characters.  Where an image stands is not the tokenizer's concern
(see ``samples``), which inserts ``image_id`` itself.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_dip.errors import DataError
from megatron_dip.files import write_atomically
from megatron_dip.reading import read_text

__all__ = ["SPECIAL_TOKENS", "VlmTokenizer", "load_tokenizer", "train_tokenizer"]

PAD, BOS, EOS, IMAGE, HUMAN, GPT = "<pad>", "<bos>", "<eos>", "<image>", "<human>", "<gpt>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE, HUMAN, GPT)
"""In the order of their ids when this package trains the tokenizer: ``<pad>`` is 0."""


class VlmTokenizer:
    """Text to token ids and back; the ids of the marks as attributes.

    It can be pickled and copied, as data loader workers need.
    """

    def __init__(self, text: str, source: str = "tokenizer") -> None:
        """
        Args:
            text: The JSON text of a tokenizer of the ``tokenizers`` library.
            source: Where it came from, for messages.

        Raises:
            DataError: The text is no tokenizer, or a mark is missing in it.
        """
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # The library raises plain Exception.
            raise DataError(
                f"{source}: not a tokenizer ({error}); make one with train_tokenizer"
            ) from error
        # Not kept in the JSON: without it, marks typed in a text would become marks.
        self._tokenizer.encode_special_tokens = True
        self._text = text
        self._source = source
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        """SHA-256 of the JSON text."""
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise DataError(
                f"{source}: has no token {', '.join(missing)}; expected a tokenizer with "
                f"{' '.join(SPECIAL_TOKENS)}, as train_tokenizer makes it"
            )
        self.pad_id = vocabulary[PAD]
        self.bos_id = vocabulary[BOS]
        self.eos_id = vocabulary[EOS]
        self.image_id = vocabulary[IMAGE]
        self.human_id = vocabulary[HUMAN]
        self.gpt_id = vocabulary[GPT]

    def __reduce__(self) -> tuple[Any, ...]:
        return VlmTokenizer, (self._text, self._source)

    def encode_text(self, text: str) -> list[int]:
        """The ids of ``text``, no mark among them, nothing added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, marks written out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path) -> VlmTokenizer:
    """Train a byte-level BPE tokenizer on ``texts`` and write it to ``path``.

    The 256 bytes are always part of the vocabulary, so that any text can be encoded.
    The vocabulary is smaller than ``vocab_size`` where the texts do not hold enough pairs.

    Raises:
        DataError: ``vocab_size`` is too small for the bytes and the marks.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise DataError(f"vocab_size is {vocab_size}; expected at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    # Its pattern never joins letters and punctuation, so no merge can spell one of the marks.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    text = tokenizer.to_str(pretty=True)
    write_atomically(Path(path), text)
    return VlmTokenizer(text, str(path))


def load_tokenizer(path: str | Path) -> VlmTokenizer:
    """The tokenizer in the JSON file ``path``.

    Raises:
        DataError: The file cannot be read, is no tokenizer, or lacks a mark.
    """
    return VlmTokenizer(read_text(path, DataError), str(path))
