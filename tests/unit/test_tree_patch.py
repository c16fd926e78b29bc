"""``megatron-dip patch`` on copies of the files that the patch changes."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_dip.cli.main import app
from megatron_dip.tree_patch import TreePatch, patch_file

SCHEDULES = "megatron/core/pipeline_parallel/schedules.py"
ARGUMENTS = "megatron/training/arguments.py"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the patch reads of the release that is installed."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations is not None
    installed = Path(next(iter(spec.submodule_search_locations))).parents[1]
    for name in (SCHEDULES, ARGUMENTS, "megatron/core/package_info.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installed / name, tmp_path / name)
    return tmp_path


def patch(tree: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["patch", str(tree), *options])
    return result.exit_code, result.output


def contents(tree: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def test_applied_and_reverted_a_tree_is_what_it_was_to_the_byte(tree: Path) -> None:
    # Another version: lines stand elsewhere, one file ends without a line's end.
    arguments = tree / ARGUMENTS
    arguments.write_bytes(b"# moved\n\n\n" + arguments.read_bytes() + b"# no end")
    arguments.chmod(0o640)
    before = contents(tree)
    assert patch(tree, "--check")[0] == 0 and contents(tree) == before
    status, output = patch(tree)
    assert status == 0 and "fits and is not applied" in output and ARGUMENTS in output
    assert b"select_schedule(forward_backward_func)" in (tree / SCHEDULES).read_bytes()
    assert b"parser = _add_dip_args(parser)" in arguments.read_bytes()
    assert arguments.stat().st_mode & 0o777 == 0o640
    applied = contents(tree)
    status, output = patch(tree)
    assert status == 0 and "is applied" in output and "nothing was changed" in output
    assert contents(tree) == applied
    assert patch(tree, "--revert")[0] == 0
    assert contents(tree) == before
    status, output = patch(tree, "--revert")
    assert status == 0 and "nothing was changed" in output


def test_a_tree_that_it_does_not_fit_stays_as_it_is(tree: Path) -> None:
    arguments = tree / ARGUMENTS
    text = arguments.read_bytes()
    arguments.write_bytes(text.replace(b"_add_sft_args(parser)", b"_add_other_args(parser)"))
    before = contents(tree)
    status, output = patch(tree)
    assert status == 2 and contents(tree) == before
    assert "arguments.py" in output and "do not stand there" in output
    assert "megatron_dip.launch" in output


def test_a_tree_with_a_part_of_it_is_refused(tree: Path) -> None:
    original = (tree / SCHEDULES).read_bytes()
    TreePatch(patch_file(), tree).apply()
    (tree / SCHEDULES).write_bytes(original)
    before = contents(tree)
    status, output = patch(tree)
    assert status == 2 and contents(tree) == before
    assert "has a part of the patch" in output


def test_files_that_are_shared_by_links_stay_as_they_are(tree: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    os.link(tree / SCHEDULES, cache)
    original = cache.read_bytes()
    assert patch(tree)[0] == 0
    assert cache.read_bytes() == original != (tree / SCHEDULES).read_bytes()
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    (elsewhere / "megatron").symlink_to(tree / "megatron")
    status, output = patch(elsewhere, "--revert")
    assert status == 2 and "is a link to" in output


def test_a_file_that_cannot_be_written_leaves_the_other_as_it_was(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(tree)
    replace, calls = os.replace, []

    def fail_at_the_second(source: str, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_second)
    status, output = patch(tree)
    assert status == 2 and "no space left" in output
    assert contents(tree) == before


def test_what_is_no_tree_or_no_supported_version_is_refused(tree: Path, tmp_path: Path) -> None:
    assert "holds no megatron/core" in patch(tmp_path / "nowhere")[1]
    info = tree / "megatron/core/package_info.py"
    info.write_text("MAJOR = 0\nMINOR = 16\nPATCH = 1\n")
    before = contents(tree)
    status, output = patch(tree)
    assert status == 2 and "0.16.1" in output and contents(tree) == before
    status, output = patch(tree, "--check", "--revert")
    assert status == 2 and "at most one" in output
