"""Which Megatron this package works with, whether that is installed, and what differs by version.

All that differs between the supported versions stands here; everything else binds to names that
all of them have.  What differs is found by what a Megatron has, not by its number, because trees
of one's own carry changes of other versions.  Nothing of Megatron is imported before it is needed.
"""

import importlib.util
import inspect
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dip.errors import UnsupportedError

__all__ = [
    "FIRST_UNSUPPORTED",
    "FIRST_VERSION",
    "RELEASES",
    "build_helpers_where_they_can_be_built",
    "check_megatron",
    "check_version",
    "complete_arguments",
    "evaluates_in_batches_of_its_own",
    "has_model_builders",
    "needed",
    "parse_arguments",
    "pretrain",
    "rebind",
    "version_of",
]

# ``scripts/check_versions.py`` has trained under these: from the first up to, not including, the
# second, which is what the main branch of Megatron-LM will be followed by.
FIRST_VERSION = (0, 17)
FIRST_UNSUPPORTED = (0, 21)
# Of these, what has been released; ``setup.py`` names the same.
RELEASES = ">=0.17.1,<0.20"


def check_megatron() -> str:
    """The version of the Megatron that an import would find, without importing it.

    Raises:
        UnsupportedError: There is none, its version is outside the supported range, or
            ``megatron.core`` and ``megatron.training`` come from different places: ``megatron`` is
            a namespace package, so that a checkout and an installed release can mix unnoticed.
    """
    core, training = _folder_of("megatron.core"), _folder_of("megatron.training")
    if core.parent != training.parent:
        raise UnsupportedError(
            f"megatron.core comes from {core} but megatron.training from {training}: "
            f"take the one you do not want off PYTHONPATH, or uninstall it"
        )
    version = version_of(core)
    check_version(version, str(core))
    return version


def check_version(version: str, place: str) -> None:
    """Refuse a version such as "0.18.2" that is outside the supported range.

    Raises:
        UnsupportedError: Names the version, where it is, the range and the remedy.
    """
    found = tuple(int(part) for part in version.split(".")[:2])
    if not FIRST_VERSION <= found < FIRST_UNSUPPORTED:
        raise UnsupportedError(
            f"Megatron-Core {version} in {place} is not supported (supported: {_range()}): "
            f"{_how_to_install()}"
        )


def _range() -> str:
    first, end = (".".join(map(str, version)) for version in (FIRST_VERSION, FIRST_UNSUPPORTED))
    return f">={first},<{end}"


def _how_to_install() -> str:
    return f"pip install 'megatron-core{RELEASES}'"


def _folder_of(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError(f"{package} is not installed: {_how_to_install()}")
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def version_of(core: Path) -> str:
    """The version of the folder ``megatron/core``, without importing it.

    Raises:
        UnsupportedError: It states none.
    """
    # By its assignments to MAJOR, MINOR and PATCH.
    package_info = core / "package_info.py"
    text = package_info.read_text(encoding="utf-8") if package_info.is_file() else ""
    parts = [re.search(rf"^{name}\s*=\s*(\d+)", text, re.M) for name in ("MAJOR", "MINOR", "PATCH")]
    if not all(parts):
        raise UnsupportedError(
            f"{package_info} states no version: this is no Megatron-Core; {_how_to_install()}"
        )
    return ".".join(part.group(1) for part in parts if part)


def build_helpers_where_they_can_be_built() -> None:
    """Released wheels hold the built helper of Megatron's data sets, but not its Makefile; Megatron
    runs ``make`` at every start all the same, and ends the first rank when that fails.
    """
    from megatron.core.datasets import utils

    is_built = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    if is_built and not Path(utils.__file__).with_name("Makefile").exists():
        needed(utils, "compile_helpers")
        utils.compile_helpers = lambda: None


def has_model_builders() -> bool:
    """Whether models may come by a ``ModelConfig`` and its builder; before 0.18 all come through
    providers."""
    return importlib.util.find_spec("megatron.training.models") is not None


def needed(owner: Any, name: str) -> Any:
    """What ``owner``, a module or class of Megatron's, has under ``name``, to be hooked.

    Raises:
        UnsupportedError: It has none: this Megatron is another than those that were tried, and a
            hook that is left out would train something else.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        module = sys.modules.get(owner.__module__) if isinstance(owner, type) else owner
        raise UnsupportedError(
            f"{getattr(module, '__name__', owner)} in {getattr(module, '__file__', 'memory')} has "
            f"no {name}, which this package changes (supported: Megatron-Core {_range()} as it "
            f"was released): {_how_to_install()}"
        ) from None


def rebind(name: str, original: Any, hooked: Any) -> None:
    """Put ``hooked`` in place of ``original`` wherever it is imported by value.

    Who imports what differs by version: until 0.17 the start of a run parses the command line, and
    has functions of the parser by value.
    """
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, hooked)


def parse_arguments(
    extra_args_provider: Callable[[ArgumentParser], ArgumentParser] | None = None,
) -> Namespace:
    """Megatron's arguments from the command line, for :func:`pretrain`.

    From 0.18 on a script parses and validates; before, ``pretrain`` did, and what this returns is
    not validated yet.
    """
    from megatron.training import arguments

    if hasattr(arguments, "parse_and_validate_args"):
        return arguments.parse_and_validate_args(extra_args_provider=extra_args_provider)
    return arguments.parse_args(extra_args_provider)


def pretrain(
    args: Namespace,
    data_sets: Callable[..., Any],
    model_provider: Callable[..., Any],
    forward_step: Callable[..., Any],
) -> None:
    """Megatron's ``pretrain`` with the arguments of :func:`parse_arguments`."""
    from megatron.core.enums import ModelType
    from megatron.training import training

    given = {
        "train_valid_test_dataset_provider": data_sets,
        "model_provider": model_provider,
        "model_type": ModelType.encoder_or_decoder,
        "forward_step_func": forward_step,
    }
    if "cfg_container" in inspect.signature(training.pretrain).parameters:
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        training.pretrain(pretrain_cfg_container_from_args(args), **given)
        return
    from megatron.training import initialize

    parse = initialize.parse_args
    initialize.parse_args = lambda *_: args
    try:
        training.pretrain(**given)
    finally:
        initialize.parse_args = parse


def evaluates_in_batches_of_its_own(args: Namespace) -> bool:
    """Whether evaluation has batch sizes that can be set; before 0.18 it had those of training."""
    return hasattr(args, "eval_micro_batch_size")


def complete_arguments(args: Namespace) -> None:
    """Give validated arguments those that later versions have, with what they stand for."""
    later = {
        "eval_micro_batch_size": args.micro_batch_size,
        "eval_global_batch_size": args.global_batch_size,
        "start_eval_at_iter": None,
        "step_batch_size_schedule": None,
    }
    for name, value in later.items():
        if not hasattr(args, name):
            setattr(args, name, value)
