"""Rows about Python and packages."""

import re

from megatron_dip.doctor.facts import Answer, Facts
from megatron_dip.doctor.rows import Row, ok, problem, warning

__all__ = ["software_rows"]

_FIRST_PYTHON = (3, 12)
_FIRST_TORCH = (2, 6)
_NO_FUSION = "give --no-gradient-accumulation-fusion"
_APEX = (
    "build it from https://github.com/NVIDIA/apex with its C++ and CUDA extensions (pip's apex is "
    "another program)"
)


def software_rows(facts: Facts) -> list[Row]:
    """In the order in which a run needs them."""
    return [
        _python(facts),
        _torch(facts),
        _backends(facts),
        _megatron(facts),
        _helpers(facts),
        _transformer_engine(facts),
        _apex(facts),
        _fusion(facts),
        _compiler(facts),
        _code_cache(facts),
    ]


def _failed(name: str, answer: Answer, remedy: str) -> Row | None:
    """The row where a probe brought nothing."""
    if answer.failure is None:
        return None
    return problem(name, f"importing it failed: {answer.failure}", remedy)


def _python(facts: Facts) -> Row:
    version = ".".join(map(str, facts.machine.python))
    found = f"{version}, {facts.machine.executable}"
    if facts.machine.python[:2] < _FIRST_PYTHON:
        return problem("Python", found, "take Python 3.12 or later")
    return ok("Python", found)


def _torch(facts: Facts) -> Row:
    remedy = "install it: pip install 'torch>=2.6', a build for the CUDA of your driver"
    failed = _failed("torch", facts.torch, remedy)
    if failed is not None:
        return failed
    version, cuda = facts.torch.found["version"], facts.torch.found["cuda"]
    found = f"{version}, " + (f"built for CUDA {cuda}" if cuda else "built without CUDA")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < _FIRST_TORCH:
        return problem("torch", found, remedy)
    if not cuda and not facts.run.on_cpu:
        return problem("torch", found, "install a build for the CUDA of your driver")
    return ok("torch", found)


def _backends(facts: Facts) -> Row:
    """NCCL carries messages between GPUs, gloo plans and everything on CPUs."""
    name, answer = "NCCL and gloo", facts.torch.found
    if not answer:
        return warning(name, "unknown: torch cannot be imported", "mend torch first")
    if not answer["has_gloo"]:
        return problem(
            name, "torch has no gloo", "install a build of torch with gloo: plans use it"
        )
    if facts.run.on_cpu:
        return ok(name, "gloo")
    if not answer["has_nccl"] or answer["nccl"] is None:
        return problem(name, "torch has no NCCL", "install a build of torch for CUDA on Linux")
    return ok(name, f"NCCL {answer['nccl']}, gloo")


def _megatron(facts: Facts) -> Row:
    failed = _failed("Megatron", facts.megatron, "reinstall megatron-core, or mend torch first")
    if failed is not None:
        return failed
    if "refused" in facts.megatron.found:
        reason, _, remedy = str(facts.megatron.found["refused"]).rpartition(": ")
        return problem("Megatron", reason, remedy)
    return ok("Megatron", f"{facts.megatron.found['version']}, {facts.megatron.found['folder']}")


def _helpers(facts: Facts) -> Row:
    """Megatron builds it at every start, on the first rank of a run."""
    name, answer = "helper of Megatron's data sets", facts.megatron.found
    if "has_helpers" not in answer:
        return warning(name, "unknown: Megatron cannot be used", "mend Megatron first")
    missing = [one for one in ("make", "g++") if facts.machine.programs.get(one) is None]
    if not answer["has_makefile"]:
        if answer["has_helpers"]:
            return ok(name, "built; a release, which has nothing to build it from")
        remedy = "reinstall megatron-core from a wheel for this Python"
        return problem(name, "not built, and there is nothing to build it from", remedy)
    if missing:
        remedy = f"install {' and '.join(missing)}: Megatron ends the first rank where make fails"
        return problem(name, f"a checkout; {' and '.join(missing)} not on PATH", remedy)
    if not answer["has_helpers"] and not answer["can_write"]:
        remedy = "run make -C megatron/core/datasets there once, as the owner of the checkout"
        return problem(name, "not built, and the folder cannot be written to", remedy)
    return ok(name, "built" if answer["has_helpers"] else "built at the first start, by make")


def _transformer_engine(facts: Facts) -> Row:
    name = "Transformer Engine"
    if facts.run.on_cpu:
        return ok(name, "not used on CPUs")
    remedy = "install one built for this torch and CUDA, or uninstall it"
    failed = _failed(
        name, facts.transformer_engine, f"{remedy}: Megatron imports it wherever it is"
    )
    if failed is not None:
        return failed
    answer = facts.transformer_engine.found
    if not answer["is_installed"]:
        return warning(
            name,
            "not installed, and Megatron's default --transformer-impl is transformer_engine",
            "pip install --no-build-isolation 'megatron-dip[gpu]', or give "
            "--transformer-impl local",
        )
    if answer["error"]:
        return problem(name, f"installed, but: {answer['error']}", remedy)
    return ok(name, str(answer["version"] or "version unknown"))


def _apex(facts: Facts) -> Row:
    if facts.run.on_cpu:
        return ok("apex", "not used on CPUs")
    failed = _failed("apex", facts.apex, f"uninstall it, or {_APEX}")
    if failed is not None:
        return failed
    answer = facts.apex.found
    if not answer["is_installed"]:
        return ok("apex", "not installed; only gradient accumulation fusion needs it")
    if not answer["is_vendors"]:
        found = "a package of this name that is not NVIDIA's"
        return warning("apex", found, f"pip uninstall apex; {_APEX}")
    return ok("apex", "NVIDIA's")


def _fusion(facts: Facts) -> Row:
    """On by default; Megatron's own layers, and so every head, then ask for apex's extension."""
    name = "gradient accumulation fusion"
    if facts.run.on_cpu:
        return ok(name, "switched off on CPUs")
    if facts.apex.failure is not None:
        return warning(name, "unknown: its probe failed", f"{_NO_FUSION}, or mend apex")
    error = facts.apex.found["fused_error"]
    if error:
        found = f"Megatron's default, but its extension of apex is missing ({error})"
        return warning(name, found, f"{_NO_FUSION} in every command, or {_APEX}")
    return ok(name, "its extension can be imported")


def _compiler(facts: Facts) -> Row:
    name = "C compiler"
    path = facts.machine.programs.get("cc") or facts.machine.programs.get("gcc")
    if path is not None:
        return ok(name, path)
    if facts.run.on_cpu:
        return ok(name, "none; not needed on CPUs")
    found = "none on PATH; torch.compile, which Megatron fuses operations with, calls one"
    return warning(name, found, "install gcc, or give --disable-jit-fuser")


def _code_cache(facts: Facts) -> Row:
    name = "folder for compiled planners"
    failed = _failed(name, facts.code_cache, "reinstall numba: planners are compiled with it")
    if failed is not None:
        return failed
    folder = facts.code_cache.found["folder"]
    if folder is None:
        return warning(
            name,
            f"none can be written to ({facts.code_cache.found['reason']}): every process compiles "
            f"for itself at every start",
            "set NUMBA_CACHE_DIR to a folder that can be written to",
        )
    return ok(name, str(folder))
