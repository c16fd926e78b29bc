"""Samples from webdataset shards: the same batches as from a list, and what is wrong is named."""

import io
import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from launching import REPOSITORY
from tiny_data_set import make_settings
from tiny_vlm import make_tiny_data, write_config
from training_runs import train

from megatron_dip.errors import ConfigError, DataError
from megatron_dip.families.configs import load_config
from megatron_dip.families.data.energon import write_energon
from megatron_dip.families.data.index import build_index, split_source, usable_samples
from megatron_dip.families.data.sources import DataSettings, open_source
from megatron_dip.families.vlm.batches import VlmMicrobatch
from megatron_dip.families.vlm.dataset import VlmDataset
from megatron_dip.runtime.look_ahead import LookAhead

NUM_SAMPLES, SAMPLES_PER_SHARD = 24, 7
NUM_SEQUENCES = 24
SCRIPT = REPOSITORY / "scripts" / "make_energon_data.py"


def make_shards(settings: DataSettings, folder: Path, *options: str) -> DataSettings:
    """``settings`` over shards that the script has made of the same samples."""
    command = [sys.executable, SCRIPT, settings.samples, settings.image_folder, folder, *options]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return replace(settings, samples=folder, image_folder=None, format="energon")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    return make_settings(tmp_path_factory.mktemp("llava") / "data", num_samples=NUM_SAMPLES)


@pytest.fixture(scope="module")
def shards(llava: DataSettings, tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    folder = tmp_path_factory.mktemp("energon") / "set"
    options = ("--samples-per-shard", str(SAMPLES_PER_SHARD), "--valid-shards", "1")
    return make_shards(llava, folder, *options)


@pytest.fixture
def copied(shards: DataSettings, tmp_path: Path) -> DataSettings:
    """Shards that a test may break."""
    shutil.copytree(shards.samples, tmp_path / "set")
    return replace(shards, samples=tmp_path / "set")


def data_set(settings: DataSettings, **changes: Any) -> VlmDataset:
    index, _ = build_index(settings, settings.samples.parent / "cache", show_progress=False)
    return VlmDataset(settings, index, **({"num_samples": NUM_SEQUENCES, "seed": 7} | changes))


def content(batch: VlmMicrobatch) -> list[torch.Tensor]:
    """All that a microbatch holds."""
    images = batch.sub_batch("vision", range(len(batch.images)))
    texts = batch.sub_batch("language", range(len(batch.sequences)))
    numbers = (*texts.span_lengths, *texts.images, *images.span_lengths)
    rows = [texts.tokens, texts.labels, texts.loss_mask, texts.position_ids, texts.image_rows]
    return [images.patches, *rows, torch.tensor(numbers)]


def same(first: VlmMicrobatch, second: VlmMicrobatch) -> bool:
    pairs = list(zip(content(first), content(second), strict=True))
    return first.metadata() == second.metadata() and all(torch.equal(*pair) for pair in pairs)


def batches_of(
    monkeypatch: pytest.MonkeyPatch,
    dataset: VlmDataset,
    *,
    consumed_samples: int = 0,
    rank: int = 0,
    num_replicas: int = 1,
    num_workers: int = 0,
) -> Iterator[Any]:
    """What a data-parallel rank reads of ``dataset`` in training, two sequences at a time."""
    from megatron.core.datasets.utils import Split
    from megatron.training.datasets import data_samplers

    from megatron_dip.families import loaders

    arguments = Namespace(
        micro_batch_size=2,
        num_workers=num_workers,
        global_batch_size=4 * num_replicas,
        data_parallel_size=num_replicas,
        dataloader_type="single",
        full_validation=False,
        hybrid_context_parallel=False,
        exit_signal_handler=False,
    )
    monkeypatch.setattr(loaders, "get_args", lambda: arguments)
    monkeypatch.setattr(data_samplers, "get_args", lambda: arguments)
    monkeypatch.setattr(data_samplers.mpu, "get_data_parallel_rank", lambda: rank)
    monkeypatch.setattr(data_samplers.mpu, "get_data_parallel_world_size", lambda: num_replicas)
    loaded = loaders.LoadedSet(dataset, Split.train)
    loader = data_samplers.build_pretraining_data_loader(loaded, consumed_samples)
    return iter(loaders.BatchLoader(loader, loaded))


# ---- the same as from a list -------------------------------------------------------------------


def test_shards_hold_the_samples_of_the_list_in_its_order(
    llava: DataSettings, shards: DataSettings
) -> None:
    from_list, from_shards = data_set(llava), data_set(shards)
    assert from_shards.index.samples == from_list.index.samples
    assert len(from_shards.index.samples) == NUM_SAMPLES
    packs = [from_list.sample_numbers(i) for i in range(NUM_SEQUENCES)]
    assert [from_shards.sample_numbers(i) for i in range(NUM_SEQUENCES)] == packs


# Workers are forked, as Megatron's are; other tests may have left threads behind.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_reads_the_same_microbatches_from_both(
    monkeypatch: pytest.MonkeyPatch, llava: DataSettings, shards: DataSettings, num_workers: int
) -> None:
    expected = list(batches_of(monkeypatch, data_set(llava)))
    given = list(batches_of(monkeypatch, data_set(shards), num_workers=num_workers))
    assert len(given) == NUM_SEQUENCES // 2
    assert all(same(*pair) for pair in zip(given, expected, strict=True))
    assert any(batch.images for batch in given)
    assert not same(given[0], given[1])


def test_a_data_set_over_shards_survives_pickling(shards: DataSettings) -> None:
    dataset = data_set(shards)
    other = pickle.loads(pickle.dumps(dataset))
    assert same(dataset.collate_fn([other[3]]), dataset.collate_fn([dataset[3]]))


def test_the_last_shards_are_kept_for_validation(llava: DataSettings, shards: DataSettings) -> None:
    train, valid = split_source(open_source(shards), 0.5, 1)
    assert train == tuple(range(21)) and valid == (21, 22, 23)
    train, valid = split_source(open_source(llava), 0.5, 1)
    assert len(train) == len(valid) == 12


def test_what_the_script_makes_is_a_data_set_for_energon_itself(shards: DataSettings) -> None:
    import megatron.energon as energon

    @energon.stateless
    def keep(sample: energon.CrudeSample) -> energon.CrudeSample:
        return sample

    class Encoder(energon.DefaultTaskEncoder):
        cookers = (energon.Cooker(keep),)

    stream = energon.get_train_dataset(
        str(shards.samples),
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
        repeat=False,
    )
    samples = list(energon.get_loader(stream))
    assert sorted(sample["__key__"] for sample in samples) == [f"{n:09d}" for n in range(21)]


# ---- resuming and replicas -------------------------------------------------------------------


def test_training_goes_on_after_a_restart_where_it_was_whatever_was_read_ahead(
    monkeypatch: pytest.MonkeyPatch, shards: DataSettings
) -> None:
    expected = list(batches_of(monkeypatch, data_set(shards)))
    stopped = LookAhead(batches_of(monkeypatch, data_set(shards)), VlmMicrobatch.metadata)
    consumed = [next(stopped) for _ in range(5)]
    stopped.hold(4)
    assert stopped.num_held == 4
    # Megatron's checkpoint keeps the samples that were trained on.
    consumed_samples = 2 * len(consumed)
    resumed = list(batches_of(monkeypatch, data_set(shards), consumed_samples=consumed_samples))
    assert len(resumed) == len(expected) - 5
    assert all(same(*pair) for pair in zip(resumed, expected[5:], strict=True))


def test_data_parallel_ranks_read_disjoint_shares(
    monkeypatch: pytest.MonkeyPatch, shards: DataSettings
) -> None:
    whole = list(batches_of(monkeypatch, data_set(shards)))
    shares = [
        list(batches_of(monkeypatch, data_set(shards), rank=rank, num_replicas=2))
        for rank in range(2)
    ]
    by_turns = [batch for pair in zip(*shares, strict=True) for batch in pair]
    assert len(by_turns) == len(whole)
    assert all(same(*pair) for pair in zip(by_turns, whole, strict=True))


def test_a_run_on_shards_goes_on_where_one_on_the_list_was_stopped(tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "data", num_samples=60)
    # Else plans, and with them last digits, follow what steps happen to take.
    listed = write_config(tmp_path / "listed.yaml", tmp_path / "data", num_ranks=1, feedback=False)
    form = yaml.safe_load(listed.read_text())
    data = form["data"]
    write_energon(Path(data["path"]), Path(data.pop("image_folder")), tmp_path / "set")
    data |= {"format": "energon", "path": str(tmp_path / "set")}
    sharded = tmp_path / "sharded.yaml"
    sharded.write_text(yaml.safe_dump(form))
    sizes = shlex.split("--micro-batch-size 2 --global-batch-size 4 --lr 0.002 --train-iters 4")

    def losses(config: Path, *arguments: str) -> tuple[float, ...]:
        flags = (*sizes, "--dip-schedule", "--dip-config", str(config), *arguments)
        return train(tmp_path / f"run of {config.stem}", 1, *flags).losses

    saved = str(tmp_path / "saved")
    whole = losses(listed, "--save", saved, "--save-interval", "2")
    assert len(set(whole)) == 4
    assert losses(sharded, "--load", saved, "--ckpt-step", "2") == whole[2:]


# ---- captions, as img2dataset writes them ------------------------------------------------------


def write_captions(folder: Path, images: list[Path], captions: list[bytes | None]) -> None:
    """A shard of img2dataset's, and its index as docs/data.md says how to make it."""
    from megatron.energon.tools.prepare import command

    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
            said = {"url": "https://example.org", "status": "success", "width": 9, "caption": "?"}
            parts = {"jpg": image.read_bytes(), "txt": caption, "json": json.dumps(said).encode()}
            for ending, content in parts.items():
                if content is not None and (ending != "json" or number):
                    header = tarfile.TarInfo(f"{number:09d}.{ending}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    page = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    (flags,) = re.findall(r"^energon prepare (.*) FOLDER$", page, re.MULTILINE)
    more = ["--num-workers", "1", "--no-progress"]
    done = CliRunner().invoke(command, [*shlex.split(flags), *more, str(folder)])
    assert done.exit_code == 0, done.output


def test_shards_of_img2dataset_are_images_answered_by_their_captions(
    llava: DataSettings, tmp_path: Path
) -> None:
    assert llava.image_folder is not None
    images = sorted(llava.image_folder.glob("*.jpg"))
    captions = [b"It is number 3.\n", b"\xef\xbb\xbfA picture.", b" ", None, b"\xff"]
    write_captions(tmp_path / "set", images[:1] * len(captions), captions)
    settings = replace(llava, samples=tmp_path / "set", image_folder=None, format="energon")
    index, _ = build_index(settings, tmp_path, show_progress=False)
    errors = [record.error for record in index.samples]
    assert errors[:2] == [None, None]
    expected = ("is blank", "neither conversations in a part 'json' nor a caption", "not UTF-8")
    for number, (error, part) in enumerate(zip(errors[2:], expected, strict=True), start=2):
        assert f"00000.tar: sample '00000000{number}'" in str(error) and part in str(error)
    dataset = VlmDataset(settings, index, num_samples=2, seed=7, skip_bad_samples=True)
    (sequence,) = [dataset[i] for i in range(2) if len(dataset.sample_numbers(i)) == 2][:1]
    length = sequence.span_lengths[dataset.sample_numbers(0).index(0)]
    start = 0 if dataset.sample_numbers(0)[0] == 0 else sequence.span_lengths[0]
    tokens = sequence.tokens[start : start + length]
    learned = tokens[1:][sequence.loss_mask[start : start + length - 1].bool()]
    assert dataset.tokenizer.decode(learned.tolist()) == "It is number 3.<eos>"
    assert dataset.tokenizer.decode(tokens.tolist()).replace("<image>", "") == (
        "<bos><human><gpt>It is number 3.<eos>"
    )


def test_a_caption_beside_a_conversation_or_without_an_image_is_refused(
    copied: DataSettings, tmp_path: Path
) -> None:
    source = open_source(copied)
    entry = source._entries[1]
    source._parts[f"{entry.key}.txt"] = source._parts[f"{entry.key}.json"]
    with pytest.raises(DataError, match="has conversations and a part 'txt'"):
        source.sample(1)
    write_captions(tmp_path / "captions", [copied.samples / "shard-000000.tar"], [b"A cat."])
    captions = open_source(replace(copied, samples=tmp_path / "captions"))
    captions._entries = (captions._entries[0]._replace(names=("000000000.txt",)),)
    with pytest.raises(DataError, match="a caption and no image, only"):
        captions.sample(0)


# ---- bad input -------------------------------------------------------------------------------


def parts_of(shard: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(shard) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            yield member, file.read()


def overwrite(folder: Path, shard: str, part: str) -> None:
    """Put other bytes, as many as before, where a part is."""
    path = folder / shard
    (member,) = [member for member, _ in parts_of(path) if member.name == part]
    with path.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(b"x" * member.size)


def test_a_broken_sample_is_named_or_left_out(copied: DataSettings) -> None:
    overwrite(copied.samples, "shard-000000.tar", "000000002.json")
    overwrite(copied.samples, "shard-000001.tar", "000000010.1.png")
    index, _ = build_index(copied, copied.samples.parent, show_progress=False)
    errors = {number: s.error for number, s in enumerate(index.samples) if s.error}
    assert set(errors) == {2, 10}
    assert errors[2] is not None and errors[10] is not None
    assert errors[2].startswith("shard-000000.tar: sample '000000002': 000000002.json: not JSON")
    assert "shard-000001.tar: sample 's10' (number 10)" in errors[10]
    assert "shard-000001.tar/000000010.1.png: does not decode" in errors[10]
    with pytest.raises(DataError, match=r"set: shard-000000\.tar: .* \(and 1 more bad samples\)"):
        VlmDataset(copied, index, num_samples=5, seed=7)
    dataset = VlmDataset(copied, index, num_samples=20, seed=7, skip_bad_samples=True)
    read = {number for i in range(20) for number in dataset.sample_numbers(i)}
    assert read == set(range(NUM_SAMPLES)) - {2, 10}


def test_a_shard_that_is_cut_short_or_missing_is_named_or_its_samples_left_out(
    copied: DataSettings,
) -> None:
    last = max(member.offset_data for member, _ in parts_of(copied.samples / "shard-000002.tar"))
    with (copied.samples / "shard-000002.tar").open("r+b") as file:
        file.truncate(last + 10)
    (copied.samples / "shard-000000.tar").unlink()
    index, _ = build_index(copied, copied.samples.parent, show_progress=False)
    bad = [number for number, record in enumerate(index.samples) if record.error]
    assert bad == [*range(7), 20]
    assert "shard-000000.tar: 000000000.json cannot be read" in str(index.samples[0].error)
    assert "shard-000002.tar is cut short: 000000020" in str(index.samples[20].error)
    with pytest.raises(DataError, match=r"shard-000000\.tar.*and 7 more bad samples"):
        usable_samples(index, skip_bad_samples=False)
    assert usable_samples(index, skip_bad_samples=True) == (*range(7, 20), *range(21, 24))


def test_a_shard_that_breaks_after_the_index_was_made_is_named(copied: DataSettings) -> None:
    dataset = data_set(copied)
    (copied.samples / "shard-000001.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"set: shard-000001\.tar: shard .* is cut short"):
        [dataset[i] for i in range(NUM_SEQUENCES)]


def test_a_folder_that_is_no_data_set_is_named(copied: DataSettings, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set of megatron-energon, \.nv-meta/\.info\.json"):
        open_source(replace(copied, samples=tmp_path))
    (copied.samples / ".nv-meta" / "index.sqlite").write_bytes(b"no data base")
    with pytest.raises(DataError, match=r"set: what \.nv-meta says cannot be used .*again"):
        open_source(copied)


def test_a_missing_package_is_named(shards: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.energon", None)
    with pytest.raises(DataError, match=r"not installed; pip install 'megatron-dip\[energon\]'"):
        open_source(shards)


def test_samples_that_cannot_be_written_are_named(llava: DataSettings, tmp_path: Path) -> None:
    assert llava.image_folder is not None
    with pytest.raises(DataError, match=r"sample 's1' \(number 1\): image .*1\.png: no such file"):
        write_energon(llava.samples, tmp_path, tmp_path / "set")
    with pytest.raises(DataError, match="1 of 1 shards for validation leave none to train on"):
        write_energon(llava.samples, llava.image_folder, tmp_path / "set", num_valid_shards=1)


def test_the_folder_of_images_belongs_to_one_format(tmp_path: Path) -> None:
    text = (REPOSITORY / "configs" / "vlm_tiny.yaml").read_text()
    folder = "  image_folder: ../runs/sample/images\n"
    path = tmp_path / "config.yaml"
    for given, expected in (
        (text.replace(folder, ""), "image_folder is missing"),
        (text.replace(folder, f"{folder}  format: energon\n"), "image_folder is given"),
    ):
        path.write_text(given)
        with pytest.raises(ConfigError, match=expected):
            load_config(path)
    path.write_text(text.replace(folder, "  format: energon\n"))
    assert load_config(path).data.format == "energon"
