"""How long the host is held by ways to bring numbers to the device, behind a kernel that runs."""

import time
from collections.abc import Callable

import torch
from check_results import part_arguments, report
from hardware_queues import cycles_of

_WAIT_SECONDS = 0.05
_NUM_VALUES = 4096
_NUM_PATCH_VALUES = 4_000_000
"""About the patches of one microbatch of images, as fp32."""


def main() -> None:
    """Run the part."""
    options = part_arguments(__doc__).parse_args()
    on_gpu = options.device == "cuda"
    cycles = cycles_of(_WAIT_SECONDS) if on_gpu else 0
    found: dict[str, object] = {"seconds that the kernel runs": _WAIT_SECONDS if on_gpu else 0.0}
    for name, bring in ways(torch.device(options.device)).items():
        bring()  # The first time allocates.
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda._sleep(cycles)
        start = time.perf_counter()
        bring()
        held = time.perf_counter() - start
        found[name] = {"host us": held * 1e6, "waited": on_gpu and held > _WAIT_SECONDS / 2}
        if on_gpu:
            torch.cuda.synchronize()
    report(options.results, "copies", options.device, found)


def ways(device: torch.device) -> dict[str, Callable[[], object]]:
    """By name, each way as a function."""
    on_gpu = device.type == "cuda"
    values = list(range(_NUM_VALUES))
    small = torch.arange(_NUM_VALUES, pin_memory=on_gpu)
    pageable = torch.zeros(_NUM_PATCH_VALUES)
    pinned = torch.zeros(_NUM_PATCH_VALUES, pin_memory=on_gpu)
    on_device = torch.zeros(_NUM_PATCH_VALUES, device=device)
    side = torch.cuda.Stream() if on_gpu else None

    def on_side_stream() -> None:
        with torch.cuda.stream(side):
            on_device.copy_(pinned, non_blocking=True)

    return {
        "torch.tensor(list, device)": lambda: torch.tensor(values, device=device),
        "list to a pinned tensor, to(device)": lambda: torch.tensor(values, pin_memory=on_gpu).to(
            device, non_blocking=True
        ),
        "pinned numbers": lambda: small.to(device, non_blocking=True),
        "pageable patches": lambda: on_device.copy_(pageable, non_blocking=True),
        "pinned patches": lambda: on_device.copy_(pinned, non_blocking=True),
        "pinned patches on a side stream": on_side_stream,
        "item()": lambda: on_device[0].item(),
    }


if __name__ == "__main__":
    main()
