"""LaVIN: frozen CLIP and LLaMA towers, tuned through small routed adapters in every layer.

Mixture-of-Modality Adaptation (Luo et al., "Cheap and Quick: Efficient Vision-Language Instruction
Tuning for Large Language Models", arXiv 2305.15023).  Before the attention of every layer of both
towers an adapter of two experts is added to the normalised rows; a router weighs the experts.  In
the language tower the gates of a sample come from its *modality row*, a row of a learned table
(text or image) that runs through all layers beside the sample: nothing attends to it, and it
attends to itself alone.  It is a span of one token among the packed rows, so it crosses stage
boundaries, is recomputed and is divided among tensor-parallel ranks as all other rows are.

Megatron is imported by the modules of this package, not by the package.
"""
