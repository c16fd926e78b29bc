"""A script of Megatron's on the CPU without the hooks: ``python stock_setup.py SCRIPT ARGUMENTS``.

With ``--list-hooks`` alone it prints what the hooks change, as JSON.
"""

import json
import runpy
import sys
from typing import Any

from megatron_dip.integration import cpu_mode

cpu_mode.enable()


def list_hooks() -> dict[str, Any]:
    """Names of Megatron's that are others after ``hooks.enable()``, and what stands behind each."""
    import megatron.training.arguments
    import megatron.training.models.dist_utils
    import megatron.training.training  # noqa: F401
    from megatron.core.pipeline_parallel import schedules

    from megatron_dip.integration import hooks

    before = {
        (module, name): value
        for module in [name for name in sys.modules if name.partition(".")[0] == "megatron"]
        for name, value in list(vars(sys.modules[module]).items())
        if not name.startswith("__")
    }
    hooks.enable()
    changed = {
        f"{module}.{name}": getattr(vars(sys.modules[module])[name], "__wrapped__", None) is value
        for (module, name), value in before.items()
        if vars(sys.modules[module]).get(name) is not value
    }
    chosen = [
        schedules.get_forward_backward_func(pp_size, vp_size).__name__
        for pp_size, vp_size in ((1, None), (2, None), (2, 2))
    ]
    return {"changed": changed, "chosen": chosen}


if __name__ == "__main__":
    if sys.argv[1] == "--list-hooks":
        print(json.dumps(list_hooks()))
    else:
        from mock_sequences import make_few_mock_sequences

        from megatron_dip.integration.versions import build_helpers_where_they_can_be_built

        # Nothing of a released wheel starts without it: it holds no Makefile.
        build_helpers_where_they_can_be_built()
        make_few_mock_sequences()
        del sys.argv[0]
        runpy.run_path(sys.argv[0], run_name="__main__")
