"""Rows of samples divided among context-parallel ranks."""

import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from forked_ranks import run_modes
from short_of_memory import assert_moved, write_short, write_steady
from tiny_omni import make_tiny_sounds, write_omni_config
from tiny_vlm import make_tiny_data, write_config
from training_runs import train

from megatron_dip.errors import DataError, UnsupportedError
from megatron_dip.families.data.images import Grid
from megatron_dip.families.vlm.batches import ImageData, PackedSequence, VlmMicrobatch
from megatron_dip.integration.flag_rules import SCHEDULE_RULES
from megatron_dip.integration.rules import check_rules
from megatron_dip.integration.stages import check_division
from megatron_dip.models.context_rows import rows_of_context_rank
from megatron_dip.models.gpt import StagedGpt, context_shares
from megatron_dip.models.llava import StagedLlava
from megatron_dip.models.staged import RunFacts

WORKER = Path(__file__).with_name("context_parallel_worker.py")
MODES = ("causal", "full", "packed")
RUN = RunFacts(num_pipeline_ranks=2, num_tensor_ranks=1, num_context_ranks=2)


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return run_modes(WORKER, tmp_path_factory.mktemp("context"), MODES)


@pytest.mark.parametrize("mode", MODES)
def test_attention_of_divided_rows_is_that_of_whole_samples(
    differences: dict[str, list[float]], mode: str
) -> None:
    assert differences[mode] == pytest.approx([0.0, 0.0], abs=2e-6)


def test_a_rank_has_a_chunk_from_the_front_of_every_sequence_and_one_from_its_end() -> None:
    assert rows_of_context_rank([8, 4], 2, 0) == [0, 1, 6, 7, 8, 11]
    assert rows_of_context_rank([8, 4], 2, 1) == [2, 3, 4, 5, 9, 10]
    with pytest.raises(DataError, match=r"6 rows .* 2 context-parallel ranks .*multiple of 4"):
        rows_of_context_rank([8, 6], 2, 0)


def test_the_losses_of_a_sample_are_counted_for_every_rank_that_has_some_of_them() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 1, 1, 0, 1]])
    assert context_shares(mask, 2) == [(2, 1), (1, 3)]
    assert context_shares(mask, 4) == [(1, 1, 1, 0), (1, 0, 2, 1)]


def test_a_model_that_does_not_divide_samples_is_refused() -> None:
    arguments = dict.fromkeys(
        ("language_transformer_config", "vision_transformer_config"), SimpleNamespace()
    ) | {"language_max_sequence_length": 8}
    message = "--context-parallel-size 2 with --dip-schedule: StagedLlava does not divide"
    with pytest.raises(UnsupportedError, match=message):
        check_division(StagedLlava(arguments, RUN))
    check_division(StagedLlava(arguments, RUN._replace(num_context_ranks=1)))
    check_division(StagedGpt({}, RUN))


def test_samples_divided_one_way_or_another_are_refused() -> None:
    message = "--hybrid-context-parallel .* with --dip-schedule.* use --context-parallel-size"
    with pytest.raises(UnsupportedError, match=message):
        check_rules(
            SimpleNamespace(hybrid_context_parallel=True), SCHEDULE_RULES, "with --dip-schedule"
        )


def sequence(lengths: tuple[int, ...], image_rows: tuple[int, ...]) -> PackedSequence:
    """Tokens are their places, from 1; one image of a row for each of ``image_rows``."""
    num_tokens = sum(lengths)
    tokens = torch.arange(1, num_tokens + 1)
    return PackedSequence(
        tokens=tokens,
        labels=tokens + 100,
        loss_mask=(tokens % 2).float(),
        span_lengths=lengths,
        images=(ImageData(grid=Grid(2, 2, 2), pixels=None),) * len(image_rows),
        image_positions=torch.tensor(image_rows, dtype=torch.int64),
    )


def test_samples_are_filled_up_and_every_feature_falls_on_one_rank() -> None:
    whole = sequence((5, 3), (1, 4, 6)).divisible(4)
    assert whole.span_lengths == (8, 4)
    assert whole.tokens.tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 8, 0]
    assert whole.padding is not None
    assert torch.equal(whole.padding, whole.tokens == 0)
    assert whole.tokens[whole.image_positions].tolist() == [2, 5, 7]
    parts = [
        VlmMicrobatch(sequences=(whole,), context_rank=rank, num_context_ranks=2) for rank in (0, 1)
    ]
    (size,) = parts[0].metadata()["language"]
    assert (size.tokens, size.loss_tokens, size.context_loss_tokens) == (12, 4, (1, 3))
    found = [part.sub_batch("language", (0,)) for part in parts]
    assert [one.tokens.tolist() for one in found] == [[1, 2, 0, 0, 6, 0], [3, 4, 5, 0, 7, 8]]
    assert [one.position_ids.tolist() for one in found] == [[0, 1, 6, 7, 0, 3], [2, 3, 4, 5, 1, 2]]
    for one, features in zip(found, ([0], [1, 2]), strict=True):
        assert one.feature_rows is not None
        assert one.feature_rows.tolist() == features
        assert one.num_features == 3
        read = whole.tokens[whole.image_positions][one.feature_rows]
        assert torch.equal(one.tokens[one.image_rows], read)


def vlm_config(folder: Path) -> Path:
    make_tiny_data(folder / "data", num_samples=60)
    parts = (90, 96)
    return write_config(
        folder / "config.yaml", folder / "data", num_ranks=2, sub_microbatch_tokens=parts
    )


def omni_config(folder: Path) -> Path:
    make_tiny_sounds(folder / "data")
    return write_omni_config(folder / "config.yaml", folder / "data", num_ranks=2, num_segments=2)


@pytest.mark.parametrize("make_config", [vlm_config, omni_config], ids=["vlm", "omni"])
def test_a_model_with_media_computes_on_divided_rows_what_it_computes_on_whole_ones(
    make_config: Callable[[Path], Path], tmp_path: Path
) -> None:
    config = make_config(tmp_path)
    steady = write_steady(config, yaml.safe_load(config.read_text()))
    arguments = f"""
        --dip-config {config} --pipeline-model-parallel-size 2
        --micro-batch-size 2 --global-batch-size 8 --train-iters 2 --calculate-per-token-loss
        --optimizer sgd --lr 0.03 --min-lr 0.03 --eval-iters 1 --eval-interval 1000
    """
    whole = train(tmp_path / "whole", 2, *shlex.split(arguments))
    divides = f"--context-parallel-size 2 --dip-schedule --dip-trace-dir {tmp_path / 'room'}"
    divided = train(tmp_path / "divided", 4, *shlex.split(f"{arguments} {divides}"))
    assert divided.losses == pytest.approx(whole.losses, rel=1e-6)
    assert divided.grad_norms == pytest.approx(whole.grad_norms, rel=1e-6)
    assert divided.validation_losses == pytest.approx(whole.validation_losses, rel=1e-6)
    # The same ranks with less memory: their rows go to the host and come back.
    short, traces = config.with_name("short.yaml"), tmp_path / "traces"
    write_short(short, steady, tmp_path / "room")
    less = f"--dip-config {short} --context-parallel-size 2 --dip-schedule --dip-trace-dir {traces}"
    away = train(tmp_path / "away", 4, *shlex.split(f"{arguments} {less}"))
    assert_moved(traces, tmp_path / "room")
    assert not any(divided.moved_bytes)
    assert any(away.moved_bytes)
    assert away.losses == pytest.approx(divided.losses, rel=1e-6)
    assert away.grad_norms == pytest.approx(divided.grad_norms, rel=1e-6)
    assert away.gradients.keys() == divided.gradients.keys()
    for name, pair in divided.gradients.items():
        assert away.gradients[name] == pytest.approx(pair, rel=1e-4, abs=1e-6), name
