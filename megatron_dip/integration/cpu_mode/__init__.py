"""Megatron-LM on CPU: the unmodified ``pretrain()`` over gloo, in several processes.

``enable()`` gives torch's CUDA functions CPU meanings, so that Megatron's training, evaluation,
checkpoints and optimizers run as they are; the same layers, the same loop, slower.  Tested are
pipeline, tensor, sequence, context and data parallelism, Adam (also distributed) and SGD, 32-bit
and 16-bit parameters.  Expert parallelism and Megatron's interleaved schedule are neither
tested nor refused.  What exists only as a CUDA kernel (Transformer Engine, fp8, CUDA graphs, FSDP)
is refused when arguments are parsed.

Nothing of it is in effect unless ``enable()`` is called: it changes torch for the whole process.
"""

import os
import sys

from megatron_dip.errors import UnsupportedError

__all__ = ["enable", "is_enabled"]


def enable() -> None:
    """Switch this process to CPU; does nothing when it is switched already.

    Raises:
        UnsupportedError: Something of Megatron was imported before; its modules hold references
            to torch's own functions by then.
    """
    if is_enabled():
        return
    packages = ("megatron.core", "megatron.training")
    loaded = sorted(name for name in sys.modules if name.startswith(packages))
    if loaded:
        raise UnsupportedError(
            f"CPU mode must be enabled before Megatron is imported, but {loaded[0]} already is: "
            f"call megatron_dip.integration.cpu_mode.enable() first, or start the script with "
            f"'python -m megatron_dip.launch --cpu SCRIPT'"
        )
    # Tensor parallelism refuses to start without it; it has no effect on a CPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    # Dynamo makes a table of torch's functions when it is imported, which every optimizer does; it
    # refuses a table in which one function of ours stands under many names.
    import torch._dynamo  # noqa: F401

    from megatron_dip.integration.cpu_mode.arguments import wrap_argument_parsing
    from megatron_dip.integration.cpu_mode.context_parallel import divide_rows_among_context_ranks
    from megatron_dip.integration.cpu_mode.cuda_functions import replace_cuda_functions
    from megatron_dip.integration.cpu_mode.devices import redirect_devices
    from megatron_dip.integration.cpu_mode.local_layers import complete_local_layers
    from megatron_dip.integration.cpu_mode.megatron_patches import import_and_patch_megatron
    from megatron_dip.integration.cpu_mode.process_groups import redirect_process_groups
    from megatron_dip.integration.cpu_mode.random_numbers import split_generators

    replace_cuda_functions()
    redirect_devices()
    split_generators()
    redirect_process_groups()
    import_and_patch_megatron()
    complete_local_layers()
    divide_rows_among_context_ranks()
    wrap_argument_parsing()


def is_enabled() -> bool:
    """Whether ``enable()`` was called in this process."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    from megatron_dip.integration.cpu_mode.cuda_functions import CpuStream

    return bool(torch.cuda.Stream is CpuStream)
