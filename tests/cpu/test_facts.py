"""Facts read off built stages: weights of layers and ends, and what of them is trained."""

import copy

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from models_setup import base_config, megatron_on_cpu

from megatron_dip.costs.weights import ModuleWeights, PartWeights
from megatron_dip.errors import UnsupportedError
from megatron_dip.models.facts import read_facts
from megatron_dip.models.layout import cut_config
from megatron_dip.models.module_shapes import module_shape
from megatron_dip.models.staged import Part

VOCABULARY = 64


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    with megatron_on_cpu():
        yield


def config():
    """Four layers, of which the two in the middle have four experts."""
    made = copy.copy(base_config())
    fields = {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "num_moe_experts": 4,
        "moe_layer_freq": [0, 1, 1, 0],
        "moe_ffn_hidden_size": 16,
        "add_bias_linear": False,
        "gated_linear_unit": True,
    }
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def gpt_stage(first_layer, num_layers):
    first, last = first_layer == 0, first_layer + num_layers == 4
    part = Part("language", first_layer, num_layers, first, last)
    sliced = cut_config(config(), part)
    model = GPTModel(
        config=sliced,
        transformer_layer_spec=get_gpt_decoder_block_spec(sliced, use_transformer_engine=False),
        vocab_size=VOCABULARY,
        max_sequence_length=8,
        pre_process=first,
        post_process=last,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    return model, part


def num_weights(model):
    return sum(weight.numel() for weight in model.parameters())


def test_weights_of_a_model_in_stages_are_those_of_the_model_in_one_piece():
    whole = read_facts(*gpt_stage(0, 4))
    stages = [read_facts(*gpt_stage(*cut)) for cut in ((0, 1), (1, 3))]
    joined = ModuleWeights.of_stages("language", 4, stages)
    assert (joined.before, joined.layers, joined.after) == (whole.before, whole.layers, whole.after)
    counted = [sum(weights) for weights in (whole.before, *whole.layers, whole.after)]
    assert sum(counted) == num_weights(gpt_stage(0, 4)[0])
    table = VOCABULARY * 32
    assert (whole.before.trained, whole.after.trained) == (table, table + 2 * 32)


def test_experts_are_counted_by_themselves():
    facts = read_facts(*gpt_stage(1, 3))
    one = 3 * 32 * 16
    assert [layer.trained_experts for layer in facts.layers] == [4 * one, 4 * one, 0]


def test_a_shape_states_about_the_weights_that_a_token_meets():
    shape = module_shape("language", config(), causal=True, vocab_size=VOCABULARY)
    met = [
        layer.met(shape.generic.expert_share)[0] for layer in read_facts(*gpt_stage(0, 4)).layers
    ]
    assert shape.layer_linear_parameters() == pytest.approx(sum(met) / 4, rel=0.05)


def test_frozen_layers_and_ends_are_seen():
    model, part = gpt_stage(0, 4)
    model.embedding.requires_grad_(False)
    model.decoder.layers[0].requires_grad_(False)
    model.decoder.layers[3].self_attention.requires_grad_(False)
    facts = read_facts(model, part)
    assert [layer.is_trained for layer in facts.layers] == [False, True, True, True]
    assert (facts.before.is_trained, facts.after.is_trained) == (False, True)
    assert facts.layers[3].frozen > 0


class Tower(torch.nn.Module):
    """Blocks that Megatron does not know, between a stem and a head."""

    def __init__(self, *blocks):
        super().__init__()
        self.stem = torch.nn.Linear(2, 3, bias=False)
        self.blocks = torch.nn.ModuleList(blocks)
        self.head = torch.nn.ModuleList([torch.nn.Linear(1, 4, bias=False)])


def test_blocks_of_others_are_found_in_a_list_that_kept_its_length():
    tower = Tower(torch.nn.Identity(), torch.nn.Linear(5, 5, bias=False), torch.nn.Identity())
    tower.head = torch.nn.Identity()
    tower.stem = torch.nn.Identity()
    facts = read_facts(tower, Part("vision", 1, 1, first=False, last=False))
    assert facts.layers == (PartWeights(25),)


def test_ends_of_a_tower_are_told_apart_by_their_order():
    tower = Tower(torch.nn.Linear(5, 5, bias=False), torch.nn.Linear(7, 1, bias=False))
    facts = read_facts(tower, Part("vision", 0, 2, first=True, last=True))
    assert (facts.before, facts.after) == (PartWeights(6), PartWeights(4))
    assert facts.layers == (PartWeights(25), PartWeights(7))


def test_trained_weights_that_no_stage_should_have_are_refused():
    tower = Tower(torch.nn.Linear(5, 5))
    with pytest.raises(UnsupportedError, match=r"stem.weight is trained and lies in the stage of"):
        read_facts(tower, Part("vision", 1, 1, first=False, last=False))


def test_a_stage_without_its_layers_is_refused():
    with pytest.raises(UnsupportedError, match=r"no list of modules that holds them"):
        read_facts(Tower(), Part("vision", 0, 2, first=True, last=True))
