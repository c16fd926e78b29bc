"""The front door: how a class of model is cut into stages.

Megatron is only imported by the modules of this package, not by the package itself, so that CPU
mode can be enabled first.
"""
