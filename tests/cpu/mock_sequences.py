"""Megatron's mock data set, made small, alike in every process that a test compares."""

from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

__all__ = ["make_few_mock_sequences"]


def make_few_mock_sequences() -> None:
    """It shuffles an entry per sequence: ten million of 16 tokens, which outlasts training."""
    MockGPTLowLevelDataset.size = 1000
