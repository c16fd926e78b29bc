"""LaVIN's data: ScienceQA and chat files, prompts, answers, and microbatches with modality rows."""

from megatron_dip.data.lavin.batches import (
    ClipBatch,
    ImageSize,
    LavinMicrobatch,
    LavinWholeBatch,
    RoutedBatch,
    RoutedSequence,
)
from megatron_dip.data.lavin.chat import read_chat
from megatron_dip.data.lavin.dataset import LavinDataset, LavinSettings
from megatron_dip.data.lavin.image_check import (
    ImageFiles,
    check_images,
    load_checked_images,
    split_by_images,
)
from megatron_dip.data.lavin.instructions import Instruction, encode_instruction
from megatron_dip.data.lavin.scienceqa import (
    ScienceQaProblem,
    ScienceQaScores,
    read_scienceqa,
    score,
    to_instruction,
)

__all__ = [
    "ClipBatch",
    "ImageFiles",
    "ImageSize",
    "Instruction",
    "LavinDataset",
    "LavinMicrobatch",
    "LavinSettings",
    "LavinWholeBatch",
    "RoutedBatch",
    "RoutedSequence",
    "ScienceQaProblem",
    "ScienceQaScores",
    "check_images",
    "encode_instruction",
    "load_checked_images",
    "read_chat",
    "read_scienceqa",
    "score",
    "split_by_images",
    "to_instruction",
]
