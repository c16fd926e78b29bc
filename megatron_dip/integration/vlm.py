"""The vision-language model of a run, for either schedule, from the same stages.

Under ``--dip-schedule`` a rank holds one chunk per stage.  Without, it holds what Megatron's own
schedule wants: the whole vision tower with the first language layers on the first rank, and a
run of language layers on every other.
"""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import make_viewless_tensor
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args

from megatron_dip.config import DipConfig, load_config
from megatron_dip.errors import ConfigError
from megatron_dip.integration.chunks import ChunkList, DipChunk
from megatron_dip.integration.data import WholeBatch
from megatron_dip.integration.pipeline import DipPipeline
from megatron_dip.integration.rules import Rule, check_rules
from megatron_dip.models.configs import (
    make_language_config,
    make_projection_config,
    make_vision_config,
)
from megatron_dip.models.initialization import initialize_parameters
from megatron_dip.models.language import LanguageStage
from megatron_dip.models.stage import StageModule
from megatron_dip.models.vision import VisionStage
from megatron_dip.partition import Stage

__all__ = ["StageFactory", "StockVlm", "build_model"]

_STOCK_RULES = tuple(
    Rule(flag=flag, destination=destination, allowed=(None,))
    for flag, destination in (
        ("--pipeline-model-parallel-layout", "pipeline_model_parallel_layout"),
        ("--num-layers-per-virtual-pipeline-stage", "num_layers_per_virtual_pipeline_stage"),
        ("--num-virtual-stages-per-pipeline-rank", "num_virtual_stages_per_pipeline_rank"),
    )
)


class StageFactory:
    """Builds stages of the two modules with initial weights that do not depend on the cut."""

    def __init__(self, config: DipConfig, base: TransformerConfig, seed: int) -> None:
        vision, language = config.model.vision, config.model.language
        self._config = config
        self._seed = seed
        self.num_vision_layers = vision.num_layers
        self.language_config = make_language_config(
            base,
            num_layers=language.num_layers,
            hidden_size=language.hidden_size,
            ffn_hidden_size=language.ffn_hidden_size,
            num_attention_heads=language.num_attention_heads,
            num_query_groups=language.num_query_groups,
        )
        self._vision_config = make_vision_config(
            base,
            num_layers=vision.num_layers,
            hidden_size=vision.hidden_size,
            ffn_hidden_size=vision.ffn_hidden_size,
            num_attention_heads=vision.num_attention_heads,
        )
        self._projection_config = make_projection_config(
            base, hidden_size=language.hidden_size, ffn_hidden_size=4 * vision.hidden_size
        )

    def vision(self, first_layer: int, num_layers: int, *, first: bool, last: bool) -> VisionStage:
        config = self._config.model.vision
        stage = VisionStage(
            self._vision_config,
            self._projection_config,
            first_layer=first_layer,
            num_layers=num_layers,
            first=first,
            last=last,
            patch_size=config.patch_size,
            position_table_side=config.position_grid,
        )
        return self._finished(stage, config.trainable)

    def language(
        self, first_layer: int, num_layers: int, *, first: bool, last: bool
    ) -> LanguageStage:
        config = self._config.model.language
        stage = LanguageStage(
            self.language_config,
            first_layer=first_layer,
            num_layers=num_layers,
            first=first,
            last=last,
            vocab_size=config.vocab_size,
            max_sequence_length=config.seq_length,
            rotary_base=config.rotary_base,
        )
        return self._finished(stage, config.trainable)

    def _finished[StageT: StageModule](self, stage: StageT, trainable: bool) -> StageT:
        initialize_parameters(stage, self._seed)
        stage.requires_grad_(trainable)
        return stage


class StockVlm(MegatronModule):
    """What one rank holds under Megatron's own schedule.

    Hidden states of B sequences of S tokens are packed rows [S x B, 1, H] inside and shaped
    [S, B, H] at the boundaries, where Megatron's schedule wants them so.
    """

    def __init__(
        self, factory: StageFactory, *, pre_process: bool, post_process: bool, sequences: int
    ) -> None:
        config = factory.language_config
        super().__init__(config=config)
        self.pre_process, self.post_process = pre_process, post_process
        self.vision = (
            factory.vision(0, factory.num_vision_layers, first=True, last=True)
            if pre_process
            else None
        )
        self.language = factory.language(
            get_transformer_layer_offset(config),
            get_num_layers_to_build(config),
            first=pre_process,
            last=post_process,
        )
        self.pg_collection = self.language.pg_collection
        self.vp_stage = None
        self.share_embeddings_and_output_weights = False
        self._sequences = sequences
        self._input: torch.Tensor | None = None

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        return self.language.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: list[torch.Tensor | None]) -> None:
        (self._input,) = input_tensor

    def forward(self, batch: WholeBatch) -> torch.Tensor:
        """Hidden states [S, B, H], or losses [S x B] on the last rank."""
        hidden = features = None
        if self.vision is not None:
            if batch.vision.items:
                features = self.vision(None, batch.vision)
        else:
            assert self._input is not None
            hidden = self._input.reshape(-1, 1, self._input.shape[-1])
        output: torch.Tensor = self.language(hidden, batch.language, features)
        if self.post_process:
            return output
        shaped = output.reshape(-1, self._sequences, output.shape[-1])
        # Megatron frees outputs after sending them and refuses to free a view.
        viewless: torch.Tensor = make_viewless_tensor(
            shaped, requires_grad=shaped.requires_grad, keep_graph=True
        )
        return viewless

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The stages' own names: the same checkpoint as under ``--dip-schedule``."""
        state: dict[str, Any] = {}
        for stage in self._stages():
            state.update(stage.sharded_state_dict(prefix, sharded_offsets, metadata))
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> None:
        for stage in self._stages():
            names = tuple(f"{name}." for name, _ in stage.named_children())
            own = {key: value for key, value in state_dict.items() if key.startswith(names)}
            stage.load_state_dict(own, strict=strict)

    def _stages(self) -> list[StageModule]:
        return [stage for stage in (self.vision, self.language) if stage is not None]


def build_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: Any = None,
) -> torch.nn.Module | ChunkList:
    """Megatron's ``model_provider`` for the model in ``--dip-config``.

    Returns:
        A list of chunks under ``--dip-schedule``, else one model for Megatron's own schedule.

    Raises:
        ConfigError: There is no ``--dip-config``, or it does not fit the launch.
        UnsupportedError: Megatron's own schedule was asked for a cut that the model does not have.
    """
    args = get_args()
    if not args.dip_config:
        raise ConfigError("the model is described by --dip-config FILE, which was not given")
    dip_config = load_config(args.dip_config)
    base = config or core_transformer_config_from_args(args)
    factory = StageFactory(dip_config, base, args.seed)
    if args.dip_schedule:
        device = torch.device("cuda", torch.cuda.current_device())
        pipeline = DipPipeline(
            dip_config, factory.language_config, args.dip_timeout_seconds, device
        )
        return _build_chunks(factory, pipeline)
    check_rules(args, _STOCK_RULES, "with this model under Megatron's own schedule")
    return StockVlm(
        factory,
        pre_process=pre_process,
        post_process=post_process,
        sequences=args.micro_batch_size,
    )


def _build_chunks(factory: StageFactory, pipeline: DipPipeline) -> ChunkList:
    """The stages of this rank, language stages outermost.

    Megatron's reduction of embedding gradients expects the embedding in the first chunk of the
    first rank and the head in the last chunk of the last rank.
    """
    stages = pipeline.partition.stages_on(pipeline.rank)
    entry = pipeline.partition.first_stage("language")
    ordered = sorted(stages, key=lambda stage: (stage != entry, stage.module == "language"))
    return ChunkList(_build_chunk(factory, pipeline, stage) for stage in ordered)


def _build_chunk(factory: StageFactory, pipeline: DipPipeline, stage: Stage) -> DipChunk:
    build = factory.vision if stage.module == "vision" else factory.language
    module = build(
        stage.first_layer,
        stage.num_layers,
        first=pipeline.partition.first_stage(stage.module) == stage,
        last=pipeline.partition.last_stage(stage.module) == stage,
    )
    return DipChunk(module, stage, factory.language_config, pipeline)
