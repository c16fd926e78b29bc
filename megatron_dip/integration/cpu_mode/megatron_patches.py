"""What Megatron itself needs to run without CUDA, Transformer Engine and Apex.

Everything here replaces an attribute of a Megatron module or class after its import.
"""

import copy
import functools
import warnings
from typing import Any

import torch

from megatron_dip.integration.versions import needed

__all__ = ["import_and_patch_megatron"]


def import_and_patch_megatron() -> None:
    """Import Megatron with torch already redirected, and mend what does not run on the CPU."""
    _import_without_compiler()
    _let_norms_run_sequence_parallel()
    _give_every_parameter_its_step()
    _let_sgd_resume()
    _skip_kernel_warm_up()
    _give_numbers_of_tokens_as_such()


def _import_without_compiler() -> None:
    """Small functions are compiled when their modules are imported, by Megatron and by packages
    built on it: seconds for each on a CPU, and Dynamo's tables refuse functions of ours that stand
    under several names."""
    torch.compile = _leave_uncompiled
    with warnings.catch_warnings():
        # A dozen lines per rank about Transformer Engine and Apex, which no CPU has.
        warnings.simplefilter("ignore", UserWarning)
        # megatron.training imports most of megatron.core.
        from megatron.core import jit
        from megatron.training import training as _training  # noqa: F401
    # For the modules that are imported later.
    jit.disable_jit_fuser()


def _leave_uncompiled(model: Any = None, **kwargs: Any) -> Any:
    return (lambda function: function) if model is None else model


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
    """Torch's Adam counts steps per parameter, in place; the distributed optimizer knows one step.

    Its ``state_dict`` needs a step before there is any, when a run resumes.  ``load_state_dict``
    gives all parameters one tensor, to which each of them would add one, and overwrites it with
    what a shard held: the bias correction of a resumed run would be wrong.  Its fully reshardable
    form stores no step per parameter, but loading it asks for one.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict = needed(DistributedOptimizer, "state_dict")
    load_state_dict = needed(DistributedOptimizer, "load_state_dict")

    @functools.wraps(state_dict)
    def state_dict_with_steps(self: Any) -> Any:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                state.setdefault("step", torch.tensor(0.0))
                for key in self.optimizer_state_keys:
                    if state.get(key) is None:
                        state[key] = torch.zeros_like(parameter)
        return state_dict(self)

    @functools.wraps(load_state_dict)
    def load_with_own_steps(self: Any, loaded: Any) -> None:
        # With 32-bit parameters it copies into views of parameters that require gradients.
        with torch.no_grad():
            load_state_dict(self, loaded)
        step = float(loaded["optimizer"]["param_groups"][0]["step"])
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(step)

    set_states = needed(DistributedOptimizer, "_set_main_param_and_optimizer_states")

    @functools.wraps(set_states)
    def set_states_without_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # What is no tensor is left as it is.
        set_states(self, model_param, {"step": None} | tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_without_step
    DistributedOptimizer.state_dict = state_dict_with_steps
    DistributedOptimizer.load_state_dict = load_with_own_steps


def _let_sgd_resume() -> None:
    """Loading needs the state that will be filled; Megatron makes Adam's only.

    A momentum of zero has the same effect as none: torch's first step starts from the gradient.
    """
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    init = MegatronOptimizer.__init__

    def init_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group.get("momentum") else ():
                optimizer.state[parameter].setdefault(
                    "momentum_buffer", torch.zeros_like(parameter)
                )

    @functools.wraps(init)
    def init_with_momentum(
        self: Any, optimizer: Any, config: Any, init_state_fn: Any = None
    ) -> None:
        if init_state_fn is None and isinstance(optimizer, torch.optim.SGD):
            init_state_fn = init_momentum
        init(self, optimizer, config, init_state_fn)

    MegatronOptimizer.__init__ = init_with_momentum


def _skip_kernel_warm_up() -> None:
    """There are no fused kernels to warm up, and doing it would draw random numbers.

    How many depends on the tensor-parallel size, so that layouts would differ from then on.
    """
    from megatron.training import initialize

    needed(initialize, "_warmup_jit_function")
    initialize._warmup_jit_function = lambda *args, **kwargs: None


def _give_numbers_of_tokens_as_such() -> None:
    """Experts exchange as many tokens as counted: a tensor that is on the CPU stays a tensor in
    Megatron, and torch takes sequences of numbers only."""
    from megatron.core.transformer.moe import token_dispatcher

    move = needed(token_dispatcher, "maybe_move_tensor_to_cpu")

    @functools.wraps(move)
    def move_as_numbers(tensor: Any, as_numpy: bool = False, **kwargs: Any) -> Any:
        if as_numpy and isinstance(tensor, torch.Tensor):
            return tensor.cpu().numpy()
        return move(tensor, **kwargs)

    token_dispatcher.maybe_move_tensor_to_cpu = move_as_numbers
