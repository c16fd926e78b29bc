"""Files of text: what is wrong with one is a line that names it, whoever reads it."""

import ast
import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_dip.cli.main import app
from megatron_dip.costs import load_cluster, load_model, load_profile
from megatron_dip.costs.mixtures import load_workload
from megatron_dip.errors import MAX_MESSAGE_CHARACTERS, ConfigError, DataError, one_line, shown
from megatron_dip.families.configs import load_config
from megatron_dip.forms import Form
from megatron_dip.partition import load_partition
from megatron_dip.plan.plan import load_plan
from megatron_dip.reading import RepeatedKeys, parse_json, read_json, read_text, read_yaml
from megatron_dip.report.steps import read_records
from megatron_dip.report.traces import read_traces
from megatron_dip.workload import load_problem

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_dip"
DEEP = 100_000

BAD_TEXTS = {
    "Chinese in GBK": ("['猫在树上']".encode("gbk"), "not UTF-8 text (line 1, byte "),
    "half of UTF-16": (codecs.BOM_UTF16_LE + b"[\0]", "not UTF-16 text"),
    "a folder": (None, "cannot be read (Is a directory)"),
}
BAD_JSON = BAD_TEXTS | {
    "nothing": (b"", "the file is empty"),
    "zeros": (b"\0" * 50, "the file holds nothing but zeros"),
    "cut short": (b'{"a": [1,', "the file ends too early"),
    "deep": (b"[" * DEEP, "nested too deeply"),
    "single quotes": (b"{\n\"a\": 1,\n'b': 2}", "line 3, column 1"),
    "a key twice": (b'{"a": {"b": 1, "b": 2}}', "the key 'b' comes twice"),
    "lines": (b'{"a": 1}\n{"a": 2}\n', "line 2, column 1: Extra data; of JSON lines"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
}
BAD_YAML = BAD_TEXTS | {
    "nothing": (b"", "expected keys and values at top level, found an empty file"),
    "zeros": (b"\0" * 50, "special characters are not allowed"),
    "a list": (b"- a\n", "found list"),
    "deep": (b"[" * 900, "nested too deeply"),
    "a tab": (b"a:\n\tb: 1\n", "line 2, column 1: found character"),
    "a key twice": (b"a: 1\nb: {c: 1, c: 2}\n", "line 2, column 11: the key 'c' comes twice"),
    "no such date": (b"a: 2026-13-45\n", "not YAML (month must be"),
    "a function": (b"a: !!python/name:os.system\n", "could not determine a constructor"),
}
JSON_READERS: dict[str, Callable[[Path], Any]] = {
    "plan": load_plan,
    "partition": load_partition,
    "problem": load_problem,
    "profile": load_profile,
    "statistics": load_workload,
}
YAML_READERS: dict[str, Callable[[Path], Any]] = {
    "configuration": load_config,
    "model": load_model,
    "cluster": load_cluster,
}


def write(path: Path, content: bytes | None) -> Path:
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    return path


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    """What the reader says; asserts that it is an error about input, of one short line."""
    with pytest.raises((ConfigError, DataError, ValueError)) as caught:
        read(path)
    message = str(caught.value)
    assert type(caught.value).__module__ == "megatron_dip.errors", caught.value
    assert str(path) in message and "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("reader", JSON_READERS)
@pytest.mark.parametrize("kind", BAD_JSON)
def test_what_is_wrong_with_a_file_of_json_is_said_with_its_name(
    tmp_path: Path, kind: str, reader: str
) -> None:
    content, expected = BAD_JSON[kind]
    path = write(tmp_path / "file.json", content)
    assert expected in refusal(JSON_READERS[reader], path)


@pytest.mark.parametrize("reader", YAML_READERS)
@pytest.mark.parametrize("kind", BAD_YAML)
def test_what_is_wrong_with_a_file_of_yaml_is_said_with_its_name(
    tmp_path: Path, kind: str, reader: str
) -> None:
    content, expected = BAD_YAML[kind]
    path = write(tmp_path / "file.yaml", content)
    assert expected in refusal(YAML_READERS[reader], path)


@pytest.mark.parametrize("kind", ["Chinese in GBK", "deep"])
def test_records_and_traces_name_their_file(tmp_path: Path, kind: str) -> None:
    content = BAD_JSON[kind][0]
    assert content is not None
    records = write(tmp_path / "steps-replica0.jsonl", content)
    with pytest.raises(DataError, match=records.name):
        read_records(tmp_path)
    traces = write(tmp_path / "rank00000.jsonl", content)
    with pytest.raises(DataError, match=traces.name):
        read_traces(tmp_path)


@pytest.mark.parametrize("name", ["missing", "with a \0 in it", "half \ud800", "x" * 5000])
def test_names_of_files_that_cannot_be_opened_are_errors_about_input(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_text(tmp_path / name, ConfigError)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_accepted(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "file"
    path.write_text('{"图": 1}', encoding=encoding)
    assert read_json(path, DataError) == read_yaml(path) == {"图": 1}


def test_longer_integers_than_python_reads_are_refused_by_their_field() -> None:
    class Size(Form):
        rows: int

    data = parse_json('{"rows": ' + "9" * 5000 + "}", "file", DataError)
    with pytest.raises(ConfigError, match=r"rows: .*given: inf"):
        Size.parse(data, ConfigError)
    with pytest.raises(ConfigError, match=r"rows: .*given: nan"):
        Size.parse(parse_json('{"rows": NaN}', "file", DataError), ConfigError)


def test_an_object_with_a_key_twice_can_be_kept_for_whoever_refuses_it_alone() -> None:
    text = '[{"a": 1}, {"b": 1, "b": 2}]'
    good, bad = parse_json(text, "file", DataError, allow_repeated_keys=True)
    assert type(good) is dict and isinstance(bad, RepeatedKeys) and bad.repeated == "b"


def test_merged_keys_of_yaml_are_no_repeated_ones(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  b: 3\n")
    assert read_yaml(path)["other"] == {"a": 1, "b": 3}


# ---- the length of messages -------------------------------------------------------------------

BASE64 = "iVBORw0KGgo" * 9000


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a\nb\0\x1b[31m\ud800", r"'a\nb\x00\x1b[31m\ud800'"),
        (BASE64, f"'{BASE64[:80]}'... (99,000 characters)"),
        ([1] * 100_000, "[1, 1, 1, 1, 1, 1, ...]"),
        (10**5000, "a number of 16,610 bits"),
        (None, "None"),
    ],
    ids=["text", "long text", "list", "number", "nothing"],
)
def test_a_value_is_shown_short_and_printable(value: object, expected: str) -> None:
    assert shown(value) == expected


def test_a_nested_value_is_shown_short() -> None:
    value: Any = {f"key {n}": {"a": [BASE64] * 9, "b": list(range(99))} for n in range(50)}
    assert len(shown(value)) <= 90


def test_a_message_has_a_limit_wherever_its_parts_come_from() -> None:
    message = str(DataError(f"sample 's': {BASE64}; replace it"))
    assert len(message) < MAX_MESSAGE_CHARACTERS + 60
    assert message.startswith("sample 's': iVBOR") and message.endswith("; replace it")
    assert one_line("a\n b\x1b[31m\u202e") == r"a b\x1b[31m\u202e"


def test_forms_show_values_keys_and_faults_within_limits() -> None:
    class Size(Form):
        rows: dict[str, int]

    with pytest.raises(ConfigError) as caught:
        Size.parse({"rows": {BASE64: BASE64}} | {f"k{n}": 1 for n in range(5000)}, ConfigError)
    assert len(str(caught.value)) < 1200 and "more wrong fields" in str(caught.value)


def test_the_command_says_one_short_line(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({BASE64: 1, "a\n\x1b[31mb": 2}))
    result = CliRunner().invoke(app, ["validate", str(path)])
    assert result.exit_code == 2 and len(result.output) < 2 * MAX_MESSAGE_CHARACTERS
    assert result.output.count("\n") == 1 and "\x1b" not in result.output


# ---- nobody goes round the reader -------------------------------------------------------------

ALLOWED = {
    "families/sample_data/texts.py": "sources of Python itself",
    "files.py": "a byte, to see whether a line has ended",
    "integration/same_inputs/compare.py": "what another rank has said",
    "integration/versions.py": "a source of Megatron's",
    "planner/wire.py": "what another rank has packed",
    "reading.py": "it is the reader",
    "report/page.py": "a template of ours",
    "simulator/timeline.py": "a template of ours",
}
READERS = {"read_text", "json.load", "json.loads", "yaml.load", "yaml.safe_load", "open", "io.open"}


def reads(call: ast.Call) -> bool:
    """Whether it reads text, JSON or YAML by itself."""
    name = ast.unparse(call.func)
    if name in ("open", "io.open"):
        mode = [argument for argument in call.args[1:2] if isinstance(argument, ast.Constant)]
        return not mode or not set(str(mode[0].value)) & set("wax")
    is_method = isinstance(call.func, ast.Attribute) and call.func.attr == "read_text"
    return name in READERS - {"read_text"} or is_method


def test_all_text_is_read_through_the_reader() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and reads(node)
    }
    assert found == set(ALLOWED)
