"""What the executor does for the actions that move activations to the host and back."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_dip.errors import PlanError
from megatron_dip.plan import Action, ActionType, Work
from megatron_dip.runtime.offload import OffloadedLayers, Offloader
from megatron_dip.runtime.program import Task
from megatron_dip.runtime.runner import SavedForward
from megatron_dip.runtime.timeline import Recorder

__all__ = ["OffloadActions"]


class OffloadActions:
    """Of one run of a plan on one rank.

    Args:
        offloader: That of the rank.
        stash: Forwards whose backward is still to come.
        recorder: Where copies, and waits for them, are recorded.
    """

    def __init__(
        self, offloader: Offloader, stash: Mapping[Work, SavedForward], recorder: Recorder
    ) -> None:
        self._offloader = offloader
        self._stash = stash
        self._recorder = recorder

    def handlers(self) -> Mapping[ActionType, Callable[[Action, Any], None]]:
        """As those of the executor."""
        return {
            ActionType.OFFLOAD: self._offload,
            ActionType.RELEASE: self._release,
            ActionType.RELOAD: self._reload,
        }

    def start(self, task: Task) -> OffloadedLayers | None:
        """For the forward of ``task``; None where none of its layers is offloaded."""
        layers = task.offload_layers
        return OffloadedLayers(self._offloader, layers) if layers else None

    def await_reload(self, action: Action, saved: SavedForward) -> None:
        """Let a backward wait for the copy back."""
        if saved.call.offload is not None:
            start = self._recorder.begin()
            saved.call.offload.wait()
            self._recorder.record(action, start, is_wait=True)

    def end(self, saved: SavedForward) -> None:
        """A backward has read what was moved."""
        if saved.call.offload is not None:
            saved.call.offload.end()

    def _offload(self, action: Action, task: Task) -> None:
        saved, offload = self._with_layers(task)
        # A stage of the same rank holds the output that this one has read, and reads it in no
        # backward before this one's.
        made = [self._stash[work].output for work in task.local_sources if work in self._stash]
        with self._offloader.copying(to_host=True):
            start = self._recorder.begin()
            offload.copy_out([*saved.input_tensors, *made])
            self._recorder.record(action, start)

    def _release(self, action: Action, task: Task) -> None:
        _, offload = self._with_layers(task)
        start = self._recorder.begin()
        offload.wait()
        self._recorder.record(action, start, is_wait=True)
        offload.release()

    def _reload(self, action: Action, task: Task) -> None:
        _, offload = self._with_layers(task)
        offload.take_again()
        with self._offloader.copying(to_host=False):
            start = self._recorder.begin()
            offload.copy_back()
            self._recorder.record(action, start)

    def _with_layers(self, task: Task) -> tuple[SavedForward, OffloadedLayers]:
        saved = self._stash.get(task.work)
        if saved is None or saved.call.offload is None:
            raise PlanError(
                "nothing is offloaded here (expected an entry of the plan's 'offload', and this "
                "action between forward and backward)"
            )
        return saved, saved.call.offload
