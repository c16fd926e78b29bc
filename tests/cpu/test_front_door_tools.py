"""Ways into and out of models, parts of batches, layouts: what classes of models share."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from models_setup import base_config, megatron_on_cpu
from torch.autograd.graph import saved_tensors_hooks

from megatron_dip.costs import ItemSize
from megatron_dip.errors import PartitionError, UnsupportedError
from megatron_dip.models.batches import join, pick, take
from megatron_dip.models.entry import keep_layers, leave, placeholder
from megatron_dip.models.layout import cut_config, cut_spec
from megatron_dip.models.recompute import recomputed_layers
from megatron_dip.models.staged import Part, Received


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    # Recomputing keeps the state of generators.
    with megatron_on_cpu():
        yield


class Chain(torch.nn.Module):
    """Three layers between a stem and a head, as a model without stages has them."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Linear(2, 2)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
        self.head = torch.nn.Linear(2, 1)

    def forward(self, pixels, scale=1.0):
        hidden = self.stem(pixels)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden) * scale


def test_a_model_is_left_behind_a_layer_and_its_wrapper_sees_a_call_that_returns():
    model = Chain()
    pixels = torch.ones(1, 2)
    expected = model.layers[1](model.layers[0](model.stem(pixels)))
    keep_layers(model.layers, range(2))
    leave(model, after=model.layers[1], result=lambda output: (output, "mask"))
    output, mask = model(pixels)
    assert mask == "mask"
    assert torch.equal(output, expected)
    output.sum().backward()
    assert model.stem.weight.grad is not None and model.head.weight.grad is None


def test_layers_of_other_stages_are_dropped_and_the_list_keeps_its_length():
    model = Chain()
    own = model.layers[1]
    keep_layers(model.layers, range(1, 2))
    assert len(model.layers) == 3 and list(model.layers.parameters()) == [*own.parameters()]
    hidden = torch.ones(1, 2)
    assert model.layers[0](hidden, scale=3) is hidden


@pytest.mark.parametrize("passed", [{"pixels": None}, {"pixels": torch.zeros(5, 2)}])
def test_a_placeholder_stands_in_for_what_a_script_has_and_has_not(passed):
    model = Chain()
    placeholder(model, "pixels", lambda: torch.ones(3, 2))
    assert model(**passed, scale=2.0).shape == (3, 1)
    assert model(passed["pixels"]).shape == (3, 1)


def test_a_part_of_a_batch_has_the_rows_of_its_items_and_leaves_the_batch_alone():
    batch = {"tokens": torch.arange(6).view(3, 2), "weight": torch.tensor(2.0), "name": "a"}
    part = take(batch, (2, 0))
    assert part["tokens"].tolist() == [[4, 5], [0, 1]]
    assert (part["weight"], part["name"]) == (torch.tensor(2.0), "a")
    assert take(batch, (0, 1, 2)) == batch and take(batch, (0, 1, 2)) is not batch
    # A view where they follow each other.
    assert take(batch, (1, 2))["tokens"].data_ptr() == batch["tokens"][1:].data_ptr()


def test_batches_that_are_not_a_row_per_item_are_refused():
    batch = {"tokens": torch.zeros(3, 2), "images": torch.zeros(5, 2)}
    with pytest.raises(UnsupportedError, match=r"\{'tokens': 3, 'images': 5\}"):
        take(batch, (0,))
    with pytest.raises(UnsupportedError, match="yields list"):
        take([1, 2], (0,))


def message(items, rows, dim):
    """An item's rows hold its number."""
    sizes = tuple(ItemSize(tokens=9, spans=(9,), output_tokens=count) for count in rows)
    if dim == 1:
        tensor = torch.tensor(items, dtype=torch.float32).expand(rows[0], -1).unsqueeze(-1)
    else:
        tensor = torch.tensor(items, dtype=torch.float32)
        tensor = tensor.repeat_interleave(torch.tensor(rows)).view(-1, 1, 1)
    return Received("vision", tuple(items), sizes, tensor.contiguous())


@pytest.mark.parametrize("dim", [0, 1])
def test_messages_are_joined_in_the_order_of_their_items(dim):
    first, second = message((3, 0), (2, 2), dim), message((1,), (2,), dim)
    joined = join([first, second], dim)
    found = joined[0, :, 0].tolist() if dim == 1 else joined.flatten().tolist()
    assert found == ([0, 1, 3] if dim == 1 else [0, 0, 1, 1, 3, 3])
    assert join([second], dim) is second.tensor


@pytest.mark.parametrize("dim", [0, 1])
def test_a_stage_can_read_a_part_of_a_message(dim):
    sizes = (2, 2, 2) if dim == 1 else (1, 3, 2)
    part = pick(message((4, 5, 6), sizes, dim), (6, 5), dim)
    assert part.items == (6, 5)
    assert part.sizes[0].output_tokens == sizes[2]
    found = part.tensor[0, :, 0].tolist() if dim == 1 else part.tensor.flatten().tolist()
    assert found == ([6, 5] if dim == 1 else [6, 6, 5, 5, 5])


def test_a_cut_config_answers_for_its_stage_on_every_rank():
    config = base_config()
    config.num_layers, config.mtp_num_layers = 6, 1
    parts = [Part("language", 0, 4, True, False), Part("language", 4, 2, False, True)]
    layouts = [cut_config(config, part).pipeline_model_parallel_layout for part in parts]
    assert [layout.get_layer_id_list(pp_rank=1) for layout in layouts] == [[0, 1, 2, 3], [4, 5]]
    assert [layout.get_num_layers_to_build(LayerType.mtp) for layout in layouts] == [0, 1]
    assert config.pipeline_model_parallel_layout is None
    with pytest.raises(PartitionError, match=r"layers \[4, 7\) of a module of 6 layers"):
        cut_config(config, Part("language", 4, 3, False, True))


def test_specs_of_layers_are_cut_in_every_form_that_blocks_take():
    part = Part("language", 1, 2, False, False)
    specs = [SimpleNamespace(number=number) for number in range(4)]
    whole = TransformerBlockSubmodules(layer_specs=specs, layer_norm=None)
    block = ModuleSpec(module=TransformerBlock, submodules=whole)
    assert cut_spec(whole, part, 4).layer_specs == cut_spec(specs, part, 4) == specs[1:3]
    assert cut_spec(block, part, 4).submodules.layer_specs == specs[1:3]
    assert cut_spec(specs[0], part, 4) is specs[0]
    assert block.submodules.layer_specs == specs
    with pytest.raises(UnsupportedError, match="specs of 4 layers for a module of 8"):
        cut_spec(specs, part, 8)


class Deep(torch.nn.Module):
    """Layers as Megatron numbers them, with a second tensor that goes along."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Wide() for _ in range(3))
        for index, layer in enumerate(self.layers):
            layer.layer_number = index + 5

    def forward(self, hidden, context):
        for layer in self.layers:
            hidden, context = layer(hidden, context=(context, "mask"))
        return hidden


class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4 * 64)
        self.outer = torch.nn.Linear(4 * 64, 4)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))

    def forward(self, hidden, context):
        tensor, _ = context
        return hidden + self.outer(self.inner(hidden).tanh()) * tensor, tensor


def run_deep(layers, trained=True):
    model, wrapper = Deep(), torch.nn.Module()
    wrapper.module = model
    model.requires_grad_(trained)
    hidden, context = torch.ones(2, 4), torch.full((4,), 0.5, requires_grad=True)
    kept = []
    keeping = saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t)
    with keeping, recomputed_layers(wrapper, layers):
        output = model(hidden, context)
    assert all("forward" not in vars(layer) for layer in model.layers)
    output.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()] + [context.grad]
    return output, gradients, sum(kept)


@pytest.mark.parametrize("trained", [True, False])
def test_recomputed_layers_keep_their_input_alone_and_give_equal_gradients(trained):
    output, gradients, kept = run_deep((), trained)
    again, found, kept_again = run_deep((4, 5, 6), trained)
    assert torch.equal(output, again)
    for one, other in zip(gradients, found, strict=True):
        assert one is other or torch.equal(one, other)
    assert kept_again < kept / 2


def test_layers_that_a_stage_does_not_hold_cannot_be_recomputed():
    with pytest.raises(ValueError, match=r"layers \[7\] .* holds layers \[4, 5, 6\]"):
        run_deep((5, 7))


def test_nothing_is_recomputed_where_there_is_no_backward():
    model = Deep()
    with torch.no_grad(), recomputed_layers(model, (4,)):
        assert not model(torch.ones(2, 4), torch.ones(4)).requires_grad
