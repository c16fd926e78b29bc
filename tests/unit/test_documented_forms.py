"""The documentation of the forms says what the parsers accept and the planner makes."""

import json
import re
from pathlib import Path

import pytest

from megatron_dip.errors import PlanDigestError
from megatron_dip.forms import Form
from megatron_dip.partition import Stage, parse_partition
from megatron_dip.plan import ActionType, Estimate, parse_plan
from megatron_dip.plan.validation import check_memory, validate_plan
from megatron_dip.planner import make_plan
from megatron_dip.simulator import simulate
from megatron_dip.workload import Item, LayerExtra, Module, Problem, TransferCost, parse_problem

DOCS = Path(__file__).resolve().parents[2] / "docs"
FORMS_PAGE = (DOCS / "plan_format.md").read_text(encoding="utf-8")
CONCEPTS_PAGE = (DOCS / "concepts.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The contents of the fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def documented_forms() -> dict[str, dict]:
    """The JSON examples of the page by the last word of their format."""
    parsed = [json.loads(block) for block in blocks(FORMS_PAGE, "json")]
    return {data["format"].rpartition("/")[2]: data for data in parsed}


def test_there_is_one_example_of_every_form():
    assert len(blocks(FORMS_PAGE, "json")) == 3
    assert set(documented_forms()) == {"problem", "partition", "plan"}


def test_the_documented_problem_and_partition_can_be_planned():
    forms = documented_forms()
    problem, partition = parse_problem(forms["problem"]), parse_partition(forms["partition"])
    plan = make_plan(problem, partition)
    check_memory(plan, simulate(plan).peak_bytes)


def test_the_documented_plan_is_what_the_planner_makes():
    plan = parse_plan(documented_forms()["plan"])
    validate_plan(plan)
    assert plan == make_plan(plan.problem, plan.partition, max_tokens={"language": 256})


def test_the_documented_plan_is_refused_with_another_problem():
    data = documented_forms()["plan"]
    data["problem"]["transfer"]["latency_us"] = 21.0
    with pytest.raises(PlanDigestError):
        parse_plan(data)


@pytest.mark.parametrize("form", [Problem, TransferCost, Module, LayerExtra, Item, Stage, Estimate])
def test_every_field_is_described(form: type[Form]):
    missing = [
        name for name in form.model_fields if not re.search(rf"`(\w+\.)?{name}`", FORMS_PAGE)
    ]
    assert missing == []


def test_every_type_of_action_is_described():
    described = re.search(r"## Action text\n(.*?)\n## ", FORMS_PAGE, flags=re.DOTALL)
    assert described is not None
    assert [kind for kind in ActionType if f"`{kind.value}`" not in described[1]] == []


def test_the_example_of_the_concepts_prints_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    forms = documented_forms()
    for name in ("problem", "partition"):
        (tmp_path / f"{name}.json").write_text(json.dumps(forms[name]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (code,), (shown,) = blocks(CONCEPTS_PAGE, "python"), blocks(CONCEPTS_PAGE, "text")
    exec(compile(code, "concepts.md", "exec"), {})
    # The page folds long lines.
    assert capsys.readouterr().out.split() == shown.split()
