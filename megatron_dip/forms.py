"""Base of the versioned JSON forms: immutable, strict, with errors that name the field."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_dip.errors import one_line, shown

__all__ = ["Form", "digest_of", "explain_validation_error"]

_NUM_SHOWN_FIELDS = 6
_MAX_KEY_CHARACTERS = 60
_MAX_REASON_CHARACTERS = 600


def explain_validation_error(error: ValidationError) -> str:
    """One part per wrong field, the first few of them: its path, what is wrong and, where it
    helps, what was given."""
    details = error.errors()
    lines = []
    for detail in details[:_NUM_SHOWN_FIELDS]:
        path = ".".join(one_line(str(part), _MAX_KEY_CHARACTERS) for part in detail["loc"])
        given = detail.get("input")
        value = f" (given: {shown(given)})" if isinstance(given, (str, int, float, bool)) else ""
        # Checks of ours across fields: pydantic puts its own words before the message.
        message = one_line(detail["msg"].removeprefix("Value error, "), _MAX_REASON_CHARACTERS)
        lines.append(f"{path}: {message}{value}" if detail["loc"] else message)
    if len(details) > _NUM_SHOWN_FIELDS:
        lines.append(f"and {len(details) - _NUM_SHOWN_FIELDS} more wrong fields")
    return "; ".join(lines)


def digest_of(data: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON text of ``data``."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Form(BaseModel):
    """An immutable record that is checked once, when it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, data: Mapping[str, Any], error_type: type[ValueError], source: str = "") -> Self:
        """``data`` as a checked record.

        Raises:
            error_type: A field is missing, unknown or out of range; the message names it.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            prefix = f"{source}: " if source else ""
            raise error_type(prefix + explain_validation_error(error)) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, without what has been computed from the fields of the original."""
        copied = super().model_copy(update=update, deep=deep)
        for name in set(copied.__dict__) - set(type(self).model_fields):
            del copied.__dict__[name]
        return copied

    def digest(self) -> str:
        """SHA-256 of the canonical JSON text: equal records have equal digests."""
        return digest_of(self.model_dump(mode="json"))
