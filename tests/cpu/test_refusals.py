"""Refusals about the way into plans that no other test meets: each with its message."""

import argparse
from types import SimpleNamespace

import pytest
import torch

from megatron_dip.errors import UnsupportedError
from megatron_dip.integration.arguments import options_of
from megatron_dip.integration.stages import place_of
from megatron_dip.models.encoders import encoder_of
from megatron_dip.models.gpt import StagedGpt
from megatron_dip.models.llava import StagedLlava
from megatron_dip.models.qwen_vl import StagedQwenVL
from megatron_dip.models.staged import RunFacts

ONE_RANK = RunFacts(num_pipeline_ranks=1, num_tensor_ranks=1, num_context_ranks=1)


def test_a_model_from_another_door_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="did not come through Megatron's get_model or"):
        place_of(torch.nn.Linear(1, 1))


def test_arguments_that_were_not_checked_are_refused() -> None:
    assert options_of(argparse.Namespace(dip_schedule=False)) is None
    with pytest.raises(UnsupportedError, match=r"another place than the command line \(--yaml"):
        options_of(argparse.Namespace(dip_schedule=True))


def test_an_encoder_that_nobody_described_needs_as_many_rows_for_every_item() -> None:
    spec = SimpleNamespace(module=torch.nn.Linear)
    encoder = encoder_of("sounds", spec, 8, 8)
    assert [size.tokens for size in encoder.sizes({"x": torch.zeros(2, 3)}, 8)] == [4, 4]
    with pytest.raises(UnsupportedError, match=r"sounds: 2 items for 7 places .*rows Linear makes"):
        encoder.sizes({"x": torch.zeros(2, 3)}, 7)


def test_a_loss_that_weighs_turns_needs_whole_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    args = argparse.Namespace(use_loss_scaling=True)
    monkeypatch.setattr("megatron.training.get_args", lambda: args)
    staged = object.__new__(StagedLlava)
    staged.check_split("vision")
    with pytest.raises(UnsupportedError, match="--use-loss-scaling divides by a sum over all"):
        staged.check_split("language")


def test_tied_embeddings_of_qwen_need_several_ranks() -> None:
    config = SimpleNamespace(vision_config=None, share_embeddings_and_output_weights=True)
    with pytest.raises(UnsupportedError, match="Qwen25VLModel with tied embeddings on one pipe"):
        StagedQwenVL({"config": config}, ONE_RANK).modules()


def test_a_loss_of_sparse_attention_needs_whole_microbatches() -> None:
    config = SimpleNamespace(experimental_attention_variant="dsa", dsa_indexer_loss_coeff=0.0)
    staged = StagedGpt({"config": config, "mtp_block_spec": None}, ONE_RANK)
    staged.check_split("language")
    config.dsa_indexer_loss_coeff = 0.1
    with pytest.raises(UnsupportedError, match="not work with --dsa-indexer-loss-coeff: the loss"):
        staged.check_split("language")
