"""Image-text data: samples, index, packed sequences and microbatches. Knows torch, no Megatron."""

from megatron_dip.data.dataset import VlmDataset
from megatron_dip.data.index import (
    DataIndex,
    DataSettings,
    build_index,
    index_digest,
    index_path,
    load_index,
    split_samples,
)
from megatron_dip.data.microbatch import (
    ImageData,
    LanguageBatch,
    PackedSequence,
    VisionBatch,
    VlmMicrobatch,
)
from megatron_dip.data.packing import PackingOptions
from megatron_dip.data.tokenizer import VlmTokenizer, load_tokenizer

__all__ = [
    "DataIndex",
    "DataSettings",
    "ImageData",
    "LanguageBatch",
    "PackedSequence",
    "PackingOptions",
    "VisionBatch",
    "VlmDataset",
    "VlmMicrobatch",
    "VlmTokenizer",
    "build_index",
    "index_digest",
    "index_path",
    "load_index",
    "load_tokenizer",
    "split_samples",
]
