"""Which Megatron this package works with, whether that is installed, and what its wheel lacks."""

import importlib.util
import re
from pathlib import Path

from megatron_dip.errors import UnsupportedError

__all__ = [
    "FIRST_UNSUPPORTED",
    "FIRST_VERSION",
    "build_helpers_where_they_can_be_built",
    "check_megatron",
    "check_version",
]

# The tests run against these releases: from the first up to, not including, the second.
FIRST_VERSION = (0, 19)
FIRST_UNSUPPORTED = (0, 20)


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
    version = _version_in(core / "package_info.py")
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
    return f"pip install 'megatron-core{_range()}'"


def _folder_of(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError(f"{package} is not installed: {_how_to_install()}")
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def _version_in(package_info: Path) -> str:
    """The version that ``package_info.py`` states in its assignments to MAJOR, MINOR and PATCH."""
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
        utils.compile_helpers = lambda: None
