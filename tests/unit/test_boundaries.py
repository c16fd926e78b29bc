"""Boundaries: one rule for the shapes of messages and for the bytes of items."""

import pytest
from cost_cases import causal, dit, item, vit

from megatron_dip.costs import Boundary, ItemSize, Parallelism, shape_boundary
from megatron_dip.errors import DataError

ITEMS = [item(5, context=3), item(3, context=2)]


@pytest.mark.parametrize(
    ("boundary", "expected"),
    [
        (Boundary("packed", 8), (8, 1, 8)),
        (Boundary("flat", 8), (8, 8)),
        # The joined rows are padded, and not those of every item.
        (Boundary("packed", 8, num_shards=2), (4, 1, 8)),
        (Boundary("packed", 8, num_shards=2, extra_rows=7), (4 + 14, 1, 8)),
        (Boundary("packed", 8, num_shards=2, carries_context=True), (4 + 5, 1, 8)),
    ],
)
def test_a_message_holds_the_rows_of_its_items(boundary: Boundary, expected: tuple[int, ...]):
    assert boundary.shape(ITEMS, outer=False) == expected


def test_modules_that_read_get_as_many_rows_as_are_handed_on():
    images = [ItemSize(tokens=8, spans=(8,), output_tokens=2), item(3)]
    assert Boundary("packed", 8).shape(images, outer=True) == (2 + 3, 1, 8)
    assert Boundary("packed", 8).shape(images, outer=False) == (8 + 3, 1, 8)


def test_batched_items_stand_beside_each_other():
    boundary = Boundary("batched", 8, num_shards=2, extra_rows=1)
    assert boundary.shape([item(6), item(6), item(6)], outer=False) == (3 + 1, 3, 8)


def test_batched_items_of_different_sizes_are_refused():
    with pytest.raises(DataError, match=r"items of \[6, 5\] rows cannot be joined .* same length"):
        Boundary("batched", 8).shape([item(6), item(5)], outer=False)


def test_bytes_of_an_item_are_those_of_a_message_of_it_alone():
    plain, sharded = Parallelism(tensor=2), Parallelism(tensor=2, sequence_parallel=True)
    size = item(10)
    assert shape_boundary(vit(), plain).num_bytes(size, bytes_per_value=2) == 10 * 8 * 2
    assert shape_boundary(vit(), sharded).num_bytes(size, bytes_per_value=2) == 10 * 8
    context = shape_boundary(causal(), Parallelism(context=2))
    assert context.num_bytes(size, bytes_per_value=2) == 10 * 8


def test_what_other_modules_read_crosses_in_parts_and_is_gathered():
    images = [ItemSize(tokens=8, spans=(8,), output_tokens=2), item(3)]
    for sequence_parallel in (False, True):
        parallel = Parallelism(tensor=4, sequence_parallel=sequence_parallel)
        boundary = shape_boundary(vit(), parallel, outer=True)
        assert boundary.is_gathered
        assert boundary.num_rows(images, outer=True) == 5
        # 5 rows on 4 ranks: 8 with those that fill up.
        assert boundary.shape(images, outer=True) == (2, 1, 8)
        assert boundary.num_bytes(item(16), bytes_per_value=2, outer=True) == 16 * 8 * 2 // 4
    assert not shape_boundary(vit(), Parallelism(), outer=True).is_gathered


def test_stages_of_a_diffusion_transformer_hand_on_text_and_modulation_whole():
    boundary = shape_boundary(dit(), Parallelism(tensor=2, sequence_parallel=True))
    assert boundary.shape([item(10, context=3)], outer=False) == (5 + 3 + 7, 1, 8)
