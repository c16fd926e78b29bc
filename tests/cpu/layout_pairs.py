"""Layouts, optimizers and precisions of which every pair of values occurs in some run.

Six runs are the fewest: an optimizer needs a run for either value of every other setting.  So the
two runs of an optimizer differ in everything else, and three of the six have eight processes.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

__all__ = ["COMBINATIONS", "Combination", "uncovered_pairs"]

_DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce"
_OPTIMIZERS = {
    "adam": "",
    "distributed": _DISTRIBUTED,
    "gather": f"{_DISTRIBUTED} --overlap-param-gather",
}
# The first iteration changes the weights, the others leave them, so that nothing can drift apart:
# a sum that differs in its last bit may round a weight of 16 bits to its neighbour.
_ONE_STEP = "--min-lr 0 --lr-decay-style linear --lr-decay-iters 1"
_VALUES: dict[str, tuple[object, ...]] = {
    "num_pipeline_ranks": (2, 4),
    "num_tensor_ranks": (1, 2),
    "num_replicas": (1, 2),
    "optimizer": tuple(_OPTIMIZERS),
    "in_16_bits": (False, True),
}


@dataclass(frozen=True)
class Combination:
    """One value of every setting."""

    num_pipeline_ranks: int
    num_tensor_ranks: int
    """With sequence parallelism where there are several."""
    num_replicas: int
    optimizer: str
    in_16_bits: bool
    """Then microbatches should stay whole: parts of them round in other ways."""

    @property
    def num_processes(self) -> int:
        return self.num_pipeline_ranks * self.num_tensor_ranks * self.num_replicas

    @property
    def name(self) -> str:
        layout = f"pp{self.num_pipeline_ranks}-tp{self.num_tensor_ranks}-dp{self.num_replicas}"
        return f"{layout}-{self.optimizer}-{'bf16' if self.in_16_bits else 'fp32'}"

    @property
    def arguments(self) -> str:
        """Megatron's, of either schedule."""
        sizes = f"--pipeline-model-parallel-size {self.num_pipeline_ranks}"
        if self.num_tensor_ranks > 1:
            sizes += f" --tensor-model-parallel-size {self.num_tensor_ranks} --sequence-parallel"
        precision = f"--bf16 {_ONE_STEP}" if self.in_16_bits else ""
        return f"{sizes} {_OPTIMIZERS[self.optimizer]} {precision}"

    @property
    def gpt_cut(self) -> dict[str, Any]:
        """Of four layers: two segments, and ranks without a layer in one of them."""
        layers = {2: [[2, 0], [1, 1]], 4: [[1, 1, 0, 0], [0, 0, 1, 1]]}
        parts = {} if self.in_16_bits else {"sub_microbatch_tokens": 16}
        return {"language": {"layers": layers[self.num_pipeline_ranks], **parts}}


COMBINATIONS = (
    Combination(2, 1, 2, "gather", in_16_bits=True),
    Combination(4, 2, 1, "gather", in_16_bits=False),
    Combination(2, 2, 1, "distributed", in_16_bits=True),
    Combination(4, 1, 2, "distributed", in_16_bits=False),
    Combination(4, 1, 1, "adam", in_16_bits=True),
    Combination(2, 2, 2, "adam", in_16_bits=False),
)


def uncovered_pairs() -> set[tuple[tuple[str, object], tuple[str, object]]]:
    """Pairs of values of two settings that no run has."""
    pairs = list(combinations(_VALUES, 2))
    wanted = {
        ((one, a), (other, b)) for one, other in pairs for a in _VALUES[one] for b in _VALUES[other]
    }
    found = {
        ((one, getattr(run, one)), (other, getattr(run, other)))
        for run in COMBINATIONS
        for one, other in pairs
    }
    return wanted - found
