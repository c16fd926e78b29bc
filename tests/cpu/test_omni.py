"""Models that see and hear: audio files, the encoder, fan-in, training under both schedules."""

import json
import shlex
import shutil
import wave
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from equality_runs import largest_difference
from failing_runs import error_of, run_vlm
from member_cases import check_members
from models_setup import base_config, layers_of, megatron_on_cpu, run_chain
from tiny_omni import MELS, RATE, make_tiny_sounds, write_omni_config
from training_runs import train

from megatron_dip.errors import DataError
from megatron_dip.families.data.images import ImageLimits
from megatron_dip.families.data.index import usable_samples
from megatron_dip.families.omni.audio import log_mel, num_audio_tokens
from megatron_dip.families.omni.batches import AudioBatch
from megatron_dip.families.omni.data import OmniDataset, OmniSettings, build_omni_index
from megatron_dip.families.omni.encoder import AudioStage
from megatron_dip.families.packed.configs import make_projection_config, make_vision_config
from megatron_dip.families.packed.initialization import (
    initialize_parameters,
    named_global_parameters,
)
from megatron_dip.families.sample_data.sounds import synthesise
from megatron_dip.plan import load_plan

LAYERS, NUM_ITERATIONS = 4, 10


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("omni") / "data"
    make_tiny_sounds(folder)
    return folder


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data"


def settings_of(data: Path) -> OmniSettings:
    return OmniSettings(
        samples=data / "samples.json",
        media_folder=data / "media",
        tokenizer=data / "tokenizer.json",
        seq_length=160,
        limits=ImageLimits(4, 2, 12),
        audio_rate=RATE,
        num_mels=MELS,
    )


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


# ---- audio files ----------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(200.0, 400.0), (1000.0, 2000.0)])
def test_a_higher_tone_is_loudest_in_a_higher_band(low: float, high: float):
    loudest = []
    for pitch in (low, high):
        samples = synthesise("a steady tone", pitch, 0.5, 16000, 0) / 2**15
        mels = log_mel(samples, 16000, 80)
        assert mels.shape == (2 * num_audio_tokens(len(samples), 16000), 80)
        loudest.append(int(mels[10:40].mean(axis=0).argmax()))
    centres = np.linspace(0, 15 + 27 * np.log(8) / np.log(6.4), 82)[1:-1]
    for band, pitch in zip(loudest, (low, high), strict=True):
        expected = pitch * 3 / 200 if pitch < 1000 else 15 + 27 * np.log(pitch / 1000) / np.log(6.4)
        assert abs(centres[band] - expected) < 0.6


def test_silence_at_the_end_fills_the_last_row():
    assert [num_audio_tokens(n, 8000) for n in (1, 640, 641)] == [4, 4, 8]


def test_an_index_names_bad_samples_and_loses_nothing_else(data: Path):
    samples = json.loads((data / "samples.json").read_text())
    heard = [n for n, sample in enumerate(samples) if "audio" in sample]
    write_wav(data / "media" / samples[heard[0]]["audio"], np.zeros(99, "<i2"), rate=11025)
    samples[heard[1]]["question"] = ""
    samples[heard[2]]["answer"] = "long " * 200
    (data / "samples.json").write_text(json.dumps(samples))
    index = build_omni_index(settings_of(data), data)[0]
    bad = set(heard[:3])
    assert {n for n, record in enumerate(index.samples) if record.error} == bad
    with pytest.raises(DataError, match=rf"'{heard[0]}' .*11025 samples per second, expected 8000"):
        usable_samples(index, skip_bad_samples=False)
    assert set(usable_samples(index, skip_bad_samples=True)) == set(range(60)) - bad


def test_a_file_of_another_rate_ends_a_run_with_its_name(data: Path, tmp_path: Path):
    name = next(s["audio"] for s in json.loads((data / "samples.json").read_text()) if "audio" in s)
    write_wav(data / "media" / name, np.zeros(999, "<i2"), rate=22050)
    config = write_omni_config(tmp_path / "config.yaml", data, num_ranks=1)
    (rank,) = run_vlm(tmp_path / "run", 1, "--dip-config", str(config), "--dip-schedule")
    error = error_of(rank)
    assert name in error and "22050" in error and "data.audio_rate" in error


# ---- the encoder ----------------------------------------------------------------------------


def audio_stages(cuts=()):
    base = base_config()
    config = make_vision_config(
        base, num_layers=LAYERS, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4
    )
    projection = make_projection_config(base, hidden_size=48, ffn_hidden_size=64)
    stages = []
    for layers in layers_of(cuts, LAYERS):
        stage = AudioStage(
            config,
            projection,
            num_mels=MELS,
            **layers,
        ).double()
        initialize_parameters(stage, 7)
        stages.append(stage)
    return stages


def audio_batch(lengths=(4, 12, 8)) -> AudioBatch:
    mels = torch.randn(2 * sum(lengths), MELS, generator=torch.Generator().manual_seed(1))
    return AudioBatch(mels=mels.double(), span_lengths=lengths, items=tuple(range(len(lengths))))


def features_and_gradients(cuts):
    stages = audio_stages(cuts)
    features = run_chain(stages, audio_batch())
    assert features.shape == (6, 1, 48)
    (features * torch.arange(1.0, 7.0)[:, None, None]).square().sum().backward()
    named = {name: p.grad for stage in stages for name, p in named_global_parameters(stage)}
    return features.detach(), named


def test_the_audio_encoder_gives_the_same_wherever_it_is_cut():
    with megatron_on_cpu():
        whole = features_and_gradients(())
        for cuts in ((1,), (0, 3), (4,)):
            ours = features_and_gradients(cuts)
            torch.testing.assert_close(ours[0], whole[0], rtol=1e-11, atol=1e-11)
            assert ours[1].keys() == whole[1].keys()
            for name, gradient in whole[1].items():
                assert gradient is not None and gradient.abs().max() > 0, name
                torch.testing.assert_close(ours[1][name], gradient, rtol=1e-9, atol=1e-10)


def test_a_clip_is_heard_alike_alone_and_among_others():
    with megatron_on_cpu():
        (stage,) = audio_stages()
        batch = audio_batch()
        joint = stage(None, batch)
        assert batch.mels is not None
        middle = AudioBatch(mels=batch.mels[8:32], span_lengths=(12,), items=(1,))
        torch.testing.assert_close(joint[1:4], stage(None, middle), rtol=0, atol=1e-12)


# ---- fan-in and training --------------------------------------------------------------------


def test_rows_of_sequences_are_filled_in_the_order_in_which_they_stand(made: Path):
    settings = settings_of(made)
    index = build_omni_index(settings, made)[0]
    dataset = OmniDataset(settings, index, num_samples=60, seed=1, subset=range(60))
    both = [i for i in range(60) if dataset[i].images and dataset[i].audios][:2]
    mute = next(i for i in range(60) if not dataset[i].images and not dataset[i].audios)
    batch = dataset.collate_fn([dataset[i] for i in (both[0], mute, both[1])])
    language = batch.sub_batch("language", (2, 0, 1))
    assert language.upstream_items == (("vision", 1), ("audio", 1), ("vision", 0), ("audio", 0))
    sizes = batch.item_sizes
    rows = [sizes[module][item].num_output_rows for module, item in language.upstream_items]
    assert sum(rows) == len(language.image_rows)
    needs = [dict(size.needs) for size in batch.metadata()["language"]]
    nothing = {"vision": (), "audio": ()}
    assert needs == [{"vision": (0,), "audio": (0,)}, nothing, {"vision": (1,), "audio": (1,)}]
    blind = OmniDataset(
        settings, index, num_samples=60, seed=1, subset=range(60), decode_media=False
    )
    other = blind.collate_fn([blind[i] for i in (both[0], mute, both[1])])
    assert other.metadata() == batch.metadata()
    check_members(blind, (both[0], mute, both[1]))
    assert other.sub_batch("audio", (0,)).mels is None


def test_plans_with_fan_in_train_as_the_stock_schedule_and_the_loss_falls(
    made: Path, tmp_path: Path
):
    def run(name: str, config: Path, schedule: str = ""):
        text = (
            f"--train-iters {NUM_ITERATIONS} --eval-iters 1 --micro-batch-size 3 "
            f"--global-batch-size 12 --pipeline-model-parallel-size 2 --dip-config {config} "
            f"--optimizer sgd --lr 0.1 --min-lr 0.1 {schedule}"
        )
        return train(tmp_path / name, 2, *shlex.split(text))

    whole = write_omni_config(tmp_path / "whole.yaml", made, num_ranks=2)
    split = write_omni_config(tmp_path / "split.yaml", made, num_ranks=2, num_segments=2)
    stock = run("stock", whole)
    ours = run("dip", split, f"--dip-schedule --dip-trace-dir {tmp_path / 'trace'}")
    loss = largest_difference(ours.losses, stock.losses)
    norm = largest_difference(ours.grad_norms, stock.grad_norms)
    print(f"omni: loss {loss:.1e}, norm {norm:.1e}")
    assert loss <= 1e-5 and norm <= 1e-4
    assert largest_difference(ours.validation_losses, stock.validation_losses) <= 1e-5
    assert mean(stock.losses[-3:]) < 0.95 * mean(stock.losses[:3])
    plans = [load_plan(path) for path in sorted((tmp_path / "trace").glob("plan-*.json"))]
    assert len(plans) == NUM_ITERATIONS
    subs = {(sub.module, sub.sub) for plan in plans for sub in plan.sub_microbatches}
    assert {("vision", 1), ("audio", 1), ("language", 1)} <= subs
    kinds = {tuple(sorted(items)) for plan in plans for items in plan.problem.microbatches}
    assert ("audio", "language", "vision") in kinds and len(kinds) >= 2


def test_an_encoder_without_work_takes_part_where_megatron_counts_on_it(made: Path, tmp_path: Path):
    """Of microbatches of one sequence, some have no sound, no image, or neither."""
    config = write_omni_config(tmp_path / "config.yaml", made, num_ranks=1)
    text = (
        f"--train-iters 4 --micro-batch-size 1 --global-batch-size 4 --dip-config {config} "
        f"--optimizer sgd --lr 0.1 --min-lr 0.1"
    )
    plain, overlapped = (
        train(tmp_path / name, 1, *shlex.split(f"{text} {more}"))
        for name, more in (("plain", ""), ("overlapped", "--overlap-grad-reduce"))
    )
    assert overlapped.losses == plain.losses and overlapped.gradients == plain.gradients
