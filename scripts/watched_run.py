"""Run a pretrain script of Megatron's and write down its losses in full; the log rounds them.

    torchrun ... -m megatron_dip.launch scripts/watched_run.py RECORD SCRIPT ARGUMENTS...

``RECORD`` gets, from the rank that holds the loss, losses and gradient norms by iteration and the
losses of evaluations, as JSON.
"""

import inspect
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from megatron.training import training


def watch(seen: dict[str, Any]) -> None:
    """Have Megatron's training loop fill ``seen``; what it calls has the same names in all
    versions, in another order."""
    log, evaluate = training.training_log, training.evaluate
    log_parameters = inspect.signature(log)

    def watched_log(*args: Any, **kwargs: Any) -> Any:
        given = log_parameters.bind(*args, **kwargs).arguments
        losses = [float(value) for value in given["loss_dict"].values()]
        if losses:
            seen["steps"][given["iteration"]] = [*losses, float(given["grad_norm"])]
        return log(*args, **kwargs)

    def watched_evaluate(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        seen["evaluations"] += [float(value) for value in (result[0] or {}).values()]
        return result

    training.training_log, training.evaluate = watched_log, watched_evaluate


def main() -> None:
    """Run the script that the command line names."""
    record, script = sys.argv[1:3]
    seen: dict[str, Any] = {"steps": {}, "evaluations": []}
    watch(seen)
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if seen["steps"]:
            Path(record).write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
