"""Two random generators where the CPU has one.

On a GPU, dropout and weight initialisation draw from the device's generator and the data loader
from the host's.  Here the operations can only draw from torch's default generator, which therefore
plays the device's part; loading data gets a state of its own.  Without the split, the number of
draws of the loader would decide the dropout masks: a resumed run, or two tensor-parallel ranks of
which only one loads data, would silently differ.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import dataloader

__all__ = ["HostGenerator", "is_about_something_else", "split_generators"]

# Host and device start from different streams, as they do where they are different generators.
_HOST_SEED_OFFSET = 0x5EED


class HostGenerator:
    """The state of the generator from which data loading draws."""

    def __init__(self) -> None:
        self._state = torch.Generator().manual_seed(_HOST_SEED_OFFSET).get_state()
        self._active = False

    def manual_seed(self, seed: int) -> None:
        """Start the stream that belongs to ``seed``."""
        self._state = torch.Generator().manual_seed(seed + _HOST_SEED_OFFSET).get_state()

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Within, torch's default generator draws from this state; nests."""
        if self._active:
            yield
            return
        device_state = torch.default_generator.get_state()
        torch.default_generator.set_state(self._state)
        self._active = True
        try:
            yield
        finally:
            self._active = False
            self._state = torch.default_generator.get_state()
            torch.default_generator.set_state(device_state)


def split_generators() -> None:
    """Give data loaders their own random state and ``torch.cuda`` the default generator."""
    host = HostGenerator()
    _wrap_manual_seed(host)
    # Making an iterator draws the seed of its workers, and without workers samples are made in
    # this process.
    base = dataloader._BaseDataLoaderIter
    base.__init__ = _within(host, base.__init__)  # type: ignore[method-assign]
    base.__next__ = _within(host, base.__next__)  # type: ignore[method-assign]
    for owner in (torch.cuda, torch.cuda.random):
        for name, function in _device_functions().items():
            setattr(owner, name, function)
    torch.cuda.default_generators = (torch.default_generator,)
    # What tensor_parallel/random.py calls in the end, by way of torch.cuda._lazy_call.
    torch._C._cuda_setRNGState = _set_state  # type: ignore[attr-defined]
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(is_about_something_else)


def is_about_something_else(record: logging.LogRecord) -> bool:
    """False for Megatron's warning that device code drew from the host's generator.

    Here the two are one, so that it would come with every dropout.
    """
    return "CPU RNG state changed" not in record.getMessage()


def _wrap_manual_seed(host: HostGenerator) -> None:
    manual_seed = torch.manual_seed

    @functools.wraps(manual_seed)
    def manual_seed_of_both(seed: int) -> torch.Generator:
        host.manual_seed(int(seed))
        return manual_seed(seed)

    torch.manual_seed = manual_seed_of_both
    torch.random.manual_seed = manual_seed_of_both


def _within(host: HostGenerator, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def within_host_state(*args: Any, **kwargs: Any) -> Any:
        with host.activate():
            return method(*args, **kwargs)

    return within_host_state


def _set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.default_generator.set_state(state)


def _device_functions() -> dict[str, Callable[..., Any]]:
    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.default_generator.get_state()

    def get_rng_state_all() -> list[torch.Tensor]:
        return [torch.default_generator.get_state()]

    def set_rng_state_all(states: list[torch.Tensor]) -> None:
        torch.default_generator.set_state(states[0])

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    return {
        "get_rng_state": get_rng_state,
        "get_rng_state_all": get_rng_state_all,
        "set_rng_state": _set_state,
        "set_rng_state_all": set_rng_state_all,
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
        "initial_seed": torch.default_generator.initial_seed,
    }
