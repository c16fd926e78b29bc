"""Chat templates: programs of Jinja that write a conversation for a model.

A template is run with a placeholder in the place of every text, so that what it writes around the
texts is known, and no text can be taken for markup.  A template that cuts white space off its texts
has it cut off in what is trained, too.  It cannot know the date: templates that ask for one write
their own default, so that the same data is the same tokens tomorrow.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Never

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_dip.errors import DataError, one_line
from megatron_dip.text_form import SpecialTokens

__all__ = ["WrittenTurn", "compile_template", "write_turns"]

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
# Private characters, and white space that no template writes by itself: what becomes of it tells
# whether a template cuts white space off.
_PLACEHOLDER = "\u2003\ue0f0{}\ue0f1\u2003"
_PLACEHOLDERS = re.compile("(\u2003?)\ue0f0([0-9]+)\ue0f1(\u2003?)")
_LONGEST_REASON = 200


class WrittenTurn(NamedTuple):
    """What a template does with the text of a turn."""

    cuts_start: bool
    """Whether it cuts off white space before the text."""
    cuts_end: bool
    after: str
    """What it writes between this text and the next."""


@lru_cache(maxsize=8)
def compile_template(text: str) -> Template:
    """A chat template, read as ``transformers`` reads it.

    Raises:
        DataError: It is no template of Jinja.
    """

    def refuse(message: str) -> Never:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(text)
    except TemplateSyntaxError as error:
        reason = one_line(str(error), _LONGEST_REASON)
        raise DataError(
            f"data.chat_template: not a template of Jinja (line {error.lineno}: {reason})"
        ) from error


def write_turns(
    template: str, roles: Sequence[str], tokens: SpecialTokens, name: str
) -> tuple[str, list[WrittenTurn]]:
    """What a template writes before the first of some turns, and around each.

    Args:
        roles: As samples have them.
        name: What the conversation is, for messages.

    Raises:
        DataError: The template refuses the conversation, or leaves a turn out.
    """
    messages = [
        {"role": _ROLES.get(role, role), "content": _PLACEHOLDER.format(number)}
        for number, role in enumerate(roles)
    ]
    try:
        written = compile_template(template).render(
            messages=messages,
            add_generation_prompt=False,
            bos_token=tokens.bos or "",
            eos_token=tokens.eos or "",
            pad_token=tokens.pad or "",
        )
    except Exception as error:  # A template may fail as any program does.
        reason = one_line(str(error), _LONGEST_REASON)
        raise DataError(f"{name}: the chat template refuses it ({reason})") from error
    places = list(_PLACEHOLDERS.finditer(written))
    if [int(place[2]) for place in places] != list(range(len(roles))):
        raise DataError(
            f"{name}: the chat template does not write its {len(roles)} turns once each and in "
            f"their order"
        )
    ends = [*(place.start() for place in places[1:]), len(written)]
    return written[: places[0].start()], [
        WrittenTurn(not place[1], not place[3], written[place.end() : end])
        for place, end in zip(places, ends, strict=True)
    ]
