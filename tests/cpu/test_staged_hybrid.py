"""Stages of ``HybridModel`` against the model in one piece, in one process."""

import pytest
from hybrid_setup import local_stack
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from models_setup import megatron_on_cpu
from staged_loop import RUN, Setting, assert_same, run_stages, run_whole
from test_staged_gpt import NUM_TOKENS, VOCABULARY, config, raw_batch, step

from megatron_dip.errors import UnsupportedError
from megatron_dip.models.hybrid import StagedHybrid

PATTERN = "*-*E-"


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    with megatron_on_cpu(), pytest.MonkeyPatch.context() as patch:
        # The last norm is Transformer Engine's, whatever the layers are.
        patch.setattr(hybrid_block, "TENorm", WrappedTorchNorm)
        yield


def setting(pattern=PATTERN, **arguments):
    made = config(num_moe_experts=4, moe_ffn_hidden_size=16, add_bias_linear=False)
    made.num_layers = len(PATTERN)
    given = {
        "config": made,
        "hybrid_stack_spec": local_stack(),
        "vocab_size": VOCABULARY,
        "max_sequence_length": NUM_TOKENS,
        "hybrid_layer_pattern": pattern,
        "position_embedding_type": "rope",
        **arguments,
    }
    return Setting(HybridModel, StagedHybrid, given, step)


@pytest.mark.parametrize("cut", [(5,), (2, 3), (0, 3, 0, 1, 1), (1, 1, 1, 1, 1)])
def test_stages_give_the_losses_and_gradients_of_the_whole_model(cut):
    given, batch = setting(), raw_batch()
    assert_same(run_stages(given, batch, {"language": cut}), run_whole(given, batch))


def test_where_a_pattern_divides_its_layers_a_schedule_does_instead():
    batch = raw_batch()
    ours = run_stages(setting("*|-*E|-"), batch, {"language": (3, 2)})
    assert_same(ours, run_whole(setting(), batch))


def test_a_tied_head_and_recomputed_layers():
    given, batch = setting(share_embeddings_and_output_weights=True), raw_batch()
    parts = {"language": [(1,), (0, 2)]}
    ours = run_stages(given, batch, {"language": (2, 3)}, parts, recompute=(1, 2, 3))
    assert_same(ours, run_whole(given, batch), tolerance=1e-6, loss_tolerance=1e-6)


def test_layers_that_were_on_the_host():
    given, batch = setting(), raw_batch()
    ours = run_stages(given, batch, {"language": (2, 3)}, recompute=(1,), offload=(0, 2, 3, 4))
    assert_same(ours, run_whole(given, batch))


def test_a_pattern_of_another_number_of_layers_is_refused():
    given = setting("*-")
    with pytest.raises(UnsupportedError, match=r"\*- has 2 layers and the configuration 5"):
        run_stages(given, raw_batch(), {"language": (5,)})


@pytest.mark.parametrize("arguments", [{"hybrid_layer_pattern": "*-*E-/*-"}, {"tied": True}])
def test_stages_of_one_rank_that_share_an_embedding_are_refused(arguments):
    tied = arguments.pop("tied", False)
    given = setting(share_embeddings_and_output_weights=tied, **arguments)
    with pytest.raises(UnsupportedError, match="on one pipeline rank"):
        run_stages(given, raw_batch(), {"language": (2, 3)}, run=RUN._replace(num_pipeline_ranks=1))


def test_a_microbatch_is_not_split_where_several_tokens_are_predicted():
    plain, several = (StagedHybrid(setting(p).arguments, RUN) for p in (PATTERN, "*-*E-/*-"))
    plain.check_split("language")
    with pytest.raises(UnsupportedError, match="mtp-num-layers"):
        several.check_split("language")
