"""The command line: what it prints, and one line with exit code 2 for bad input."""

import json

import pytest
from planning_cases import chain_case, encoder_case
from typer.testing import CliRunner

from megatron_dip.cli.main import app
from megatron_dip.plan import load_plan, save_plan
from megatron_dip.planner import load_joint_plan, make_plan, restrict_plan


@pytest.fixture
def files(tmp_path):
    problem, partition = encoder_case()
    (tmp_path / "problem.json").write_text(problem.model_dump_json())
    (tmp_path / "partition.json").write_text(partition.model_dump_json())
    save_plan(make_plan(problem, partition), tmp_path / "made.json")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plan_arguments(files):
    return (
        "plan",
        "--problem",
        files / "problem.json",
        "--partition",
        files / "partition.json",
        "-o",
        files / "plan.json",
    )


def test_plan_writes_a_plan_that_validates(files):
    options = ("--max-tokens", "vision=1", "--split-backward", "--algorithm", "one_f_one_b")
    result = run(*plan_arguments(files), *options)
    assert result.exit_code == 0, result.output
    made = load_plan(files / "plan.json")
    assert len(made.graph.subs("vision", 0)) == 2
    assert any(action.type.value == "W" for action in made.actions[0])
    assert run("validate", files / "plan.json").exit_code == 0


def test_a_plan_for_one_hardware_queue_says_so_validates_and_is_simulated_by_its_rules(files):
    result = run(*plan_arguments(files), "--hardware-queues", "one")
    assert result.exit_code == 0, result.output
    made = load_plan(files / "plan.json")
    assert made.queues is not None and made.queues.communicators == 2
    assert run("validate", files / "plan.json").exit_code == 0
    spoiled = made.to_json()
    line = spoiled["ranks"][0]["actions"]
    line.sort(key=lambda action: "RECV" not in action)
    (files / "plan.json").write_text(json.dumps(spoiled))
    refused = run("validate", files / "plan.json")
    assert refused.exit_code == 2 and "with one hardware queue" in refused.output


def test_several_problems_get_one_plan_that_holds_for_each(files):
    problem, partition = encoder_case()
    text_only = problem.model_copy(update={"microbatches": problem.microbatches[1:] * 2})
    (files / "text.json").write_text(text_only.model_dump_json())
    result = run(*plan_arguments(files), "--problem", files / "text.json")
    assert result.exit_code == 0, result.output
    one_plan = load_joint_plan(files / "plan.json", partition)
    for batch in (problem, text_only):
        assert restrict_plan(one_plan, batch).problem == batch


@pytest.mark.parametrize("search", ["local", "mcts"])
def test_plan_searches_and_writes_the_same_bytes_again(files, search):
    options = ("--search", search, "--evaluations", "30", "--seed", "3")
    written = []
    for _ in range(2):
        result = run(*plan_arguments(files), *options)
        assert result.exit_code == 0, result.output
        written.append((files / "plan.json").read_bytes())
    assert written[0] == written[1]


def test_simulate_prints_a_row_per_plan_and_writes_the_timeline(files):
    result = run("simulate", files / "made.json", files / "made.json", "--html", files / "t.html")
    assert result.exit_code == 0, result.output
    assert result.output.count("GB") == 2
    assert "canvas" in (files / "t.html").read_text()


def test_simulate_puts_baselines_beside_plans_everywhere(files):
    options = ("--baseline", "1f1b", "--baseline", "encoder-in-bubbles", "--text")
    pictures = ("--html", files / "t.html", "--svg", files / "t.svg", "--trace", files / "t.json")
    fit = ("--fit", files / "problem.json", "--text-file", files / "t.txt")
    result = run("simulate", files / "made.json", *options, *pictures, *fit)
    assert result.exit_code == 0, result.output
    assert result.output.count("GB") == 3
    text = (files / "t.txt").read_text()
    assert "forward/backward: V/v vision, L/l language" in result.output
    for name in ("made", "1f1b: Megatron's 1F1B, best cut", "encoder-in-bubbles: encoder in"):
        assert name in text
        assert name.replace("'", "&#x27;") in (files / "t.svg").read_text()
        assert name in (files / "t.json").read_text()
        assert name in (files / "t.html").read_text()


def test_static_baselines_come_once_for_plans_of_one_batch_and_others_once_per_plan(files):
    (files / "other.json").write_text((files / "made.json").read_text())
    options = ("--baseline", "1f1b", "--baseline", "nested-encoder", "--text-file", files / "t.txt")
    result = run("simulate", files / "made.json", files / "other.json", *options)
    assert result.exit_code == 0, result.output
    text = (files / "t.txt").read_text()
    assert text.count("1f1b: ") == 1
    assert text.count("nested-encoder for made: ") == text.count("nested-encoder for other: ") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--baseline", "2f2b"), "no baseline '2f2b' (expected one of 1f1b,"),
        (("--baseline", "1f1b", "--fit", "chain.json"), "do not fit a problem with vision"),
        (("--baseline", "1f1b", "--fit", "nowhere.json"), "nowhere.json: cannot be read"),
        (("--baseline", "interleaved-stock"), "baseline interleaved-stock: 2 layers on 2 ranks"),
        (("--fit", "chain.json"), "--fit without --baseline"),
    ],
)
def test_baselines_that_cannot_be_are_one_line_and_exit_code_2(
    files, options, message, monkeypatch
):
    monkeypatch.chdir(files)
    (files / "chain.json").write_text(chain_case(2, 2)[0].model_dump_json())
    result = run("simulate", "made.json", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(problem_digest="0" * 64), "problem_digest is 0000"),
        (lambda data: data["ranks"][0]["actions"].pop(0), "0F0 is missing from rank 0"),
        (lambda data: data.pop("ranks"), "ranks: Field required"),
    ],
)
def test_validate_names_file_and_fault_in_one_line(files, change, message):
    path = files / "made.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    result = run("validate", path)
    assert result.exit_code == 2
    assert message in result.stderr
    assert str(path) in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_plan_above_the_memory_limit_does_not_validate(files):
    problem, partition = encoder_case(memory_limit_bytes=[5, 5])
    plan = make_plan(problem, partition, when_infeasible="least_memory")
    save_plan(plan, files / "made.json")
    result = run("validate", files / "made.json")
    assert result.exit_code == 2
    assert "limit 5" in result.stderr


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--max-tokens", "vision"), "expected MODULE=TOKENS"),
        (("--max-tokens", "visoin=4"), "unknown module 'visoin'"),
        (("--problem", "nowhere.json"), "nowhere.json: cannot be read"),
        (("-o", "/nowhere/plan.json"), "cannot be written"),
        (("--workers", "0", "--evaluations", "9"), "0 workers (expected 1 or more)"),
        (("--evaluations", "0"), "0 evaluations, None ms (expected exactly one"),
        (("--budget-ms", "-5"), "None evaluations, -5.0 ms (expected exactly one"),
        (("--budget-ms", "nan"), "nan ms (expected exactly one"),
        (("--evaluations", "9", "--budget-ms", "9"), "9 evaluations, 9.0 ms (expected exactly"),
        (("--evaluations", "9", "--algorithm", "one_f_one_b"), "nothing to search"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(files, extra, message):
    result = run(*plan_arguments(files), *extra)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
