"""The configurations of the five models: what is trained is what costs are counted for."""

import re

import pytest
from cost_cases import GPUS, MODELS, ROOT

from megatron_dip.costs import load_cluster, load_model
from megatron_dip.families.configs import load_config


@pytest.mark.parametrize("name", MODELS)
def test_a_run_trains_the_model_that_is_counted(name: str):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    model = load_model(ROOT / "configs" / "models" / f"{name}.yaml")
    assert config.model_shape().modules == model.modules


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gpu", ["h100", "h800"])
def test_a_run_has_as_many_ranks_as_the_cluster_that_it_is_for(name: str, gpu: str):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    cluster = load_cluster(ROOT / "configs" / "clusters" / f"{gpu}_{GPUS[name]}.yaml")
    assert cluster.num_gpus == GPUS[name]
    assert config.schedule.num_ranks == cluster.pipeline_parallel
    stated = (ROOT / "configs" / f"{name}.yaml").read_text()
    sizes = re.search(r"--tensor-model-parallel-size (\d+)", stated)
    assert sizes is not None and int(sizes[1]) == cluster.tensor_parallel


@pytest.mark.parametrize("name", [*MODELS, "vlm_xl", "t2v_xl"])
def test_the_file_of_a_model_states_its_exact_size(name: str):
    path = ROOT / "configs" / "models" / f"{name}.yaml"
    model = load_model(path)
    (line,) = re.findall(r"# Exactly: (.*)", path.read_text())
    numbers = [int(number.replace(",", "")) for number in re.findall(r"[\d,]{5,}", line)]
    sizes = [module.num_parameters() for module in model.modules]
    assert numbers == [*sizes, model.num_parameters()]
