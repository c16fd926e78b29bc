"""The commands that pages of the documentation show, and a place where they are run as written.

A fenced block without a language, or of ``bash``, holds commands; ``text`` marks output.  A command
in a line of prose is one in backticks that begins with a known program and has arguments.
"""

import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from launching import REPOSITORY

from megatron_dip.report.local_run import launched

__all__ = [
    "FEWEST_ITERATIONS",
    "LANGUAGES",
    "Command",
    "Sandbox",
    "blocks_of",
    "commands_of",
    "mentions_of",
    "with_fewer_iterations",
]

LANGUAGES = ("", "bash", "json", "python", "text", "yaml")
"""What a fenced block may be; others would be neither run nor known as output."""
FEWEST_ITERATIONS = 3
_PROGRAMS = ("bash", "megatron-dip", "patch", "pip", "python", "sbatch", "torchrun")
_ITERATIONS = re.compile(r"(?<=--)(train-iters|changes|iterations) +(\d+)")
_OUTPUTS = ("-o", "--output", "--html", "--save-adapters")
_COPIED = ("configs", "examples", "scripts")
_LINKED = ("LICENSE", "README.md", "benchmarks", "docs", "patches")


@dataclass(frozen=True)
class Command:
    """One command, or one Python program, and where it stands."""

    page: str
    line: int
    text: str
    language: str = ""

    @property
    def words(self) -> list[str]:
        """As a shell would split them, without comments and settings of variables."""
        words = shlex.split(self.text, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
        return words

    @property
    def key(self) -> str:
        """The same for the same command with other comments."""
        return self.text if self.language == "python" else shlex.join(self.words)

    @property
    def outputs(self) -> list[str]:
        """Files that it says it writes."""
        words = self.words if self.language != "python" else []
        return [words[at + 1] for at, word in enumerate(words[:-1]) if word in _OUTPUTS]

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}: {self.text}"


def blocks_of(page: str) -> list[Command]:
    """All fenced blocks of a page, each as a whole."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = re.finditer(r"^ *```([^\n]*)\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    return [
        Command(page, text.count("\n", 0, match.start(2)) + 1, match[2], match[1].strip())
        for match in found
    ]


def commands_of(page: str) -> list[Command]:
    """What the fenced blocks of a page tell a reader to run, in order."""
    commands = []
    for block in blocks_of(page):
        if block.language == "python":
            commands.append(block)
        elif block.language in ("", "bash"):
            line, lines = block.line, re.split(r"(?<!\\)\n", block.text)
            for text in lines:
                if text.strip() and not text.lstrip().startswith("#"):
                    commands.append(Command(page, line, text.strip()))
                line += text.count("\n") + 1
    return commands


def mentions_of(page: str) -> list[Command]:
    """Commands in prose and tables."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```", _blank, text, flags=re.MULTILINE | re.DOTALL)
    found = re.finditer(r"`([^`]+)`", prose)
    commands = [
        Command(page, prose.count("\n", 0, match.start()) + 1, " ".join(match[1].split()))
        for match in found
        if len(match[1].split()) > 1 and Path(match[1].split()[0]).name in _PROGRAMS
    ]
    return [one for one in commands if not re.match(r"megatron-dip: |python -c", one.text)]


def _blank(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


def with_fewer_iterations(text: str) -> str:
    """The only thing that may differ from the page."""
    return _ITERATIONS.sub(
        lambda match: f"{match[1]} {min(int(match[2]), FEWEST_ITERATIONS)}", text
    )


class Sandbox:
    """A folder like a fresh clone after ``scripts/setup.sh``, whose ``runs`` is its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in _COPIED:
            shutil.copytree(REPOSITORY / name, folder / name)
        for name in _LINKED:
            (folder / name).symlink_to(REPOSITORY / name)
        (folder / ".venv").symlink_to(sys.prefix)

    def run(self, command: Command, limit_seconds: float) -> tuple[int, str]:
        """Exit status and output; nothing that it started is left."""
        text = with_fewer_iterations(command.text)
        if command.language == "python":
            script = self.folder / "page.py"
            script.write_text(text, encoding="utf-8")
            text = "python page.py"
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        }
        paths = [str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)]
        environment |= {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(REPOSITORY)}
        shell = ("bash", "-euo", "pipefail", "-c", 'cd -- "$1" && eval "$2"', "bash")
        with launched(
            (*shell, str(self.folder), text), environment, limit_seconds=limit_seconds
        ) as launcher:
            output = "".join(launcher.lines())
            status = launcher.wait()
        return (124 if launcher.timed_out else status), output
