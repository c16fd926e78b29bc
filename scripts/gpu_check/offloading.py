"""Activations moved to the host and back: equal gradients, less memory, and a host that runs ahead.

A kernel that runs for a while stands in front of everything, as the work of a plan does that is
queued ahead.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from check_results import part_arguments, report
from hardware_queues import cycles_of
from torch import Tensor

from megatron_dip.runtime import create_recorder
from megatron_dip.runtime.offload import OffloadedLayers, Offloader

_WAIT_SECONDS = 0.1
_SIZES = {"cuda": (8192, 2048), "cpu": (64, 32)}
"""Rows and width, by device: on a GPU activations of 2.7 GB."""
_NUM_LAYERS = 4


def main() -> None:
    """Run the part."""
    options = part_arguments(__doc__).parse_args()
    device = torch.device(options.device)
    report(options.results, "offloading", options.device, measured(device))


def measured(device: torch.device) -> dict[str, object]:
    """What a forward and a backward with all layers offloaded give beside those without."""
    offloader = Offloader(device)
    offloader.most_bytes = 8 * 2**30
    bench = _Bench(device, *_SIZES[device.type])
    expected = bench.gradients()
    bench.gradients(offloader)  # The first one takes memory of the host.
    with _no_synchronising(device):
        found = bench.gradients(offloader)
    bench.recorder.finish()
    spans = {str(span.label): span.end_us - span.start_us for span in bench.recorder.spans}
    return {
        "equal gradients": all(map(torch.equal, found, expected)),
        "bytes moved": bench.moved_bytes,
        "bytes that left the device": bench.freed_bytes,
        "bytes that came back": bench.taken_bytes,
        # Bytes in a microsecond are megabytes in a second.
        "GB/s": {name: bench.moved_bytes / us / 1e3 for name, us in spans.items()},
        "host us": {name: seconds * 1e6 for name, seconds in bench.steps.items()},
        "host waited": device.type == "cuda" and sum(bench.steps.values()) > _WAIT_SECONDS / 2,
    }


@contextmanager
def _no_synchronising(device: torch.device) -> Iterator[None]:
    """Within it, what makes the host wait for the device is an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _Bench:
    """Some layers, the same weights and rows every time."""

    def __init__(self, device: torch.device, num_rows: int, width: int) -> None:
        torch.manual_seed(1)
        self.layers = [
            torch.nn.Sequential(
                torch.nn.LayerNorm(width),
                torch.nn.Linear(width, 4 * width),
                torch.nn.GELU(),
                torch.nn.Linear(4 * width, width),
            ).to(device)
            for _ in range(_NUM_LAYERS)
        ]
        self.rows = torch.randn(num_rows, width).to(device)
        self.on_gpu = device.type == "cuda"
        self.cycles = cycles_of(_WAIT_SECONDS) if self.on_gpu else 0
        self.recorder = create_recorder(device)
        self.steps: dict[str, float] = {}
        """Seconds of the host in each."""
        self.moved_bytes = self.freed_bytes = self.taken_bytes = 0

    def gradients(self, offloader: Offloader | None = None) -> list[Tensor]:
        """Of the rows and of all weights, behind a kernel that runs for a while."""
        leaf = self.rows.clone().requires_grad_()
        layers = tuple(range(_NUM_LAYERS))
        offload = None if offloader is None else OffloadedLayers(offloader, layers)
        if self.on_gpu:
            torch.cuda._sleep(self.cycles)
        loss = self._timed("forward", lambda: self._forward(leaf, offload))
        if offloader is not None and offload is not None:
            self._move(offloader, offload, leaf)
        self._timed("backward", loss.backward)
        if offload is not None:
            offload.end()
        weights = [weight for layer in self.layers for weight in layer.parameters()]
        found = [one.grad for one in (leaf, *weights) if one.grad is not None]
        for weight in weights:
            weight.grad = None
        return found

    def _forward(self, leaf: Tensor, offload: OffloadedLayers | None) -> Tensor:
        rows = leaf
        for layer in self.layers:
            with nullcontext() if offload is None else offload.keeping():
                rows = rows + layer(rows)
        return rows.sum()

    def _move(self, offloader: Offloader, offload: OffloadedLayers, leaf: Tensor) -> None:
        before = offloader.moved_bytes
        with offloader.copying(to_host=True):
            start = self.recorder.begin()
            self._timed("copy out", lambda: offload.copy_out([leaf]))
            self.recorder.record("to the host", start)
        self.moved_bytes = offloader.moved_bytes - before
        offload.wait()
        held = self._allocated()
        self._timed("release", offload.release)
        less = self._allocated()
        self._timed("take again", offload.take_again)
        self.freed_bytes, self.taken_bytes = held - less, self._allocated() - less
        with offloader.copying(to_host=False):
            start = self.recorder.begin()
            self._timed("copy back", offload.copy_back)
            self.recorder.record("back", start)
        offload.wait()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.on_gpu else 0

    def _timed[Result](self, name: str, do: Callable[[], Result]) -> Result:
        start = time.perf_counter()
        result = do()
        self.steps[name] = time.perf_counter() - start
        return result


if __name__ == "__main__":
    main()
