"""Features of upstream items in the order in which a sequence reads them."""

from types import SimpleNamespace

import torch

from megatron_dip.families.packed.model import in_reading_order

MODULES = ("vision", "audio", "language")


def features_of(*items: tuple[float, int]) -> torch.Tensor:
    """Items with so many rows each, one after another; the rows of item 3 read 3.0, 3.1, ..."""
    values = [item + row / 10 for item, count in items for row in range(count)]
    return torch.tensor(values).reshape(-1, 1, 1).repeat(1, 1, 2)


def order(features: torch.Tensor, *read: tuple[str, int, int]) -> torch.Tensor:
    """``read``: module, number and rows of every item in the order of reading."""
    data = SimpleNamespace(
        upstream_items=tuple((module, item) for module, item, _ in read),
        upstream_rows=tuple(rows for _, _, rows in read),
    )
    return in_reading_order(features, data, MODULES)


def numbers(features: torch.Tensor) -> list[float]:
    assert features.shape[1:] == (1, 2)
    return [round(value, 1) for value in features[:, 0, 0].tolist()]


def test_rows_that_are_in_order_are_handed_on_as_they_are() -> None:
    features = features_of((0, 2), (1, 1))
    assert order(features, ("vision", 0, 2), ("vision", 1, 1)) is features
    assert order(features[:0]).shape[0] == 0


def test_items_that_are_read_in_another_order_are_put_into_it() -> None:
    read = [("vision", 5, 1), ("vision", 2, 2), ("vision", 3, 2)]
    assert numbers(order(features_of((2, 2), (3, 2), (5, 1)), *read)) == [5.0, 2.0, 2.1, 3.0, 3.1]


def test_items_of_two_modules_are_read_in_turn() -> None:
    read = [("vision", 0, 2), ("audio", 0, 1), ("vision", 1, 1), ("audio", 1, 2)]
    features = features_of((0, 2), (1, 1), (10, 1), (11, 2))
    assert numbers(order(features, *read)) == [0.0, 0.1, 10.0, 1.0, 11.0, 11.1]


def test_gradients_go_back_to_the_rows_they_belong_to() -> None:
    features = features_of((1, 2), (2, 1)).requires_grad_()
    ordered = order(features, ("vision", 2, 1), ("vision", 1, 2))
    (ordered[:, 0, 0] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert features.grad is not None
    assert features.grad[:, 0, 0].tolist() == [2.0, 3.0, 1.0]
