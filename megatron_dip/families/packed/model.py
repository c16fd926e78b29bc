"""The model of a family: whole under Megatron's own schedule, one part of it under a plan."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import make_viewless_tensor
from megatron.training import get_args

from megatron_dip.errors import UnsupportedError
from megatron_dip.families.packed.stage import StageModule, pad_rows, row_multiple
from megatron_dip.models.staged import Part
from megatron_dip.runtime.host_copies import to_device

if TYPE_CHECKING:
    from megatron_dip.families.base import StageFactory
    from megatron_dip.families.packed.batches import StageData

__all__ = ["PackedModel", "in_reading_order"]

_COUNTS_ON_ALL_MODULES = ("overlap_grad_reduce", "overlap_param_gather")


class PackedModel(MegatronModule):
    """What a rank holds of a model of packed rows.

    Whole: on the first rank all encoders, everywhere some layers of the backbone, the module with
    the loss.  Hidden states of B samples of S rows are packed rows inside and shaped [S, B, H] at
    the boundaries, where Megatron's schedule wants them so.  As a part it holds one stage of one
    module, with packed rows at its boundaries.  Checkpoints have the stages' own names either way.

    Args:
        stages: Builds stages of the model.
        pre_process: Whether the whole model's part on this rank is the first one.
        post_process: Whether it is the last one.
        idle: Per encoder, the data on which it runs where a microbatch has none for it and all
            modules must run, see :meth:`no_rows`.
        part: The one stage that is held; None for the whole.

    Raises:
        UnsupportedError: The whole cannot run under Megatron's own schedule.
    """

    def __init__(
        self,
        stages: "StageFactory",
        *,
        pre_process: bool,
        post_process: bool,
        idle: "Mapping[str, StageData]",
        part: Part | None = None,
    ) -> None:
        config = stages.loss_config
        super().__init__(config=config)
        # None: Megatron's own virtual pipeline is off, and it asserts that this agrees.
        self.vp_stage = None
        self._is_part = part is not None
        self._modules_in_order = tuple(module.name for module in stages.shape.modules)
        built = {}
        if part is None:
            self.check_whole()
            built = {
                module.name: stages.build(
                    module.name, first_layer=0, num_layers=module.num_layers, first=True, last=True
                )
                for module in (stages.shape.modules[:-1] if pre_process else ())
            }
            part = Part(
                self._modules_in_order[-1],
                first_layer=get_transformer_layer_offset(config),
                num_layers=get_num_layers_to_build(config),
                first=pre_process,
                last=post_process,
            )
        self._module = part.module
        self.encoders = torch.nn.ModuleDict(built)
        self.backbone = stages.build(
            part.module,
            first_layer=part.first_layer,
            num_layers=part.num_layers,
            first=part.first,
            last=part.last,
        )
        self.pre_process, self.post_process = part.first, part.last
        self.share_embeddings_and_output_weights = self.backbone.share_embeddings_and_output_weights
        self.pg_collection = self.backbone.pg_collection
        args = get_args()
        self._train_sequences: int = args.micro_batch_size
        self._eval_sequences: int = args.eval_micro_batch_size
        self._seq_length: int = args.seq_length // self.backbone.num_shards
        if not self._is_part and config.fp8 and config.pipeline_model_parallel_size > 1:
            self.check_handed_rows(row_multiple(config) * self.backbone.num_shards)
        self._idle = dict(idle)
        self._runs_all = any(getattr(args, name, False) for name in _COUNTS_ON_ALL_MODULES)
        self._input: torch.Tensor | None = None

    def check_whole(self) -> None:
        """
        Raises:
            UnsupportedError: The model cannot run under Megatron's own schedule.
        """

    def check_handed_rows(self, multiple: int) -> None:
        """
        Args:
            multiple: Of which the rows of a microbatch are, as 8-bit kernels and ranks want.

        Raises:
            UnsupportedError: Megatron's own schedule would hand on another number of rows.
        """
        rows = self._seq_length * self.backbone.num_shards
        for num_sequences in (self._train_sequences, self._eval_sequences):
            if rows * num_sequences % multiple:
                raise UnsupportedError(
                    f"{num_sequences} sequences of {rows} tokens in a microbatch do not work with "
                    f"--fp8-format under Megatron's own schedule, which fixes the rows that stages "
                    f"hand on: expected a multiple of {multiple} (change the sequence length, or "
                    f"use --dip-schedule)"
                )

    def forward(self, batch: Any) -> torch.Tensor:
        """The output of the last module that this rank holds.

        Args:
            batch: The data of a part, or a ``whole`` batch.

        Returns:
            Losses [T] where the loss is; else hidden states [S, B, H], or of a part rows
            [T, 1, width].
        """
        taken, self._input = self._input, None
        if self._is_part:
            return self._run_part(taken, batch)
        hidden = features = None
        data = getattr(batch, self._module)
        if self.pre_process:
            features = self.features(batch)
        else:
            assert taken is not None
            hidden = taken.reshape(-1, 1, taken.shape[-1])[: self.num_rows(data)]
        output: torch.Tensor = self.backbone(hidden, data, features)
        if self.post_process:
            return output
        sequences = self._train_sequences if self.training else self._eval_sequences
        padded = pad_rows(output, self._seq_length * sequences)
        shaped = padded.reshape(self._seq_length, sequences, -1)
        # Megatron frees outputs after sending them and refuses to free a view.
        viewless: torch.Tensor = make_viewless_tensor(
            shaped, requires_grad=shaped.requires_grad, keep_graph=True
        )
        return viewless

    def _run_part(self, taken: torch.Tensor | None, data: "StageData") -> torch.Tensor:
        hidden = features = None
        if not self.pre_process:
            hidden = taken
        elif taken is not None:
            features = in_reading_order(taken, data, self._modules_in_order)
        output: torch.Tensor = self.backbone(hidden, data, features)
        return output

    def features(self, batch: Any) -> torch.Tensor | None:
        """What the backbone reads of the encoders ``[rows, 1, width]``; None where that is nothing.

        Only of a whole model.
        """
        outputs = []
        for name, encoder in self.encoders.items():
            data = getattr(batch, name)
            output = encoder(None, data) if data.items else self.no_rows(name)
            outputs += [] if output is None else [output]
        if not outputs:
            return None
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return in_reading_order(joined, getattr(batch, self._module), self._modules_in_order)

    def no_rows(self, encoder: str) -> torch.Tensor | None:
        """What an encoder gives for a microbatch that has nothing for it: None, or no rows.

        Megatron counts on a gradient of every parameter in the last microbatch, and on the same
        order of modules in all replicas, where it overlaps communication with computing.  There
        the encoder runs on a small item of which nothing is read: its gradients are zero.
        """
        if not self._runs_all or not torch.is_grad_enabled():
            return None
        device = torch.device("cuda", torch.cuda.current_device())
        output: torch.Tensor = self.encoders[encoder](None, self._idle[encoder].to(device))
        return output[:0]

    def num_rows(self, data: Any) -> int | None:
        """Rows of the backbone's stages where those are fewer than S x B."""
        return None

    def stages(self) -> list[StageModule]:
        """The parts of modules that this rank holds, that with the loss last."""
        encoders: list[Any] = list(self.encoders.values())
        return [*encoders, self.backbone]

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """Of the backbone."""
        return self.backbone.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Sequence[torch.Tensor | None]) -> None:
        """What the next forward reads.

        Of a whole model and of a later stage of a module hidden states; of a module's first stage
        the rows of all items of upstream modules that its data read ``[rows, 1, width]``: those of
        the first module in ascending order, then those of the second.
        """
        (self._input,) = input_tensor

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The stages' own names: the same checkpoint whole and in parts."""
        state: dict[str, Any] = {}
        for stage in self.stages():
            state.update(stage.sharded_state_dict(prefix, sharded_offsets, metadata))
        return state

    def state_dict_for_save_checkpoint(
        self, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """As :meth:`sharded_state_dict`."""
        state: dict[str, Any] = {}
        for stage in self.stages():
            state.update(stage.state_dict(prefix=prefix, keep_vars=keep_vars))
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> None:
        """From the stages' own names."""
        for stage in self.stages():
            names = tuple(f"{name}." for name, _ in stage.named_children())
            own = {key: value for key, value in state_dict.items() if key.startswith(names)}
            stage.load_state_dict(own, strict=strict)


def in_reading_order(
    features: torch.Tensor, data: "StageData", modules: Sequence[str]
) -> torch.Tensor:
    """Rows of upstream items in the order in which ``data`` read them.

    Args:
        features: ``[rows, 1, width]``, module after module and ascending in each.
        data: Of a module's first stage.
        modules: In the order of ``features``.
    """
    wanted = data.upstream_items
    order = sorted(
        range(len(wanted)), key=lambda place: (modules.index(wanted[place][0]), wanted[place][1])
    )
    if order == list(range(len(wanted))):
        return features
    num_rows = data.upstream_rows
    starts = {}
    position = 0
    for place in order:
        starts[place] = position
        position += num_rows[place]
    index = torch.cat(
        [torch.arange(starts[place], starts[place] + rows) for place, rows in enumerate(num_rows)]
    )
    return features.index_select(0, to_device(index, features.device))
