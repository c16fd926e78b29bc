"""Samples of global batches that are moved before they are read: which rank reads what."""

from collections import Counter
from itertools import chain, islice
from typing import Any, NamedTuple

import pytest
from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from tiny_vlm import SEQUENCE_LENGTH, make_tiny_data, write_config

from megatron_dip.costs import Kernels, ProblemBuilder, config_builder
from megatron_dip.families.configs import load_config
from megatron_dip.families.data.index import build_index
from megatron_dip.families.data.sources import DataSettings
from megatron_dip.families.global_batches import AssignedSampler, BatchAssigner, GlobalBatchSizes
from megatron_dip.families.vlm.dataset import VlmDataset

NUM_SAMPLES, REPLICAS, MICROBATCHES, SIZE = 96, 2, 4, 2
BATCH = REPLICAS * MICROBATCHES * SIZE


class Run(NamedTuple):
    """A data set and what costs are taken from."""

    dataset: VlmDataset
    builder: ProblemBuilder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("assigned")
    make_tiny_data(folder)
    config = load_config(write_config(folder / "config.yaml", folder, num_ranks=2))
    settings = DataSettings(
        samples=folder / "samples.json",
        image_folder=folder / "images",
        tokenizer=folder / "tokenizer.json",
        seq_length=SEQUENCE_LENGTH,
        patch_size=4,
        min_image_tokens=2,
        max_image_tokens=12,
    )
    index, _ = build_index(settings, folder, show_progress=False)
    return Run(
        VlmDataset(settings, index, num_samples=NUM_SAMPLES, seed=1, decode_images=False),
        config_builder(
            config.schedule,
            config.model_shape(),
            config.partition(2),
            num_ranks=2,
            kernels=Kernels(is_fp32=True),
        ),
    )


class Growing(ConstantNumMicroBatchesCalculator):
    """Batches of half the size at first, as schedules of batch sizes have it."""

    def update(self, consumed_samples: int, consistency_check: bool, verbose: bool = False) -> None:
        self.num_micro_batches = MICROBATCHES // 2 if consumed_samples < BATCH else MICROBATCHES
        self.current_running_global_batch_size = self.num_micro_batches * REPLICAS * SIZE


def sampler_of(
    run: Run, moves: Any, replica: int, said: list[str], *, consumed: int = 0, grows: bool = False
) -> AssignedSampler:
    make = Growing if grows else ConstantNumMicroBatchesCalculator
    return AssignedSampler(
        MegatronPretrainingSampler(NUM_SAMPLES, consumed, SIZE, replica, REPLICAS),
        BatchAssigner(run.dataset, run.builder, moves),
        GlobalBatchSizes(num_replicas=REPLICAS, calculator=make(BATCH, SIZE, REPLICAS, False, 0)),
        first_iteration=1 + consumed // BATCH,
        say=said.append,
    )


def members_of(run: Run, microbatches: Any) -> Counter[Any]:
    return Counter(
        member
        for entry in chain.from_iterable(microbatches)
        for member in (run.dataset.members(entry) if isinstance(entry, int) else entry)
    )


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("moves", ["microbatches", "samples"])
def test_a_global_batch_keeps_its_samples_and_replicas_have_alike_work(
    run: Run, moves: str, grows: bool
) -> None:
    said: list[str] = []
    samplers = [sampler_of(run, moves, replica, said, grows=grows) for replica in range(REPLICAS)]
    sources = [iter(sampler) for sampler in samplers]
    first = 0
    for iteration in range(1, 5):
        count = MICROBATCHES // 2 if grows and iteration <= 2 else MICROBATCHES
        batch = [list(islice(source, count)) for source in sources]
        assert all(len(one) == SIZE for replica in batch for one in replica)
        expected = members_of(run, [range(first, first + count * REPLICAS * SIZE)])
        assert sum((members_of(run, replica) for replica in batch), Counter()) == expected
        records = [sampler.record_of(iteration) for sampler in samplers]
        assert records[0] == records[1] and records[0] is not None
        assert records[0].replicas[1] <= min(1.1, records[0].replicas[0])
        if moves == "samples":
            assert records[0].microbatches[1] <= records[0].microbatches[0]
        sequences = [run.dataset[entry] for one in chain(*batch) for entry in one]
        assert all(sequence.num_tokens <= SEQUENCE_LENGTH for sequence in sequences)
        first += count * REPLICAS * SIZE
    assert [text.split(":")[0] for text in said] == [
        f"schedule.assignment {moves}, first batch"
    ] * 2


def test_a_resumed_run_reads_what_the_whole_one_does(run: Run) -> None:
    whole = list(sampler_of(run, "samples", 1, []))
    resumed = sampler_of(run, "samples", 1, [], consumed=2 * BATCH)
    assert list(resumed) == whole[2 * MICROBATCHES :]
    assert resumed.record_of(2) is None


def test_what_is_left_of_the_data_is_not_moved(run: Run) -> None:
    consumed = NUM_SAMPLES - BATCH // 2
    own = range(consumed, NUM_SAMPLES)
    rest = list(sampler_of(run, "samples", 0, [], consumed=consumed))
    assert rest == [[own[0], own[1]], [own[4], own[5]]]
