"""Which Megatron is accepted, on folders that look like one."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dip.errors import UnsupportedError
from megatron_dip.integration.versions import check_megatron, check_version


@pytest.fixture
def only_megatron(monkeypatch: pytest.MonkeyPatch) -> object:
    """A function that makes the given folders the only ones in which Megatron is looked for."""

    def use(*folders: Path) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
            monkeypatch.delitem(sys.modules, name)
        elsewhere = [path for path in sys.path if not (Path(path) / "megatron").is_dir()]
        monkeypatch.setattr(sys, "path", [*map(str, folders), *elsewhere])
        importlib.invalidate_caches()

    yield use
    # Looking for megatron.core imports the namespace package from the folders of the test.
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
        del sys.modules[name]


def make_tree(folder: Path, version: str, packages: tuple[str, ...]) -> Path:
    major, minor, patch = version.split(".")
    for package in packages:
        path = folder / "megatron" / package
        path.mkdir(parents=True)
        (path / "__init__.py").write_text("raise AssertionError('was imported')\n")
    if "core" in packages:
        text = f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\nPRE_RELEASE = 'rc0'\n"
        (folder / "megatron" / "core" / "package_info.py").write_text(text)
    return folder


def test_a_supported_tree_is_accepted_without_importing_it(only_megatron, tmp_path: Path) -> None:
    only_megatron(make_tree(tmp_path, "0.19.7", ("core", "training")))
    assert check_megatron() == "0.19.7"


@pytest.mark.parametrize("version", ["0.18.2", "0.20.0", "1.19.0"])
def test_a_version_outside_the_range_is_refused_with_range_and_remedy(
    only_megatron, tmp_path: Path, version: str
) -> None:
    only_megatron(make_tree(tmp_path, version, ("core", "training")))
    with pytest.raises(UnsupportedError, match=rf"{version}.*>=0\.19,<0\.20.*pip install"):
        check_megatron()


def test_core_and_training_from_two_places_are_refused(only_megatron, tmp_path: Path) -> None:
    checkout = make_tree(tmp_path / "checkout", "0.19.2", ("training",))
    wheel = make_tree(tmp_path / "wheel", "0.19.2", ("core", "training"))
    only_megatron(checkout, wheel)
    with pytest.raises(UnsupportedError, match=r"wheel.*core.*checkout.*training"):
        check_megatron()


def test_no_megatron_is_reported_with_the_way_to_install_it(only_megatron) -> None:
    only_megatron()
    with pytest.raises(UnsupportedError, match=r"megatron\.core is not installed: pip install"):
        check_megatron()


def test_a_megatron_without_its_training_loop_is_reported(only_megatron, tmp_path: Path) -> None:
    only_megatron(make_tree(tmp_path, "0.19.2", ("core",)))
    with pytest.raises(UnsupportedError, match=r"megatron\.training is not installed"):
        check_megatron()


def test_a_folder_that_states_no_version_is_no_megatron(only_megatron, tmp_path: Path) -> None:
    tree = make_tree(tmp_path, "0.19.2", ("core", "training"))
    (tree / "megatron" / "core" / "package_info.py").write_text("")
    only_megatron(tree)
    with pytest.raises(UnsupportedError, match="states no version"):
        check_megatron()


def test_a_later_patch_release_is_accepted() -> None:
    check_version("0.19.11", "a folder")


def test_importing_the_integration_imports_neither_megatron_nor_torch() -> None:
    code = "import sys, megatron_dip.integration, megatron_dip.launch; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    modules = done.stdout.split()
    assert "megatron_dip.integration.hooks" in modules
    assert not {"torch", "megatron", "megatron.core"} & set(modules)
