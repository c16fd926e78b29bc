"""Stages of Megatron's ``MimoModel``: encoders of any modalities before a language model.

Every modality is a module, named as in the model's configuration, and the language model reads all
of them.  A stage is a model of the same class that plays one role (its ``RankRole``): merging rows
into sequences, packing and sharding stay the model's own.

Batches are dicts of the arguments of its forward, and every rank reads them.  An item of a modality
is what stands under one index of its encoder's inputs (an image, a clip), an item of the language
model a sequence.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_dip.costs import Boundary, ItemSize, ItemSizes, ModuleShape
from megatron_dip.errors import UnsupportedError, shown
from megatron_dip.models.batches import items_in_places, join, take, take_samples
from megatron_dip.models.boundaries import batched, flat
from megatron_dip.models.encoders import StagedEncoder, encoder_of
from megatron_dip.models.gpt import StagedGpt
from megatron_dip.models.module_shapes import module_shape
from megatron_dip.models.registry import register
from megatron_dip.models.staged import Part, Received, RunFacts, StagedModel

__all__ = ["StagedMimo"]

LANGUAGE = "language"

_PER_SEQUENCE = ("input_ids", "position_ids", "attention_mask", "loss_mask", "labels")
_INPUT_WIDTHS = ("input_size", "in_features")
"""What classes of projections call the width of what they take."""


@register("megatron.core.models.mimo.model.base.MimoModel")
class StagedMimo(StagedModel):
    """One encoder per modality, and a language model."""

    def __init__(self, arguments: Mapping[str, Any], run: RunFacts) -> None:
        super().__init__(arguments, run)
        self._given = arguments["mimo_config"]
        self._check()
        spec = self._given.language_model_spec
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(spec.module).parameters.items()
        }
        self._language = StagedGpt(defaults | spec.params, run)
        self._config = spec.params["config"]
        self._encoders: dict[str, tuple[str, StagedEncoder]] = {}
        for name, modality in self._given.modality_submodules_spec.items():
            ((key, encoder),) = modality.submodules["encoders"].items()
            widths = self._width(modality), self._config.hidden_size
            self._encoders[name] = key, encoder_of(name, encoder, *widths)

    def _check(self) -> None:
        given = self._given
        if given.module_to_grid_map:
            raise UnsupportedError(
                "MimoModel with module_to_grid_map: its modules have ranks of their own, joined by "
                "Megatron's communicators (leave it out: plans place the modules)"
            )
        if not issubclass(given.language_model_spec.module, GPTModel):
            raise UnsupportedError(
                f"MimoModel with a {given.language_model_spec.module.__name__} as language model "
                f"(expected a GPTModel)"
            )
        for name, spec in given.modality_submodules_spec.items():
            held = {kind: len(made) for kind, made in (spec.submodules or {}).items() if made}
            if held.get("encoders") != 1 or held.keys() - {"encoders", "input_projections"}:
                raise UnsupportedError(
                    f"MimoModel with modality {name} of {shown(held)} (expected one encoder, and "
                    f"neither decoders nor output projections)"
                )
            if name not in given.special_token_ids:
                raise UnsupportedError(
                    f"MimoModel without a token for modality {name} in special_token_ids: nothing "
                    f"says where its rows go (expected one)"
                )

    def _width(self, modality: ModuleSpec) -> int:
        """Of the rows that come out of an encoder."""
        for projection in modality.submodules.get("input_projections") or ():
            for name in _INPUT_WIDTHS:
                if name in (projection.params or {}):
                    return int(projection.params[name])
        return int(self._config.hidden_size)

    def modules(self) -> tuple[ModuleShape, ...]:
        """Modalities, and the language model."""
        language = module_shape(
            LANGUAGE,
            self._config,
            upstream=tuple(self._encoders),
            causal=True,
            vocab_size=self._given.language_model_spec.params["vocab_size"],
        )
        return (*(encoder.shape() for _, encoder in self._encoders.values()), language)

    def stage_arguments(self, part: Part) -> dict[str, Any]:
        """The model's configuration with one module in it, cut."""
        given = copy.copy(self._given)
        if part.module == LANGUAGE:
            spec = given.language_model_spec
            params = spec.params | self._language.stage_arguments(part)
            given.language_model_spec = ModuleSpec(spec.module, params, spec.submodules)
        else:
            key, encoder = self._encoders[part.module]
            spec = copy.copy(given.modality_submodules_spec[part.module])
            spec.submodules = spec.submodules | {"encoders": {key: encoder.cut_spec(part)}}
            given.modality_submodules_spec = {part.module: spec}
        return {"mimo_config": given}

    @contextmanager
    def constructing(self, part: Part) -> Iterator[None]:
        """The constructor asks ranks for their role; a stage has the one of its module."""
        from megatron.core.models.mimo.config import role as roles

        stage = roles.ModuleStageInfo(is_first_stage=part.first, is_last_stage=part.last)
        role = roles.RankRole({part.module: stage}, roles.ModuleLayout.NON_COLOCATED)
        build = vars(roles.RankRole)["build"]
        roles.RankRole.build = staticmethod(lambda *_: role)
        try:
            yield
        finally:
            roles.RankRole.build = build

    def finish(self, model: Any, part: Part) -> None:
        """Let it take and give tensors, where it knows dicts by the names of modules."""
        model.pre_process, model.post_process = part.first, part.last
        model.share_embeddings_and_output_weights = False
        # Sizes for the model's own communicators.
        model._attach_modality_split_sizes = lambda *_: None
        if part.module == LANGUAGE:
            language = model.language_model
            model.share_embeddings_and_output_weights = language.share_embeddings_and_output_weights
            model.shared_embedding_or_output_weight = language.shared_embedding_or_output_weight
            names = tuple(self._encoders) if part.first else (LANGUAGE,)
            model.set_input_tensor = partial(_keep_tensors, model, names)
        else:
            key, staged = self._encoders[part.module]
            modality = model.modality_submodules[part.module]
            encoder = modality.encoders[key]
            staged.finish(encoder, part, modality)
            # Only a first stage calls its encoder.
            modality._is_first_stage = True
            model.set_input_tensor = partial(_hand_on, encoder)
        model.forward = _returning_a_tensor(model, part.module)

    def items(self, batch: Mapping[str, Any]) -> ItemSizes:
        """Items of every modality, and sequences.

        Raises:
            DataError: Rows of a modality do not fill its places in the sequences.
        """
        tokens = batch["input_ids"]
        sizes: dict[str, Sequence[ItemSize]] = {}
        needs: dict[str, list[tuple[int, ...]]] = {}
        for name, (key, encoder) in self._encoders.items():
            is_place = tokens == self._given.special_token_ids[name]
            places = is_place.sum(dim=1).tolist()
            inputs = ((batch.get("modality_inputs") or {}).get(name) or {}).get(key)
            sizes[name] = encoder.sizes(inputs, sum(places)) if inputs else ()
            rows = [size.num_output_rows for size in sizes[name]]
            needs[name] = items_in_places(name, rows, places)
        packing = batch.get("packing_kwargs")
        starts = packing["cu_seqlens_q"] if packing else None
        spans = (tokens.shape[1],) if starts is None else tuple(starts.diff().tolist())
        losses = batch["loss_mask"].sum(dim=1).int().tolist()
        sizes[LANGUAGE] = tuple(
            ItemSize(
                tokens=tokens.shape[1],
                spans=spans,
                needs={name: found[number] for name, found in needs.items()},
                loss_tokens=loss,
            )
            for number, loss in enumerate(losses)
        )
        return sizes

    def part_of(self, batch: Mapping[str, Any], part: Part, items: Sequence[int]) -> dict[str, Any]:
        """Inputs of an encoder go to its stages alone."""
        if part.module == LANGUAGE:
            taken = take_samples(batch, _PER_SEQUENCE, items, len(batch["input_ids"]))
            return {**batch, **taken, "modality_inputs": None}
        key, _ = self._encoders[part.module]
        inputs = take(batch["modality_inputs"][part.module][key], items)
        return {**batch, "modality_inputs": {part.module: {key: inputs}}}

    def boundary(self, module: str, *, outer: bool) -> Boundary:
        """Rows of modalities one after another, sequences side by side."""
        if module == LANGUAGE:
            return batched(self._config)
        return flat(self._config) if outer else self._encoders[module][1].boundary()

    def inputs(self, part: Part, received: Sequence[Received]) -> list[Tensor | None]:
        """In the language model's first stage, the rows of each modality in their order."""
        if part.module != LANGUAGE or not part.first:
            return super().inputs(part, received)
        found = [[one for one in received if one.module == name] for name in self._encoders]
        return [join(messages, dim=0) if messages else None for messages in found]


def _keep_tensors(model: Any, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    given = zip(names, tensors, strict=True)
    model.input_tensors = {name: tensor for name, tensor in given if tensor is not None}


def _hand_on(encoder: Any, tensors: Sequence[Tensor | None]) -> None:
    (tensor,) = tensors
    if tensor is not None:
        encoder.set_input_tensor(tensor)


def _returning_a_tensor(model: Any, module: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The model's forward, which keeps none of its inputs."""
    forward = model.forward

    @functools.wraps(forward)
    def forward_tensor(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, loss_mask = forward(*args, **kwargs)
        model.input_tensors = None
        return (output[module] if isinstance(output, Mapping) else output), loss_mask

    return forward_tensor
