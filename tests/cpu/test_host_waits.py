"""No step makes the host wait for the device: training scripts on a device that is watched.

Every stage is on one rank or two, cut so that each module has a first stage, one in the middle
where it has the layers, and a last one.
"""

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from forked_ranks import fork_ranks
from launching import REPOSITORY
from tiny_lavin import make_tiny_scienceqa, write_lavin_config
from tiny_t2v import make_tiny_clips, write_t2v_config
from tiny_vlm import make_tiny_data, write_config

from megatron_dip.families.sample_data.sounds import SampleSoundOptions, make_sample_sounds

HERE = Path(__file__).parent
RUN = """
    --lr 0.001 --min-lr 0.001 --lr-decay-style constant --hidden-dropout 0 --attention-dropout 0
    --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --num-workers 0 --log-interval 1
    --eval-iters 0 --eval-interval 1000 --ckpt-format torch_dist --make-vocab-size-divisible-by 1
    --dip-schedule --dip-timeout-seconds 200 --distributed-timeout-minutes 4
"""
HARMLESS = (
    # Events of the step before, which has ended when the host has read its gradient norm.
    "megatron_dip/runtime/timeline.py finish",
    # When all of the step is queued.
    "megatron_dip/integration/late_checks.py checked_at_the_end",
)


def waits_of(
    folder: Path, script: Path, arguments: str, known: Sequence[str] = (), num_ranks: int = 1
) -> list[str]:
    """What the steps of a run make the host wait for, without the places ``known``."""
    watched = HERE / "watched_script.py"
    command = [str(watched), str(folder), str(script), *shlex.split(RUN), *shlex.split(arguments)]
    for rank in fork_ranks(folder / "run", num_ranks, command, timeout_seconds=250):
        assert rank.returncode == 0, rank.output[-4000:]
    found = []
    for rank in range(num_ranks):
        for what, place, caller, times in json.loads((folder / f"waits{rank}.json").read_text()):
            shown = f"{what} at {place} (from {caller})"
            if not any(name in shown for name in (*HARMLESS, *known)):
                found.append(f"{shown}, {times} times")
    if found:
        print("\n".join(found))
    return sorted(set(found))


# ---- the models of examples/ ----------------------------------------------------------------


def vlm(folder: Path) -> Path:
    make_tiny_data(folder / "data", num_samples=60)
    parts = {"num_segments": 3, "sub_microbatch_tokens": (64, 96)}
    return write_config(folder / "dip.yaml", folder / "data", num_ranks=1, **parts)


def t2v(folder: Path) -> Path:
    make_tiny_clips(folder / "data", num_clips=16)
    parts = {"num_segments": 3, "sub_microbatch_tokens": 40, "train_text": True}
    return write_t2v_config(folder / "dip.yaml", folder / "data", num_ranks=1, **parts)


def lavin(folder: Path) -> Path:
    make_tiny_scienceqa(folder / "data", num_problems=40)
    parts = {"num_segments": 3, "adapter": {"gates": "public_code"}}
    return write_lavin_config(folder / "dip.yaml", folder / "data", num_ranks=1, **parts)


def omni(folder: Path) -> Path:
    options = SampleSoundOptions(
        num_samples=40, rate=8000, lengths_s=(0.1, 0.25, 0.5), side=32, vocab_size=320
    )
    data = folder / "data"
    make_sample_sounds(data, options)
    size = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}
    parts = {"vision": 60, "audio": 30, "language": 160}
    config = {
        "family": "omni",
        "model": {
            "vision": size | {"patch_size": 4, "position_grid": 8},
            "audio": size | {"num_mels": 16},
            "language": size | {"num_query_groups": 2, "vocab_size": 384, "seq_length": 160},
        },
        "schedule": {
            "num_ranks": 1,
            "modules": {
                name: {"num_segments": 3, "sub_microbatch_tokens": tokens}
                for name, tokens in parts.items()
            },
        },
        "data": {
            "path": str(data / "samples.json"),
            "media_folder": str(data / "media"),
            "tokenizer": str(data / "tokenizer.json"),
            "min_image_tokens": 2,
            "max_image_tokens": 12,
            "audio_rate": 8000,
        },
    }
    (folder / "dip.yaml").write_text(yaml.safe_dump(config))
    return folder / "dip.yaml"


@pytest.mark.parametrize(
    ("configure", "script", "flags"),
    [
        (vlm, "pretrain_vlm.py", "--bf16"),
        (t2v, "pretrain_t2v.py", "--bf16"),
        (omni, "pretrain_vlm.py", ""),
        (lavin, "finetune_lavin.py", ""),
    ],
    ids=["vlm", "t2v", "omni", "lavin"],
)
def test_stages_of_the_examples_let_the_host_run_ahead(
    configure: Callable[[Path], Path], script: str, flags: str, tmp_path: Path
) -> None:
    arguments = f"--dip-config {configure(tmp_path)} {flags}"
    assert waits_of(tmp_path, REPOSITORY / "examples" / script, arguments) == []


def test_shards_of_tensor_parallel_ranks_let_the_host_run_ahead(tmp_path: Path) -> None:
    arguments = f"--dip-config {vlm(tmp_path)} --tensor-model-parallel-size 2 --sequence-parallel"
    script = REPOSITORY / "examples" / "pretrain_vlm.py"
    # Gloo copies what it has reduced when it is waited for; NCCL lets the stream wait.
    known = ("megatron/core/tensor_parallel/layers.py backward ",)
    assert waits_of(tmp_path, script, arguments, known, num_ranks=2) == []


# ---- other classes --------------------------------------------------------------------------


def modules_file(folder: Path, **modules: object) -> Path:
    (folder / "dip.yaml").write_text(yaml.safe_dump({"schedule": {"modules": modules}}))
    return folder / "dip.yaml"


LANGUAGE = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64
    --max-position-embeddings 16 --position-embedding-type rope --mock-data
    --tokenizer-type NullTokenizer --vocab-size 64 --untie-embeddings-and-output-weights
"""


def test_stages_of_a_gpt_model_let_the_host_run_ahead(tmp_path: Path) -> None:
    config = modules_file(tmp_path, language={"num_segments": 3, "sub_microbatch_tokens": 16})
    arguments = f"{LANGUAGE} --seq-length 16 --dip-config {config}"
    # What Megatron has scripts share data among tensor-parallel ranks with.
    known = (
        "megatron/core/tensor_parallel/data.py broadcast_data ",
        "megatron/core/tensor_parallel/data.py _build_key_size_numel_dictionaries ",
    )
    assert waits_of(tmp_path, HERE / "gpt_builder_script.py", arguments, known) == []


def test_stages_of_a_llava_model_let_the_host_run_ahead(tmp_path: Path) -> None:
    parts = {"num_segments": 3, "sub_microbatch_tokens": 5}
    config = modules_file(tmp_path, vision=parts, language={"num_segments": 3})
    arguments = f"{LANGUAGE} --seq-length 12 --dip-config {config}"
    known = (
        # It moves a batch as scripts do that wait.
        "tests/cpu/llava_script.py run_forward_step ",
        # The class puts rows of images between words by masks.
        "megatron/core/models/multimodal/llava_model.py forward ",
        "megatron/core/models/multimodal/llava_model.py _preprocess_data ",
        "backward of IndexPutBackward0",
    )
    assert waits_of(tmp_path, HERE / "llava_script.py", arguments, known) == []


def test_stages_of_a_mimo_model_let_the_host_run_ahead(tmp_path: Path) -> None:
    modules = {
        "images": {"layers": [[1], [1], [1]], "sub_microbatch_tokens": 5},
        "sounds": {"layers": [[1]]},
        "language": {"layers": [[1], [1], [1]]},
    }
    config = modules_file(tmp_path, **modules)
    arguments = f"""
        --num-layers 3 --hidden-size 16 --num-attention-heads 2 --seq-length 16
        --max-position-embeddings 16 --tokenizer-type NullTokenizer --vocab-size 63
        --eval-iters 1 --dip-config {config}
    """
    # The class counts and picks the places of embeddings.
    known = (
        "megatron/core/models/mimo/model/base.py align_embeddings_by_token_positions ",
        "megatron/core/models/mimo/model/base.py get_text_embeddings ",
    )
    assert waits_of(tmp_path, HERE / "mimo_script.py", arguments, known) == []
