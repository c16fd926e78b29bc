"""Models under Megatron's own schedule: what a rank of it holds, built from the same stages."""

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import make_viewless_tensor
from megatron.training import get_args

from megatron_dip.families.packed.stage import StageModule, pad_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megatron_dip.families.base import StageFactory
    from megatron_dip.families.packed.batches import StageData

__all__ = ["StockModel"]

_COUNTS_ON_ALL_MODULES = ("overlap_grad_reduce", "overlap_param_gather")


class StockModel(MegatronModule):
    """What a rank holds: on the first one all encoders, everywhere some layers of the backbone.

    The backbone is the module with the loss.  Hidden states of B samples of S rows are packed rows
    inside and shaped [S, B, H] at the boundaries, where Megatron's schedule wants them so.
    Checkpoints have the stages' own names, as under ``--dip-schedule``.

    Args:
        idle: Per encoder, the data on which it runs where a microbatch has none for it and all
            modules must run, see :meth:`no_rows`.
    """

    def __init__(
        self,
        factory: "StageFactory",
        *,
        pre_process: bool,
        post_process: bool,
        idle: "Mapping[str, StageData]",
    ) -> None:
        config = factory.loss_config
        super().__init__(config=config)
        self.pre_process, self.post_process = pre_process, post_process
        self.vp_stage = None
        self.share_embeddings_and_output_weights = False
        *encoders, backbone = factory.shape.modules
        self._backbone_name = backbone.name
        self._encoders = {
            module.name: factory.build(
                module.name, first_layer=0, num_layers=module.num_layers, first=True, last=True
            )
            for module in (encoders if pre_process else ())
        }
        self.backbone = factory.build(
            backbone.name,
            first_layer=get_transformer_layer_offset(config),
            num_layers=get_num_layers_to_build(config),
            first=pre_process,
            last=post_process,
        )
        self.encoders = torch.nn.ModuleDict(self._encoders)
        self.pg_collection = self.backbone.pg_collection
        args = get_args()
        self._train_sequences: int = args.micro_batch_size
        self._eval_sequences: int = args.eval_micro_batch_size
        self._seq_length: int = args.seq_length // self.backbone.num_shards
        self._idle = dict(idle)
        self._runs_all = any(getattr(args, name, False) for name in _COUNTS_ON_ALL_MODULES)
        self._input: torch.Tensor | None = None

    def forward(self, batch: Any) -> torch.Tensor:
        """Hidden states [S, B, H], or losses on the last rank; ``batch`` is a ``whole`` one."""
        hidden = features = None
        data = getattr(batch, self._backbone_name)
        if self.pre_process:
            features = self.features(batch)
        else:
            assert self._input is not None
            hidden = self._input.reshape(-1, 1, self._input.shape[-1])[: self.num_rows(data)]
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

    def features(self, batch: Any) -> torch.Tensor | None:
        """What the backbone reads of one encoder; None where that is nothing."""
        ((name, encoder),) = self._encoders.items()
        data = getattr(batch, name)
        return encoder(None, data) if data.items else self.no_rows(name)

    def no_rows(self, encoder: str) -> torch.Tensor | None:
        """What an encoder gives for a microbatch that has nothing for it: None, or no rows.

        Megatron counts on a gradient of every parameter in the last microbatch, and on the same
        order of modules in all replicas, where it overlaps communication with computing.  There
        the encoder runs on a small item of which nothing is read: its gradients are zero.
        """
        if not self._runs_all or not torch.is_grad_enabled():
            return None
        device = torch.device("cuda", torch.cuda.current_device())
        output: torch.Tensor = self._encoders[encoder](None, self._idle[encoder].to(device))
        return output[:0]

    def num_rows(self, data: Any) -> int | None:
        """Rows of the backbone's stages where those are fewer than S x B."""
        return None

    def stages(self) -> list[StageModule]:
        """The parts of modules that this rank holds, that with the loss last."""
        return [*self._encoders.values(), self.backbone]

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        return self.backbone.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: list[torch.Tensor | None]) -> None:
        (self._input,) = input_tensor

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The stages' own names: the same checkpoint as under ``--dip-schedule``."""
        state: dict[str, Any] = {}
        for stage in self.stages():
            state.update(stage.sharded_state_dict(prefix, sharded_offsets, metadata))
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> None:
        for stage in self.stages():
            names = tuple(f"{name}." for name, _ in stage.named_children())
            own = {key: value for key, value in state_dict.items() if key.startswith(names)}
            stage.load_state_dict(own, strict=strict)
