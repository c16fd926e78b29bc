"""Stages of ``GPTModel`` against the model in one piece, in one process."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from models_setup import base_config, megatron_on_cpu
from staged_loop import RUN, Setting, assert_same, run_stages, run_whole

from megatron_dip.errors import UnsupportedError
from megatron_dip.models.gpt import StagedGpt
from megatron_dip.models.staged import Part

NUM_LAYERS = 4
NUM_TOKENS = 12
VOCABULARY = 64
CUTS = [(4,), (1, 3), (0, 3, 1, 0), (1, 0, 2, 1)]


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    with megatron_on_cpu():
        yield


def config(**fields):
    made = base_config()
    made.num_layers = NUM_LAYERS
    made.hidden_size = made.ffn_hidden_size = 32
    made.num_attention_heads = made.num_query_groups = 4
    made.kv_channels = 8
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def setting(made=None, spec=None, **arguments):
    made = made or config()
    return Setting(
        GPTModel,
        StagedGpt,
        {
            "config": made,
            "transformer_layer_spec": spec or get_gpt_layer_local_spec(),
            "vocab_size": VOCABULARY,
            "max_sequence_length": NUM_TOKENS,
            "position_embedding_type": "rope",
            **arguments,
        },
        step,
    )


def expert_setting():
    made = config(
        num_moe_experts=4,
        moe_layer_freq=[0, 1, 1, 0],
        moe_ffn_hidden_size=16,
        add_bias_linear=False,
        gated_linear_unit=True,
    )
    spec = get_gpt_decoder_block_spec(made, use_transformer_engine=False)
    return setting(made, spec)


def step(iterator, model):
    """As that of ``pretrain_gpt.py``."""
    batch = next(iterator)
    tokens, labels, loss_mask = (batch.pop(name) for name in ("tokens", "labels", "loss_mask"))
    output = model(tokens, batch["position_ids"], None, labels=labels, loss_mask=loss_mask)
    return output, partial(loss, loss_mask)


def loss(loss_mask, output):
    return (output.view(-1).double() * loss_mask.view(-1)).sum(), loss_mask.sum()


def raw_batch(num_samples=3):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (num_samples, NUM_TOKENS + 1), generator=generator)
    loss_mask = torch.ones(num_samples, NUM_TOKENS)
    loss_mask[0, :5] = 0
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": loss_mask,
        "position_ids": torch.arange(NUM_TOKENS).expand(num_samples, -1),
    }


@pytest.mark.parametrize("cut", CUTS)
def test_stages_give_the_losses_and_gradients_of_the_whole_model(cut):
    given, batch = setting(), raw_batch()
    assert_same(run_stages(given, batch, {"language": cut}), run_whole(given, batch))


def test_samples_can_be_sub_microbatches():
    given, batch = setting(), raw_batch()
    parts = {"language": [(2,), (0, 1)]}
    ours = run_stages(given, batch, {"language": (1, 3)}, parts)
    assert_same(ours, run_whole(given, batch), tolerance=1e-6, loss_tolerance=1e-6)


def test_a_tied_head_adds_its_gradient_to_the_embedding():
    given = setting(share_embeddings_and_output_weights=True)
    batch = raw_batch()
    ours = run_stages(given, batch, {"language": (1, 3)})
    assert_same(ours, run_whole(given, batch), tolerance=1e-12)


def test_layers_of_different_kinds_are_those_of_their_numbers():
    given, batch = expert_setting(), raw_batch()
    assert_same(run_stages(given, batch, {"language": (0, 2, 1, 1)}), run_whole(given, batch))


def test_learned_positions_are_in_the_first_stage():
    given, batch = setting(position_embedding_type="learned_absolute"), raw_batch()
    assert_same(run_stages(given, batch, {"language": (2, 2)}), run_whole(given, batch))


def predicting_setting():
    made = config(mtp_num_layers=1)
    spec = get_gpt_layer_local_spec()
    prediction = get_gpt_mtp_block_spec(made, spec, use_transformer_engine=False)
    return setting(made, spec, mtp_block_spec=prediction)


def test_prediction_of_several_tokens_goes_with_the_last_stage():
    given, batch = predicting_setting(), raw_batch()
    assert_same(run_stages(given, batch, {"language": (3, 1)}), run_whole(given, batch))


def test_prediction_of_several_tokens_needs_the_last_layer_beside_it():
    with pytest.raises(UnsupportedError, match="give the last stage a layer"):
        run_stages(predicting_setting(), raw_batch(), {"language": (4, 0)})


def test_specs_of_one_rank_only_are_refused_with_the_reason():
    made = expert_setting().arguments["config"]
    made.pipeline_model_parallel_size = 2
    spec = get_gpt_decoder_block_spec(made, use_transformer_engine=False)
    with pytest.raises(UnsupportedError, match="specs of 2 layers for a module of 4"):
        run_stages(setting(made, spec), raw_batch(), {"language": (2, 2)})


def test_documents_in_a_sample_are_spans_of_their_own():
    batch = raw_batch(1) | {"cu_seqlens": torch.tensor([[0, 4, 9, 12, 12]])}
    staged = StagedGpt(setting().arguments, RUN)
    (size,) = staged.items(batch)["language"]
    assert (size.tokens, size.spans, size.loss_tokens) == (12, (4, 5, 3), 7)
    with pytest.raises(UnsupportedError, match="2 samples with packed documents"):
        staged.items(raw_batch(2) | {"cu_seqlens": torch.tensor([[0, 12], [0, 12]])})


def test_recomputed_layers_give_equal_losses_and_gradients():
    given, batch = expert_setting(), raw_batch()
    ours = run_stages(given, batch, {"language": (1, 2, 1)}, recompute=(0, 2, 3))
    assert_same(ours, run_whole(given, batch))


def test_layers_that_were_on_the_host_give_equal_losses_and_gradients():
    given, batch = expert_setting(), raw_batch()
    ours = run_stages(given, batch, {"language": (1, 2, 1)}, recompute=(1,), offload=(0, 2, 3))
    assert_same(ours, run_whole(given, batch))


def test_tensor_parallel_ranks_without_data_are_told_the_samples_of_a_part(monkeypatch):
    args = SimpleNamespace(micro_batch_size=3)
    monkeypatch.setattr("megatron.training.get_args", lambda: args)
    staged = StagedGpt(setting().arguments, RUN._replace(num_tensor_ranks=2))
    sizes = staged.items(raw_batch())["language"][:2]
    with (
        pytest.raises(RuntimeError, match="in a forward"),
        staged.calling(Part("language", 0, 4, True, True), sizes),
    ):
        assert args.micro_batch_size == 2
        raise RuntimeError("in a forward")
    assert args.micro_batch_size == 3
