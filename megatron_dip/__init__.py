"""Dynamic interleaved pipelines for large multimodal models, as a Megatron-LM extension."""

__version__ = "0.1.0"
