"""A tiny text-to-video model, and clips of real photographs for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_dip.families.sample_data.clips import SampleClipOptions, make_sample_clips

__all__ = ["make_tiny_clips", "write_t2v_config"]


def make_tiny_clips(folder: Path, *, num_clips: int = 40) -> None:
    """Write ``samples.json``, ``tokenizer.json`` and ``videos/``; the same files every time."""
    options = SampleClipOptions(
        num_clips=num_clips, frame_counts=(2, 3, 6), sides=(32, 48, 64), vocab_size=300, seed=5
    )
    make_sample_clips(folder, options)


def write_t2v_config(
    path: Path,
    data: Path,
    *,
    num_ranks: int,
    num_segments: int = 1,
    sub_microbatch_tokens: int | None = None,
    train_text: bool = False,
    planner: str = "dual_queue",
    layers: dict[str, Sequence[Sequence[int]]] | None = None,
    **data_fields: Any,
) -> Path:
    """A configuration file; ``data`` is what :func:`make_tiny_clips` has filled."""
    split = {"sub_microbatch_tokens": sub_microbatch_tokens} if sub_microbatch_tokens else {}
    modules = {
        name: {"num_segments": num_segments}
        | split
        | ({"layers": [list(segment) for segment in layers[name]]} if layers else {})
        for name in ("text", "dit")
    }
    config = {
        "family": "t2v",
        "model": {
            "text": {
                "num_layers": 4,
                "hidden_size": 32,
                "ffn_hidden_size": 64,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "vocab_size": 384,
                "seq_length": 96,
                "trainable": train_text,
            },
            "dit": {
                "num_layers": 8,
                "hidden_size": 48,
                "ffn_hidden_size": 96,
                "num_attention_heads": 4,
            },
        },
        "schedule": {"num_ranks": num_ranks, "planner": planner, "modules": modules},
        "data": {
            "path": str(data / "samples.json"),
            "video_folder": str(data / "videos"),
            "tokenizer": str(data / "tokenizer.json"),
            "max_frames": 6,
            "max_frame_tokens": 12,
            "valid_share": 0.1,
        }
        | data_fields,
    }
    path.write_text(yaml.safe_dump(config))
    return path
