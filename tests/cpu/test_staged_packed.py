"""How the models of the examples are cut: what a stage is given of a microbatch."""

from types import SimpleNamespace

import pytest
import torch

from megatron_dip.errors import DataError
from megatron_dip.families.data.images import Grid
from megatron_dip.families.staged import StagedPacked
from megatron_dip.families.vlm.batches import ImageData, PackedSequence, VlmMicrobatch
from megatron_dip.models.staged import Part, RunFacts

FACTS = RunFacts(num_pipeline_ranks=2, num_tensor_ranks=1, num_context_ranks=1)


@pytest.fixture
def staged() -> StagedPacked:
    made = StagedPacked({"stages": SimpleNamespace()}, FACTS)
    made.finish(torch.nn.Module().eval(), vision())
    return made


def vision(*, first: bool = False, last: bool = False) -> Part:
    return Part("vision", first_layer=2, num_layers=1, first=first, last=last)


def microbatch() -> VlmMicrobatch:
    """One sequence of four tokens of which one stands for an image."""
    tokens = torch.arange(4)
    sequence = PackedSequence(
        tokens=tokens,
        labels=tokens,
        loss_mask=torch.ones(4),
        span_lengths=(4,),
        images=(ImageData(grid=Grid(2, 2, 2), pixels=torch.ones(4, 12)),),
        image_positions=torch.tensor([1]),
    )
    return VlmMicrobatch(sequences=(sequence,), values_per_patch=12)


def test_pixels_go_to_the_ends_of_a_module_alone(staged: StagedPacked) -> None:
    batch = microbatch()
    first, inner = (staged.part_of(batch, vision(first=end), [0]) for end in (True, False))
    assert first.patches.shape == (4, 12) and inner.patches is None
    assert first.items == inner.items == (0,) and first.grids == inner.grids
    assert staged.part_of(batch, vision(last=True), [0]).patches is not None


def test_a_batch_of_another_kind_is_refused_with_what_to_use(staged: StagedPacked) -> None:
    with pytest.raises(DataError, match=r"yielded dict \(expected a microbatch: use .*data_sets"):
        staged.items({"tokens": torch.zeros(1, 2)})
