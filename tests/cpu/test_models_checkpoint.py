"""Checkpoint keys, and initial weights, of differently cut models are the same."""

import re

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from models_setup import (
    LANGUAGE_LAYERS,
    SEED,
    base_config,
    language_batch,
    language_stages,
    megatron_on_cpu,
    vision_stages,
)

from megatron_dip.families.packed.initialization import (
    initialize_parameters,
    named_global_parameters,
)


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    with megatron_on_cpu():
        yield


@pytest.fixture(scope="module")
def base(_megatron):
    return base_config(torch.float32)


def sharded_tensors(stages, metadata=None):
    """(key, global shape, global offset, replica) of every tensor that ``stages`` would save."""
    found = []
    for stage in stages:
        for value in stage.sharded_state_dict(metadata=metadata).values():
            parts = value.build() if isinstance(value, ShardedTensorFactory) else [value]
            if isinstance(parts, dict):
                parts = list(parts.values())
            for part in parts:
                if isinstance(part, ShardedTensor):
                    found.append((part.key, part.global_shape, part.global_offset, part.replica_id))
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize("metadata", [None, {"non_homogeneous_layers": True}])
@pytest.mark.parametrize("cuts", [((1,), (2,)), ((0, 2), (0, 1, 4)), ((3,), (1, 2, 3))])
def test_every_cut_saves_the_same_tensors(base, cuts, metadata):
    whole = sharded_tensors(vision_stages(base), metadata) | sharded_tensors(
        language_stages(base), metadata
    )
    vision_cuts, language_cuts = cuts
    cut = sharded_tensors(vision_stages(base, vision_cuts), metadata) | sharded_tensors(
        language_stages(base, language_cuts), metadata
    )
    assert cut == whole


def test_keys_are_those_of_llava_and_gpt_models(base):
    keys = {key for key, *_ in sharded_tensors(vision_stages(base))}
    keys |= {key for key, *_ in sharded_tensors(language_stages(base))}
    assert {key.split(".")[0] for key in keys} == {
        "vision_model",
        "vision_projection",
        "language_model",
    }
    assert keys >= {
        "vision_model.patch_embedding.weight",
        "vision_model.position_table",
        "vision_model.decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "vision_model.decoder.final_layernorm.weight",
        "vision_projection.encoder.linear_fc1.weight",
        "language_model.embedding.word_embeddings.weight",
        "language_model.decoder.layers.mlp.linear_fc1.weight",
        "language_model.decoder.layers.mlp.linear_fc1.layer_norm_weight",
        "language_model.output_layer.weight",
    }


def test_layers_are_saved_at_their_global_numbers(base):
    last_stage = language_stages(base, (3,))[1]
    name = "language_model.decoder.layers.self_attention.linear_proj.weight"
    (entry,) = [entry for entry in sharded_tensors([last_stage]) if entry[0] == name]
    assert entry[1][0] == LANGUAGE_LAYERS
    assert entry[2][0] == 3


def weights(stages):
    return {
        name: parameter.detach().clone()
        for stage in stages
        for name, parameter in named_global_parameters(stage)
    }


@pytest.mark.parametrize("cuts", [(2,), (0, 1, 4)])
def test_initial_weights_do_not_depend_on_the_cut(base, cuts):
    whole, cut = weights(language_stages(base)), weights(language_stages(base, cuts))
    assert whole.keys() == cut.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(cut[name], weight, rtol=0, atol=0, msg=name)


def test_layers_and_seeds_have_weights_of_their_own(base):
    (stage,) = language_stages(base)
    matrices = {name: value for name, value in weights([stage]).items() if value.dim() > 1}
    flat = [value.flatten()[:16] for value in matrices.values()]
    assert not any(torch.equal(one, two) for index, one in enumerate(flat) for two in flat[:index])
    initialize_parameters(stage, SEED + 1)
    assert not any(
        torch.equal(value, matrices[name])
        for name, value in weights([stage]).items()
        if value.dim() > 1
    )


def test_last_layers_of_residual_branches_are_scaled_down_by_depth(base):
    (stage,) = language_stages(base)
    by_kind = {"linear_qkv": [], "linear_proj": [], "linear_fc1": [], "linear_fc2": []}
    for name, weight in weights([stage]).items():
        for kind, found in by_kind.items():
            if re.search(rf"{kind}\.weight$", name):
                found.append(weight.flatten())
    deviation = {kind: torch.cat(found).std().item() for kind, found in by_kind.items()}
    scaled = base.init_method_std / (2 * LANGUAGE_LAYERS) ** 0.5
    assert deviation["linear_qkv"] == pytest.approx(base.init_method_std, rel=0.05)
    assert deviation["linear_fc1"] == pytest.approx(base.init_method_std, rel=0.05)
    assert deviation["linear_proj"] == pytest.approx(scaled, rel=0.05)
    assert deviation["linear_fc2"] == pytest.approx(scaled, rel=0.05)


def test_drawing_weights_leaves_the_random_state_as_it_was(base):
    (stage,) = language_stages(base)
    before = torch.get_rng_state()
    initialize_parameters(stage, SEED)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tied_head_starts_as_the_embedding(base):
    first, last = language_stages(base, (2,))
    # Building a tied last stage takes a second pipeline rank, whose collective it joins.
    last.share_embeddings_and_output_weights = True
    initialize_parameters(last, SEED)
    embedding = first.shared_embedding_or_output_weight()
    head = last.shared_embedding_or_output_weight()
    assert embedding is not head
    torch.testing.assert_close(head, embedding, rtol=0, atol=0)


def test_an_uncut_module_with_tied_embeddings_has_one_weight_for_both(base):
    (stage,) = language_stages(base, tie_embeddings=True)
    batch = language_batch(images=())
    stage(None, batch).sum().backward()
    names = [name for name, _ in named_global_parameters(stage)]
    assert "language_model.output_layer.weight" not in names
    assert stage.shared_embedding_or_output_weight().grad is not None
