"""What is wrong with a run's input, or with one of its ranks, is said in one line by each rank."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from failing_runs import ARGUMENTS, ERROR_PREFIX, SCRIPT, error_of, run_vlm
from launching import REPOSITORY, CompletedRank, run_ranks
from runtime_program import CASE, plan_of
from tiny_data_set import conversation
from tiny_vlm import make_tiny_data, write_config

from megatron_dip.errors import DataError
from megatron_dip.families.configs import load_config
from megatron_dip.families.data.index import build_index, usable_samples
from megatron_dip.families.data.sources import DataSettings
from megatron_dip.plan.plan import save_plan

Edit = Callable[[Any], None]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_tiny_data(tmp_path / "data", num_samples=60)
    return tmp_path / "data"


def edit_samples(data: Path, edit: Edit) -> None:
    path = data / "samples.json"
    samples = json.loads(path.read_text())
    edit(samples)
    path.write_text(json.dumps(samples))


def config_for(data: Path, num_ranks: int = 1, edit: Edit | None = None) -> str:
    path = write_config(data / "config.yaml", data, num_ranks=num_ranks)
    if edit is not None:
        config = yaml.safe_load(path.read_text())
        edit(config)
        path.write_text(yaml.safe_dump(config))
    return str(path)


def settings_of(data: Path) -> DataSettings:
    """What a run with ``config_for(data)`` reads."""
    config = load_config(config_for(data))
    return DataSettings(
        samples=config.data.path,
        image_folder=config.data.image_folder,
        tokenizer=config.data.tokenizer,
        seq_length=config.model.language.seq_length,
        patch_size=config.model.vision.patch_size,
        min_image_tokens=config.data.min_image_tokens,
        max_image_tokens=config.data.max_image_tokens,
    )


def alone(tmp_path: Path, *arguments: str) -> str:
    """What a run on one rank says."""
    return error_of(run_vlm(tmp_path / "run", 1, *arguments)[0])


def on_two_ranks(tmp_path: Path, *arguments: str, script: Path = SCRIPT) -> list[CompletedRank]:
    flags = ("--pipeline-model-parallel-size", "2", *arguments)
    return run_vlm(tmp_path / "run", 2, *flags, script=script)


# ---- configuration and command line ---------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda c: c["model"]["vision"].pop("num_layers"), ("model.vision.num_layers", "required")),
        (lambda c: c["schedule"].update(rank=3), ("schedule.rank", "permitted")),
        (
            lambda c: c["model"]["language"].update(vocab_size=300),
            ("320 tokens", "vocab_size is 300"),
        ),
    ],
    ids=["missing key", "unknown key", "small vocabulary"],
)
def test_what_is_wrong_with_the_configuration_is_named(
    tmp_path: Path, data: Path, edit: Edit, expected: tuple[str, ...]
) -> None:
    error = alone(tmp_path, "--dip-config", config_for(data, edit=edit))
    assert all(part in error for part in expected), error


@pytest.mark.parametrize("schedule", [(), ("--dip-schedule",)])
def test_a_flag_that_the_model_would_drop_is_refused_under_either_schedule(
    tmp_path: Path, data: Path, schedule: tuple[str, ...]
) -> None:
    flag = "--num-layers-per-virtual-pipeline-stage 2"
    error = alone(tmp_path, *flag.split(), "--dip-config", config_for(data), *schedule)
    assert f"{flag} does not work with the models of --dip-config: " in error


def test_a_schedule_for_another_number_of_ranks_is_refused(tmp_path: Path, data: Path) -> None:
    error = alone(tmp_path, "--dip-config", config_for(data, num_ranks=4), "--dip-schedule")
    assert "schedule.num_ranks is 4" in error and "--pipeline-model-parallel-size 1" in error


def test_megatron_of_an_unsupported_version_is_refused(tmp_path: Path) -> None:
    for package in ("core", "training"):
        (tmp_path / "megatron" / package).mkdir(parents=True)
        (tmp_path / "megatron" / package / "__init__.py").touch()
    info = tmp_path / "megatron" / "core" / "package_info.py"
    info.write_text("MAJOR = 0\nMINOR = 12\nPATCH = 1\n")
    paths = os.pathsep.join(map(str, (tmp_path, REPOSITORY)))
    command = [sys.executable, "-m", "megatron_dip.launch", str(REPOSITORY / "setup.py")]
    (rank,) = run_ranks(1, command, timeout_seconds=120, env={"PYTHONPATH": paths})
    error = error_of(rank)
    assert "Megatron-Core 0.12.1" in error and "pip install" in error


# ---- data -----------------------------------------------------------------------------------


def test_samples_that_cannot_be_used_are_named(tmp_path: Path, data: Path) -> None:
    def edit(samples: Any) -> None:
        samples[5]["conversations"][0]["value"] += " <image>"
        samples[6] = {"id": "long", "conversations": conversation("Why?", "because " * 200)}

    edit_samples(data, edit)
    error = alone(tmp_path, "--dip-config", config_for(data), "--dip-schedule")
    assert "sample 's5' (number 5)" in error and "<image> marks" in error
    assert "and 1 more bad samples" in error
    edit_samples(data, lambda samples: samples.pop(5))
    index, _ = build_index(settings_of(data), data, show_progress=False)
    with pytest.raises(DataError, match=r"'long' .* longer than the sequence length 96"):
        usable_samples(index, skip_bad_samples=False)


def test_an_image_that_does_not_decode_is_named_or_skipped_and_counted(
    tmp_path: Path, data: Path
) -> None:
    (data / "images" / "broken.png").write_bytes(b"no image")
    edit_samples(
        data,
        lambda samples: samples[7].update(
            image="broken.png", conversations=conversation("<image>?", "x")
        ),
    )
    flags = ("--dip-config", config_for(data, num_ranks=2), "--dip-schedule")
    for rank in on_two_ranks(tmp_path / "refused", *flags):
        error = error_of(rank)
        assert "sample 's7' (number 7)" in error and "broken.png" in error
    ranks = on_two_ranks(tmp_path / "skipped", *flags, "--skip-bad-samples")
    for rank in ranks:
        assert rank.returncode == 0, rank.output[-3000:]
        assert "left out 1 bad of 60 samples" in rank.output
    assert "iteration        2/" in ranks[-1].output


def test_an_image_that_breaks_after_the_index_was_made_is_named_by_the_rank_that_reads_it(
    tmp_path: Path, data: Path
) -> None:
    """The workers of the data loader find out, in the middle of Megatron's training loop."""
    build_index(settings_of(data), data, show_progress=False)
    flags = ("--dip-config", config_for(data, num_ranks=2), "--dip-schedule")
    for image in (data / "images").iterdir():
        times = image.stat()
        image.write_bytes(b"x" * times.st_size)
        os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    reader, other = on_two_ranks(tmp_path, *flags, "--num-workers", "1")
    error = error_of(reader)
    assert "sample 's" in error and ".png" in error and "worker" not in error
    assert "the other process has ended" in error_of(other)


def test_a_list_of_samples_that_is_no_text_is_named_on_all_ranks(
    tmp_path: Path, data: Path
) -> None:
    """The first rank alone reads it; the others must not wait, or say that they lost a peer."""
    (data / "samples.json").write_bytes('[{"id": "猫在树上"}]'.encode("gbk"))
    flags = ("--dip-config", config_for(data, num_ranks=2), "--dip-schedule")
    for rank in on_two_ranks(tmp_path, *flags):
        assert "samples.json: not UTF-8 text (line 1, byte" in error_of(rank)


# ---- plan files -----------------------------------------------------------------------------


def test_a_plan_file_whose_digest_does_not_match_is_refused(tmp_path: Path) -> None:
    plan = plan_of(CASE)
    save_plan(plan, tmp_path / "plan.json")
    record = json.loads((tmp_path / "plan.json").read_text())
    record["problem"]["microbatches"][0]["vision"][0]["tokens"] += 1
    (tmp_path / "changed.json").write_text(json.dumps(record))
    command = [sys.executable, "-m", "megatron_dip.cli.main", "validate"]
    (good,) = run_ranks(1, [*command, str(tmp_path / "plan.json")], timeout_seconds=120)
    assert good.returncode == 0 and "ok" in good.output
    (bad,) = run_ranks(1, [*command, str(tmp_path / "changed.json")], timeout_seconds=120)
    assert bad.returncode == 2 and "Traceback" not in bad.output
    (line,) = bad.output.splitlines()
    assert "changed.json: problem_digest is" in line and "plan again" in line


# ---- a rank that dies -----------------------------------------------------------------------

_ENDING = """
import os, signal, sys, time
sys.path.append("EXAMPLES")
import pretrain_vlm as example
from megatron.training import get_args

def forward_step(data_iterator, model):
    if os.environ["RANK"] == "1" and get_args().curr_iteration >= 1:
        ENDING
    return example.forward_step(data_iterator, model)

if __name__ == "__main__":
    example.main(forward_step)
"""


def write_script(folder: Path, ending: str) -> Path:
    path = folder / "script.py"
    path.write_text(_ENDING.replace("ENDING", ending).replace("EXAMPLES", str(SCRIPT.parent)))
    return path


def says_what_became_of_rank_1(survivor: CompletedRank, expected: str) -> bool:
    error = error_of(survivor)
    return all(part in error for part in ("rank 0, step ", expected, "rank 1 to rank 0"))


def test_when_a_rank_is_killed_the_other_says_so_in_one_line(tmp_path: Path, data: Path) -> None:
    script = write_script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    command = [sys.executable, "-m", "megatron_dip.launch", "--cpu", str(script), *ARGUMENTS]
    command += ["--pipeline-model-parallel-size", "2"]
    command += ["--dip-config", config_for(data, num_ranks=2), "--dip-schedule"]
    survivor, killed = run_ranks(2, command, timeout_seconds=180)
    assert "iteration        1/" in killed.output, killed.output[-3000:]
    assert says_what_became_of_rank_1(survivor, "the other process has ended")


def test_when_a_rank_is_stuck_the_other_says_so_within_the_limit(
    tmp_path: Path, data: Path
) -> None:
    log = str(tmp_path / "run" / "rank0.log")
    until_the_other_ends = f"while {ERROR_PREFIX!r} not in open({log!r}).read(): time.sleep(0.1)"
    survivor, stuck = on_two_ranks(
        tmp_path,
        *("--dip-config", config_for(data, num_ranks=2), "--dip-schedule"),
        *("--dip-timeout-seconds", "2"),
        script=write_script(tmp_path, until_the_other_ends),
    )
    assert "iteration        1/" in stuck.output, stuck.output[-3000:]
    assert says_what_became_of_rank_1(survivor, "limit 2 s")
