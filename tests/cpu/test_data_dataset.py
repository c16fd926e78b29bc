"""The data set of packed sequences, and the microbatches made of them."""

import copy
import pickle
from collections import Counter
from itertools import product

import pytest
import torch
from megatron.core import mpu
from member_cases import check_members
from PIL import Image
from tiny_data_set import conversation, make_settings, sample_of, with_samples
from torch.utils.data import DataLoader

from megatron_dip.errors import DataError
from megatron_dip.families.data.index import build_index
from megatron_dip.families.data.packing import PackingOptions
from megatron_dip.families.data.statistics import microbatch_statistics
from megatron_dip.families.packed.media import decodes_media
from megatron_dip.families.vlm import dataset as dataset_module
from megatron_dip.families.vlm.batches import PackedSequence, VlmMicrobatch
from megatron_dip.families.vlm.dataset import VlmDataset


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return make_settings(tmp_path_factory.mktemp("set") / "data")


def tokens_of(microbatch: VlmMicrobatch, module: str) -> tuple[int, ...]:
    return tuple(size.tokens for size in microbatch.metadata()[module])


def make(settings, **changes) -> VlmDataset:
    index, _ = build_index(settings, settings.samples.parent / "cache", show_progress=False)
    return VlmDataset(settings, index, **({"num_samples": 50, "seed": 7} | changes))


@pytest.fixture(scope="module")
def microbatch(settings) -> VlmMicrobatch:
    dataset = make(settings)
    return dataset.collate_fn([dataset[i] for i in range(4)])


def same(first: PackedSequence, second: PackedSequence) -> bool:
    pixels = zip(first.images, second.images, strict=True)
    return (
        torch.equal(first.tokens, second.tokens)
        and torch.equal(first.labels, second.labels)
        and torch.equal(first.loss_mask, second.loss_mask)
        and torch.equal(first.image_positions, second.image_positions)
        and first.span_lengths == second.span_lengths
        and all(a.grid == b.grid and torch.equal(a.pixels, b.pixels) for a, b in pixels)
    )


def test_reading_samples_draws_no_random_numbers_of_torchs(settings):
    dataset, before = make(settings), torch.get_rng_state()
    dataset.collate_fn([dataset[i] for i in range(4)]).metadata()
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_of_sequences_are_known_before_they_are_read_and_samples_fit_any_sequence(settings):
    check_members(make(settings), range(4))


def test_training_goes_on_after_a_restart_where_it_was(settings):
    whole = make(settings)
    expected = [whole[i] for i in range(20)]
    fresh = make(settings)
    assert all(same(fresh[i], expected[i]) for i in range(12, 20))
    assert same(fresh[3], expected[3])  # an earlier epoch, after a later one
    assert not same(make(settings, seed=8)[12], expected[12])


def test_every_epoch_holds_every_sample_once(settings):
    dataset = make(settings)
    packs = [dataset.sample_numbers(i) for i in range(50)]
    counts: Counter[int] = Counter()
    for pack in packs:
        counts.update(pack)
        assert max(counts.values()) - min(counts[n] for n in range(24)) <= 1
    assert min(counts.values()) >= 2
    with pytest.raises(IndexError, match="no packed sequence 50: the data set has 50"):
        dataset[50]


def test_a_subset_is_all_that_is_used(settings):
    dataset = make(settings, subset=[1, 4, 7])
    assert {n for i in range(10) for n in dataset.sample_numbers(i)} == {1, 4, 7}
    with pytest.raises(DataError, match="no usable sample"):
        make(settings, subset=[99])


def test_labels_and_loss_stay_inside_their_span(settings):
    dataset = make(settings)
    tokenizer = dataset.tokenizer
    for i in range(10):
        sequence = dataset[i]
        assert sequence.num_tokens <= settings.seq_length
        assert sequence.num_tokens == len(sequence.labels) == sum(sequence.span_lengths)
        start = 0
        for length in sequence.span_lengths:
            span = slice(start, start + length)
            tokens, labels = sequence.tokens[span], sequence.labels[span]
            mask = sequence.loss_mask[span]
            assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id
            assert torch.equal(labels[:-1], tokens[1:])
            assert mask[-1] == 0
            # What is learned is exactly what follows the mark of gpt, up to the end of turn.
            answer = tokens.tolist().index(tokenizer.gpt_id)
            assert mask.tolist() == [0.0] * answer + [1.0] * (length - answer - 1) + [0.0]
            assert tokenizer.decode(labels[mask.bool()].tolist()).endswith("<eos>")
            start += length


def test_no_loss_on_later_questions_and_on_images(settings, tmp_path):
    raw = {"id": "a", "image": "0.jpg", "conversations": conversation("<image>q", "yes", "q", "no")}
    other = make_settings(tmp_path / "data")
    dataset = make(with_samples(other, [raw]), num_samples=1)
    sequence = dataset[0]
    learned = sequence.labels[sequence.loss_mask.bool()].tolist()
    assert dataset.tokenizer.decode(learned) == "yes<eos>no<eos>"
    assert sequence.loss_mask[sequence.image_positions].sum() == 0


def test_image_positions_are_the_image_tokens(settings):
    dataset = make(settings)
    for i in range(10):
        sequence = dataset[i]
        rows = (sequence.tokens == dataset.tokenizer.image_id).nonzero().flatten()
        assert torch.equal(sequence.image_positions, rows)
        assert len(rows) == sum(image.num_tokens for image in sequence.images)
        assert dataset.grids(i) == tuple(image.grid for image in sequence.images)
        for image in sequence.images:
            assert image.pixels.shape == (image.num_patches, 3 * 4 * 4)


def test_a_rank_without_pixels_knows_the_same_metadata(settings, microbatch):
    dataset = make(settings, decode_images=False)
    other = dataset.collate_fn([dataset[i] for i in range(4)])
    assert other.metadata() == microbatch.metadata()
    batch = other.sub_batch("vision", range(len(other.images)))
    assert batch.patches is None
    assert batch.span_lengths == tokens_of(microbatch, "vision")


def test_of_a_pipeline_one_rank_decodes_each_image_once(settings, monkeypatch):
    decoded = Counter()
    read = dataset_module.recorded_patches

    def counted(*args):
        decoded[place] += 1
        return read(*args)

    monkeypatch.setattr(dataset_module, "recorded_patches", counted)
    for place in product(range(2), range(4)):
        pipeline_rank, tensor_rank = place
        monkeypatch.setattr(mpu, "get_pipeline_model_parallel_rank", lambda r=pipeline_rank: r)
        monkeypatch.setattr(mpu, "get_tensor_model_parallel_rank", lambda r=tensor_rank: r)
        dataset = make(settings, decode_images=decodes_media())
        num_images = sum(len(dataset[i].images) for i in range(4))
    assert decoded == {(0, 0): num_images}


def test_an_image_that_changed_after_indexing_is_named(tmp_path):
    other = with_samples(make_settings(tmp_path / "data"), [sample_of("cat", "1.png")])
    dataset = make(other)
    dataset[0]
    path = other.image_folder / "1.png"
    Image.new("RGB", (50, 50)).save(path)
    with pytest.raises(DataError, match=r"'cat'.*1\.png is 50x50, but was .* when the index"):
        dataset[0]
    path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"samples\.json: sample 'cat'.*1\.png: does not decode"):
        dataset[0]


def test_an_index_of_other_samples_is_refused(tmp_path):
    other = make_settings(tmp_path / "data")
    index, _ = build_index(other, tmp_path, show_progress=False)
    with_samples(other, [sample_of("cat")])
    with pytest.raises(DataError, match="holds 1 samples, its index 24; make the index again"):
        VlmDataset(other, index, num_samples=1, seed=1)


def test_bad_samples_are_refused_unless_skipped(tmp_path):
    other = make_settings(tmp_path / "data")
    with_samples(other, [sample_of("bad", "gone.png"), sample_of("good")])
    with pytest.raises(DataError, match="sample 'bad'"):
        make(other)
    dataset = make(other, skip_bad_samples=True)
    assert {n for i in range(5) for n in dataset.sample_numbers(i)} == {1}


# Workers are forked, as Megatron's are; other tests may have left threads behind.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_makes_microbatches(settings, microbatch, num_workers):
    dataset = make(settings, num_samples=8)
    loader = DataLoader(
        dataset, batch_size=4, num_workers=num_workers, collate_fn=dataset.collate_fn
    )
    batches = list(loader)
    assert len(batches) == 2
    pairs = zip(batches[0].sequences, microbatch.sequences, strict=True)
    assert all(same(one, other) for one, other in pairs)


def test_a_data_set_survives_pickling(settings):
    dataset = make(settings)
    other = pickle.loads(pickle.dumps(dataset))
    assert same(other[9], dataset[9])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_microbatch_survives_copying(microbatch, copied):
    other = copied(microbatch)
    assert other.metadata() == microbatch.metadata()
    pairs = zip(other.sequences, microbatch.sequences, strict=True)
    assert all(same(one, two) for one, two in pairs)


def test_images_are_numbered_through_the_microbatch(microbatch):
    needs = [size.needs["vision"] for size in microbatch.metadata()["language"]]
    assert [image for images in needs for image in images] == list(range(len(microbatch.images)))
    for sequence, images in zip(microbatch.sequences, needs, strict=True):
        assert sequence.images == tuple(microbatch.images[image] for image in images)


def test_a_vision_sub_batch_holds_its_images_in_the_order_asked_for(microbatch):
    batch = microbatch.sub_batch("vision", [2, 0])
    expected = [microbatch.images[2].pixels, microbatch.images[0].pixels]
    assert torch.equal(batch.patches, torch.cat(expected))
    assert batch.items == (2, 0)
    assert batch.grids == (microbatch.images[2].grid, microbatch.images[0].grid)


def test_a_language_sub_batch_shifts_its_image_rows(settings, microbatch):
    image_id = make(settings).tokenizer.image_id
    batch = microbatch.sub_batch("language", [3, 1])
    third, first = microbatch.sequences[3], microbatch.sequences[1]
    assert torch.equal(batch.tokens, torch.cat([third.tokens, first.tokens]))
    assert torch.equal(batch.labels, torch.cat([third.labels, first.labels]))
    assert torch.equal(batch.image_rows, (batch.tokens == image_id).nonzero().flatten())
    assert batch.images == microbatch.needs[3] + microbatch.needs[1]
    assert batch.span_lengths == third.span_lengths + first.span_lengths
    expected = [torch.arange(length) for length in batch.span_lengths]
    assert torch.equal(batch.position_ids, torch.cat(expected))
    tokens = sum(microbatch.images[image].num_tokens for image in batch.images)
    assert len(batch.image_rows) == tokens


def test_sizes_say_how_many_rows_are_handed_on_and_how_many_losses_count(microbatch):
    sizes = microbatch.item_sizes
    images = [image.num_tokens for image in microbatch.images]
    assert [size.num_output_rows for size in sizes["vision"]] == images
    parts = [microbatch.sub_batch("language", [item]) for item in range(4)]
    losses = [int(part.loss_mask.sum()) for part in parts]
    assert [size.loss_tokens for size in sizes["language"]] == losses


def test_padding_adds_one_span_without_loss_to_each_sequence(settings, microbatch):
    batch = microbatch.padded(settings.seq_length)
    assert batch.num_tokens == 4 * settings.seq_length == sum(batch.span_lengths)
    losses = [size.loss_tokens for size in microbatch.item_sizes["language"]]
    assert int(batch.loss_mask.sum()) == sum(losses)
    assert batch.images == tuple(range(len(microbatch.images)))
    image_id = make(settings).tokenizer.image_id
    assert torch.equal(batch.image_rows, (batch.tokens == image_id).nonzero().flatten())
    for number, sequence in enumerate(microbatch.sequences):
        rows = batch.tokens[number * settings.seq_length : (number + 1) * settings.seq_length]
        assert torch.equal(rows[: sequence.num_tokens], sequence.tokens)
        assert rows[sequence.num_tokens :].sum() == 0
    with pytest.raises(ValueError, match="cannot be padded to 10"):
        microbatch.padded(10)


def test_a_sub_batch_of_nothing_keeps_its_widths(microbatch):
    assert microbatch.sub_batch("vision", []).patches.shape == (0, 48)
    empty = microbatch.sub_batch("language", [])
    assert empty.num_tokens == 0 and empty.tokens.dtype == torch.int64


@pytest.mark.parametrize(
    ("module", "items", "message"),
    [
        ("audio", [0], "unknown module 'audio'"),
        ("language", [4], "no language item 4: the microbatch has 4"),
        ("vision", [-1], "no vision item -1"),
    ],
)
def test_items_that_do_not_exist_are_reported(microbatch, module, items, message):
    with pytest.raises(ValueError, match=message):
        microbatch.sub_batch(module, items)


def test_statistics_are_those_of_the_microbatches(settings, microbatch):
    dataset = make(settings, packing=PackingOptions())
    statistics = {
        one.name: one.values
        for one in microbatch_statistics(dataset, num_microbatches=2, micro_batch_size=4)
    }
    assert statistics["patches (vision)"][0] == sum(tokens_of(microbatch, "vision"))
    assert statistics["tokens (language)"][0] == sum(tokens_of(microbatch, "language"))
    assert statistics["images"][0] == len(microbatch.images)
    rows = sum(size.num_output_rows for size in microbatch.item_sizes["vision"])
    assert statistics["image tokens"][0] == rows
    assert 9 * rows == sum(tokens_of(microbatch, "vision"))
