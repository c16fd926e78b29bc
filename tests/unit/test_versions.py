"""Which Megatron is accepted, on folders that look like one."""

import importlib
import subprocess
import sys
import types
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_dip.errors import UnsupportedError
from megatron_dip.integration import versions
from megatron_dip.integration.versions import check_megatron, check_version

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("version", ["0.17.1", "0.18.2", "0.19.7", "0.20.0"])
def test_a_supported_tree_is_accepted_without_importing_it(
    only_megatron, tmp_path: Path, version: str
) -> None:
    only_megatron(make_tree(tmp_path, version, ("core", "training")))
    assert check_megatron() == version


@pytest.mark.parametrize("version", ["0.16.1", "0.21.0", "1.19.0"])
def test_a_version_outside_the_range_is_refused_with_range_and_remedy(
    only_megatron, tmp_path: Path, version: str
) -> None:
    only_megatron(make_tree(tmp_path, version, ("core", "training")))
    with pytest.raises(UnsupportedError, match=rf"{version}.*>=0\.17,<0\.21.*pip install"):
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


def test_the_package_asks_for_the_releases_that_its_messages_name() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f'"megatron-core{versions.RELEASES}"' in setup


def test_a_name_that_a_hook_needs_and_megatron_lacks_is_told() -> None:
    module = types.ModuleType("megatron.training.training")
    module.__file__ = "/a/tree/training.py"
    module.get_model = print  # type: ignore[attr-defined]
    assert versions.needed(module, "get_model") is print
    expected = r"megatron\.training\.training in /a/tree/training\.py has no train_step.*>=0\.17"
    with pytest.raises(UnsupportedError, match=expected):
        versions.needed(module, "train_step")


def test_a_function_is_replaced_wherever_it_was_imported_by_value(monkeypatch) -> None:
    def validate_args() -> None: ...
    def other() -> None: ...

    modules = [types.ModuleType(f"holder{number}") for number in range(3)]
    for module, value in zip(modules, (validate_args, validate_args, other), strict=True):
        module.validate_args = value  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    versions.rebind("validate_args", validate_args, print)
    assert [module.validate_args for module in modules] == [print, print, other]


def test_arguments_of_later_versions_mean_what_earlier_ones_did() -> None:
    args = Namespace(micro_batch_size=2, global_batch_size=8)
    assert not versions.evaluates_in_batches_of_its_own(args)
    versions.complete_arguments(args)
    assert (args.eval_micro_batch_size, args.eval_global_batch_size) == (2, 8)
    assert args.start_eval_at_iter is None and args.step_batch_size_schedule is None
    later = Namespace(micro_batch_size=2, global_batch_size=8, eval_micro_batch_size=1)
    versions.complete_arguments(later)
    assert later.eval_micro_batch_size == 1


class Loop:
    """Stands for Megatron's modules of one version, and records how it was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, object]] = []
        names = ("core.enums", "training.training", "training.arguments", "training.initialize")
        names += ("training.argument_utils",)
        self.modules = {name: types.ModuleType(f"megatron.{name}") for name in names}
        for package in ("megatron", "megatron.core", "megatron.training"):
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        for module in self.modules.values():
            monkeypatch.setitem(sys.modules, module.__name__, module)
            parent, _, last = module.__name__.rpartition(".")
            setattr(sys.modules[parent], last, module)
        self.modules["core.enums"].ModelType = types.SimpleNamespace(encoder_or_decoder="model")

    def note(self, name: str, result: object = None):  # type: ignore[no-untyped-def]
        def called(*args: object, **kwargs: object) -> object:
            self.calls.append((name, (*args, *kwargs.values())))
            return result

        return called


def test_a_script_of_0_19_parses_and_gives_a_container(monkeypatch) -> None:
    loop, args = Loop(monkeypatch), Namespace()
    arguments = loop.modules["training.arguments"]
    arguments.parse_and_validate_args = loop.note("parse and validate", args)
    container = loop.note("container", "the container")
    loop.modules["training.argument_utils"].pretrain_cfg_container_from_args = container

    def pretrain(
        cfg_container, train_valid_test_dataset_provider, model_type, forward_step_func,
        model_provider=None,
    ):  # fmt: skip
        loop.calls.append(("pretrain", (cfg_container, model_provider, model_type)))
        assert (train_valid_test_dataset_provider, forward_step_func) == ("sets", "step")

    loop.modules["training.training"].pretrain = pretrain
    found = versions.parse_arguments("provider")
    versions.pretrain(found, "sets", "builder", "step")
    assert loop.calls == [
        ("parse and validate", ("provider",)),
        ("container", (args,)),
        ("pretrain", ("the container", "builder", "model")),
    ]


def test_a_script_of_0_17_parses_once_and_pretrain_validates(monkeypatch) -> None:
    loop, args = Loop(monkeypatch), Namespace()
    loop.modules["training.arguments"].parse_args = loop.note("parse", args)
    initialize = loop.modules["training.initialize"]
    initialize.parse_args = own_parse = loop.note("parse again")

    def pretrain(
        train_valid_test_dataset_provider, model_provider, model_type, forward_step_func
    ):  # fmt: skip
        assert initialize.parse_args(None, False) is args
        loop.calls.append(("pretrain", (model_provider, model_type)))

    loop.modules["training.training"].pretrain = pretrain
    versions.pretrain(versions.parse_arguments("provider"), "sets", "builder", "step")
    assert loop.calls == [("parse", ("provider",)), ("pretrain", ("builder", "model"))]
    assert initialize.parse_args is own_parse


def test_importing_the_integration_imports_neither_megatron_nor_torch() -> None:
    code = "import sys, megatron_dip.integration, megatron_dip.launch; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    modules = done.stdout.split()
    assert "megatron_dip.integration.hooks" in modules
    assert not {"torch", "megatron", "megatron.core"} & set(modules)
