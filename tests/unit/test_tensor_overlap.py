"""Where ``--tp-comm-overlap`` works: its buffers have one shape."""

import argparse
from pathlib import Path

import pytest

from megatron_dip.config import DipConfig, build_partition
from megatron_dip.costs import ModelShape
from megatron_dip.errors import UnsupportedError
from megatron_dip.families.configs import load_config
from megatron_dip.integration.tensor_overlap import check_tensor_overlap

CONFIG = Path(__file__).parents[2] / "configs" / "vlm_tiny.yaml"
ON = argparse.Namespace(tp_comm_overlap=True)


def test_overlap_inside_tensor_parallelism_needs_whole_microbatches_of_one_module() -> None:
    both = load_config(str(CONFIG)).model_shape()
    (language,) = [module for module in both.modules if module.name == "language"]
    one = ModelShape(name="one", modules=(language.model_copy(update={"upstream": ()}),))

    def check(model: ModelShape, tokens: int | None = None, varies: bool = False) -> None:
        modules = {"language": {"sub_microbatch_tokens": tokens}} if tokens else {}
        schedule = DipConfig.model_validate({"schedule": {"modules": modules}}).schedule
        layers = {module.name: module.num_layers for module in model.modules}
        partition = build_partition(schedule, layers, 2)
        check_tensor_overlap(ON, model, partition, varies_parts=varies)

    check(one)
    with pytest.raises(UnsupportedError, match=r"modules vision and language .*buffers are made"):
        check(both)
    with pytest.raises(UnsupportedError, match="sub_microbatch_tokens of module language"):
        check(one, tokens=16)
    with pytest.raises(UnsupportedError, match="--dip-vary-parts"):
        check(one, varies=True)
