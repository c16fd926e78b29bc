"""Image-text data: samples, index, packed sequences and microbatches. Knows torch, no Megatron."""

from megatron_dip.data.batches import Microbatch, StageData
from megatron_dip.data.dataset import VlmDataset
from megatron_dip.data.index import (
    DataIndex,
    build_index,
    index_digest,
    index_path,
    load_index,
    split_samples,
    split_source,
)
from megatron_dip.data.look_ahead import LookAhead
from megatron_dip.data.microbatch import (
    ImageData,
    LanguageBatch,
    PackedSequence,
    VisionBatch,
    VlmMicrobatch,
    VlmWholeBatch,
)
from megatron_dip.data.packing import PackingOptions
from megatron_dip.data.sources import DataSettings, SampleSource, open_source
from megatron_dip.data.tokenizer import VlmTokenizer, load_tokenizer

__all__ = [
    "DataIndex",
    "DataSettings",
    "ImageData",
    "LanguageBatch",
    "LookAhead",
    "Microbatch",
    "PackedSequence",
    "PackingOptions",
    "SampleSource",
    "StageData",
    "VisionBatch",
    "VlmDataset",
    "VlmMicrobatch",
    "VlmTokenizer",
    "VlmWholeBatch",
    "build_index",
    "index_digest",
    "index_path",
    "load_index",
    "load_tokenizer",
    "open_source",
    "split_samples",
    "split_source",
]
