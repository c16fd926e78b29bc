"""Probes of packages, each run as ``python -m megatron_dip.doctor.probes NAME``.

A probe prints one line of JSON.  It runs in a process of its own because importing may do anything:
hang in a driver, abort over a library of another version, take a minute from a cold file system.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dip.doctor.asking import MARK
from megatron_dip.errors import UnsupportedError, one_line

__all__ = ["PROBES", "main"]


def _torch() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "has_gloo": dist.is_available() and dist.is_gloo_available(),
        "has_nccl": dist.is_available() and dist.is_nccl_available(),
        "num_devices": torch.cuda.device_count(),
        "architectures": torch.cuda.get_arch_list(),
        "nccl": None,
        "device_error": None,
    }
    if found["has_nccl"] and torch.version.cuda:
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if found["num_devices"]:
        try:
            found["capability"] = torch.cuda.get_device_capability(0)
            torch.ones(1, device="cuda").item()
        except Exception as error:  # Whatever stops the first kernel stops a run.
            found["device_error"] = one_line(str(error), 300)
    return found


def _megatron() -> dict[str, Any]:
    from megatron_dip.integration import versions

    try:
        version = versions.check_megatron()
    except UnsupportedError as error:
        return {"refused": str(error)}
    spec = importlib.util.find_spec("megatron.core.datasets")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    built = importlib.util.find_spec("megatron.core.datasets.helpers_cpp")
    return {
        "version": version,
        "folder": str(folder.parent),
        "has_helpers": built is not None,
        "has_makefile": (folder / "Makefile").is_file(),
        "can_write": os.access(folder, os.W_OK),
    }


def _transformer_engine() -> dict[str, Any]:
    if importlib.util.find_spec("transformer_engine") is None:
        return {"is_installed": False}
    return {"is_installed": True, **_imported("transformer_engine.pytorch", "transformer-engine")}


def _apex() -> dict[str, Any]:
    fused = _imported("fused_weight_gradient_mlp_cuda", None)
    spec = importlib.util.find_spec("apex")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return {
        "is_installed": spec is not None,
        # The package of this name on PyPI is another program's.
        "is_vendors": any((Path(folder) / "normalization").is_dir() for folder in folders),
        "fused_error": fused["error"],
    }


def _code_cache() -> dict[str, Any]:
    from megatron_dip.code_cache import CodeCache
    from megatron_dip.simulator.kernels import new_run_state

    try:
        return {
            "folder": str(CodeCache(getattr(new_run_state, "py_func", new_run_state)).cache_path)
        }
    except RuntimeError as error:
        return {"folder": None, "reason": one_line(str(error), 300)}


def _imported(module: str, distribution: str | None) -> dict[str, Any]:
    """Why ``module`` cannot be imported, or the version of its ``distribution``."""
    try:
        importlib.import_module(module)
    except Exception as error:  # An import raises what it likes; the answer is that text.
        return {"version": None, "error": one_line(f"{type(error).__name__}: {error}", 300)}
    try:
        version = importlib.metadata.version(distribution) if distribution else None
    except importlib.metadata.PackageNotFoundError:
        version = None
    return {"version": version, "error": None}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": _torch,
    "megatron": _megatron,
    "transformer_engine": _transformer_engine,
    "apex": _apex,
    "code_cache": _code_cache,
}


def main(name: str) -> None:
    """Print what the probe ``name`` finds, or what it raised as the last line of standard error."""
    print(MARK + json.dumps(PROBES[name]()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
