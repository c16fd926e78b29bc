"""Base of the versioned JSON forms: immutable, strict, with errors that name the field."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = ["Form", "digest_of", "explain_validation_error", "read_json"]


def explain_validation_error(error: ValidationError) -> str:
    """One line per wrong field: its path, what is wrong and, where it helps, what was given."""
    lines = []
    for detail in error.errors():
        path = ".".join(str(part) for part in detail["loc"])
        given = detail.get("input")
        shown = f" (given: {given!r})" if isinstance(given, (str, int, float, bool)) else ""
        # Checks of ours across fields: pydantic puts its own words before the message.
        message = detail["msg"].removeprefix("Value error, ")
        lines.append(f"{path}: {message}{shown}" if detail["loc"] else message)
    return "; ".join(lines)


def read_json(path: str | Path, error_type: type[ValueError]) -> Any:
    """The parsed content of a JSON file; ``error_type`` with the path where it has none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise error_type(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise error_type(f"{path}: not JSON ({error})") from error


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
