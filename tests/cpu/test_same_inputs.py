"""Ranks that were given different inputs are told what differs, and nothing waits forever."""

import argparse
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from failing_runs import SCRIPT, error_of, run_vlm
from tiny_vlm import make_tiny_data, write_config
from torch.distributed import HashStore

from megatron_dip.errors import ChannelError, ConfigError
from megatron_dip.families.arguments import ModelArguments
from megatron_dip.integration.same_inputs import Input, collect, compare_inputs
from megatron_dip.integration.same_inputs.collect import (
    argument_inputs,
    code_inputs,
    environment_inputs,
    file_input,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def errors_of(ranks: list[dict[str, Any]], timeout_seconds: float = 20.0) -> list[str | None]:
    """What each rank is told, by threads that stand for the ranks."""
    store, told = HashStore(), [None] * len(ranks)

    def compare(rank: int) -> None:
        given = {name: Input(str(value), str(value)) for name, value in ranks[rank].items()}
        try:
            compare_inputs(
                store, given, rank=rank, num_ranks=len(ranks), timeout_seconds=timeout_seconds
            )
        except ConfigError as error:
            told[rank] = str(error)

    threads = [threading.Thread(target=compare, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_equal_inputs_are_accepted_on_all_ranks():
    assert errors_of([{"a": 1, "b": 2}] * 5) == [None] * 5


def test_all_ranks_are_told_what_differs_and_where():
    ranks = [{"same": 1, "heads": 4, "base": 1} for _ in range(6)]
    ranks[3] = {"same": 1, "heads": 8, "base": 1}
    ranks[5] = {"same": 1, "heads": 8, "base": 2, "more": 7}
    (told,) = set(errors_of(ranks))
    assert told is not None
    assert "heads is 4 on ranks 0, 1, 2, 4 and 8 on ranks 3, 5;" in told
    assert "base is 1 on ranks 0 to 4 and 2 on rank 5;" in told
    assert "more is absent on ranks 0 to 4 and 7 on rank 5 (give all ranks the same)" in told
    assert "same" not in told.replace("the same", "")


def test_many_differences_and_long_values_stay_one_short_line():
    many = {f"key{number}": "x" * 10_000 for number in range(500)}
    told = errors_of([many, dict.fromkeys(many, "y")])
    assert told[0] is not None and len(told[0]) < 2000 and "\n" not in told[0]
    assert "and 494 more" in told[0]


@pytest.mark.parametrize(("rank", "missing"), [(0, 1), (1, 0)])
def test_a_rank_that_never_comes_ends_the_wait(rank: int, missing: int):
    with pytest.raises(ChannelError, match=rf"rank {missing} has not reported .* 0\.2 seconds"):
        compare_inputs(HashStore(), {}, rank=rank, num_ranks=2, timeout_seconds=0.2)


def inputs_of(path: Path) -> dict[str, Input]:
    return dict(ModelArguments().inputs(str(path)))


def changed(one: dict[str, Input], other: dict[str, Input]) -> list[str]:
    return [
        name
        for name in {**one, **other}
        if name not in one or name not in other or one[name].value != other[name].value
    ]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run's files, as a node would have them."""
    return write_node(tmp_path / "node0")


def write_node(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "samples.json").write_text('["first", "second"]')
    (folder / "tokenizer.json").write_text("{}")
    data = yaml.safe_load((CONFIGS / "vlm_tiny.yaml").read_text())
    data["data"] |= {
        "path": "samples.json", "tokenizer": "tokenizer.json", "image_folder": "images",
        "cache_folder": "cache",
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(data))
    return folder / "config.yaml"


def test_a_copy_of_all_files_on_another_node_is_the_same(config: Path, tmp_path: Path):
    shutil.copytree(config.parent, tmp_path / "node1")
    assert changed(inputs_of(config), inputs_of(tmp_path / "node1" / "config.yaml")) == []


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("model", "language", "rotary_base"), 5000),
        (("model", "vision", "trainable"), False),
        (("model", "vision", "num_attention_heads"), 2),
        (("schedule", "evaluations"), 3),
        (("schedule", "costs", "feedback"), False),
        (("planning", "look_ahead"), 5),
        (("data", "separation"), 0.25),
        (("schedule", "modules", "vision", "sub_microbatch_tokens"), 512),
    ],
)
def test_another_value_on_a_rank_is_named_by_its_key(
    config: Path, tmp_path: Path, keys: tuple[str, ...], value: Any
):
    other = write_node(tmp_path / "node1")
    data = part = yaml.safe_load(other.read_text())
    for key in keys[:-1]:
        part = part.setdefault(key, {})
    part[keys[-1]] = value
    other.write_text(yaml.safe_dump(data))
    assert changed(inputs_of(config), inputs_of(other)) == [".".join(keys)]


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        ("samples.json", '["second", "first"]', "data.path"),
        ("tokenizer.json", '{"a": 1}', "data.tokenizer"),
    ],
)
def test_another_file_of_the_same_size_is_named(
    config: Path, tmp_path: Path, name: str, text: str, key: str
):
    other = write_node(tmp_path / "node1")
    (other.parent / name).write_text(text)
    one, two = inputs_of(config), inputs_of(other)
    assert changed(one, two) == [key]
    assert name in one[key].shown and "sha256" in one[key].shown
    (other.parent / name).unlink()
    assert "No such file" in inputs_of(other)[key].shown


def test_a_folder_of_shards_is_compared_by_sizes_and_by_small_files(tmp_path: Path):
    for node, text in (("a", "1"), ("b", "1"), ("c", "2"), ("d", "11")):
        (tmp_path / node / ".nv-meta").mkdir(parents=True)
        (tmp_path / node / ".nv-meta" / "split.yaml").write_text(text)
    values = [file_input(tmp_path / node).value for node in "abcd"]
    assert values[0] == values[1] and len(set(values)) == 3


def test_arguments_are_compared_but_not_what_belongs_to_a_rank(tmp_path: Path):
    adapters = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for path in adapters:
        path.write_text("same")
    one = argparse.Namespace(
        lr=1.0, local_rank=0, dip_trace_dir="a", load_adapters=str(adapters[0]), load=None,
        script=object(),
    )  # fmt: skip
    other = argparse.Namespace(**vars(one) | {"local_rank": 1, "dip_trace_dir": "b"})
    other.load_adapters, other.script = str(adapters[1]), object()
    names = list(vars(one))
    assert changed(dict(argument_inputs(one, names)), dict(argument_inputs(other, names))) == []
    other.lr = 2.0
    assert changed(dict(argument_inputs(one, names)), dict(argument_inputs(other, names))) == [
        "--lr"
    ]
    for folder, iteration in (("c", "10"), ("d", "20")):
        (tmp_path / folder / "iter").mkdir(parents=True)
        (tmp_path / folder / "latest_checkpointed_iteration.txt").write_text(iteration)
        (tmp_path / folder / "iter" / ".metadata").write_text("m")
    one.load, other.load, other.lr = str(tmp_path / "c"), str(tmp_path / "d"), 1.0
    first, second = dict(argument_inputs(one, names)), dict(argument_inputs(other, names))
    assert changed(first, second) == ["checkpoint of --load"]
    assert "(20)" in second["checkpoint of --load"].shown


def test_versions_sources_and_environment_are_compared(monkeypatch: pytest.MonkeyPatch):
    import megatron.core  # noqa: F401

    names = dict(code_inputs())
    assert {"version of torch", "version of megatron-core", "source of megatron_dip"} <= set(names)
    monkeypatch.setattr(collect, "_version", lambda package: "0")
    assert "version of torch" in changed(names, dict(code_inputs()))
    given = dict(os.environ) | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    other = given | {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "NVTE_FUSED_ATTN": "0", "HOSTNAME": "b"}
    differ = changed(dict(environment_inputs(given)), dict(environment_inputs(other)))
    assert differ == ["CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_FUSED_ATTN"]


ON_ONE_RANK = """
import os, runpy, sys
if os.environ["RANK"] == "1":
    for flag, value in {others!r}.items():
        sys.argv[sys.argv.index(flag) + 1] = value
sys.path.insert(0, {folder!r})
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize("schedule", [("--dip-schedule",), ()])
def test_a_run_whose_ranks_differ_ends_on_all_of_them_with_the_difference(
    tmp_path: Path, schedule: tuple[str, ...]
):
    """Also where the difference is one that groups of ranks are made by."""
    make_tiny_data(tmp_path / "data", num_samples=40)
    config = write_config(tmp_path / "one.yaml", tmp_path / "data", num_ranks=2)
    data = yaml.safe_load(config.read_text())
    data["model"]["language"]["rotary_base"] = 5000
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(data))
    others = {"--dip-config": str(tmp_path / "other.yaml")}
    if not schedule:
        others["--pipeline-model-parallel-size"] = "1"
    script = tmp_path / "script.py"
    script.write_text(
        ON_ONE_RANK.format(others=others, folder=str(SCRIPT.parent), script=str(SCRIPT))
    )
    flags = ("--pipeline-model-parallel-size", "2", "--dip-config", str(config), *schedule)
    ranks = run_vlm(tmp_path / "run", 2, *flags, script=script)
    (error,) = {error_of(rank) for rank in ranks}
    assert "model.language.rotary_base is 10000 on rank 0 and 5000 on rank 1" in error
    assert "--rotary-base" not in error
    assert schedule or "--pipeline-model-parallel-size is 2 on rank 0 and 1 on rank 1" in error
