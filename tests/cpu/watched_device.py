"""A GPU played by the CPU that tells where the host would wait for it.

In CPU mode a CUDA device means the CPU, so that nothing shows which tensors would be on a GPU.
Here their memory is marked: what factories make on a CUDA device, what is moved there, and the
results of operations on it.  Everything computes real numbers, as in CPU mode.  While a
:class:`WatchedDevice` watches, it notes every operation for which a host would wait: copies from
pageable memory or without ``non_blocking``, values read back, Python values and host tensors used
on the device, and operations whose result has a size that depends on values.

Limits: it does not see waits inside of a kernel library or of NCCL, nor whether a copy that is
ordered after the wrong stream arrives in time.  Zeros that autograd makes for gradients that
nobody has given are not marked, so host tensors are not looked for in a backward.
"""

import functools
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import _utils
from torch.utils.data import dataloader as loaders

from megatron_dip.integration.cpu_mode import cuda_functions
from megatron_dip.integration.cpu_mode import devices as cpu_devices
from megatron_dip.integration.cpu_mode.devices import cpu_if_cuda

__all__ = ["HostWait", "WatchedDevice"]

_ROOT = Path(__file__).resolve().parents[2]
_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace"),
    *("ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm"),
    *("tensor", "tril_indices", "triu_indices", "zeros", "zeros_like"),
)
_NEW = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
_OF_VALUES = frozenset({"tensor", "as_tensor", "new_tensor"})
"""Factories that copy what they are given."""
_SIZED_BY_VALUES = frozenset(
    {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
)
_READ_BACK = frozenset({"_local_scalar_dense", "equal", "is_nonzero"})
_TORCH = str(Path(torch.__file__).parent)


class HostWait(NamedTuple):
    """Something for which the host would wait."""

    what: str
    place: str
    """``file function`` of the innermost frame outside of torch, and its line."""
    caller: str
    """The same of the innermost frame in this package."""


class _Marks:
    """A set of memory: whatever shares it is marked with it."""

    def __init__(self) -> None:
        self._held: dict[int, StorageWeakRef] = {}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if len(self._held) > 50_000:
            self._held = {key: ref for key, ref in self._held.items() if not ref.expired()}
        self._held[storage._cdata] = StorageWeakRef(storage)

    def remove(self, tensor: torch.Tensor) -> None:
        self._held.pop(tensor.untyped_storage()._cdata, None)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        # A weak reference keeps the address from being used again.
        return tensor.untyped_storage()._cdata in self._held


class WatchedDevice(TorchDispatchMode):
    """Marks memory from :meth:`install` on, and notes waits while :meth:`watching`."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[HostWait] = Counter()
        self._here, self._pinned = _Marks(), _Marks()
        self._is_watching = False

    def install(self) -> None:
        """For the rest of the process, which is in CPU mode."""
        for name in _FACTORIES:
            setattr(torch, name, self._marking(name, getattr(torch, name)))
        for name in _NEW:
            setattr(torch.Tensor, name, self._marking(name, getattr(torch.Tensor, name)))
        self._replace_moves()
        self._pin_what_loaders_would_pin()
        for owner, name in (
            (cuda_functions.CpuEvent, "synchronize"),
            (cuda_functions.CpuStream, "synchronize"),
            (torch.cuda, "synchronize"),
        ):
            setattr(owner, name, self._noting(f"{name}()", getattr(owner, name)))
        self.__enter__()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, waits are noted."""
        before, self._is_watching = self._is_watching, True
        try:
            yield
        finally:
            self._is_watching = before

    def mark(self, tensors: Iterable[torch.Tensor]) -> None:
        """Say that ``tensors`` are on the device."""
        for tensor in tensors:
            self._here.add(tensor)

    # ---- what torch calls -------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = [tensor for tensor in tensors if tensor in self._here]
        if here and self._is_watching and func.namespace == "aten":
            self._check(func, tensors, args, kwargs)
        output = func(*args, **kwargs)
        if here and not func._schema.is_mutable:
            self.mark(x for x in tree_leaves(output) if isinstance(x, torch.Tensor))
        return output

    def _check(self, func: Any, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> None:
        name = func.overloadpacket.__name__
        if name in _READ_BACK:
            self._note(f"{name} reads a value back")
        elif name in _SIZED_BY_VALUES or (
            name == "repeat_interleave" and kwargs.get("output_size") is None
        ):
            self._note(f"{name}: the size of its result depends on values")
        elif name == "copy_":
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            self._check_copy(args[1], args[0] in self._here, non_blocking, args[0])
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            self._check_index(name, args)
        elif torch._C._current_autograd_node() is None and any(
            tensor.dim() and tensor not in self._here for tensor in tensors
        ):
            self._note(f"{name} takes a tensor of the host and one of the device")

    def _check_copy(
        self, source: torch.Tensor, to_here: bool, non_blocking: bool, target: Any = None
    ) -> None:
        from_here = source in self._here
        if from_here == to_here:
            return
        if to_here and source.dim() == 0 and target is not None:
            # A number, which goes with the kernel.
            return
        host = source if to_here else target
        is_pinned = host is not None and host in self._pinned
        way = "to the device" if to_here else "from the device"
        if not non_blocking:
            self._note(f"copy {way} without non_blocking")
        elif not is_pinned:
            self._note(f"copy {way}, pageable memory")

    def _check_index(self, name: str, args: Any) -> None:
        indices = [index for index in args[1] if index is not None]
        is_mask = [index.dtype in (torch.bool, torch.uint8) for index in indices]
        # Torch fills under a mask where the value is a number.
        fills = name != "index" and args[2].dim() == 0 and all(is_mask)
        if any(is_mask) and not fills:
            self._note(f"{name} by a mask: the size of its result depends on values")
        if any(index not in self._here for index in indices) and args[0] in self._here:
            self._note(f"{name} by places that are on the host")

    # ---- replacements -----------------------------------------------------------------------

    def _marking(self, name: str, factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> Any:
            device = kwargs.get("device")
            is_new = name.startswith("new_")
            goes_here = _is_cuda(device) or (device is None and is_new and args[0] in self._here)
            data = args[1 if is_new else 0] if args else None
            if name in _OF_VALUES and goes_here:
                if not isinstance(data, torch.Tensor):
                    self._note(f"{name} of Python values on the device")
                else:
                    self._check_copy(data, True, False)
            made = factory(*args, **kwargs)
            if goes_here:
                self._here.add(made)
            elif device is not None:
                self._here.remove(made)
            if kwargs.get("pin_memory"):
                self._pinned.add(made)
            return made

        return make

    def _replace_moves(self) -> None:
        move, read = torch.Tensor.to, torch.Tensor.tolist

        @functools.wraps(move)
        def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            device = args[0] if args else kwargs.get("device")
            if isinstance(device, torch.Tensor):
                device = "cuda" if device in self._here else "cpu"
            if isinstance(device, torch.dtype) or device is None:
                return move(tensor, *args, **kwargs)
            target = _is_cuda(device)
            if target == (tensor in self._here):
                return move(tensor, *args, **kwargs)
            rest = [one for one in args[1:] if isinstance(one, bool)]
            non_blocking = kwargs.get("non_blocking", rest[0] if rest else False)
            if self._is_watching:
                self._check_copy(tensor, target, non_blocking)
            with _off(self):
                moved = move(tensor, *args, **{**kwargs, "copy": True})
            (self._here.add if target else self._here.remove)(moved)
            return moved

        def cuda(
            tensor: torch.Tensor, device: Any = None, non_blocking: bool = False, **_: Any
        ) -> torch.Tensor:
            return to(tensor, "cuda", non_blocking=non_blocking)

        def cpu(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
            return to(tensor, "cpu")

        def tolist(tensor: torch.Tensor) -> Any:
            if tensor in self._here:
                self._note("tolist reads values back")
            return read(tensor)

        def pin_memory(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
            if tensor in self._here or tensor in self._pinned:
                return tensor
            pinned = tensor.clone()
            self._pinned.add(pinned)
            return pinned

        methods = {"to": to, "cuda": cuda, "cpu": cpu, "tolist": tolist, "pin_memory": pin_memory}
        for name, method in methods.items():
            setattr(torch.Tensor, name, method)
        torch.Tensor.is_pinned = lambda tensor, *_: tensor in self._pinned  # type: ignore
        get_device = torch._C.TensorBase.device.__get__

        def device_of(tensor: torch.Tensor) -> torch.device:
            # What is made beside a tensor must be made where it is.
            is_here = self._is_watching and tensor in self._here
            return torch.device("cuda", 0) if is_here else get_device(tensor)

        torch.Tensor.device = property(device_of)  # type: ignore

    def _pin_what_loaders_would_pin(self) -> None:
        following = loaders._BaseDataLoaderIter.__next__

        @functools.wraps(following)
        def next_pinned(iterator: Any) -> Any:
            # Without a GPU loaders do not do what they are told.
            batch = following(iterator)
            wants = getattr(iterator, "_pin_memory_wanted", True)
            return _utils.pin_memory.pin_memory(batch) if wants else batch

        loaders._BaseDataLoaderIter.__next__ = next_pinned  # type: ignore[method-assign]

    def _noting(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def noting(*args: Any, **kwargs: Any) -> Any:
            self._note(what)
            return function(*args, **kwargs)

        return noting

    def _note(self, what: str) -> None:
        if not self._is_watching:
            return
        places = _places()
        if places is None:
            return
        node = torch._C._current_autograd_node()
        if node is not None:
            what += f" (backward of {node.name()})"
        self.waits[HostWait(what, *places)] += 1


@contextmanager
def _off(mode: WatchedDevice) -> Iterator[None]:
    with torch.utils._python_dispatch._disable_current_modes():
        yield


def _is_cuda(device: Any) -> bool:
    return device is not None and cpu_if_cuda(device) is not device


def _places() -> tuple[str, str] | None:
    """Of a wait; None for what gloo copies in place of NCCL."""
    stack = [frame for frame in reversed(traceback.extract_stack()) if frame.filename != __file__]
    of_torch = list(takewhile(lambda frame: frame.filename.startswith(_TORCH), stack))
    if any("/distributed/" in frame.filename for frame in of_torch):
        return None
    frames = [
        frame
        for frame in stack
        if not frame.filename.startswith((_TORCH, cpu_devices.__file__, "<"))
    ]
    shown = [
        f"{frame.filename.split('site-packages/')[-1].removeprefix(f'{_ROOT}/')} {frame.name} "
        f"line {frame.lineno}"
        for frame in frames
    ]
    return shown[0], next((one for one in shown if one.startswith("megatron_dip/")), "nobody")
