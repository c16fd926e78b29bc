"""Random numbers of tensor-parallel ranks, and checkpoints of activations."""

from contextlib import contextmanager

import torch.utils.checkpoint

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast


class CudaRNGStatesTracker:
    """Named generators; here they draw from torch's own."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.states_, self.seeds_ = {}, set()

    def get_states(self):
        return dict(self.states_)

    def set_states(self, states):
        self.states_ = states

    def add(self, name, seed):
        self.seeds_.add(seed)
        self.states_[name] = seed

    @contextmanager
    def fork(self, name="model-parallel-rng"):
        yield


@contextmanager
def activation_recompute_forward(activation_recompute=False, recompute_phase=False):
    yield


def is_fp8_activation_recompute_enabled():
    return False


def checkpoint(
    function,
    *args,
    use_reentrant=True,
    distribute_saved_activations=False,
    get_rng_state_tracker=None,
    tp_group=None,
    **kwargs,
):
    """Keeps inputs alone, and repeats ``function`` under the recipe of its first run."""
    recipe, group = FP8GlobalStateManager.recipe, FP8GlobalStateManager.group

    def run(*given):
        with fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe, fp8_group=group):
            return function(*given, **kwargs)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=True)
