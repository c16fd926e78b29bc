"""Measuring the layers of a model: what a profile is made of.

``processes`` starts a process per tensor-parallel rank, ``rank`` sets Megatron up there, and
``modules`` measures.
"""
