"""The ``data`` of families that learn conversations."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from megatron_dip.errors import ConfigError, shown
from megatron_dip.families.forms import DataForm
from megatron_dip.families.token_forms import TurnForm
from megatron_dip.reading import read_json, read_text
from megatron_dip.text_form import OUR_TEXT_FORM, TextForm, TurnMarkup

__all__ = ["ConversationForm"]

_TEMPLATE_KEY = "chat_template"
_DEFAULT_TEMPLATE = "default"


class ConversationForm(DataForm):
    """Conversations, and how their turns are written for the tokenizer."""

    used_tokens: ClassVar[frozenset[str]] = DataForm.used_tokens | {
        *("image", "image_start", "image_end", "human", "gpt")
    }

    turns: dict[Literal["human", "gpt", "system"], TurnForm] | None = None
    """Markup of turns by role."""
    chat_template: Path | None = None
    """Markup as the tokenizer's project has it, instead of ``turns``: its tokenizer_config.json, or
    a file that holds the template alone."""

    @model_validator(mode="after")
    def _check_turns(self) -> Self:
        if self.turns is not None and self.chat_template is not None:
            raise ValueError("turns and chat_template are both given (expected one of them)")
        if self.turns is not None:
            missing = sorted({"human", "gpt"} - set(self.turns))
            if missing:
                raise ValueError(f"turns has no {' and no '.join(missing)} (expected both)")
            eos = self._special_tokens().eos
            if eos is None or eos not in self.turns["gpt"].after:
                raise ValueError(
                    f"turns.gpt.after is {shown(self.turns['gpt'].after)} (expected tokens.eos in "
                    f"it, {shown(eos)}: an answer is learned up to there)"
                )
        stated = self.tokens.model_fields_set if self.tokens is not None else frozenset[str]()
        unread = sorted({"human", "gpt"} & stated)
        if self._has_markup and unread:
            raise ValueError(
                f"tokens.{unread[0]} is given beside turns or chat_template, which say how turns "
                f"begin (expected one of them)"
            )
        return self

    @property
    def _has_markup(self) -> bool:
        return self.turns is not None or self.chat_template is not None

    @property
    def needed_tokens(self) -> frozenset[str]:
        """See :class:`DataForm`."""
        needed = frozenset({"bos", "eos", "image"})
        return needed if self._has_markup else needed | {"human", "gpt"}

    def text_form(self) -> TextForm:
        """See :class:`DataForm`."""
        if self.tokens is None and not self._has_markup:
            return OUR_TEXT_FORM
        turns = (self.turns or {}).items()
        return TextForm(
            tokens=self._special_tokens(),
            turns=tuple(TurnMarkup(role=r, before=t.before, after=t.after) for r, t in turns),
            template=None if self.chat_template is None else _read_template(self.chat_template),
        )


def _read_template(path: Path) -> str:
    """The template in a file.

    Raises:
        ConfigError: The file cannot be read, or has no template.
    """
    if path.suffix != ".json":
        return read_text(path, ConfigError)
    data = read_json(path, ConfigError)
    found = data.get(_TEMPLATE_KEY) if isinstance(data, dict) else None
    if isinstance(found, list):
        by_name = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = by_name.get(_DEFAULT_TEMPLATE)
    if not isinstance(found, str):
        raise ConfigError(
            f"{path}: has no text {_TEMPLATE_KEY!r} (expected tokenizer_config.json with one, or a "
            f"file that holds the template alone)"
        )
    return found
