"""The look-ahead: what comes next is known, and nothing else about the data changes."""

import copy
from collections.abc import Iterator

import pytest
import torch
from tiny_data_set import make_settings

from megatron_dip.errors import DataError
from megatron_dip.families.data.index import build_index
from megatron_dip.families.vlm.batches import VlmMicrobatch
from megatron_dip.families.vlm.dataset import VlmDataset
from megatron_dip.runtime.look_ahead import LookAhead


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> VlmDataset:
    folder = tmp_path_factory.mktemp("data")
    settings = make_settings(folder)
    index, _ = build_index(settings, folder, show_progress=False)
    return VlmDataset(settings, index, num_samples=20, seed=1)


class Loader:
    """Microbatches of two sequences, with a state as external loaders have one."""

    def __init__(self, dataset: VlmDataset, consumed: int = 0, fails_at: int = -1) -> None:
        self._dataset = dataset
        self._next = consumed
        self._fails_at = fails_at

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> VlmMicrobatch:
        if self._next == 10:
            raise StopIteration
        if self._next == self._fails_at:
            raise DataError("an image does not decode")
        pair = (2 * self._next, 2 * self._next + 1)
        self._next += 1
        return self._dataset.collate_fn([self._dataset[i] for i in pair])

    def save_state(self) -> dict[str, int]:
        return {"consumed": self._next}


def texts(microbatches: Iterator[VlmMicrobatch]) -> list[list[int]]:
    return [one.sequences[0].tokens.tolist() for one in microbatches]


def test_what_is_handed_out_is_the_same_however_much_is_held(dataset: VlmDataset) -> None:
    expected = texts(Loader(dataset))
    ahead = LookAhead(Loader(dataset))
    found = []
    for number, microbatch in enumerate(ahead):
        found.append(microbatch.sequences[0].tokens.tolist())
        ahead.hold(number % 5)
    assert found == expected and len(found) == 10


def test_coming_batches_are_those_that_come(dataset: VlmDataset) -> None:
    ahead = LookAhead(Loader(dataset))
    ahead.hold(7)
    coming = ahead.coming(3)
    assert ahead.num_held == 7 and len(coming) == 2, "the third batch is not held as a whole"
    for batch in coming:
        for sizes in batch:
            microbatch = next(ahead)
            assert microbatch.item_sizes is sizes
            # Megatron's rerun iterator hands out copies: they are known to be the same batch.
            assert copy.copy(microbatch).item_sizes is sizes
            assert sizes == microbatch.metadata()
    assert ahead.num_held == 1


def test_the_state_is_that_of_what_was_handed_out(dataset: VlmDataset) -> None:
    ahead = LookAhead(Loader(dataset))
    assert ahead.save_state() == {"consumed": 0}
    for _ in range(3):
        next(ahead)
    ahead.hold(6)
    state = ahead.save_state()
    assert state == {"consumed": 3}
    resumed = texts(LookAhead(Loader(dataset, **state)))
    assert resumed == texts(ahead) and len(resumed) == 7


def test_a_source_without_a_state_has_none(dataset: VlmDataset) -> None:
    plain = LookAhead(iter([next(Loader(dataset))]))
    assert not hasattr(plain, "save_state") and hasattr(LookAhead(Loader(dataset)), "save_state")


def test_an_error_is_raised_where_training_comes_to_it(dataset: VlmDataset) -> None:
    ahead = LookAhead(Loader(dataset, fails_at=4))
    ahead.hold(8)
    assert ahead.num_held == 4 and len(ahead.coming(2)) == 2
    for _ in range(4):
        next(ahead)
    for _ in range(2):
        with pytest.raises(DataError, match="does not decode"):
            next(ahead)


def test_the_end_of_the_data_stays_the_end(dataset: VlmDataset) -> None:
    ahead = LookAhead(Loader(dataset, consumed=9))
    ahead.hold(4)
    assert len(texts(ahead)) == 1
    assert next(ahead, None) is None and ahead.coming(1) == []


def test_reading_ahead_draws_no_random_numbers(dataset: VlmDataset) -> None:
    before = torch.get_rng_state()
    LookAhead(Loader(dataset)).hold(5)
    assert torch.equal(torch.get_rng_state(), before)
