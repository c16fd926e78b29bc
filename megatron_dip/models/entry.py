"""Ways into and out of a model whose class builds it whole: for encoders without stages.

Some blocks have no ``pre_process`` flag that their owner passes on, and no way to return what is
between two layers.  These tools change one constructed instance: they drop what is not the
stage's own, let the first own layer read what has arrived and return what the last one gives.  No
line of a model is copied.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["PassThrough", "enter", "keep_layers", "leave", "placeholder", "replace"]

type Shape = Callable[..., tuple[int, ...]]


class _Stub(torch.nn.Module):
    """Zeros in place of a module's output: what reads them is replaced further on."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._shape = shape

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        example = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        dtype = example.dtype if example.is_floating_point() else torch.get_default_dtype()
        return example.new_zeros(self._shape(*args, **kwargs), dtype=dtype)


class PassThrough(torch.nn.Module):
    """In place of what belongs to another stage: gives back what it gets."""

    def forward(self, hidden_states: Any, *_: Any, **__: Any) -> Any:
        return hidden_states


def replace(owner: torch.nn.Module, name: str, value: Any) -> None:
    """Give ``owner`` something else as ``name``, which may be a module or a parameter now."""
    delattr(owner, name)
    setattr(owner, name, value)


def enter(
    block: torch.nn.Module, stubs: Mapping[tuple[torch.nn.Module, str], Shape] | None = None
) -> None:
    """Let ``block`` start at what ``set_input_tensor`` gave it.

    Args:
        block: Megatron's block of layers, whose ``pre_process`` says where it starts.
        stubs: What runs before the block, by its owner and name there, with a function of its
            arguments that gives the shape of its output.  It is dropped, and zeros, which nobody
            reads, are handed on in place of its output.
    """
    block.pre_process = False  # type: ignore[assignment]
    for (owner, name), shape in (stubs or {}).items():
        replace(owner, name, _Stub(shape))


def keep_layers(layers: torch.nn.ModuleList, kept: Collection[int]) -> None:
    """Drop the layers of other stages; the list keeps its length, by which models count.

    Args:
        layers: All layers of the module.  They take the hidden states first and give nothing else.
        kept: Indices of those of this stage.
    """
    for index in range(len(layers)):
        if index not in kept:
            layers[index] = PassThrough()


class _Left(BaseException):
    """The way out of a forward; no ``except Exception`` on that way stops it."""

    def __init__(self, model: torch.nn.Module, output: Any) -> None:
        super().__init__()
        self.model = model
        self.output = output


def leave(
    model: torch.nn.Module,
    after: torch.nn.Module,
    result: Callable[[Any], Any] = lambda output: output,
) -> None:
    """Let the forward of ``model`` end with the output of ``after``, which is inside it.

    An exception carries the output past the rest of the forward.  It is caught round the model's
    own forward, so that wrappers see a call that returns.

    Args:
        model: Whose forward is left.
        after: The block or layer whose output is the stage's.
        result: What the model returns instead, from that output.
    """
    forward = model.forward

    def raise_output(module: torch.nn.Module, args: Any, output: Any) -> None:
        raise _Left(model, output)

    @functools.wraps(forward)
    def returning(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except _Left as left:
            if left.model is not model:
                raise
            return result(left.output)

    after.register_forward_hook(raise_output)
    model.forward = returning


def placeholder(model: torch.nn.Module, argument: str, make: Callable[[], Any]) -> None:
    """Let ``make`` say what the forward of ``model`` gets as ``argument``, whatever is passed.

    For what a later stage needs the size of and does not read, and for what a script has on the
    first rank alone.
    """
    signature = inspect.signature(model.forward)

    def fill(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        bound = signature.bind(*args, **kwargs)
        bound.arguments[argument] = make()
        return bound.args, bound.kwargs

    model.register_forward_pre_hook(fill, with_kwargs=True)
