"""Asking a builder of models what it builds, and cutting that in its constructor."""

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from megatron_dip.costs import Boundary
from megatron_dip.errors import ConfigError, UnsupportedError
from megatron_dip.models.registry import ModelRegistry, register
from megatron_dip.models.staged import Part, RunFacts, StagedModel

FACTS = RunFacts(num_pipeline_ranks=2, num_tensor_ranks=1, num_context_ranks=1)
PART = Part(module="only", first_layer=1, num_layers=2, first=False, last=True)


class Net(torch.nn.Module):
    def __init__(self, width: int, *, num_layers: int = 4, **names: str) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(num_layers))
        self.names_given = names


class Wider(Net):
    def __init__(self, width: int) -> None:
        super().__init__(2 * width)


class Same(Net):
    """Changes nothing of what a stage does."""


class Other(torch.nn.Module):
    pass


class StagedNet(StagedModel):
    def modules(self):
        return ()

    def stage_arguments(self, part):
        return {"num_layers": part.num_layers}

    def finish(self, model, part):
        model.finished = part

    def items(self, batch):
        return {}

    def boundary(self, module, *, outer):
        return Boundary("packed", 4)


@pytest.fixture
def registry(monkeypatch):
    module = ModuleType("my_stages")
    staged = type("StagedNet", (StagedNet,), {"__module__": "my_stages"})
    module.StagedNet = register(Net)(staged)
    monkeypatch.setitem(sys.modules, "my_stages", module)
    return ModelRegistry(["my_stages"])


def test_a_builder_is_asked_without_making_a_weight(registry):
    made = []

    def build():
        try:
            made.append(Net(8, num_layers=4, colour="red"))
        except Exception:
            made.append("caught")
        return made[-1]

    asked = registry.ask(build)
    assert made == []
    assert asked.model_type is Net
    assert asked.arguments == {"width": 8, "num_layers": 4, "colour": "red"}
    assert len(Net(2).layers) == 4, "the constructor is as it was"


def test_a_stage_is_what_the_builder_constructs_with_other_arguments(registry):
    asked = registry.ask(lambda: Net(8))
    staged = asked.staged_type(asked.arguments, FACTS)
    model = registry.build(lambda: Net(8, colour="red"), staged, PART)
    assert type(model) is Net
    assert len(model.layers) == 2
    assert model.finished == PART
    assert model.names_given == {"colour": "red"}


def test_a_class_that_is_loaded_by_the_builder_is_asked_for_again(monkeypatch):
    late = ModuleType("late_models")
    stages = ModuleType("late_stages")
    staged = type("StagedLate", (StagedNet,), {"__module__": "late_stages"})
    stages.StagedLate = register("late_models.Late")(staged)
    monkeypatch.setitem(sys.modules, "late_stages", stages)

    def build():
        late.Late = late.__dict__.get("Late") or type("Late", (Net,), {})
        sys.modules["late_models"] = late
        return late.Late(3)

    try:
        assert ModelRegistry(["late_stages"]).ask(build).arguments["width"] == 3
    finally:
        sys.modules.pop("late_models", None)


def test_subclasses_count_as_their_class_unless_they_do_something_else(registry):
    assert registry.ask(lambda: Same(4)).model_type is Same
    with pytest.raises(UnsupportedError, match=r"Wider: it derives from Net and has its own"):
        registry.ask(lambda: Wider(4))


def test_what_cannot_be_cut_is_named_with_the_remedy(registry):
    with pytest.raises(UnsupportedError, match=r"cannot cut test_registry\.Other.*GPTModel.*Net"):
        registry.ask(Other)


def test_a_registered_model_inside_of_another_is_not_taken_for_it(registry):
    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Net(4)

    asked = registry.ask(Around)
    staged = asked.staged_type(asked.arguments, FACTS)
    with pytest.raises(UnsupportedError, match=r"cannot cut test_registry\..*Around"):
        registry.build(Around, staged, PART)


def test_a_second_model_beside_the_first_is_refused(registry):
    asked = registry.ask(lambda: Net(4))
    staged = asked.staged_type(asked.arguments, FACTS)
    with pytest.raises(UnsupportedError, match="a Net and a Net"):
        registry.build(lambda: [Net(4), Net(4)][0], staged, PART)


def test_a_builder_that_hands_out_an_old_model_is_refused(registry):
    old = Net(4)
    asked = registry.ask(lambda: Net(4))
    staged = asked.staged_type(asked.arguments, FACTS)
    with pytest.raises(UnsupportedError, match="expected a new model at every call"):
        registry.build(lambda: old, staged, PART)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_stages", "--dip-models no_such_stages: No module named"),
        ("json", "--dip-models json: registers no model"),
    ],
)
def test_modules_that_register_nothing_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        ModelRegistry([name])


@dataclass
class Config:
    num_layers: int
    mtp_num_layers: int | None = None


def test_specs_come_whole_while_a_builder_runs_and_stages_in_the_constructor(registry):
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import transformer_block

    seen = []

    class Looking(StagedNet):
        def constructing(self, part):
            seen.append(transformer_block.get_num_layers_to_build.__name__)
            return super().constructing(part)

    def build():
        seen.append(gpt_layer_specs.get_num_layers_to_build(Config(num_layers=6), vp_stage=1))
        return Net(4)

    registry.ask(build)
    registry.build(build, Looking({}, FACTS), PART)
    assert seen == [6, 6, "get_num_layers_to_build"]
    assert gpt_layer_specs.get_num_layers_to_build.__name__ == "get_num_layers_to_build"
