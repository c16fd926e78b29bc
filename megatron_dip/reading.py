"""Reading files of text: the one way in for JSON, YAML and plain text of a user.

Whatever is wrong with such a file becomes one line that names it, and the place in it: a file that
is missing, a folder, not UTF-8, cut short, nested too deeply, with a key that comes twice.  A
byte-order mark is accepted (of UTF-8, UTF-16 or UTF-32); without one the text must be UTF-8.
"""

import codecs
import json
import sys
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_dip.errors import ConfigError, one_line, shown

__all__ = [
    "RepeatedKeys",
    "decode_text",
    "parse_json",
    "parse_yaml",
    "read_content",
    "read_json",
    "read_text",
    "read_yaml",
]

# The mark of UTF-32 begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LFS_POINTER = "version https://git-lfs.github.com/spec/"
_MAX_REASON_CHARACTERS = 300


class RepeatedKeys(dict[str, Any]):
    """An object of JSON in which a key comes twice; the last value counts, as always in JSON."""

    repeated: str
    """The first such key."""


def read_text(path: str | Path, error_type: type[ValueError]) -> str:
    """The text of a file, without a byte-order mark.

    Raises:
        error_type: The file cannot be read, or is no text; the message names it.
    """
    return decode_text(read_content(path, error_type), str(path), error_type)


def read_content(path: str | Path, error_type: type[ValueError]) -> bytes:
    """The bytes of a file.

    Raises:
        error_type: The file cannot be read; the message names it.
    """
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no name of a file, e.g. with a NUL in it.
        reason = error.strerror if isinstance(error, OSError) else None
        raise error_type(f"{path}: cannot be read ({reason or error})") from error


def decode_text(content: bytes, source: str, error_type: type[ValueError]) -> str:
    """The text that ``content`` is, without a byte-order mark; ``source`` names it in messages.

    Raises:
        error_type: It is no text.
    """
    marks = [name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)]
    encoding = marks[0] if marks else "utf-8"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise error_type(
            f"{source}: not {encoding.removesuffix('-sig').upper()} text (line {line}, byte "
            f"{error.start}: {error.reason}); save the file as UTF-8, e.g. with iconv -f GB18030 "
            f"-t UTF-8"
        ) from error


def read_json(
    path: str | Path, error_type: type[ValueError], *, allow_repeated_keys: bool = False
) -> Any:
    """What a JSON file holds; see :func:`parse_json`.

    Raises:
        error_type: The file cannot be read or is not JSON; the message names it.
    """
    text = read_text(path, error_type)
    return parse_json(text, str(path), error_type, allow_repeated_keys=allow_repeated_keys)


def parse_json(
    text: str, source: str, error_type: type[ValueError], *, allow_repeated_keys: bool = False
) -> Any:
    """What a JSON text says.  NaN and Infinity are numbers here, which forms then refuse by field.

    Args:
        source: What the text is, for messages: a file, or a line of one.
        allow_repeated_keys: Make an object in which a key comes twice a :class:`RepeatedKeys`,
            for callers that refuse the object alone.

    Raises:
        error_type: The text is not JSON, or a key comes twice in an object.
    """
    make = _keep_repeated if allow_repeated_keys else partial(_refuse_repeated, source, error_type)
    try:
        # Longer integers than Python reads are infinite, which the field's own check refuses.
        return json.loads(text, object_pairs_hook=make, parse_int=_parse_integer)
    except json.JSONDecodeError as error:
        raise error_type(f"{source}: not JSON ({_json_fault(text, error)})") from error
    except RecursionError as error:
        raise error_type(f"{source}: not JSON of any form here (nested too deeply)") from error


def _parse_integer(digits: str) -> int | float:
    return int(digits) if len(digits) < sys.int_info.default_max_str_digits else float(digits)


def _refuse_repeated(
    source: str, error_type: type[ValueError], pairs: Sequence[tuple[str, Any]]
) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise error_type(
            f"{source}: the key {shown(_first_repeated(pairs))} comes twice in an object"
        )
    return found


def _keep_repeated(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    kept = RepeatedKeys(found)
    kept.repeated = _first_repeated(pairs)
    return kept


def _first_repeated(pairs: Sequence[tuple[str, Any]]) -> str:
    counts = Counter(key for key, _ in pairs)
    return next(key for key, count in counts.items() if count > 1)


def _json_fault(text: str, error: json.JSONDecodeError) -> str:
    if not text.strip(" \t\r\n\0"):
        return "the file is empty" if not text.strip() else "the file holds nothing but zeros"
    if text.startswith(_LFS_POINTER):
        return "this is a pointer of Git LFS, not the file itself: run git lfs pull"
    hint = ""
    if error.msg == "Extra data" and error.lineno > 1:
        hint = "; of JSON lines, one value per line, make one list"
    elif error.pos >= len(text.rstrip()):
        hint = "; the file ends too early"
    return f"line {error.lineno}, column {error.colno}: {error.msg}{hint}"


class _Loader(yaml.SafeLoader):
    """PyYAML's, which takes the last of two equal keys silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node)
                if key in seen:
                    _refuse_key(key, key_node)
                seen.add(key)
        return super().construct_mapping(node, deep)


def _refuse_key(key: Hashable, node: yaml.Node) -> NoReturn:
    problem = f"the key {shown(key)} comes twice"
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def read_yaml(path: str | Path, error_type: type[ValueError] = ConfigError) -> dict[str, object]:
    """The mapping at the top of a YAML file.

    Raises:
        error_type: The file cannot be read, is not YAML, or holds no mapping; it is named.
    """
    data = parse_yaml(read_text(path, error_type), str(path), error_type)
    if not isinstance(data, dict):
        found = "an empty file" if data is None else type(data).__name__
        raise error_type(f"{path}: expected keys and values at top level, found {found}")
    return data


def parse_yaml(text: str, source: str, error_type: type[ValueError]) -> Any:
    """What a YAML text says.

    Raises:
        error_type: The text is not YAML, or a key comes twice in a mapping.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise error_type(f"{source}: not YAML of any form here (nested too deeply)") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist.
        raise error_type(f"{source}: not YAML ({_yaml_fault(error)})") from error


def _yaml_fault(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    reason = one_line(getattr(error, "problem", None) or str(error), _MAX_REASON_CHARACTERS)
    return f"line {mark.line + 1}, column {mark.column + 1}: {reason}" if mark else reason
