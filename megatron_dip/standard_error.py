"""What a job has to say when it ends with an error in the user's input: once, not once per rank."""

import hashlib
import os
import sys
from datetime import timedelta

__all__ = ["print_error"]

_STORE_TIMEOUT = timedelta(seconds=5)


def print_error(message: str) -> None:
    """Print ``message`` on standard error unless another rank of this job has printed the same.

    Ranks that torchrun started share its store; where there is none, every rank prints.
    """
    if _is_first(message):
        print(f"megatron-dip: error: {message}", file=sys.stderr, flush=True)


def _is_first(message: str) -> bool:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"megatron_dip/{attempt}/{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        store = distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=_STORE_TIMEOUT,
        )
        return bool(store.add(key, 1) == 1)
    except (KeyError, ValueError, RuntimeError):
        return True
