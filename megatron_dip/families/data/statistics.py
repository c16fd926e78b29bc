"""What the microbatches of a data set hold, in numbers: how much batches vary."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from megatron_dip.families.vlm.dataset import VlmDataset

__all__ = ["MicrobatchStatistics", "microbatch_statistics", "statistics_table"]


@dataclass(frozen=True, kw_only=True)
class MicrobatchStatistics:
    """One number of every microbatch looked at."""

    name: str
    values: tuple[int, ...]

    def quantile(self, share: float) -> float:
        """The value that ``share`` of the microbatches do not exceed."""
        return float(np.quantile(self.values, share))


def microbatch_statistics(
    dataset: VlmDataset, *, num_microbatches: int, micro_batch_size: int
) -> tuple[MicrobatchStatistics, ...]:
    """Counts of the first ``num_microbatches`` microbatches; no image is read."""
    counts: dict[str, list[int]] = {
        "images": [],
        "image tokens": [],
        "patches (vision)": [],
        "tokens (language)": [],
        "samples": [],
    }
    for start in range(0, num_microbatches * micro_batch_size, micro_batch_size):
        packs = range(start, start + micro_batch_size)
        numbers = [number for i in packs for number in dataset.sample_numbers(i)]
        records = [dataset.index.samples[number] for number in numbers]
        grids = [grid for i in packs for grid in dataset.grids(i)]
        counts["images"].append(sum(len(record.images) for record in records))
        counts["image tokens"].append(sum(grid.num_tokens for grid in grids))
        counts["patches (vision)"].append(sum(grid.num_patches for grid in grids))
        counts["tokens (language)"].append(sum(record.num_tokens for record in records))
        counts["samples"].append(len(records))
    return tuple(MicrobatchStatistics(name=n, values=tuple(v)) for n, v in counts.items())


def statistics_table(statistics: Sequence[MicrobatchStatistics]) -> Table:
    """The same as a table: least, quartiles, most."""
    table = Table(title="per microbatch")
    table.add_column("")
    shares = {"least": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "most": 1.0}
    for column in shares:
        table.add_column(column, justify="right")
    for one in statistics:
        table.add_row(one.name, *(f"{one.quantile(share):.0f}" for share in shares.values()))
    return table
