"""A script of Megatron's run on a device that tells where the host would wait for it.

Usage, under the launcher with ``--cpu``: ``watched_script.py FOLDER SCRIPT ARGUMENTS...``.  In
FOLDER ``waits<rank>.json`` gets what was noted in the steps after the first one, which makes what
later ones use again: ``[what, place, caller, times]``.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from watched_device import WatchedDevice

from megatron_dip.integration import forward_backward


def watch_steps(device: WatchedDevice) -> None:
    """Let ``device`` watch the schedule's function."""
    step = forward_backward.forward_backward_dip
    num_steps = 0

    def watched(*, model: Any, **arguments: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        for chunk in model:
            # Megatron's wrapper has an attribute of this name.
            device.mark([*chunk.parameters(), *torch.nn.Module.buffers(chunk)])
        if num_steps == 1:
            return step(model=model, **arguments)
        with device.watching():
            return step(model=model, **arguments)

    forward_backward.forward_backward_dip = watched  # type: ignore[assignment]


def main(folder: Path, script: str, *arguments: str) -> None:
    """Run ``script``, then write what was noted."""
    device = WatchedDevice()
    device.install()
    watch_steps(device)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        found = [[*wait, times] for wait, times in device.waits.most_common()]
        (folder / f"waits{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
