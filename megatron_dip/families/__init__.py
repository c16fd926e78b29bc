"""The models of this package with their data: examples that train.

Nothing else of the package needs them: a model enters through ``megatron_dip.models``.  Imports of
PyTorch and Megatron are in the modules, not here: forms of configurations know neither.
"""
