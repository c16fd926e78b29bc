"""How a configuration says what a tokenizer of another project calls its special tokens."""

from collections.abc import Collection
from dataclasses import fields
from typing import Annotated, Self

from pydantic import Field, model_validator

from megatron_dip.forms import Form
from megatron_dip.text_form import OUR_TEXT_FORM, SpecialTokens

__all__ = ["TokensForm", "TurnForm"]

TokenName = Annotated[str, Field(min_length=1)]


class TokensForm(Form):
    """Names of special tokens.  What is needed and not named has this package's name for it; null
    says that the tokenizer has no such token."""

    pad: TokenName | None = None
    """Is looked up, and else not needed: no row that is padding is learned."""
    bos: TokenName | None = None
    eos: TokenName | None = None
    image: TokenName | None = None
    image_start: TokenName | None = None
    image_end: TokenName | None = None
    audio: TokenName | None = None
    audio_start: TokenName | None = None
    audio_end: TokenName | None = None
    human: TokenName | None = None
    gpt: TokenName | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "eos" in self.model_fields_set and self.eos is None:
            raise ValueError("eos is null (expected the token that ends an answer)")
        return self

    def special_tokens(self, needed: Collection[str]) -> SpecialTokens:
        """All names; ``needed`` are those that must be, under this package's names if no other."""
        names = [field.name for field in fields(SpecialTokens)]
        given = {name: getattr(self, name) for name in names if name in self.model_fields_set}
        ours = {
            name: getattr(OUR_TEXT_FORM.tokens, name) if name in needed else None for name in names
        }
        return SpecialTokens(**(ours | given))


class TurnForm(Form):
    """What is written around the text of a turn; names of special tokens in it are those tokens."""

    before: str = ""
    after: str = ""
