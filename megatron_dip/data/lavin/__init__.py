"""LaVIN's data: ScienceQA and chat files, prompts, answers, and microbatches with modality rows."""

from megatron_dip.data.lavin.batches import ClipBatch, LavinMicrobatch, RoutedBatch, RoutedSequence

__all__ = ["ClipBatch", "LavinMicrobatch", "RoutedBatch", "RoutedSequence"]
