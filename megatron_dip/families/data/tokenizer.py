"""The tokenizer: a JSON file of the ``tokenizers`` library, kept with the run.

This package trains byte-level BPE with marks of its own; those of other projects are used as
``text_form`` says.  Marks are single tokens.  Text never becomes a mark: a user who types ``<eos>``
gets the tokens of five ordinary characters.  Where turns and images stand is not the tokenizer's
concern, see ``conversation``.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_dip.errors import DataError, one_line, shown
from megatron_dip.families.data.chat_template import compile_template
from megatron_dip.files import write_atomically
from megatron_dip.reading import parse_json, read_text
from megatron_dip.text_form import OUR_TEXT_FORM, SPECIAL_TOKENS, TextForm

__all__ = ["SPECIAL_TOKENS", "VlmTokenizer", "load_tokenizer", "train_tokenizer"]

_LONGEST_REASON = 300
_MOST_TOKENS = 2**24
_STANDARD_ERROR = 2
_PROBE = "aZ5é图"
_Json = dict[str, Any]


class VlmTokenizer:
    """Text to token ids and back; the ids of the marks as attributes, None for what it has not.

    Nothing that a tokenizer's file says of truncation, padding, added tokens around a text or
    random merges holds here: a text becomes its own tokens, all of them, every time.
    It can be pickled and copied, as data loader workers need.
    """

    def __init__(
        self, text: str, source: str = "tokenizer", form: TextForm = OUR_TEXT_FORM
    ) -> None:
        """
        Args:
            text: The JSON text of a tokenizer of the ``tokenizers`` library.
            source: Where it came from, for messages.
            form: What it calls its special tokens.

        Raises:
            DataError: The text is no tokenizer, a mark is missing in it, or the template of the
                form is none.
        """
        self._text, self._source, self.form = text, source, form
        if form.template is not None:
            compile_template(form.template)
        marks = {name: mark for name, mark in asdict(form.tokens).items() if mark is not None}
        data = _without_state(parse_json(text, source, DataError), source, set(marks.values()))
        try:
            self._tokenizer = _made_quietly(json.dumps(data))
        except BaseException as error:  # The library raises plain Exception, its Rust panics.
            if not is_of_library(error):
                raise
            raise DataError(
                f"{source}: not a tokenizer ({one_line(str(error), _LONGEST_REASON)}); expected "
                f"tokenizer.json of the tokenizers library"
            ) from error
        # Not kept in the JSON: without it, marks typed in a text would become marks.
        self._tokenizer.encode_special_tokens = True
        self.digest = hashlib.sha256(f"{text}\0{form!r}".encode()).hexdigest()
        """SHA-256 of the JSON text and of the form."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        """One more than the highest id: a vocabulary may have gaps."""
        self.num_tokens = len(vocabulary)
        self._check_marks(marks, vocabulary)
        ids = {name: vocabulary[mark] for name, mark in marks.items()}
        self.pad_id, self.bos_id, self.eos_id = (ids.get(n) for n in ("pad", "bos", "eos"))
        self.human_id, self.gpt_id = ids.get("human"), ids.get("gpt")
        self.image_id: int = ids.get("image", -1)
        """-1, which no token is, where there is none."""
        self.audio_id: int = ids.get("audio", self.image_id)
        self.media_ids = frozenset({self.image_id, self.audio_id})
        self.around_image = (ids.get("image_start"), ids.get("image_end"))
        self.around_audio = (ids.get("audio_start"), ids.get("audio_end"))
        added = self._tokenizer.get_added_tokens_decoder()
        known = {token.content: number for number, token in added.items()} | {
            mark: vocabulary[mark] for mark in marks.values()
        }
        self._ids_of_markup = known
        longest_first = sorted(known, key=lambda name: (-len(name), name))
        self._markup = re.compile("|".join(map(re.escape, longest_first)))

    def __reduce__(self) -> tuple[Any, ...]:
        return VlmTokenizer, (self._text, self._source, self.form)

    def encode_text(self, text: str) -> list[int]:
        """The ids of ``text``, no mark among them, nothing added.

        Raises:
            DataError: The library fails on the text.
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except BaseException as error:
            if not is_of_library(error):
                raise
            reason = one_line(str(error), _LONGEST_REASON)
            raise DataError(f"{self._source}: cannot encode {shown(text)} ({reason})") from error

    def begin(self) -> list[int]:
        """What stands before a text that is no conversation."""
        return [] if self.bos_id is None else [self.bos_id]

    def end(self) -> list[int]:
        """What stands after it."""
        return [] if self.eos_id is None else [self.eos_id]

    def split_markup(self, markup: str) -> list[str | int]:
        """Markup as texts and the ids of the special tokens between them."""
        parts: list[str | int] = []
        end = 0
        for match in self._markup.finditer(markup):
            parts += [markup[end : match.start()], self._ids_of_markup[match[0]]]
            end = match.end()
        return [part for part in (*parts, markup[end:]) if part != ""]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, marks written out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _check_marks(self, marks: Mapping[str, str], vocabulary: Mapping[str, int]) -> None:
        missing = [mark for mark in marks.values() if mark not in vocabulary]
        if missing:
            raise DataError(
                f"{self._source}: has no token {', '.join(shown(m)[1:-1] for m in missing)}; "
                f"expected a tokenizer with {' '.join(SPECIAL_TOKENS)}, as train_tokenizer makes "
                f"it, or the names of its own tokens under data.tokens"
            )
        lost = [character for character in _PROBE if not self.encode_text(character)]
        if lost:
            raise DataError(
                f"{self._source}: drops characters of a text without a trace, as {shown(lost[0])}; "
                f"expected a tokenizer that knows all bytes, or has a token for the unknown"
            )
        for name, mark in marks.items():
            if vocabulary[mark] in self.encode_text(mark):
                raise DataError(
                    f"{self._source}: the text {shown(mark)} becomes the token data.tokens.{name}, "
                    f"so that a user could type it; name a token that is special"
                )
        media = [marks[name] for name in ("image", "audio") if name in marks]
        others = {mark for name, mark in marks.items() if name not in ("image", "audio", "pad")}
        if others.intersection(media):
            raise DataError(
                f"{self._source}: {shown(media)} stand for rows of media and for something else; "
                f"name different tokens under data.tokens"
            )


def _made_quietly(text: str) -> Tokenizer:
    """A tokenizer of the library, without what its Rust writes of a panic: the error says it, too.

    What other threads write to standard error meanwhile comes after it.
    """
    with tempfile.TemporaryFile() as written:
        try:
            kept = os.dup(_STANDARD_ERROR)
        except OSError:  # There is none.
            return Tokenizer.from_str(text)
        has_panicked = False
        os.dup2(written.fileno(), _STANDARD_ERROR)
        try:
            return Tokenizer.from_str(text)
        except BaseException as error:
            has_panicked = not isinstance(error, Exception)
            raise
        finally:
            os.dup2(kept, _STANDARD_ERROR)
            os.close(kept)
            written.seek(0)
            if not has_panicked and (text_of_others := written.read()):
                os.write(_STANDARD_ERROR, text_of_others)


def is_of_library(error: BaseException) -> bool:
    """Whether the tokenizers library raised it: an exception, or a panic of its Rust."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _without_state(data: Any, source: str, marks: Collection[str]) -> _Json:
    """The tokenizer's JSON without what would change texts behind our back."""
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise DataError(
            f"{source}: not a tokenizer (no object with a model); expected tokenizer.json of the "
            f"tokenizers library"
        )
    data |= {"truncation": None, "padding": None, "post_processor": None}
    if data["model"].get("dropout") is not None:
        data["model"]["dropout"] = None
    added = data.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("content") in marks:
            token["special"] = True
    return data


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path) -> VlmTokenizer:
    """Train a byte-level BPE tokenizer on ``texts`` and write it to ``path``.

    The 256 bytes are always part of the vocabulary, so that any text can be encoded.
    The vocabulary is smaller than ``vocab_size`` where the texts do not hold enough pairs.

    Raises:
        DataError: ``vocab_size`` is too small for the bytes and the marks.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if not smallest <= vocab_size <= _MOST_TOKENS:
        raise DataError(
            f"vocab_size is {vocab_size}; expected at least {smallest}, at most {_MOST_TOKENS:,}"
        )
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


def load_tokenizer(path: str | Path, form: TextForm = OUR_TEXT_FORM) -> VlmTokenizer:
    """The tokenizer in the JSON file ``path``, for texts of the given form.

    Raises:
        DataError: The file cannot be read, is no tokenizer, or lacks a mark.
    """
    if Path(path).is_dir() or Path(path).suffix == ".model":
        raise DataError(
            f"{path}: is a folder or a model of sentencepiece; expected the file tokenizer.json of "
            f"the tokenizers library, as transformers saves it"
        )
    return VlmTokenizer(read_text(path, DataError), str(path), form)
