"""Which parts of a module are trained, as a configuration states it.

``trainable`` is ``true`` (all parts), ``false`` (none), a list of the parts that are trained, or a
mapping that may also name some of the layers::

    trainable: [projector]
    trainable: {projector: true, layers: {last: 4}}

A part that a list or a mapping does not name is frozen.  In modules with a projector, ``tower``
stands for all other parts.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator

from megatron_dip.errors import shown
from megatron_dip.forms import Form
from megatron_dip.limits import Layer

__all__ = ["LAYERS", "LayerChoice", "Trainable", "TrainedParts", "by_part", "trained_parts"]

LAYERS = "layers"
_PROJECTOR, _TOWER = "projector", "tower"


class LayerChoice(Form):
    """Some layers of a module: so many from its beginning and so many from its end."""

    first: Layer = 0
    last: Layer = 0


def _check_form(given: Any) -> Any:
    """One line where pydantic would explain every form that the value might have had."""
    if isinstance(given, bool | dict):
        return given
    if isinstance(given, list | tuple) and all(isinstance(name, str) for name in given):
        return tuple(given)
    raise ValueError(
        "expected true, false, a list of the parts that are trained such as [projector], or a "
        "mapping such as {projector: true, layers: {last: 4}}"
    )


Trainable = Annotated[
    bool | tuple[str, ...] | dict[str, bool | LayerChoice], BeforeValidator(_check_form)
]
"""See the top of this file; which parts there are, the module says."""


class TrainedParts(NamedTuple):
    """What of a module is trained."""

    parts: frozenset[str]
    """``layers`` is among them if any layer is trained."""
    layers: tuple[range, ...]
    """Consecutive ones, ascending."""


def trained_parts(
    trainable: bool | tuple[str, ...] | Mapping[str, bool | LayerChoice],
    part_names: Sequence[str],
    num_layers: int,
) -> TrainedParts:
    """What ``trainable`` says of a module with these parts.

    Raises:
        ValueError: It names a part that the module does not have, or more layers than it has; or
            it is a list or a mapping by which nothing is trained.
    """
    every_layer = range(num_layers)
    if isinstance(trainable, bool):
        parts = frozenset(part_names) if trainable else frozenset[str]()
        return TrainedParts(parts, (every_layer,) if trainable else ())
    said: Mapping[str, bool | LayerChoice]
    said = trainable if isinstance(trainable, Mapping) else dict.fromkeys(trainable, True)
    chosen = by_part(said, part_names, "trainable")
    choice = chosen.pop(LAYERS, False)
    odd = [name for name, value in chosen.items() if not isinstance(value, bool)]
    if odd:
        raise ValueError(
            f"trainable.{odd[0]}: expected true or false (only layers can be chosen one by one)"
        )
    layers = _layers(choice, num_layers)
    parts = frozenset(name for name, value in chosen.items() if value)
    if not parts and not layers:
        raise ValueError(
            "trainable names no part that is trained (parts that are not named are frozen; to "
            "freeze all of the module, say trainable: false)"
        )
    return TrainedParts(parts | {LAYERS} if layers else parts, layers)


def _layers(choice: bool | LayerChoice, num_layers: int) -> tuple[range, ...]:
    if isinstance(choice, bool):
        return (range(num_layers),) if choice else ()
    if max(choice.first, choice.last) > num_layers:
        raise ValueError(
            f"trainable.layers: first {choice.first} and last {choice.last} of {num_layers} layers "
            f"(expected no more than there are)"
        )
    middle = num_layers - choice.last
    if choice.first >= middle:
        return (range(num_layers),)
    ranges = (range(choice.first), range(middle, num_layers))
    return tuple(layers for layers in ranges if layers)


def by_part[ValueT](
    said: Mapping[str, ValueT], part_names: Sequence[str], field: str
) -> dict[str, ValueT]:
    """``said`` of every part, with ``tower`` written out.

    Raises:
        ValueError: A part is unknown, or named twice.
    """
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in part_names}
    if _PROJECTOR in part_names:
        groups[_TOWER] = tuple(name for name in part_names if name != _PROJECTOR)
    found: dict[str, ValueT] = {}
    for name, value in said.items():
        if name not in groups:
            raise ValueError(
                f"{field} names {shown(name)} (expected some of the module's parts: {list(groups)})"
            )
        for part in groups[name]:
            if part in found:
                raise ValueError(f"{field} names {part} twice, once as part of {_TOWER}")
            found[part] = value
    return found
