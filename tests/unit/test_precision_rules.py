"""What a run on GPUs needs, and what its precision demands, before Megatron builds anything."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dip.costs import Boundary, ItemSize
from megatron_dip.errors import UnsupportedError
from megatron_dip.integration import gpu_requirements
from megatron_dip.integration.gpu_requirements import check_gpu_requirements
from megatron_dip.integration.precision_rules import check_scaling_of_replicas

STAND_IN = Path(__file__).parents[1] / "cpu" / "stand_in_te"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Puts modules of these names, made of nothing, where an import finds them."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def install(*names: str) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        sys.path_importer_cache.clear()

    return install


ENGINE = "transformer_engine/__init__.py"
COMPILED = "transformer_engine/wheel_lib/transformer_engine_torch.abi3.so"
APEX = "fused_weight_gradient_mlp_cuda.py"


def gpu_args(**values: Any) -> argparse.Namespace:
    defaults = {"transformer_impl": "transformer_engine", "gradient_accumulation_fusion": True}
    return argparse.Namespace(**defaults | values)


def test_a_run_without_transformer_engine_is_told_to_install_it_or_to_do_without() -> None:
    with pytest.raises(UnsupportedError, match="Transformer Engine: not installed") as refused:
        check_gpu_requirements(gpu_args())
    assert "pip install" in str(refused.value)
    assert "--transformer-impl local" in str(refused.value)
    check_gpu_requirements(gpu_args(transformer_impl="local", gradient_accumulation_fusion=False))


def test_transformer_engine_without_its_compiled_part_is_none(installed: Any) -> None:
    installed(ENGINE)
    with pytest.raises(UnsupportedError, match="without its part for PyTorch"):
        check_gpu_requirements(gpu_args(gradient_accumulation_fusion=False))
    installed(COMPILED)
    check_gpu_requirements(gpu_args(gradient_accumulation_fusion=False))


def test_fused_accumulation_without_apex_is_refused_with_the_flag_that_leaves_it_out(
    installed: Any,
) -> None:
    installed(ENGINE, COMPILED)
    with pytest.raises(UnsupportedError, match="--no-gradient-accumulation-fusion") as refused:
        check_gpu_requirements(gpu_args())
    assert "fused_weight_gradient_mlp_cuda" in str(refused.value)
    installed(APEX)
    check_gpu_requirements(gpu_args())


def test_every_requirement_has_a_name_and_a_remedy_where_it_is_missing() -> None:
    found = gpu_requirements.gpu_requirements()
    assert [one.name for one in found] == [
        "Transformer Engine",
        "Apex's kernel for weight gradients",
    ]
    assert all(one.is_present or one.remedy for one in found)


def fp8_args(**values: Any) -> argparse.Namespace:
    defaults = {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "context_parallel_size": 1,
        "world_size": 8,
    }
    return argparse.Namespace(**defaults | values)


def test_delayed_scales_of_two_replicas_are_refused_with_the_recipes_that_work() -> None:
    with pytest.raises(UnsupportedError, match="2 data-parallel replicas") as refused:
        check_scaling_of_replicas(fp8_args())
    assert "tensorwise, blockwise or mxfp8" in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        {"fp8": None},
        {"world_size": 4},
        {"context_parallel_size": 2},
        {"tp_only_amax_red": True},
        *({"fp8_recipe": recipe} for recipe in ("tensorwise", "blockwise", "mxfp8")),
    ],
    ids=str,
)
def test_other_scales_are_accepted(values: dict[str, Any]) -> None:
    check_scaling_of_replicas(fp8_args(**values))


@pytest.mark.parametrize(("num_shards", "rows"), [(1, 32), (2, 16), (4, 16)])
def test_rows_are_filled_up_for_every_rank(num_shards: int, rows: int) -> None:
    """17 rows of tokens, and one that is whole on every rank."""
    sizes = [ItemSize(tokens=8, spans=(8,)), ItemSize(tokens=9, spans=(9,))]
    boundary = Boundary("packed", 4, num_shards=num_shards, row_multiple=16)
    assert boundary.shape(sizes, outer=False) == (rows, 1, 4)
    extra = boundary._replace(extra_rows=1)
    assert extra.shape(sizes, outer=False) == (rows + 2, 1, 4)
