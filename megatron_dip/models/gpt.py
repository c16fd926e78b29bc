"""Stages of Megatron's ``GPTModel``: dense and expert layers, latent attention, tied embeddings.

Batches are the dicts of ``pretrain_gpt.py``: ``tokens``, ``labels`` and ``loss_mask`` [samples,
tokens], and with packed documents ``cu_seqlens`` [samples, tokens + 1].  An item is a sample.
Layers of multi-token prediction go with the last stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

from torch import Tensor

from megatron_dip.costs import Boundary, ItemSize, ItemSizes, ModuleShape
from megatron_dip.errors import UnsupportedError
from megatron_dip.models.boundaries import batched
from megatron_dip.models.layout import cut_config, cut_spec
from megatron_dip.models.module_shapes import module_shape
from megatron_dip.models.registry import register
from megatron_dip.models.staged import Part, StagedModel

__all__ = ["StagedGpt", "document_lengths", "micro_batch_size"]

MODULE = "language"


@register("megatron.core.models.gpt.gpt_model.GPTModel")
class StagedGpt(StagedModel):
    """A language model of one module."""

    divides_rows = True

    def modules(self) -> tuple[ModuleShape, ...]:
        """The one module."""
        given = self.arguments
        shape = module_shape(MODULE, given["config"], causal=True, vocab_size=given["vocab_size"])
        return (shape,)

    def stage_arguments(self, part: Part) -> dict[str, Any]:
        """Config and specs cut, and whether embedding and output layer are there.

        Raises:
            UnsupportedError: The stage shares its embedding with another one of the same rank, or
                predicts several tokens without the module's last layer.
        """
        self.check_tied(part)
        if self.predicts_several_tokens and part.last and not part.num_layers:
            raise UnsupportedError(
                f"module {part.module}: the last stage has no layer and predicts several tokens, "
                "but the norm between them is in the stage of the last layer (give the last stage "
                "a layer)"
            )
        config = self.arguments["config"]
        spec = self.arguments["transformer_layer_spec"]
        return {
            "config": cut_config(config, part),
            "transformer_layer_spec": cut_spec(spec, part, config.num_layers),
            "mtp_block_spec": self.arguments["mtp_block_spec"] if part.last else None,
            "pre_process": part.first,
            "post_process": part.last,
            "vp_stage": None,
        }

    @property
    def predicts_several_tokens(self) -> bool:
        """Whether the model has layers of multi-token prediction, which embed tokens too."""
        return self.arguments["mtp_block_spec"] is not None

    def check_tied(self, part: Part) -> None:
        """
        Raises:
            UnsupportedError: The stage shares its embedding with another one of the same rank.
        """
        shares = self.arguments["share_embeddings_and_output_weights"]
        is_tied = shares or self.predicts_several_tokens
        if is_tied and self.run.num_pipeline_ranks == 1 and not (part.first and part.last):
            raise UnsupportedError(
                "several stages of a model with tied embeddings, or with multi-token prediction, "
                "on one pipeline rank: nothing would add their gradients up (expected one segment, "
                "more pipeline ranks, or --untie-embeddings-and-output-weights)"
            )

    def check_split(self, module: str) -> None:
        """
        Raises:
            UnsupportedError: A loss beside that of the script is a mean over a microbatch.
        """
        config = self.arguments["config"]
        flag = "--mtp-num-layers" if self.predicts_several_tokens else None
        is_sparse = getattr(config, "experimental_attention_variant", None) == "dsa"
        if is_sparse and getattr(config, "dsa_indexer_loss_coeff", None):
            flag = "--dsa-indexer-loss-coeff"
        if flag is not None:
            raise UnsupportedError(
                f"sub_microbatch_tokens of module {module} does not work with {flag}: the loss of "
                f"its layers is a mean over a microbatch (leave sub_microbatch_tokens out)"
            )

    def items(self, batch: Mapping[str, Any]) -> ItemSizes:
        """A sample is an item; the loss of all of its tokens counts where the batch has no mask.

        Raises:
            UnsupportedError: Several samples with packed documents, which the script makes one of.
        """
        num_samples, num_tokens = batch["tokens"].shape
        mask = batch.get("loss_mask")
        losses = [num_tokens] * num_samples if mask is None else mask.sum(dim=1).int().tolist()
        spans: Sequence[tuple[int, ...]] = [(num_tokens,)] * num_samples
        shares: Sequence[tuple[int, ...]] = [()] * num_samples
        if batch.get("cu_seqlens") is not None:
            if num_samples > 1:
                raise UnsupportedError(
                    f"a microbatch of {num_samples} samples with packed documents: the script makes"
                    f" one of them (expected --micro-batch-size 1 and longer samples)"
                )
            spans = [document_lengths(row, num_tokens) for row in batch["cu_seqlens"]]
        elif mask is not None and self.run.num_context_ranks > 1:
            shares = context_shares(mask, self.run.num_context_ranks)
        return {
            MODULE: tuple(
                ItemSize(
                    tokens=num_tokens, spans=lengths, loss_tokens=loss, context_loss_tokens=share
                )
                for lengths, loss, share in zip(spans, losses, shares, strict=True)
            )
        }

    def single_samples(self, batch: Any) -> list[Any]:
        """
        Raises:
            UnsupportedError: Always: samples have one length.
        """
        raise UnsupportedError(
            "all samples of this model have one length and cost alike: there is nothing to move "
            "(leave schedule.assignment out)"
        )

    def boundary(self, module: str, *, outer: bool) -> Boundary:
        """Samples side by side."""
        return batched(self.arguments["config"])

    def calling(self, part: Part, sizes: Sequence[ItemSize]) -> AbstractContextManager[None]:
        """Tensor-parallel ranks without data allocate for as many samples as the arguments say."""
        return micro_batch_size(len(sizes)) if self.run.num_tensor_ranks > 1 else nullcontext()


def document_lengths(starts: Tensor, num_tokens: int) -> tuple[int, ...]:
    """Lengths of the documents in a sample from where they start, and of what is behind the last.

    Args:
        starts: [entries], ascending; the last ones repeat.
        num_tokens: Of the sample.
    """
    positions = [*starts.tolist(), num_tokens]
    lengths = (end - start for start, end in pairwise(positions))
    return tuple(length for length in lengths if length > 0)


def context_shares(mask: Tensor, num_ranks: int) -> list[tuple[int, ...]]:
    """What of ``mask`` each context-parallel rank has of every sample, as Megatron divides them.

    Args:
        mask: [samples, tokens], 1 where a loss counts; two equal chunks of a sample for each rank,
            of which it gets one from the front and one from the end.
        num_ranks: Among which they are divided.
    """
    chunks = mask.unflatten(1, (2 * num_ranks, -1)).sum(dim=2).int()
    shares = chunks[:, :num_ranks] + chunks[:, num_ranks:].flip(1)
    return [tuple(row) for row in shares.tolist()]


@contextmanager
def micro_batch_size(num_samples: int) -> Iterator[None]:
    """While in it, Megatron's arguments say that a microbatch has so many samples."""
    from megatron.training import get_args

    args = get_args()
    whole = args.micro_batch_size
    args.micro_batch_size = num_samples
    try:
        yield
    finally:
        args.micro_batch_size = whole
