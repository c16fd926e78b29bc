"""A tiny model that sees and hears, and a tiny data set for it."""

from pathlib import Path

import yaml

from megatron_dip.families.sample_data.sounds import SampleSoundOptions, make_sample_sounds

__all__ = ["MELS", "RATE", "make_tiny_sounds", "write_omni_config"]

RATE, MELS = 8000, 16


def make_tiny_sounds(folder: Path) -> None:
    """60 samples, with image and audio or without."""
    options = SampleSoundOptions(
        num_samples=60, rate=RATE, lengths_s=(0.1, 0.25, 0.5), side=32, vocab_size=320
    )
    make_sample_sounds(folder, options)


def write_omni_config(path: Path, data: Path, *, num_ranks: int, num_segments: int = 1) -> Path:
    size = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}
    part = {"vision": 60, "audio": 30, "language": 120} if num_segments > 1 else {}
    modules = {
        name: {"num_segments": num_segments}
        | ({"sub_microbatch_tokens": part[name]} if part else {})
        for name in ("vision", "audio", "language")
    }
    config = {
        "family": "omni",
        "model": {
            "vision": size | {"patch_size": 4, "merge_size": 3, "positions": "rotary_2d"},
            "audio": size | {"num_mels": MELS},
            "language": size | {"num_query_groups": 2, "vocab_size": 384, "seq_length": 160},
        },
        "schedule": {"num_ranks": num_ranks, "modules": modules},
        "data": {
            "path": str(data / "samples.json"),
            "media_folder": str(data / "media"),
            "tokenizer": str(data / "tokenizer.json"),
            "min_image_tokens": 2,
            "max_image_tokens": 12,
            "audio_rate": RATE,
            "valid_share": 0.1,
        },
    }
    path.write_text(yaml.safe_dump(config))
    return path
