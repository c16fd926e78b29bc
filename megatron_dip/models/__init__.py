"""Stages of a vision tower and a language backbone, built from Megatron-Core's own layers.

Everything runs on packed rows: the hidden states of T tokens are ``[T, 1, H]``, attention stays
inside spans, and no row is padded except to divide evenly among tensor-parallel ranks.  A module
can be cut into stages before any of its layers; parameters, their initial values and their
checkpoint keys do not depend on the cut.

Megatron is only imported by the modules of this package, not by the package itself, so that CPU
mode can be enabled first.
"""
