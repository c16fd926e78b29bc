"""A configuration that names a partition file instead of stating the cut."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dip.config import ScheduleConfig, build_partition
from megatron_dip.errors import ConfigError, PartitionError
from megatron_dip.families.configs import load_config
from megatron_dip.partition import Partition, partition_from_layers

EXAMPLE = Path(__file__).parents[2] / "configs" / "vlm_tiny.yaml"


def write_config(folder: Path, partition: Partition, **modules: dict[str, Any]) -> Path:
    """The tiny model with its cut in a file beside the configuration."""
    data = yaml.safe_load(EXAMPLE.read_text())
    data["schedule"]["modules"] = modules
    data["schedule"]["partition"] = "cut.json"
    (folder / "cut.json").write_text(partition.model_dump_json())
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def tiny_cut(num_vision_layers: int = 18) -> Partition:
    cut = partition_from_layers({"vision": [[9, num_vision_layers - 9]], "language": [[4, 4]]}, 2)
    return cut.model_copy(update={"sub_microbatch_tokens": {"vision": 512}})


def test_a_named_partition_is_used_with_its_sizes(tmp_path):
    config = load_config(write_config(tmp_path, tiny_cut()))
    assert config.partition(2) == tiny_cut()


def test_a_stated_cut_carries_its_sizes_too():
    assert load_config(EXAMPLE).partition(2).sub_microbatch_tokens == {"vision": 1024}


def test_speeds_of_modules_may_stand_beside_a_named_partition(tmp_path):
    config = load_config(write_config(tmp_path, tiny_cut(), vision={"flops_per_us": 1e5}))
    assert config.schedule.modules["vision"].flops_per_us == 1e5


def test_two_cuts_are_refused(tmp_path):
    path = write_config(tmp_path, tiny_cut(), vision={"num_segments": 2})
    with pytest.raises(ConfigError, match=r"schedule\.modules\.vision states \['num_segments'\]"):
        load_config(path)


def test_a_partition_of_another_model_is_refused(tmp_path):
    path = write_config(tmp_path, tiny_cut(num_vision_layers=12))
    with pytest.raises(PartitionError, match="module vision: stages hold 12 layers"):
        load_config(path)


def test_a_tower_with_fewer_layers_than_ranks_of_which_nothing_is_said_starts_at_the_first():
    cut = build_partition(ScheduleConfig(), {"vision": 2, "language": 4}, 4)
    expected = {"vision": [[1, 1, 0, 0]], "language": [[1, 1, 1, 1]]}
    assert cut == partition_from_layers(expected, 4)


IDLE_RANK = {"vision": [[9, 0, 9]], "language": [[4, 0, 4]]}


def test_a_rank_without_a_stage_is_refused_in_a_file_and_where_layers_are_stated(tmp_path):
    cut = partition_from_layers(IDLE_RANK, 3)
    path = write_config(tmp_path, cut)
    data = yaml.safe_load(path.read_text())
    data["schedule"]["num_ranks"] = 3
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(PartitionError, match=r"ranks \[1\] have no stage .* 3 pipeline ranks"):
        load_config(path)
    del data["schedule"]["partition"]
    data["schedule"]["modules"] = {name: {"layers": rows} for name, rows in IDLE_RANK.items()}
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=r"ranks \[1\] have no stage .* some of the 26 layers"):
        load_config(path)
    data["schedule"]["modules"]["vision"]["layers"] = [[8, 2, 8]]
    path.write_text(yaml.safe_dump(data))
    assert len(load_config(path).partition(3).stages_on(1)) == 1
