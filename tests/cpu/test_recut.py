"""Microbatches of a script's own iterator, whose samples are exchanged."""

from typing import Any

import pytest
import torch
from staged_loop import RUN
from test_staged_llava import bound, example_batch, raw_batch

from megatron_dip.config import ScheduleConfig, build_partition
from megatron_dip.costs import Kernels, ModelShape, ProblemBuilder, config_builder
from megatron_dip.errors import ConfigError, UnsupportedError
from megatron_dip.integration import recut
from megatron_dip.integration.recut import Recut, check_recut
from megatron_dip.models.gpt import StagedGpt
from megatron_dip.models.llava import StagedLlava
from megatron_dip.models.staged import StagedModel

# Sequences of six images and of none: the first microbatch has all images of the step.
MANY, NONE = (0, 1, 2, 3, 4, 5), ()


@pytest.fixture(scope="module")
def staged() -> StagedLlava:
    return StagedLlava(bound(), RUN)


@pytest.fixture(scope="module")
def builder(staged: StagedLlava) -> ProblemBuilder:
    schedule = ScheduleConfig()
    shapes = staged.modules()
    partition = build_partition(schedule, {one.name: one.num_layers for one in shapes}, 1)
    model = ModelShape(name="model", modules=shapes)
    return config_builder(schedule, model, partition, num_ranks=1, kernels=Kernels(is_fp32=True))


def batches() -> list[dict[str, Any]]:
    found = [
        raw_batch(images, (1,) * sum(map(len, images))) for images in [(MANY, MANY), (NONE,) * 2]
    ]
    for number, batch in enumerate(found):
        batch["labels"] = batch["labels"] + 100 * number
    return found


def recut_of(source: Any, staged: StagedModel, builder: ProblemBuilder, said: list[str]) -> Recut:
    return Recut(source, staged, builder, first_iteration=5, say=said.append)


def test_samples_are_exchanged_with_their_tiles_until_microbatches_are_alike(
    staged: StagedLlava, builder: ProblemBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recut, "get_num_microbatches", lambda: 2)
    given, said = batches(), list[str]()
    cut = recut_of(iter(given + given), staged, builder, said)
    ours = [next(cut), next(cut)]
    assert [len(staged.items(batch)["vision"]) for batch in ours] == [6, 6]
    assert all(batch["tokens"].shape == given[0]["tokens"].shape for batch in ours)
    rows = {tuple(row.tolist()) for batch in given for row in batch["labels"]}
    assert {tuple(row.tolist()) for batch in ours for row in batch["labels"]} == rows
    pixels = torch.cat([batch["image"] for batch in ours])
    expected = {tuple(tile.flatten().tolist()) for tile in given[0]["image"]}
    assert {tuple(tile.flatten().tolist()) for tile in pixels} == expected
    record = cut.assignment_of(5)
    assert record is not None and record.num_moved == 2
    assert record.microbatches[0] > record.microbatches[1] == pytest.approx(1.0)
    assert len(said) == 1
    assert len([*cut]) == 2 and cut.assignment_of(6) == record and len(said) == 1


def test_what_an_iterator_ends_with_is_handed_out_as_it_is(
    staged: StagedLlava, builder: ProblemBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recut, "get_num_microbatches", lambda: 4)
    given = batches()
    cut = recut_of(iter(given), staged, builder, [])
    assert next(cut) is given[0] and next(cut) is given[1]
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(cut)
    assert not hasattr(cut, "save_state")


def test_samples_of_the_multimodal_example_come_apart_and_together(
    staged: StagedLlava,
) -> None:
    batch = example_batch()
    again = staged.join_samples(staged.single_samples(batch))
    for name in ("tokens", "labels", "imgs", "num_tiles"):
        assert torch.equal(again[name], batch[name]), name
    text = staged.join_samples([staged.single_samples(batch)[1]] * 2)
    assert text["imgs"].shape == (1, 1) and len(text["tokens"]) == 2


class Config:
    """Of a dense model, as far as it is asked."""

    calculate_per_token_loss = True


def test_what_would_train_something_else_is_refused_with_the_reason(staged: StagedLlava) -> None:
    def check(moves: str, model: StagedModel = staged, args: Any = None, **config: Any) -> None:
        changed = type("Changed", (Config,), config)
        check_recut(ScheduleConfig(assignment=moves), model, changed, args)  # type: ignore[arg-type]

    check("none", calculate_per_token_loss=False)
    with pytest.raises(ConfigError, match="microbatches does not work with a script that reads"):
        check("microbatches")
    with pytest.raises(ConfigError, match="add --calculate-per-token-loss"):
        check("samples", calculate_per_token_loss=False)
    with pytest.raises(ConfigError, match=r"--moe-aux-loss-coeff 0\.01, which is taken over all"):
        check("samples", num_moe_experts=4, moe_aux_loss_coeff=0.01)
    growing = type("Args", (), {"step_batch_size_schedule": "0:4 8:8"})
    with pytest.raises(ConfigError, match="--step-batch-size-schedule: batches that are read"):
        check("samples", args=growing)
    with pytest.raises(UnsupportedError, match="all samples of this model have one length"):
        StagedGpt.single_samples(None, {})  # type: ignore[arg-type]
