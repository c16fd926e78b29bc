"""What ``megatron-dip launch-cmd`` prints is understood by the launcher and by Megatron's parser.

``docs/cluster.md`` shows a printed command for two CPU ranks, which test_page_commands.py runs.
"""

import json
import shlex
import subprocess
import sys

import pytest
import torch.distributed.run
from launching import REPOSITORY
from typer.testing import CliRunner

from megatron_dip.cli.main import app
from megatron_dip.launch import _parser as launcher_parser

VLM = "examples/pretrain_vlm.py"
COMMANDS = (
    ("--cluster", "configs/clusters/h100_16.yaml", "--config", "configs/vlm_s.yaml", "--slurm"),
    ("--cluster", "configs/clusters/h100_32.yaml", "--config", "configs/vlm_m.yaml", "--slurm"),
    (
        *("--gpus", "8", "--tensor-parallel", "2", "--pipeline-parallel", "2"),
        *("--config", "configs/vlm_tiny.yaml"),
    ),
    ("--gpus", "2", "--pipeline-parallel", "2", "--cpu", "--config", "configs/vlm_tiny.yaml"),
)
PROGRAM = """
import json, sys
from megatron_dip.integration import cpu_mode, hooks
cpu_mode.enable(); hooks.enable()
from megatron.training.arguments import parse_args
from megatron_dip.families.arguments import add_arguments
found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["script", *arguments]
    args = parse_args(add_arguments)
    found.append([args.tensor_model_parallel_size, args.pipeline_model_parallel_size,
                  args.dip_schedule, args.bf16, args.gradient_accumulation_fusion])
print(json.dumps(found))
"""


def printed(*options: str) -> list[str]:
    result = CliRunner().invoke(app, ["launch-cmd", *options, "--", VLM, "--seed", "7"])
    assert result.exit_code == 0, result.output
    return shlex.split(result.stdout.replace("\\\n", " "))


def script_arguments(words: list[str]) -> list[str]:
    """Of the pretrain script, through the parsers of torchrun and of the launcher."""
    if words[0] == "sbatch":
        at = next(n for n, word in enumerate(words) if word.endswith(".sbatch"))
        return ["--dip-schedule", "--dip-config", words[at + 1], *words[at + 2 :]]
    started = torch.distributed.run.parse_args(words[words.index("torchrun") + 1 :])
    assert started.module and started.training_script == "megatron_dip.launch"
    launched = launcher_parser().parse_args(started.training_script_args)
    assert launched.script == VLM
    return launched.arguments


def test_megatron_understands_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    asked = [script_arguments(printed(*options)) for options in COMMANDS]
    assert all(arguments[-2:] == ["--seed", "7"] for arguments in asked)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(asked)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [entry[:4] for entry in found] == [
        [4, 4, True, True],
        [8, 4, True, True],
        [2, 2, True, True],
        [1, 2, True, False],
    ]
    assert not any(entry[4] for entry in found)
