"""Files of adapters in a run of Megatron: loaded when the towers have weights, saved at the end.

Adapters know which towers they were tuned for, so they are loaded after Megatron has loaded its
checkpoint, and the optimizer takes its own copies of them again.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_dip.families.arguments import add_arguments
from megatron_dip.families.lavin.checkpoint import load_adapters, save_adapters
from megatron_dip.families.packed.model import PackedModel
from megatron_dip.families.packed.stage import StageModule

__all__ = ["AdapterFiles", "add_adapter_arguments", "stages_of"]

logger = logging.getLogger(__name__)


def add_adapter_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron's ``extra_args_provider``: those of all scripts here, and files of adapters."""
    add_arguments(parser)
    group = parser.add_argument_group(title="adapters")
    group.add_argument(
        "--load-adapters",
        metavar="FILE",
        default=None,
        help="Adapters to go on from: a file of --save-adapters or a released checkpoint.",
    )
    group.add_argument(
        "--save-adapters", metavar="FILE", default=None, help="File for the adapters at the end."
    )
    return parser


def stages_of(model: Sequence[torch.nn.Module]) -> list[StageModule]:
    """The stages in the chunks that Megatron's ``get_model`` made, whatever wraps them."""
    stages: list[StageModule] = []
    for chunk in unwrap_model(list(model)):
        assert isinstance(chunk, PackedModel), "made by build_model"
        stages += chunk.stages()
    return stages


class AdapterFiles:
    """What ``--load-adapters`` and ``--save-adapters`` ask for, around a call of ``pretrain``.

    Args:
        load: Adapters to go on from; a run that resumes has its own and leaves them.
        save: Where the adapters go at an orderly end, also at one before the last iteration.
    """

    def __init__(self, load: str | Path | None, save: str | Path | None) -> None:
        self._load, self._save = load, save
        self._stages: list[StageModule] | None = None

    def install(self) -> None:
        """Stand behind Megatron's set-up of model and optimizer; before ``pretrain``."""
        from megatron.training import training

        set_up = training.setup_model_and_optimizer

        def set_up_with_adapters(*args: Any, **kwargs: Any) -> Any:
            model, optimizer, scheduler = set_up(*args, **kwargs)
            self._take(model, optimizer)
            return model, optimizer, scheduler

        training.setup_model_and_optimizer = set_up_with_adapters

    def __enter__(self) -> "AdapterFiles":
        self.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write the adapters at every orderly end.

        Megatron leaves its loop by ``sys.exit`` after ``--exit-interval``, a duration or a signal.
        """
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.finish()

    def finish(self) -> None:
        """Write the adapters where that was asked for; a collective call of the whole world.

        Raises:
            CheckpointError: The file cannot be written.
        """
        # Without a model, the run ended before it had one.
        if self._save is None or self._stages is None:
            return
        if mpu.get_data_parallel_rank() == 0:
            save_adapters(self._save, self._stages, mpu.get_model_parallel_group())

    def _take(self, model: Sequence[torch.nn.Module], optimizer: Any) -> None:
        self._stages = stages = stages_of(model)
        if self._load is None:
            return
        if get_args().iteration > 0:
            logger.warning(
                "--load-adapters %s is left alone: the run goes on from iteration %d, whose "
                "checkpoint holds its adapters",
                self._load,
                get_args().iteration,
            )
            return
        load_adapters(self._load, stages, mpu.get_model_parallel_group())
        if optimizer is not None:
            # In 16 bits the optimizer steps copies of its own, made before.
            optimizer.reload_model_params()
