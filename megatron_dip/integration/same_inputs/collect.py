"""What a rank was given: arguments, configuration, contents of files, versions and environment.

What may rightly differ between ranks is left out: their numbers and places, the paths of files
(not what is in them), folders that results go to, and the images, sounds and videos themselves,
whose sizes the index of the data holds.
"""

import argparse
import enum
import hashlib
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import megatron_dip
from megatron_dip.errors import CheckpointError
from megatron_dip.forms import Form
from megatron_dip.integration.same_inputs.compare import Input
from megatron_dip.reading import read_text

__all__ = ["argument_inputs", "code_inputs", "environment_inputs", "file_input", "form_inputs"]

_OF_A_RANK = frozenset(
    {
        "local_rank",
        "dip_config",
        "dip_trace_dir",
        "dip_planner_cores",
        "flight_recorder_dump_path",
        "help",
        "memory_snapshot_path",
        "nccl_communicator_config_path",
        "non_persistent_local_ckpt_dir",
        "num_workers",
        "one_logger_run_name",
        "tensorboard_dir",
        "wandb_exp_name",
        "wandb_save_dir",
    }
)
"""Arguments that may differ between ranks."""
_CHECKPOINTS = ("load", "pretrained_checkpoint")
_MARK_OF_CHECKPOINT = "latest_checkpointed_iteration.txt"

_PACKAGES = (
    "av", "highspy", "megatron-core", "megatron-energon", "numba", "numpy", "pillow", "pydantic",
    "tokenizers", "torch", "transformer-engine",
)  # fmt: skip
_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_ALGO", "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip
_PREFIXES = ("NVTE_",)

_WHOLE_FILE_BYTES = 1 << 20
"""In a folder of shards only smaller files are read; of others the size counts."""
_NUM_DIGITS = 12


def argument_inputs(
    args: argparse.Namespace, destinations: Iterable[str]
) -> Iterator[tuple[str, Input]]:
    """The arguments ``destinations``; of those that name a file, what is in it."""
    for name in sorted(set(destinations) - _OF_A_RANK):
        value = getattr(args, name, None)
        label = "--" + name.replace("_", "-")
        if name in _CHECKPOINTS and value is not None:
            yield f"checkpoint of {label}", _checkpoint_input(Path(value))
        elif isinstance(value, str) and Path(value).is_file():
            yield f"file of {label}", file_input(Path(value))
        elif _is_plain(value):
            yield label, Input(repr(value), repr(value))


def form_inputs(form: Form, prefix: str = "") -> Iterator[tuple[str, Input]]:
    """Every key of a form that was read from a file; where it names a file, what is in that."""
    for name, value in form:
        key = f"{prefix}{name}"
        if isinstance(value, Form):
            yield from form_inputs(value, f"{key}.")
        elif isinstance(value, dict) and value and isinstance(next(iter(value.values())), Form):
            for inner, part in value.items():
                yield from form_inputs(part, f"{key}.{inner}.")
        elif isinstance(value, Path):
            if not name.endswith("_folder"):
                yield key, file_input(value)
        else:
            yield key, Input(repr(value), repr(value))


def code_inputs() -> Iterator[tuple[str, Input]]:
    """Versions of what computes and decodes, and the sources of this package and of the script."""
    python = ".".join(platform.python_version_tuple()[:2])
    yield "version of Python", Input(python, python)
    for package in _PACKAGES:
        version = _version(package)
        yield f"version of {package}", Input(version, version)
    folder = Path(megatron_dip.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    yield "source of megatron_dip", _digested(digest, str(folder))
    yield "source of Megatron", _sizes_of_sources()
    script = Path(sys.argv[0])
    if script.is_file():
        yield "script", file_input(script)


def environment_inputs(variables: Mapping[str, str]) -> Iterator[tuple[str, Input]]:
    """Variables of the environment that change what is computed."""
    prefixed = {name for name in variables if name.startswith(_PREFIXES)}
    for name in sorted({*_VARIABLES, *prefixed}):
        value = variables.get(name)
        yield name, Input(repr(value), "not set" if value is None else repr(value))


def file_input(path: Path) -> Input:
    """The contents of a file, or of a folder of shards."""
    digest = hashlib.sha256()
    try:
        if path.is_dir():
            for part in sorted(part for part in path.rglob("*") if part.is_file()):
                digest.update(f"{part.relative_to(path)}\0{part.stat().st_size}\0".encode())
                if part.stat().st_size <= _WHOLE_FILE_BYTES:
                    digest.update(part.read_bytes())
        else:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        # Whoever reads the file says so better; here it only is another state than the others'.
        return Input(f"error {error.errno}", f"{path} ({error.strerror})")
    return _digested(digest, str(path))


def _digested(digest: Any, place: str) -> Input:
    text = digest.hexdigest()
    return Input(text, f"{place} (sha256 {text[:_NUM_DIGITS]})")


def _checkpoint_input(folder: Path) -> Input:
    """Which iteration would be loaded, and what its metadata say."""
    mark = folder / _MARK_OF_CHECKPOINT
    digest = hashlib.sha256()
    iteration = "no checkpoint"
    try:
        iteration = read_text(mark, CheckpointError).strip()
        for path in sorted(folder.glob("*/.metadata")):
            digest.update(f"{path.parent.name}\0".encode() + path.read_bytes())
    except (OSError, CheckpointError):
        digest.update(b"none")
    return Input(f"{iteration} {digest.hexdigest()}", f"{folder} ({iteration})")


def _sizes_of_sources() -> Input:
    """Names and sizes of Megatron's files: a patched or another checkout under one version."""
    digest = hashlib.sha256()
    folder = Path(sys.modules["megatron.core"].__path__[0]).parent
    for part in ("core", "training"):
        for path in sorted((folder / part).rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
    return _digested(digest, str(folder))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _is_plain(value: Any) -> bool:
    """Whether its text says all of it, and nothing of this process."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | enum.Enum | torch.dtype)
