"""The set-up step, with an interpreter whose venv and pip are played by a few lines of shell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Everything but `-m venv` and `-m pip` goes to the real Python. The n-th line of the file
# "answers" is what pip says the n-th time; it fails where the line is not "ok".
FAKE_PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    *"-m venv"*)
        folder="${{@: -1}}"
        mkdir -p "$folder/bin"
        cp "$RECORD/python" "$folder/bin/python" ;;
    *"-m pip --version"*) ;;
    *"-m pip install"*)
        echo "$PWD: $*" >> "$RECORD/installs"
        answer="$(sed -n "$(wc -l < "$RECORD/installs")p" "$RECORD/answers")"
        echo "$answer"
        [[ "$answer" == ok ]] ;;
    *) exec "{sys.executable}" "$@" ;;
esac
"""
NETWORK_FAILURE = "WARNING: Retrying after connection broken by 'ReadTimeoutError'"


class Clone:
    """A folder with the set-up script and what it reads, and a fake interpreter beside it."""

    def __init__(self, folder: Path) -> None:
        self.record = folder
        self.root = folder / "a clone"
        (self.root / "scripts").mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "scripts/setup.sh"):
            (self.root / name).write_bytes((ROOT / name).read_bytes())
        (folder / "python").write_text(FAKE_PYTHON)
        (folder / "python").chmod(0o755)

    def set_up(self, *answers: str, **environment: str) -> tuple[int, str]:
        """Run the script while pip answers like this; return its status and its output."""
        (self.record / "answers").write_text("".join(f"{answer}\n" for answer in answers))
        (self.record / "installs").write_text("")
        ours = {"RECORD": str(self.record), "PYTHON": str(self.record / "python")}
        done = subprocess.run(
            ["bash", str(self.root / "scripts" / "setup.sh")],
            env={**os.environ, **ours, **environment},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout + done.stderr

    def installs(self) -> list[str]:
        """What pip was called with, and where, since the last set-up began."""
        return (self.record / "installs").read_text().splitlines()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_the_package_is_installed_with_what_its_tests_need(clone: Clone):
    status, output = clone.set_up("ok")
    assert status == 0, output
    (install,) = clone.installs()
    assert install.startswith(f"{clone.root}: -m pip install ")
    assert install.endswith("--editable .[dev]")


def test_an_environment_that_is_up_to_date_is_left_alone(clone: Clone):
    clone.set_up("ok")
    status, output = clone.set_up("ok")
    assert (status, output) == (0, "set-up: up to date\n")
    assert clone.installs() == []


def test_a_changed_package_definition_is_installed_again(clone: Clone):
    clone.set_up("ok")
    with (clone.root / "setup.py").open("a") as file:
        file.write("# another dependency\n")
    assert clone.set_up("ok")[0] == 0
    assert len(clone.installs()) == 1


def test_an_environment_whose_python_is_gone_is_made_again(clone: Clone):
    clone.set_up("ok")
    (clone.root / ".venv" / "bin" / "python").unlink()
    status, output = clone.set_up("ok")
    assert status == 0, output
    assert "making .venv" in output and len(clone.installs()) == 1


def test_a_network_failure_is_tried_again_once(clone: Clone):
    status, output = clone.set_up(NETWORK_FAILURE, "ok")
    assert status == 0, output
    assert "trying once more" in output and len(clone.installs()) == 2


def test_a_network_that_stays_away_ends_the_set_up_and_the_next_one_starts_over(clone: Clone):
    status, output = clone.set_up(NETWORK_FAILURE, NETWORK_FAILURE, "ok")
    assert status == 1 and len(clone.installs()) == 2
    assert NETWORK_FAILURE in output
    assert clone.set_up("ok")[0] == 0
    assert len(clone.installs()) == 1


def test_another_failure_is_shown_and_not_tried_again(clone: Clone):
    status, output = clone.set_up("ERROR: no space left on device", "ok")
    assert status == 1 and len(clone.installs()) == 1
    assert "ERROR: no space left on device" in output
    assert "pip could not install the package, exit status 1" in output


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("echo 'version 3.12 is not installed' >&2; exit 127", "does not run: version 3.12 is not"),
        ("echo '3.11.2 too old'", "3.11.2 too old"),
    ],
)
def test_an_interpreter_that_cannot_be_used_is_named_with_the_reason(
    clone: Clone, answer: str, reason: str
):
    unusable = clone.record / "shim"
    unusable.write_text(f"#!/usr/bin/env bash\n{answer}\n")
    unusable.chmod(0o755)
    tools = clone.record / "bin"
    tools.mkdir()
    (tools / "python3.12").symlink_to(clone.record / "python")
    status, output = clone.set_up("ok", PYTHON=str(unusable), PATH=f"{tools}:{os.environ['PATH']}")
    assert status == 0, output
    assert f"PYTHON={unusable} cannot be used ({reason}" in output
    assert f"making .venv with {tools / 'python3.12'}" in output
