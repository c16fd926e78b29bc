"""A model of somebody's own: an encoder of audio frames before Megatron's GPTModel."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["FRAMES_PER_ROW", "SpeechModel"]

FRAMES_PER_ROW = 4


class FrameEncoder(MegatronModule):
    """Frames [B, F, features] to rows [F, B, width]."""

    def __init__(self, config: TransformerConfig, spec: ModuleSpec, num_features: int) -> None:
        super().__init__(config=config)
        self.frame_embedding = torch.nn.Linear(num_features, config.hidden_size)
        self.block = TransformerBlock(config, spec, post_layer_norm=False)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        rows = self.frame_embedding(frames).transpose(0, 1).contiguous()
        return self.block(hidden_states=rows, attention_mask=None)


class SpeechModel(MegatronModule):
    """Rows of speech take the place of the first tokens' embeddings.

    Under Megatron's own schedule the first pipeline rank has the whole encoder.
    """

    def __init__(
        self,
        config: TransformerConfig,
        encoder_config: TransformerConfig,
        vocab_size: int,
        max_sequence_length: int,
        num_features: int,
        pre_process: bool = True,
        post_process: bool = True,
        add_encoder: bool = True,
        add_decoder: bool = True,
    ) -> None:
        super().__init__(config=config)
        self.pre_process, self.post_process = pre_process, post_process
        self.add_encoder, self.add_decoder = add_encoder, add_decoder
        self.share_embeddings_and_output_weights = False
        self.vp_stage = None
        self.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        spec = get_gpt_layer_local_spec(normalization=config.normalization)
        if add_encoder:
            self.encoder = FrameEncoder(encoder_config, spec, num_features)
            self.projection = torch.nn.Linear(
                FRAMES_PER_ROW * encoder_config.hidden_size, config.hidden_size
            )
        if add_decoder:
            self.language = GPTModel(
                config=config,
                transformer_layer_spec=spec,
                vocab_size=vocab_size,
                max_sequence_length=max_sequence_length,
                pre_process=pre_process,
                post_process=post_process,
                position_embedding_type="rope",
                share_embeddings_and_output_weights=False,
            )
        self._speech: torch.Tensor | None = None

    def set_input_tensor(self, input_tensor: list[torch.Tensor | None]) -> None:
        """Hidden states of the part before this one; rows of speech for the first layers alone."""
        (tensor,) = input_tensor
        if not self.add_decoder:
            self.encoder.block.set_input_tensor(tensor)
        elif self.pre_process:
            self._speech = tensor
        else:
            self.language.set_input_tensor(tensor)

    def forward(
        self, frames: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor | None = None
    ) -> Any:
        """Losses [B, S] where there are labels and the last layers, else hidden states."""
        speech = self._speech
        if self.add_encoder:
            rows = self.encoder(frames)
            _, num_samples, width = rows.shape
            grouped = rows.reshape(-1, FRAMES_PER_ROW, num_samples, width).transpose(1, 2)
            speech = self.projection(grouped.flatten(2))
        if not self.add_decoder:
            return speech
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        mask = torch.ones((1, 1, *tokens.shape[1:] * 2), dtype=torch.bool, device=tokens.device)
        embedded = None
        if self.pre_process:
            assert speech is not None
            embedded = self.language.embedding(tokens, positions)[speech.shape[0] :]
            embedded = torch.cat([speech, embedded])
        return self.language(tokens, positions, mask.triu(1), decoder_input=embedded, labels=labels)
