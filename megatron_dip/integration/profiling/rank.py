"""One tensor-parallel rank of a profile: Megatron's groups, then every module in turn."""

import logging
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from megatron_dip.costs.layers import Parallelism
from megatron_dip.costs.profile import Profile
from megatron_dip.errors import ConfigError, DipError
from megatron_dip.families.configs import load_config
from megatron_dip.families.forms import FamilyConfig
from megatron_dip.integration.profiling.processes import ProfileTask
from megatron_dip.rehearsal.local_ranks import Done, Failed, Progress

__all__ = ["measure_rank"]

_TIMEOUT_SECONDS = 300.0


def measure_rank(task: ProfileTask, messages: Connection) -> None:
    """Measure and send a :class:`Profile`; see ``megatron_dip.rehearsal.local_ranks``."""
    # What Megatron says of layers that stand alone would tear the progress bar.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="megatron")
    if task.device == "cpu":
        from megatron_dip.integration import cpu_mode

        cpu_mode.enable()
    import torch.distributed as dist

    try:
        if task.device == "gpu":
            _check_gpus(task.tensor_parallel)
        messages.send(Done(_measure(task, messages)))
    except (DipError, RuntimeError) as error:
        messages.send(Failed(str(error)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _measure(task: ProfileTask, messages: Connection) -> Profile:
    # Here and not above: CPU mode must come before Megatron.
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_dip.families.registry import family_of
    from megatron_dip.integration.profiling.modules import (
        MeasureOptions,
        measure_module,
        num_measurements,
    )

    if task.device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(task.rank)
    dist.init_process_group(
        "gloo" if task.device == "cpu" else "nccl",
        init_method=f"file://{task.store}",
        rank=task.rank,
        world_size=task.tensor_parallel,
        timeout=timedelta(seconds=_TIMEOUT_SECONDS),
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=task.tensor_parallel)
    model_parallel_cuda_manual_seed(task.seed)
    config: FamilyConfig = load_config(task.config)
    family = family_of(config)
    factory = family.stage_factory(config, _base_config(task), task.seed)
    total = num_measurements(config, family, task.num_points)
    options = MeasureOptions(
        num_points=task.num_points,
        repetitions=task.repetitions,
        seconds_per_point=task.seconds / total,
    )
    modules = {
        shape.name: measure_module(
            shape,
            config,
            family,
            factory,
            options,
            lambda what: messages.send(Progress((what, total))),
        )
        for shape in config.model_shape().modules
    }
    return Profile(
        device=_device_name(task.device),
        precision=task.precision,
        parallel=Parallelism(tensor=task.tensor_parallel, sequence_parallel=task.sequence_parallel),
        modules=modules,
    )


def _check_gpus(num_needed: int) -> None:
    import torch

    found = torch.cuda.device_count()
    if found < num_needed:
        raise ConfigError(
            f"this machine has {found} GPUs, {num_needed} needed "
            f"(--device cpu measures on one core)"
        )


def _base_config(task: ProfileTask) -> Any:
    """What Megatron would make of a run's arguments."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=8 * task.tensor_parallel,
        num_attention_heads=task.tensor_parallel,
        params_dtype=torch.float32 if task.precision == "fp32" else torch.bfloat16,
        bf16=task.precision == "bf16",
        tensor_model_parallel_size=task.tensor_parallel,
        sequence_parallel=task.sequence_parallel,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        transformer_impl=task.layers,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )


def _device_name(device: str) -> str:
    import torch

    if device == "gpu":
        return str(torch.cuda.get_device_name())
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return f"{names[0] if names else 'CPU'}, one core"
