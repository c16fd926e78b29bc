"""Stages built from Megatron-Core layers over packed rows, which the families share.

Everything runs on packed rows: the hidden states of T tokens are ``[T, 1, H]``, attention stays
inside spans, and no row is padded except to divide evenly among tensor-parallel ranks.  A module
can be cut into stages before any of its layers; parameters, their initial values and their
checkpoint keys do not depend on the cut.
"""
