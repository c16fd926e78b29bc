"""Every command of the pages works as written; those that need what is not here are listed."""

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch.distributed.run
from launching import REPOSITORY
from page_commands import (
    LANGUAGES,
    Command,
    Sandbox,
    blocks_of,
    commands_of,
    mentions_of,
    with_fewer_iterations,
)
from typer.main import get_command

from megatron_dip.cli.main import app
from megatron_dip.launch import _parser as launcher_parser

PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")))
OTHER_PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for folder in ("benchmarks", "configs", "patches", "scripts")
    for path in (REPOSITORY / folder).rglob("*.md")
)

CLUSTER = "needs a cluster of GPUs"
SLURM = "needs SLURM; tests/unit/test_scripts.py runs the script with stand-ins for its commands"
FRAGMENT = "a part of a script; examples/ has the whole, which other commands run"
NOT_RUN: dict[tuple[str, str], str] = {
    ("README.md", "bash scripts/quickstart.sh"): ".ci/run runs it as written",
    ("README.md", "bash scripts/test.sh"): ".ci/run runs it as written, and it runs these tests",
    ("README.md", "torchrun --nproc-per-node 8"): CLUSTER,
    ("docs/cluster.md", "bash scripts/setup.sh"): ".ci/run runs it first",
    ("docs/cluster.md", "megatron-dip doctor"): (
        "finds no GPU here, which is a problem; tests/unit/test_doctor.py has every row"
    ),
    ("docs/data.md", "energon prepare"): "tests/cpu/test_energon.py runs it on a shard of its own",
    ("docs/gpu.md", "pip install"): "needs CUDA's headers, and a quarter of an hour",
    ("docs/gpu.md", "torchrun --nproc-per-node 8"): CLUSTER,
    ("docs/integration.md", "def forward_step"): FRAGMENT,
    ("docs/integration.md", ".venv/bin/python scripts/check_versions.py"): (
        "installs releases of Megatron-Core, half an hour; benchmarks/results has what it printed"
    ),
    ("docs/integration.md", "sbatch scripts/slurm/train.sbatch"): SLURM,
    ("docs/own_model.md", '"""Stages of SpeechModel'): "tests/cpu/test_own_model.py runs it",
    ("docs/concepts.md", "import json"): "tests/unit/test_documented_forms.py runs it",
    ("scripts/slurm/README.md", "sbatch"): SLURM,
    ("patches/README.md", "megatron-dip patch"): "tests/unit/test_tree_patch.py applies it",
    ("configs/partitions/README.md", "megatron-dip problem"): "docs/tuning.md runs smaller ones",
    ("configs/partitions/README.md", "megatron-dip partition"): (
        "writes into the repository, minutes; docs/tuning.md has a smaller one, which is run"
    ),
    ("benchmarks/problems/partitions/README.md", "megatron-dip partition"): (
        "writes into the repository, minutes; docs/tuning.md has a smaller one, which is run"
    ),
}
"""By page and beginning: why a command is not run here."""

AFTER = {"docs/tuning.md": ("docs/integration.md",), "docs/baselines.md": ("docs/tuning.md",)}
"""Pages whose commands read what those of other pages have written."""
GIVEN = {"docs/baselines.md": {"plan.json": "all.json"}}
"""By page: names that stand for any such file, and the file that stands in for it."""
FLAGS_OF_OTHERS = {
    "--container-mounts",
    "--cpp_ext",
    "--cuda_ext",
    "--dip",  # "the arguments `--dip-...`"
    "--enable-mhc-connections",
    "--export",
    "--no-build-isolation",
    "--nodes",
    "--non-interactive",
    "--sample-type",
    "--split-ratio",
    "--time",
}
"""Of SLURM, energon and other versions of Megatron, which need not be here."""
FILES_OF_OTHERS = {"pretrain_gpt.py", "pretrain_vlm.py"}
"""Of a checkout of Megatron-LM, which need not be here."""
LIMIT_SECONDS = 600.0
MOST_LINES = 80
"""Of a training run in all, of which Megatron would print hundreds."""


def reason_of(command: Command) -> str | None:
    for (page, beginning), reason in NOT_RUN.items():
        if command.page == page and command.text.startswith(beginning):
            return reason
    return None


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], None]:
    sandbox = Sandbox(tmp_path_factory.mktemp("pages"))
    done: set[str] = set()
    """Several pages show some of them."""

    @cache
    def run(page: str) -> None:
        for before in AFTER.get(page, ()):
            run(before)
        for name, source in GIVEN.get(page, {}).items():
            (sandbox.folder / name).write_bytes((sandbox.folder / source).read_bytes())
        for command in commands_of(page):
            if reason_of(command) is None and command.key not in done:
                status, output = sandbox.run(command, LIMIT_SECONDS)
                assert status == 0, f"{command}\nended with {status}:\n{output[-6000:]}"
                if "megatron_dip.launch" in command.words:
                    assert output.count("\n") <= MOST_LINES, output[:6000]
                for path in command.outputs:
                    assert (sandbox.folder / path).stat().st_size, f"{command}: {path} is empty"
                done.add(command.key)

    return run


# Several trainings: more than a single test may take by default, on a machine that is busy.
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(reason_of(one) is None for one in commands_of(page))]
)
def test_the_commands_of_a_page_work_as_written(run_page: Callable[[str], None], page: str) -> None:
    run_page(page)


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES])
def test_blocks_say_what_they_are(page: str) -> None:
    """A block without a language holds commands; output is marked as text."""
    assert {block.language for block in blocks_of(page)} <= set(LANGUAGES)
    for command in commands_of(page):
        if command.language != "python":
            first = command.text.split()[0]
            assert re.fullmatch(r"\w[\w./-]*|\.?[\w./-]+/[\w.-]+|[A-Z_]+=\S*", first), (
                f"no command: {command} (mark output as ```text)"
            )


def test_continuous_integration_runs_the_commands_of_the_readme_as_written() -> None:
    lines = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    run = [line for line in lines if line.startswith("bash ")]
    shown = [one.text for one in commands_of("README.md") if one.words[0] == "bash"]
    assert run == shown == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]


def test_every_reason_is_that_of_a_command() -> None:
    commands = [command for page in (*PAGES, *OTHER_PAGES) for command in commands_of(page)]
    for page, beginning in NOT_RUN:
        found = [one for one in commands if one.page == page and one.text.startswith(beginning)]
        assert found, f"{page} has no command {beginning!r} any more"


def test_other_pages_show_nothing_that_is_neither_run_nor_listed() -> None:
    for page in OTHER_PAGES:
        for command in commands_of(page):
            assert reason_of(command), f"give a reason in NOT_RUN: {command}"


def test_only_numbers_of_iterations_are_replaced() -> None:
    text = "a --train-iters 100 --lr 1e-3 --log-interval 10 --changes  1000 --train-iters 2"
    expected = "a --train-iters 3 --lr 1e-3 --log-interval 10 --changes 3 --train-iters 2"
    assert with_fewer_iterations(text) == expected


def test_a_command_over_several_lines_is_one(tmp_path: Path) -> None:
    commands = commands_of("README.md")
    assert all("```" not in one.text for one in commands)
    (training,) = (one for one in commands if "pretrain_t2v.py" in one.text)
    assert training.words[0] == ".venv/bin/python" and "--train-iters" in training.words


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES])
def test_what_is_not_run_names_files_and_flags_that_exist(page: str) -> None:
    listed = [one for one in commands_of(page) if reason_of(one) and one.language != "python"]
    for command in (*listed, *mentions_of(page)):
        problem = problem_of(command.words)
        assert problem is None, f"{command}\n{problem}"


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES])
def test_every_flag_that_a_page_names_exists(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", text))
    assert sorted(named - known_flags() - FLAGS_OF_OTHERS) == []


@cache
def known_flags() -> set[str]:
    """Of Megatron, of torchrun, of this package, and what scripts and examples add."""
    commands = get_command(app).commands.values()  # type: ignore[attr-defined]
    known = megatron_flags() | {name for one in commands for p in one.params for name in p.opts}
    for parser in (launcher_parser(), torch.distributed.run.get_args_parser()):
        known |= {name for action in parser._actions for name in action.option_strings}
    sources = [
        path.read_text(encoding="utf-8")
        for folder in ("benchmarks", "examples", "scripts", "megatron_dip")
        for path in (REPOSITORY / folder).rglob("*.py")
    ]
    return known | {flag for text in sources for flag in re.findall(r'"(--[a-z][\w-]+)"', text)}


def problem_of(words: list[str]) -> str | None:
    """What a command that is not run gets wrong, as far as that can be told without running it."""
    program, arguments = Path(words[0]).name, words[1:]
    if program == "megatron-dip":
        return problem_of_verb(arguments)
    if program in ("torchrun", "python") and "megatron_dip.launch" in arguments:
        return problem_of_launch(arguments[arguments.index("megatron_dip.launch") + 1 :])
    if program == "pip":
        return problem_of_extras(arguments)
    if program == "sbatch":
        at = next((n for n, one in enumerate(arguments) if one.endswith(".sbatch")), None)
        if at is None:
            return None
        return missing(arguments[at : at + 2]) or unknown_flags(arguments[at + 2 :])
    if program == "python" and arguments[:1] == ["-m"]:
        return missing([f"{arguments[1].replace('.', '/')}.py", *arguments[2:]])
    if program == "python":
        return missing(arguments[:1]) or problem_of_script(arguments)
    return missing([one for one in arguments if one.endswith((".sh", ".patch"))])


def is_placeholder(word: str) -> bool:
    return bool(re.search(r"[<>]|\.\.\.", word)) or word.isupper() or word.startswith("CONFIG")


def missing(paths: list[str]) -> str | None:
    own = [one for one in paths if not is_placeholder(one) and one not in FILES_OF_OTHERS]
    gone = [one for one in own if not (REPOSITORY / one).exists()]
    return f"no such file: {', '.join(gone)}" if gone else None


def problem_of_verb(arguments: list[str]) -> str | None:
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    if arguments[0] not in verbs:
        return f"no verb {arguments[0]}"
    known = {name for one in verbs[arguments[0]].params for name in one.opts}
    unknown = [one for one in arguments[1:] if one.startswith("-") and one not in known]
    return f"{arguments[0]} has no {', '.join(unknown)}" if unknown else None


def problem_of_launch(arguments: list[str]) -> str | None:
    if not arguments:
        return None
    options = {name for one in launcher_parser()._actions for name in one.option_strings}
    rest = [one.strip("[]") for one in arguments]
    while rest and rest[0].startswith("-"):
        if rest[0] not in options:
            return f"the launcher has no {rest[0]}"
        del rest[0]
    return missing(rest[:1]) or unknown_flags(rest[1:])


def unknown_flags(arguments: list[str]) -> str | None:
    flags = {one.partition("=")[0] for one in arguments if one.startswith("--")}
    unknown = sorted(flags - megatron_flags())
    return f"Megatron and this package have no {', '.join(unknown)}" if unknown else None


@cache
def megatron_flags() -> set[str]:
    """Of Megatron's parser with ours in it; in another process, because that changes Megatron."""
    program = (
        "import argparse, json\n"
        "from megatron_dip.integration import cpu_mode, hooks\n"
        "cpu_mode.enable(); hooks.enable()\n"
        "from megatron.training import arguments\n"
        "parser = arguments.add_megatron_arguments(argparse.ArgumentParser())\n"
        "print(json.dumps(sorted(parser._option_string_actions)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=280, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def problem_of_extras(arguments: list[str]) -> str | None:
    known = set(importlib.metadata.metadata("megatron-dip").get_all("Provides-Extra") or ())
    asked = {
        extra
        for one in arguments
        for extra in re.findall(r"\[([\w,-]+)\]", one)[0:1]
        for extra in extra.split(",")
    }
    return f"no extras {sorted(asked - known)}" if asked - known else None


def problem_of_script(arguments: list[str]) -> str | None:
    flags = [one for one in arguments[1:] if one.startswith("--")]
    if not flags:
        return None
    shown = subprocess.run(
        [sys.executable, str(REPOSITORY / arguments[0]), "--help"],
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    ).stdout
    unknown = [one for one in flags if one not in shown]
    return f"{arguments[0]} has no {', '.join(unknown)}" if unknown else None
