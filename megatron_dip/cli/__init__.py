"""The ``megatron-dip`` command."""
