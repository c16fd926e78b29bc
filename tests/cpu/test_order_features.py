"""Joining the outputs of vision sub-microbatches in the order in which a sequence shows images."""

import torch

from megatron_dip.integration.chunks import UpstreamRows, order_features


def output_of(*items: tuple[int, int]) -> tuple[torch.Tensor, UpstreamRows]:
    """An upstream output of items with so many rows each; a row of item 3 reads 3.0, 3.1, ..."""
    values = [item + row / 10 for item, count in items for row in range(count)]
    rows = UpstreamRows(
        module="vision",
        items=tuple(item for item, _ in items),
        num_rows=tuple(count for _, count in items),
    )
    return torch.tensor(values).reshape(-1, 1, 1).repeat(1, 1, 2), rows


def images(*numbers: int) -> list[tuple[str, int]]:
    return [("vision", number) for number in numbers]


def order(parts: list[tuple[torch.Tensor, UpstreamRows]], wanted: list[int]) -> list[float]:
    features = order_features(
        [part[0] for part in parts], [part[1] for part in parts], images(*wanted)
    )
    assert features is not None
    assert features.shape[1] == 2
    return [round(value, 1) for value in features[:, 0].tolist()]


def test_rows_in_the_order_asked_for_are_handed_on_as_they_are() -> None:
    output, rows = output_of((0, 2), (1, 1))
    features = order_features([output], [rows], images(0, 1))
    assert features is not None
    assert features.data_ptr() == output.data_ptr()
    assert order([(output, rows)], [0, 1]) == [0.0, 0.1, 1.0]


def test_several_outputs_are_joined_in_the_order_of_the_images() -> None:
    parts = [output_of((2, 1)), output_of((0, 2), (1, 1))]
    assert order(parts, [0, 1, 2]) == [0.0, 0.1, 1.0, 2.0]
    assert order(parts, [2, 0, 1]) == [2.0, 0.0, 0.1, 1.0]


def test_items_of_equal_size_are_not_confused() -> None:
    parts = [output_of((0, 2), (1, 2))]
    assert order(parts, [1, 0]) == [1.0, 1.1, 0.0, 0.1]


def test_a_sequence_takes_its_own_images_out_of_a_shared_output() -> None:
    parts = [output_of((0, 1), (1, 2), (2, 1))]
    assert order(parts, [1]) == [1.0, 1.1]
    assert order(parts, [0, 2]) == [0.0, 2.0]


def test_a_text_only_sequence_takes_nothing() -> None:
    output, rows = output_of((0, 1))
    assert order_features([output], [rows], []) is None
    assert order_features([], [], []) is None


def test_gradients_go_back_to_the_rows_they_belong_to() -> None:
    parts = [output_of((0, 1), (1, 2)), output_of((2, 1))]
    outputs = [output.requires_grad_() for output, _ in parts]
    features = order_features(outputs, [rows for _, rows in parts], images(2, 1))
    assert features is not None
    (features[:, 0] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    gradients = [output.grad[:, 0, 0].tolist() for output in outputs if output.grad is not None]
    assert gradients == [[0.0, 2.0, 3.0], [1.0]]
