"""How a conversation becomes tokens: turns between markup, of which the answers are learned.

A conversation is taken apart into pieces: markup, texts and media, in the order in which they are
written, each learned or not.  Only markup can become special tokens.  Neighbouring texts are
encoded together, as a tokenizer encodes them when the model is used, unless what is learned begins
or ends between them: there the model's own answer begins or ends, too.

A chat template is a program of Jinja.  It is run with a placeholder in the place of every text, so
that what it writes around the texts is known; a template that cuts white space off its texts has it
cut off here.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_dip.errors import DataError, shown
from megatron_dip.families.data.chat_template import write_turns
from megatron_dip.families.data.tokenizer import VlmTokenizer
from megatron_dip.text_form import SpecialTokens, TextForm, TurnMarkup

__all__ = ["EncodedText", "Part", "TurnParts", "encode_turns"]


class Part(NamedTuple):
    """A part of a turn: a text, or a place of a medium."""

    kind: Literal["text", "image", "audio"]
    text: str = ""


class TurnParts(NamedTuple):
    """One turn."""

    role: str
    parts: tuple[Part, ...]


class _Piece(NamedTuple):
    kind: Literal["text", "image", "audio", "markup"]
    text: str
    learned: bool = False


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """A sample as tokens, each image still a single token."""

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]
    """Per token: whether the model learns to say it."""

    def num_text_tokens(self, media: int | Collection[int]) -> int:
        """How many tokens are none of ``media``, the token of an image or those of several."""
        ids = {media} if isinstance(media, int) else media
        return sum(token not in ids for token in self.tokens)

    def expand(self, media: int | Collection[int], num_rows: Sequence[int]) -> "EncodedText":
        """The same with medium k written as ``num_rows[k]`` tokens."""
        ids = {media} if isinstance(media, int) else media
        tokens: list[int] = []
        trained: list[bool] = []
        sizes = iter(num_rows)
        for token, learn in zip(self.tokens, self.trained, strict=True):
            count = next(sizes) if token in ids else 1
            tokens += [token] * count
            trained += [learn] * count
        return EncodedText(tokens=tuple(tokens), trained=tuple(trained))


def encode_turns(turns: Sequence[TurnParts], tokenizer: VlmTokenizer, name: str) -> EncodedText:
    """The tokens of a conversation, each image or sound a single one of ``media_ids``.

    Args:
        name: What the conversation is, for messages.

    Raises:
        DataError: The form has no such role, or the template refuses the conversation.
    """
    form = tokenizer.form
    pieces = (
        _pieces_of_template(turns, form, name)
        if form.template is not None
        else _pieces_of_markup(turns, form, name)
    )
    return _encode(pieces, tokenizer, name)


def _pieces_of_markup(turns: Sequence[TurnParts], form: TextForm, name: str) -> Iterator[_Piece]:
    markup = {turn.role: turn for turn in form.turns or _single_marks(form.tokens)}
    yield _Piece("markup", form.tokens.bos or "")
    for number, turn in enumerate(turns):
        if turn.role not in markup:
            raise DataError(
                f"{name}: turn {number}: unknown role {shown(turn.role)}; expected "
                f"{' or '.join(map(repr, markup))}, the roles of data.turns"
            )
        yield _Piece("markup", markup[turn.role].before)
        yield from _texts(turn)
        yield from _after(turn, markup[turn.role].after, form.tokens, name)


def _single_marks(tokens: SpecialTokens) -> tuple[TurnMarkup, ...]:
    return (
        TurnMarkup(role="human", before=tokens.human or "", after=""),
        TurnMarkup(role="gpt", before=tokens.gpt or "", after=tokens.eos or ""),
    )


def _texts(turn: TurnParts, strip: tuple[bool, bool] = (False, False)) -> Iterator[_Piece]:
    """The parts of a turn; ``strip``: whether white space at its begin and end is cut off."""
    for place, part in enumerate(turn.parts):
        text = part.text
        if strip[0] and place == 0:
            text = text.lstrip()
        if strip[1] and place == len(turn.parts) - 1:
            text = text.rstrip()
        yield _Piece(part.kind, text, turn.role == "gpt")


def _after(turn: TurnParts, after: str, tokens: SpecialTokens, name: str) -> Iterator[_Piece]:
    """What follows a turn, of which the end of an answer is learned."""
    end = 0
    if turn.role == "gpt":
        place = after.find(tokens.eos or "")
        if not tokens.eos or place < 0:
            raise DataError(
                f"{name}: an answer is followed by {shown(after)}, in which data.tokens.eos "
                f"{shown(tokens.eos)} does not stand (expected what ends an answer)"
            )
        end = place + len(tokens.eos)
    yield _Piece("markup", after[:end], True)
    yield _Piece("markup", after[end:])


def _pieces_of_template(turns: Sequence[TurnParts], form: TextForm, name: str) -> Iterator[_Piece]:
    roles = [turn.role for turn in turns]
    begin, written = write_turns(form.template or "", roles, form.tokens, name)
    yield _Piece("markup", begin)
    for turn, around in zip(turns, written, strict=True):
        yield from _texts(turn, (around.cuts_start, around.cuts_end))
        yield from _after(turn, around.after, form.tokens, name)


def _encode(pieces: Iterable[_Piece], tokenizer: VlmTokenizer, name: str) -> EncodedText:
    tokens: list[int] = []
    trained: list[bool] = []
    run, run_is_learned = "", False

    def add(ids: Sequence[int], learned: bool) -> None:
        tokens.extend(ids)
        trained.extend([learned] * len(ids))

    def end_run() -> None:
        nonlocal run
        if run:
            add(tokenizer.encode_text(run), run_is_learned)
            run = ""

    media = {
        "image": (tokenizer.image_id, *tokenizer.around_image),
        "audio": (tokenizer.audio_id, *tokenizer.around_audio),
    }
    for piece in pieces:
        if piece.kind in media:
            end_run()
            medium, start, end = media[piece.kind]
            add([one for one in (start, medium, end) if one is not None], False)
            continue
        parts: Sequence[str | int] = [piece.text]
        if piece.kind == "markup":
            parts = tokenizer.split_markup(piece.text)
        for part in parts:
            if isinstance(part, str):
                if piece.learned != run_is_learned:
                    end_run()
                run, run_is_learned = run + part, piece.learned
                continue
            if part in tokenizer.media_ids:
                raise DataError(
                    f"{name}: its markup {shown(piece.text)} holds the token of a medium"
                )
            end_run()
            add([part], piece.learned)
    end_run()
    return EncodedText(tokens=tuple(tokens), trained=tuple(trained))
