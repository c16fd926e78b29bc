"""Everything that knows Megatron; ``enable()`` installs the hooks from inside a script.

Importing this package imports nothing of Megatron; ``enable()`` does.
"""

from megatron_dip.integration.hooks import enable

__all__ = ["enable"]
