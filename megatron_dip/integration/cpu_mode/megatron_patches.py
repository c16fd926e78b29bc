"""What Megatron itself needs to run without CUDA, Transformer Engine and Apex.

Everything here replaces an attribute of a Megatron module or class after its import.
"""

import copy
import functools
import importlib.util
from typing import Any

import torch

__all__ = ["import_and_patch_megatron"]


def import_and_patch_megatron() -> None:
    """Import Megatron with torch already redirected, and mend what does not run on the CPU."""
    _import_without_compiler()
    _let_norms_run_sequence_parallel()
    _give_every_parameter_its_step()
    _skip_building_helpers()
    _skip_kernel_warm_up()


def _import_without_compiler() -> None:
    """Megatron decorates its small functions at import: compiling each takes seconds on a CPU."""
    compile_ = torch.compile
    torch.compile = lambda model=None, **kwargs: model if model else (lambda function: function)
    try:
        # megatron.training imports most of megatron.core.
        from megatron.core import jit
        from megatron.training import training as _training  # noqa: F401
    finally:
        torch.compile = compile_
    # For the modules that are imported later.
    jit.disable_jit_fuser()


def _let_norms_run_sequence_parallel() -> None:
    """Torch's norms work on a slice of the sequence; their gradients need to be summed over TP.

    Megatron does that for parameters marked ``sequence_parallel``, as Apex's norms are.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    new = WrappedTorchNorm.__new__

    @functools.wraps(new)
    def new_marked(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return new(cls, config, *args, **kwargs)
        local_config = copy.copy(config)
        local_config.sequence_parallel = False
        norm = new(cls, local_config, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    WrappedTorchNorm.__new__ = new_marked


def _give_every_parameter_its_step() -> None:
    """Torch's Adam counts steps per parameter, in place.

    The distributed optimizer loads one ``step`` tensor for all parameters: each of them would add
    one to it, and the bias correction of a resumed run would be wrong.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load_state_dict = DistributedOptimizer.load_state_dict

    @functools.wraps(load_state_dict)
    def load_with_own_steps(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    DistributedOptimizer.load_state_dict = load_with_own_steps


def _skip_building_helpers() -> None:
    """The wheel holds the built helper of the data sets, but not the Makefile."""
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None


def _skip_kernel_warm_up() -> None:
    """There are no fused kernels to warm up, and doing it would draw random numbers.

    How many depends on the tensor-parallel size, so that layouts would differ from then on.
    """
    from megatron.training import initialize

    initialize._warmup_jit_function = lambda *args, **kwargs: None
