"""Video-text pairs: latents, sizes of clips, the index with its bad samples, and what is drawn."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from failing_runs import error_of, run_vlm
from launching import REPOSITORY
from member_cases import check_members
from tiny_t2v import make_tiny_clips, write_t2v_config

from megatron_dip.errors import DataError
from megatron_dip.families.data.image_files import decode_image
from megatron_dip.families.data.index import usable_samples
from megatron_dip.families.sample_data.photos import PHOTOS, photo_folder
from megatron_dip.families.t2v.clips import (
    ClipDataset,
    ClipIndex,
    ClipSettings,
    build_clip_index,
    draw_time_and_noise,
    load_clip_index,
)
from megatron_dip.families.t2v.latents import BlockTransform, frames_of, make_encoder, patches_of
from megatron_dip.families.t2v.videos import ClipLimits, read_clip

LIMITS = ClipLimits(max_frames=4, frame_stride=1, min_frame_tokens=4, max_frame_tokens=12)
PIXELS = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    make_tiny_clips(folder, num_clips=20)
    return folder


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data"


def settings_of(data: Path) -> ClipSettings:
    return ClipSettings(
        samples=data / "samples.json",
        video_folder=data / "videos",
        tokenizer=data / "tokenizer.json",
        max_text_tokens=96,
        latent_channels=16,
        vae=None,
        limits=LIMITS,
    )


def samples_of(data: Path) -> list[dict[str, str]]:
    samples: list[dict[str, str]] = json.loads((data / "samples.json").read_text())
    return samples


def video_of(data: Path, place: int = 0) -> Path:
    """The ``place``-th sample that is not a picture."""
    names = [sample["video"] for sample in samples_of(data) if sample["video"].endswith("mp4")]
    return data / "videos" / names[place]


def photograph(width: int = 64, height: int = 48) -> np.ndarray:
    image = decode_image(photo_folder() / PHOTOS[0].file).resize((width, height))
    return np.asarray(image)[None]


# ---- latents --------------------------------------------------------------------------------


def test_the_fixed_transform_with_all_channels_loses_nothing():
    frames = photograph()
    transform = BlockTransform(192)
    assert np.array_equal(transform.decode(transform.encode(frames)), frames)


def test_the_fixed_transform_keeps_what_a_photograph_looks_like():
    frames = photograph(256, 256)
    latents = BlockTransform().encode(frames)
    assert latents.shape == (1, 16, 32, 32)
    seen = BlockTransform().decode(latents).astype(float)
    error = np.square(seen - frames).mean()
    assert error < 0.05 * np.square(frames - frames.mean()).mean()


def test_a_plain_frame_has_means_alone():
    grey = np.full((1, 16, 16, 3), 255, dtype=np.uint8)
    latents = BlockTransform().encode(grey)
    assert latents[0, 0].flatten().tolist() == pytest.approx([2.0] * 4)
    assert latents[0, 1:].abs().max() < 1e-5


@pytest.mark.parametrize("num_channels", [0, 193])
def test_channels_that_the_transform_does_not_have_are_refused(num_channels):
    with pytest.raises(DataError, match="latent_channels is"):
        BlockTransform(num_channels)


def test_patches_are_those_of_their_place():
    latents = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches, grid = patches_of(latents)
    assert grid == (2, 2, 3)
    assert torch.equal(patches[1 * 6 + 1 * 3 + 2], latents[1, :, 2:4, 4:6].flatten())
    assert torch.equal(frames_of(patches, grid), latents)


def test_an_encoder_of_diffusers_is_used_where_one_is_given(tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=6,
        scaling_factor=0.5,
    ).eval()
    model.save_pretrained(tmp_path)
    encoder = make_encoder(6, tmp_path)
    frames = photograph()
    pixels = torch.from_numpy(frames.copy()).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = model.encode(pixels).latent_dist.mean * 0.5
    assert encoder.pixels_per_cell == 2
    torch.testing.assert_close(encoder.encode(frames), expected)
    with pytest.raises(DataError, match=r"has 6 latent channels but .*latent_channels is 16"):
        make_encoder(16, tmp_path)


def test_a_folder_without_an_encoder_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="not an AutoencoderKL"):
        make_encoder(16, tmp_path)


# ---- sizes ----------------------------------------------------------------------------------


def test_clips_keep_their_length_and_shape_within_the_limits(made: Path):
    index, _ = build_clip_index(settings_of(made), made, show_progress=False)
    grids = [record.grid for record in index.samples]
    assert {grid[0] for grid in grids} == {1, 2, 3, 4}
    assert all(4 <= rows * columns <= 12 for _, rows, columns in grids)
    assert len({grid[1:] for grid in grids}) >= 4
    for number, grid in enumerate(grids):
        assert index.latents(number).shape == (grid[0] * grid[1] * grid[2], 64)


def test_a_stride_leaves_frames_out(made: Path):
    path = video_of(made)
    every, _ = read_clip(path, replace(LIMITS, max_frames=6), PIXELS)
    second, _ = read_clip(path, replace(LIMITS, max_frames=6, frame_stride=2), PIXELS)
    assert np.array_equal(second, every[::2])


def test_a_bucket_is_chosen_by_length_then_by_shape():
    limits = replace(LIMITS, buckets=((2, 2, 4), (2, 4, 2), (1, 3, 3)))
    assert limits.choose(5, 200, 100, PIXELS) == (2, 2, 4)
    assert limits.choose(2, 100, 200, PIXELS) == (2, 4, 2)
    assert limits.choose(1, 100, 200, PIXELS) == (1, 3, 3)
    with pytest.raises(DataError, match="has 1 frames at stride 1, but the shortest bucket has 2"):
        replace(LIMITS, buckets=((2, 2, 2),)).choose(1, 9, 9, PIXELS)


# ---- bad samples ----------------------------------------------------------------------------


def test_bad_samples_are_named_and_nothing_else_is_lost(data: Path):
    whole, _ = build_clip_index(settings_of(data), data / "whole", show_progress=False)
    samples = samples_of(data)
    (data / "videos" / samples[1]["video"]).write_bytes(b"no video")
    cut = video_of(data, 4)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    number_of_cut = next(n for n, sample in enumerate(samples) if sample["video"] == cut.name)
    samples[2]["video"] = "missing.mp4"
    samples[3]["caption"] = "word " * 200
    del samples[4]["caption"]
    (data / "samples.json").write_text(json.dumps(samples))
    index, path = build_clip_index(settings_of(data), data / "broken", show_progress=False)
    errors = [record.error or "" for record in index.samples]
    for number, words in {
        1: ("does not decode", samples[1]["video"]),
        2: ("no such file", "missing.mp4"),
        3: ("caption has", "more than model.text.seq_length 96"),
        4: ("field 'caption' is missing",),
        number_of_cut: ("is cut short", cut.name),
    }.items():
        assert f"(number {number})" in errors[number]
        assert all(word in errors[number] for word in words), errors[number]
    bad = {1, 2, 3, 4, number_of_cut}
    with pytest.raises(DataError, match=r"and 4 more bad samples"):
        usable_samples(index, skip_bad_samples=False)
    good = usable_samples(index, skip_bad_samples=True)
    assert set(good) == set(range(20)) - bad
    for number in good:
        assert index.samples[number] == whole.samples[number]
        assert torch.equal(index.latents(number), whole.latents(number))
    assert load_clip_index(path) == index


def test_a_corrupt_video_ends_a_run_with_its_name_or_is_skipped_and_counted(
    data: Path, tmp_path: Path
):
    broken = video_of(data)
    broken.write_bytes(broken.read_bytes()[:300])
    config = write_t2v_config(tmp_path / "config.yaml", data, num_ranks=1)
    script = REPOSITORY / "examples" / "pretrain_t2v.py"
    flags = ("--dip-config", str(config), "--dip-schedule")
    (refused,) = run_vlm(tmp_path / "refused", 1, *flags, script=script)
    assert broken.name in error_of(refused)
    # A folder for records that is none: training goes on without them.
    more = ("--skip-bad-samples", "--dip-trace-dir", str(config))
    (skipped,) = run_vlm(tmp_path / "skipped", 1, *flags, *more, script=script)
    assert skipped.returncode == 0, skipped.output[-3000:]
    assert skipped.output.count("nothing can be recorded in") == 1
    assert "left out 1 bad of 20 samples" in skipped.output
    assert "iteration        2/" in skipped.output


def damage_latents(index: ClipIndex) -> None:
    """One file is gone, one is cut short, one has a byte flipped, one is a folder."""
    index.latents_path(3).unlink()
    cut, flipped, folder = (index.latents_path(number) for number in (4, 5, 6))
    cut.write_bytes(cut.read_bytes()[:-1])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    folder.unlink()
    folder.mkdir()


def test_damaged_latents_are_named_and_made_again(data: Path, caplog: pytest.LogCaptureFixture):
    settings = settings_of(data)
    index, _ = build_clip_index(settings, data, show_progress=False)
    whole = [index.latents(number) for number in range(3, 7)]
    damage_latents(index)
    reasons = ("No such file", "damaged", "damaged", "Is a directory")
    for number, reason in zip(range(3, 7), reasons, strict=True):
        told = rf"sample number {number}: .*{number}\.npy cannot be read \({reason}.*start again"
        with pytest.raises(DataError, match=told):
            index.latents(number)
    knowing = replace(index, settings=settings)
    for number, latents in zip(range(3, 7), whole, strict=True):
        assert torch.equal(knowing.latents(number), latents)
        assert f"{number}.npy cannot be read" in caplog.text
    assert "6.npy cannot be written (Is a directory)" in caplog.text
    for number, latents in zip(range(3, 6), whole, strict=False):
        assert torch.equal(index.latents(number), latents)
    video = settings.video_folder / json.loads(settings.samples.read_text())[3]["video"]
    other = settings.video_folder / json.loads(settings.samples.read_text())[4]["video"]
    video.write_bytes(other.read_bytes())
    index.latents_path(3).unlink()
    with pytest.raises(DataError, match="the video or its encoder is another one now"):
        knowing.latents(3)


def test_a_start_makes_lost_latents_again_and_no_others(
    data: Path, caplog: pytest.LogCaptureFixture
):
    index, _ = build_clip_index(settings_of(data), data, show_progress=False)
    kept = index.latents_path(2).stat().st_mtime_ns
    index.latents_path(3).unlink()
    index.latents_path(4).write_bytes(b"")
    again, _ = build_clip_index(settings_of(data), data, show_progress=False)
    assert again.samples == index.samples
    assert "latents of 2 clips are missing or cut short: made again" in caplog.text
    assert all(map(index.has_latents, range(len(index.samples))))
    assert index.latents_path(2).stat().st_mtime_ns == kept
    shutil.rmtree(index.folder)
    again, _ = build_clip_index(settings_of(data), data, show_progress=False)
    assert again.samples == index.samples
    assert all(map(index.has_latents, range(len(index.samples))))


def test_an_index_is_made_again_when_a_video_changes(data: Path):
    _, first = build_clip_index(settings_of(data), data, show_progress=False)
    assert build_clip_index(settings_of(data), data, show_progress=False)[1] == first
    video = video_of(data)
    video.write_bytes(video.read_bytes() + b" ")
    assert build_clip_index(settings_of(data), data, show_progress=False)[1] != first


# ---- what is drawn --------------------------------------------------------------------------


def test_time_and_noise_depend_on_their_key_alone():
    torch.manual_seed(1)
    time, noise = draw_time_and_noise("1:train:5:7", (40, 8))
    torch.manual_seed(2)
    again = draw_time_and_noise("1:train:5:7", (40, 8))
    assert time == again[0] and torch.equal(noise, again[1])
    other = draw_time_and_noise("1:train:5:8", (40, 8))
    assert time != other[0] and not torch.equal(noise, other[1])


def test_times_are_logit_normal():
    times = torch.tensor([draw_time_and_noise(f"{n}", (0, 0))[0] for n in range(4000)])
    logits = torch.logit(times)
    assert abs(float(logits.mean())) < 0.05 and abs(float(logits.std()) - 1) < 0.05


def test_ranks_without_latents_see_the_same_batch(made: Path):
    index, _ = build_clip_index(settings_of(made), made, show_progress=False)
    make = {"index": index, "num_samples": 50, "seed": 3, "subset": range(20)}
    whole, without = ClipDataset(**make), ClipDataset(**make, load_latents=False)
    ours, theirs = (
        dataset.collate_fn([dataset[i] for i in (3, 21, 44)]) for dataset in (whole, without)
    )
    assert ours.metadata() == theirs.metadata()
    batch = theirs.sub_batch("dit", (0, 2))
    assert batch.inputs is None and batch.targets is None
    check_members(whole, (3, 21, 44))
    mine = ours.sub_batch("dit", (0, 2))
    assert torch.equal(mine.times, batch.times) and mine.items == (0, 2)
    clip = ours.clips[2]
    assert clip.latents is not None and clip.noise is not None and mine.inputs is not None
    end = mine.inputs[-clip.num_patches :]
    torch.testing.assert_close(end, torch.lerp(clip.latents, clip.noise, clip.time))
    assert mine.targets is not None
    torch.testing.assert_close(end - clip.time * mine.targets[-clip.num_patches :], clip.latents)


def test_every_epoch_has_all_clips_in_an_order_of_its_own(made: Path):
    index, _ = build_clip_index(settings_of(made), made, show_progress=False)
    dataset = ClipDataset(index, num_samples=40, seed=3, subset=range(20))
    first, second = ([dataset.sample_number(i + start) for i in range(20)] for start in (0, 20))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
