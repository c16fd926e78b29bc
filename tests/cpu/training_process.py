"""One rank of a training run, with Megatron imported once for all runs of a test session.

Imported by the process that ``forked_ranks`` starts: every rank is forked from one that has
imported everything and started nothing, and then runs what ``python -m megatron_dip.launch`` runs.
"""

import argparse
import functools
import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dip.integration import cpu_mode, hooks

cpu_mode.enable()
hooks.enable()

import megatron.training  # noqa: E402
import torch  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402
from mock_sequences import make_few_mock_sequences  # noqa: E402
from runtime_cases import CASE, partition_of  # noqa: E402

from megatron_dip.families.lavin.adapter_files import stages_of  # noqa: E402
from megatron_dip.families.packed.initialization import named_global_parameters  # noqa: E402
from megatron_dip.families.packed.model import PackedModel  # noqa: E402
from megatron_dip.integration import runner  # noqa: E402
from megatron_dip.integration.saving import protect_saving  # noqa: E402
from megatron_dip.launch import main  # noqa: E402
from megatron_dip.planner import make_plan  # noqa: E402

__all__ = ["run_rank"]

make_few_mock_sequences()
# Every parser reads the texts of Megatron's flags out of its sources, and a run makes two parsers.
inspect.getsource = functools.cache(inspect.getsource)
megatron.training.arguments.add_megatron_arguments(argparse.ArgumentParser())
# Loads the compiled code of planners and costs.
make_plan(CASE.problem(2), partition_of(CASE), evaluations=100)


def run_rank(environment: dict[str, str], arguments: Sequence[str], record: Path | None) -> None:
    """Launch the script that ``arguments`` name as one rank.

    ``record`` gets what :func:`_watch` sees, as JSON; nothing is watched without one.
    """
    os.environ.update(environment)
    torch.set_num_threads(1)
    if "--save" in arguments:
        # Else Megatron starts a process for this queue alone, which imports the script again.
        protect_saving()
        filesystem_async.get_write_results_queue("fork")
    seen = _watch(megatron.training.training) if record is not None else {}
    try:
        main(["--cpu", *arguments])
    except SystemExit as ending:
        # An orderly end before the last iteration.
        if ending.code:
            raise
    if record is not None:
        record.write_text(json.dumps(seen))


def _watch(training: Any) -> dict[str, Any]:
    """Collect losses and gradient norms where Megatron has them in full; the log rounds them.

    The loss is what ``train_step`` returns, over all data-parallel replicas; only ranks that hold
    the loss have one.
    """
    seen: dict[str, Any] = {
        "losses": [],
        "grad_norms": [],
        "validation_losses": [],
        "early_reductions": [],
        "gradients": {},
        "moved_bytes": 0,
    }
    train_step, evaluate = training.train_step, training.evaluate

    def watched_train_step(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        seen["losses"] += [float(value) for value in result[0].values()]
        seen["grad_norms"].append(float(result[5]))
        seen["gradients"] = _gradients(args[2])
        place = getattr(unwrap_model(args[2][0]), "dip", None)
        if place is not None:
            seen["moved_bytes"] = place.pipeline.executor.offloader.moved_bytes
        return result

    def watched_evaluate(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        seen["validation_losses"] += [float(value) for value in (result[0] or {}).values()]
        return result

    training.train_step, training.evaluate = watched_train_step, watched_evaluate
    bucket_reductions = runner.bucket_reductions

    def watched_reductions(*args: Any) -> Any:
        # Finalizing does not come here: it starts what is left by itself, so that numbers alone
        # cannot tell whether anything was early.
        made = bucket_reductions(*args)
        seen["early_reductions"] += [len(seen["grad_norms"])] * len(made)
        return made

    runner.bucket_reductions = watched_reductions
    return seen


def _gradients(model: Any) -> dict[str, tuple[float, float]]:
    """Norm and weighted sum of what each parameter of this rank has in Megatron's buffers.

    Nothing of models that are not this package's own: their parameters have no global names.
    """
    found: dict[str, tuple[float, float]] = {}
    if not isinstance(unwrap_model(model[0]), PackedModel):
        return found
    for stage in stages_of(model):
        for name, parameter in named_global_parameters(stage):
            if parameter.requires_grad:
                gradient = parameter.main_grad.detach().double().flatten()
                weights = torch.cos(torch.arange(len(gradient), dtype=torch.float64))
                found[name] = (float(gradient.norm()), float(gradient @ weights))
    return found
