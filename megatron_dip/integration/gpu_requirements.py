"""What Megatron's GPU path needs beside PyTorch, whether it is there, and what to do where not.

Megatron builds layers of Transformer Engine unless told otherwise, and adds weight gradients into
their buffers with a kernel of Apex unless told otherwise; where one is missing it fails in the
middle of building the model.  Nothing is imported here: compiled packages may need a GPU for that.
"""

import argparse
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from megatron_dip.errors import UnsupportedError

__all__ = ["GpuRequirement", "check_gpu_requirements", "gpu_requirements"]

_INSTALL_ENGINE = (
    "pip install --no-build-isolation 'megatron-dip[gpu]', or state --transformer-impl local"
)
_INSTALL_APEX = (
    "state --no-gradient-accumulation-fusion, or build NVIDIA's Apex from its sources with "
    "--cpp_ext and --cuda_ext (the package apex of PyPI is another one)"
)
# Of Apex, the one that linear layers and heads use.
_APEX_KERNEL = "fused_weight_gradient_mlp_cuda"


class GpuRequirement(NamedTuple):
    """Something that a run on GPUs needs unless its flags say otherwise."""

    name: str
    is_present: bool
    found: str
    """Its version, or what is missing."""
    remedy: str
    """What to install or to state where it is missing."""


def gpu_requirements() -> tuple[GpuRequirement, ...]:
    """Transformer Engine and the kernel of Apex, as an import would find them."""
    return (_transformer_engine(), _apex_kernel())


def check_gpu_requirements(args: argparse.Namespace) -> None:
    """Refuse a run on GPUs that would fail while Megatron builds its model.

    Args:
        args: Megatron's, as parsed.

    Raises:
        UnsupportedError: Names what is missing, and the remedy.
    """
    engine, apex = _transformer_engine(), _apex_kernel()
    if getattr(args, "transformer_impl", None) == "transformer_engine" and not engine.is_present:
        raise UnsupportedError(
            f"--transformer-impl transformer_engine, the default, needs {engine.name}: "
            f"{engine.found} ({engine.remedy})"
        )
    if getattr(args, "gradient_accumulation_fusion", False) and not apex.is_present:
        raise UnsupportedError(
            f"gradient accumulation fusion, on by default, needs {apex.name}: {apex.found} "
            f"({apex.remedy})"
        )


def _transformer_engine() -> GpuRequirement:
    name = "Transformer Engine"
    spec = find_spec("transformer_engine")
    if spec is None or not spec.submodule_search_locations:
        return GpuRequirement(name, False, "not installed", _INSTALL_ENGINE)
    installed = _version_of("transformer-engine")
    # Its Python files come in a package of their own; the compiled part is where it looks itself.
    package = Path(next(iter(spec.submodule_search_locations)))
    folders = (package.parent, package, package / "wheel_lib")
    if not any(any(folder.glob("transformer_engine_torch*.so")) for folder in folders):
        missing = f"{installed} is there without its part for PyTorch (transformer-engine-torch)"
        return GpuRequirement(name, False, missing, _INSTALL_ENGINE)
    return GpuRequirement(name, True, installed, "")


def _version_of(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "a version without a name"


def _apex_kernel() -> GpuRequirement:
    name = "Apex's kernel for weight gradients"
    if find_spec(_APEX_KERNEL) is None:
        return GpuRequirement(name, False, f"no module {_APEX_KERNEL}", _INSTALL_APEX)
    return GpuRequirement(name, True, "installed", "")
