"""Which classes of models can be cut, and cutting one where it is constructed.

A script's builder is called as it is.  The first time, the constructor of a registered class
records what it was given and is left by an exception: no weight is made.  Then the builder is
called once for every stage of this rank, and the constructor gets what
:meth:`StagedModel.stage_arguments` puts in place of the script's own.

While a builder runs, Megatron tells it that every rank builds all layers, so that lists of layer
specs come whole; a stage's layers are cut out of them in the constructor.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch

from megatron_dip.errors import ConfigError, UnsupportedError
from megatron_dip.models.staged import Part, StagedModel

__all__ = ["Construction", "ModelRegistry", "register"]

Builder = Callable[[], torch.nn.Module]
"""Calls a script's builder of models."""

_OWN_MODULES = tuple(
    f"megatron_dip.models.{name}" for name in ("gpt", "hybrid", "llava", "mimo", "qwen_vl")
)


class Construction(NamedTuple):
    """The model that a script's builder constructs."""

    model_type: type[torch.nn.Module]
    staged_type: type[StagedModel]
    arguments: Mapping[str, Any]
    """Of its constructor, by name, defaults included."""


class _Constructed(BaseException):
    """Leaves a builder at the constructor; no ``except Exception`` of a script stops it."""

    def __init__(self, construction: Construction) -> None:
        super().__init__()
        self.construction = construction


def register[StagedT: type[StagedModel]](
    model_type: type[torch.nn.Module] | str,
) -> Callable[[StagedT], StagedT]:
    """Class decorator: the :class:`StagedModel` below it cuts models of ``model_type``.

    Args:
        model_type: A class, or its full name where importing it would load what a run that does
            not use it lacks.
    """

    def mark(staged_type: StagedT) -> StagedT:
        staged_type.model_types = (*staged_type.__dict__.get("model_types", ()), model_type)
        return staged_type

    return mark


class ModelRegistry:
    """The classes that can be cut in this run.

    Args:
        modules: Names of Python modules beside this package's own that hold classes decorated
            with :func:`register` (``--dip-models``); a later one has precedence.

    Raises:
        ConfigError: A module cannot be imported, or registers nothing.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._staged: dict[type[torch.nn.Module] | str, type[StagedModel]] = {}
        for name in (*_OWN_MODULES, *modules):
            self._take(name)

    def ask(self, builder: Builder) -> Construction:
        """What ``builder`` constructs; it is called once, or twice where it loads the class.

        Raises:
            UnsupportedError: It constructs nothing that can be cut.
        """
        for _ in range(2):
            loaded = self._loaded()
            try:
                with _WholeLayers(), _replaced(loaded, _record):
                    model = builder()
            except _Constructed as constructed:
                return constructed.construction
            if self._loaded().keys() == loaded.keys():
                break
        _refuse(type(model), self._names())

    def build(self, builder: Builder, staged: StagedModel, part: Part) -> torch.nn.Module:
        """One stage of what :meth:`ask` has found.

        Raises:
            UnsupportedError: The builder constructs a second model beside it, or none this time, or
                gives another model that holds it.
        """
        whole_layers = _WholeLayers()
        built: list[torch.nn.Module] = []
        under_construction = 0

        def construct(
            original: Callable[..., None], _: type[StagedModel], model: Any, *args: Any, **kw: Any
        ) -> None:
            nonlocal under_construction
            if under_construction:
                return original(model, *args, **kw)
            if built:
                raise UnsupportedError(
                    f"the script's builder constructs a {type(built[0]).__name__} and a "
                    f"{type(model).__name__} (expected one model: --dip-schedule cuts one)"
                )
            arguments = _by_name(original, model, args, kw) | staged.stage_arguments(part)
            under_construction += 1
            try:
                with whole_layers.suspended(), staged.constructing(part):
                    original(model, **arguments)
            finally:
                under_construction -= 1
            staged.finish(model, part)
            built.append(model)

        with whole_layers, _replaced(self._loaded(), construct):
            model = builder()
        if not built:
            raise UnsupportedError(
                f"the script's builder gives a {type(model).__name__} that it did not construct "
                f"this time (expected a new model at every call)"
            )
        if model is not built[0]:
            # A class that nobody registered, with one inside that somebody did.
            _refuse(type(model), self._names())
        return model

    def _take(self, name: str) -> None:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"--dip-models {name}: {error} (expected a Python module that can be imported, "
                f"as those beside the script can)"
            ) from error
        found = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, StagedModel)
            and value.__module__ == module.__name__
            and "model_types" in vars(value)
        ]
        if not found:
            raise ConfigError(
                f"--dip-models {name}: registers no model (expected a StagedModel decorated with "
                f"@register)"
            )
        for staged_type in found:
            self._staged.update(dict.fromkeys(staged_type.model_types, staged_type))

    def _loaded(self) -> dict[type[torch.nn.Module], type[StagedModel]]:
        """Those of the registered classes that are loaded."""
        found: dict[type[torch.nn.Module], type[StagedModel]] = {}
        for model_type, staged_type in self._staged.items():
            if isinstance(model_type, str):
                module, _, name = model_type.rpartition(".")
                loaded = getattr(sys.modules.get(module), name, None)
            else:
                loaded = model_type
            if loaded is not None:
                found[loaded] = staged_type
        return found

    def _names(self) -> list[str]:
        names = (
            model_type if isinstance(model_type, str) else model_type.__name__
            for model_type in self._staged
        )
        return sorted({name.rpartition(".")[2] for name in names})


def _record(
    original: Callable[..., None],
    staged_type: type[StagedModel],
    model: Any,
    *args: Any,
    **kwargs: Any,
) -> NoReturn:
    raise _Constructed(
        Construction(type(model), staged_type, _by_name(original, model, args, kwargs))
    )


def _by_name(
    function: Callable[..., None], model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a constructor by name, defaults included, without ``self``."""
    signature = inspect.signature(function)
    bound = signature.bind(model, *args, **kwargs)
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            named[name] = value
    return named


def _refuse(model_type: type, known: Sequence[str]) -> NoReturn:
    raise UnsupportedError(
        f"--dip-schedule cannot cut {model_type.__module__}.{model_type.__name__}: no class that "
        f"it is made of is registered (known: {', '.join(known)}; register yours with "
        f"--dip-models MODULE, see 'a model of your own' in the documents)"
    )


@contextmanager
def _replaced(
    loaded: Mapping[type[torch.nn.Module], type[StagedModel]], call: Callable[..., None]
) -> Iterator[None]:
    """Constructors of ``loaded`` replaced by ``call(original, staged type, model, ...)``."""
    originals = {model_type: model_type.__init__ for model_type in loaded}

    def replacement(model_type: type[torch.nn.Module]) -> Callable[..., None]:
        original, staged_type = originals[model_type], loaded[model_type]

        def construct(model: Any, *args: Any, **kwargs: Any) -> None:
            _check_subclass(type(model), model_type)
            call(original, staged_type, model, *args, **kwargs)

        return construct

    has_own = {model_type: "__init__" in vars(model_type) for model_type in loaded}
    for model_type in loaded:
        model_type.__init__ = replacement(model_type)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for model_type, original in originals.items():
            if has_own[model_type]:
                model_type.__init__ = original  # type: ignore[method-assign]
            else:
                del model_type.__init__


def _check_subclass(model_type: type, registered: type) -> None:
    """Refuse classes that change what the registered one does in ways that nobody here knows."""
    changed = [
        name
        for ancestor in model_type.__mro__[: model_type.__mro__.index(registered)]
        for name in ("__init__", "forward", "set_input_tensor")
        if name in vars(ancestor)
    ]
    if changed:
        raise UnsupportedError(
            f"--dip-schedule cannot cut {model_type.__module__}.{model_type.__name__}: it derives "
            f"from {registered.__name__} and has its own {', '.join(sorted(set(changed)))} "
            f"(register it with --dip-models MODULE, see 'a model of your own' in the documents)"
        )


def _all_layers(config: Any, *_: Any, **__: Any) -> int:
    return int(config.num_layers)


def _no_offset(*_: Any, **__: Any) -> int:
    return 0


def _all_mtp_layers(config: Any, *_: Any, **__: Any) -> int:
    return int(config.mtp_num_layers or 0)


class _WholeLayers:
    """Megatron as if every rank built all layers of a model, while it is entered.

    Its functions are replaced, not the configurations that they ask: scripts copy these from tower
    to tower, and checkpoints hold them.
    """

    _ANSWERS = (
        ("transformer_block", "get_num_layers_to_build", _all_layers),
        ("transformer_layer", "get_transformer_layer_offset", _no_offset),
        ("multi_token_prediction", "get_mtp_num_layers_to_build", _all_mtp_layers),
    )

    def __init__(self) -> None:
        homes = [
            importlib.import_module(f"megatron.core.transformer.{module}")
            for module, _, _ in self._ANSWERS
        ]
        self._pairs = [
            (name, getattr(home, name), whole)
            for home, (_, name, whole) in zip(homes, self._ANSWERS, strict=True)
        ]

    def __enter__(self) -> None:
        for name, own, whole in self._pairs:
            _rebind(name, own, whole)

    def __exit__(self, *_: object) -> None:
        for name, own, whole in self._pairs:
            _rebind(name, whole, own)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within it, Megatron as it is."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


def _rebind(name: str, old: Any, new: Any) -> None:
    """Put ``new`` in place of ``old`` wherever it was imported by value."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)
