"""Work on many files by threads, with a progress bar."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["map_with_progress"]


def map_with_progress[InputT, OutputT](
    function: Callable[[InputT], OutputT],
    inputs: Sequence[InputT],
    *,
    description: str,
    show_progress: bool,
    num_threads: int,
) -> list[OutputT]:
    """``function`` of every input, in their order; the bar is written to standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    outputs = []
    with (
        Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not show_progress
        ) as progress,
        # Decoders work without holding the interpreter's lock.
        ThreadPoolExecutor(max(num_threads, 1)) as pool,
    ):
        task = progress.add_task(description, total=len(inputs))
        for output in pool.map(function, inputs):
            outputs.append(output)
            progress.advance(task)
    return outputs
