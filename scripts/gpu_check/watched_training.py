"""A pretrain script whose steps are watched; ``training_syncs.py`` starts it by the launcher.

watched_training.py RECORD DEVICE SCRIPT ARGUMENTS...
"""

import json
import runpy
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from megatron.training import training

_NUM_WARM_STEPS = 2


class _Watch:
    """Counts, by place in the code, what made the host wait."""

    def __init__(self, record: Path, device: str) -> None:
        self._record = record
        self._device = device
        self._places: Counter[str] = Counter()
        self._seconds: list[float] = []
        self._step = training.train_step

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        watches = self._device == "cuda" and len(self._seconds) >= _NUM_WARM_STEPS
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if watches:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                result = self._step(*arguments, **options)
            finally:
                if watches:
                    torch.cuda.set_sync_debug_mode("default")
        self._seconds.append(time.perf_counter() - start)
        self._places.update(
            f"{Path(one.filename).name}:{one.lineno}"
            for one in caught
            if "synchroniz" in str(one.message)
        )
        self._write()
        return result

    def _write(self) -> None:
        found = {
            "steps": len(self._seconds),
            "seconds of the last step": self._seconds[-1],
            "steps watched": max(0, len(self._seconds) - _NUM_WARM_STEPS)
            if self._device == "cuda"
            else 0,
            "synchronising operations": dict(self._places.most_common(30)),
        }
        self._record.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    record, device, script = sys.argv[1:4]
    training.train_step = _Watch(Path(record), device)
    sys.argv = sys.argv[3:]
    runpy.run_path(script, run_name="__main__")
