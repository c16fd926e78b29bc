"""One rank of the equality test of what is trained: every case under both schedules, in one launch.

Started by ``test_parts.py``.  Megatron is set up once; models, optimizers and steps are its own,
made anew for every case and schedule.  ``args`` are changed in between as a command line would.
"""

import json
import sys
from pathlib import Path
from typing import Any

import megatron.training.training as training
import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from megatron.training import get_args, get_timers
from megatron.training.arguments import parse_and_validate_args
from megatron.training.checkpointing import save_checkpoint
from megatron.training.initialize import initialize_megatron
from parts_cases import CASES, NUM_ITERATIONS, RATE, PartsCase

from megatron_dip.errors import ConfigError
from megatron_dip.families.arguments import add_arguments
from megatron_dip.families.iterators import data_sets
from megatron_dip.families.lavin.adapter_files import stages_of
from megatron_dip.families.packed.initialization import named_global_parameters
from megatron_dip.families.packed.parts import learning_rate_factor
from megatron_dip.families.provider import build_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from pretrain_vlm import forward_step


class Run:
    """One model with its optimizer and data."""

    def __init__(self, load: Path | None = None) -> None:
        args = get_args()
        args.iteration = args.consumed_train_samples = 0
        args.load = None if load is None else str(load)
        self.model, self.optimizer, self.scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder, build_model
        )
        self.config = get_model_config(self.model[0])
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.timers = get_timers()
        self.config.finalize_model_grads_func = finalize_model_grads
        if args.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.model]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.data = training.build_train_valid_test_data_iterators(data_sets)[0]

    def steps(self, first: int, last: int) -> dict[str, list[float]]:
        """Losses (on ranks that have one) and gradient norms of some iterations."""
        losses, norms, flops = [], [], []
        for iteration in range(first, last):
            get_args().curr_iteration = iteration
            result = training.train_step(
                forward_step,
                self.data,
                self.model,
                self.optimizer,
                self.scheduler,
                self.config,
                get_forward_backward_func(),
                iteration,
            )
            losses += [float(value) for value in result[0].values()]
            norms.append(float(result[5]))
            flops.append(training.num_floating_point_operations(get_args(), 8))
            get_args().consumed_train_samples += get_args().global_batch_size
        return {"losses": losses, "norms": norms, "flops": flops}

    def rates(self) -> dict[str, float]:
        """Learning rates of groups that this rank has parameters of, by their factor."""
        found = {}
        for group in self.optimizer.param_groups:
            factors = {learning_rate_factor(parameter) for parameter in group["params"]}
            for factor in factors:
                found[f"{factor:g}"] = group["lr"]
        return found

    def trained(self) -> list[str]:
        """Names of what is trained on this rank."""
        return [
            name
            for stage in stages_of(self.model)
            for name, parameter in named_global_parameters(stage)
            if parameter.requires_grad
        ]

    def changed(self, before: dict[str, torch.Tensor]) -> list[str]:
        """Names of parameters that are not as they were."""
        return [
            name for name, value in self.values().items() if not torch.equal(value, before[name])
        ]

    def values(self) -> dict[str, torch.Tensor]:
        """Copies of all parameters."""
        return {
            name: parameter.detach().clone()
            for stage in stages_of(self.model)
            for name, parameter in named_global_parameters(stage)
        }


def run_case(case: PartsCase, folder: Path, is_dip: bool) -> dict[str, Any]:
    """One case under one schedule; what the test compares."""
    args = get_args()
    args.dip_config = str(folder / f"{case.name}.yaml")
    args.dip_schedule = is_dip
    args.overlap_grad_reduce = args.use_distributed_optimizer = case.is_distributed
    # Megatron's distributed optimizer is Adam.
    args.optimizer, args.lr = ("adam", 0.002) if case.is_distributed else ("sgd", RATE)
    args.min_lr = args.lr
    run = Run()
    before = run.values()
    seen: dict[str, Any] = run.steps(0, NUM_ITERATIONS - 1)
    if case.resumes and is_dip:
        args.save = str(folder / case.name)
        save_checkpoint(NUM_ITERATIONS - 1, run.model, run.optimizer, run.scheduler, 0)
    for name, values in run.steps(NUM_ITERATIONS - 1, NUM_ITERATIONS).items():
        seen[name] += values
    seen["mean_flops"] = training.num_floating_point_operations(get_args(), 8)
    seen["params_norm"] = training.calc_params_l2_norm(run.model)
    training.report_theoretical_memory(get_args(), num_microbatches=4, verbose=True)
    seen |= {"trained": run.trained(), "changed": run.changed(before), "rates": run.rates()}
    if case.resumes and is_dip:
        again = Run(load=folder / case.name)
        seen["resumed"] = again.steps(NUM_ITERATIONS - 1, NUM_ITERATIONS)
        seen["resumed"]["rates"] = again.rates()
        seen["refusal"] = refusal(folder, folder / case.name)
    return seen


def refusal(folder: Path, load: Path) -> str:
    """What a run of the first case says of a checkpoint of another one."""
    get_args().dip_config = str(folder / f"{CASES[0].name}.yaml")
    try:
        Run(load=load)
    except ConfigError as error:
        return str(error)
    return ""


def main() -> None:
    """Run all cases; a line of JSON for each of them and schedule."""
    parse_and_validate_args(extra_args_provider=add_arguments)
    initialize_megatron()
    folder = Path(get_args().dip_config).parent
    for case in CASES:
        for is_dip in (False, True):
            seen = run_case(case, folder, is_dip)
            print("SEEN " + json.dumps(seen | {"case": case.name, "is_dip": is_dip}), flush=True)
    dist.barrier()


if __name__ == "__main__":
    main()
