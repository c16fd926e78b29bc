"""VLM-XL and T2V-XL on 3,072 to 16,384 GPUs.

Every replica has a batch of its own.  A step ends when the slowest replica has ended and gradients
and weights have been exchanged over the network, one after the other.  The replicas with most work
are planned, because the slowest is among them; MFU is that of all replicas.  Times are those of the
device preset, collectives included; the cut is by the paper's rule.  Published: MFU .36 for VLM-XL
and .39 for T2V-XL, up to 82.8% over the baselines.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_dip.costs.builder import ProblemBuilder
from megatron_dip.costs.flops import batch_flops
from megatron_dip.costs.machine import ClusterConfig, cluster_builder
from megatron_dip.costs.mixtures import draw_microbatches
from megatron_dip.errors import InfeasibleError
from megatron_dip.planner import make_plan
from megatron_dip.simulator import useful_work_us
from megatron_dip.workload import Problem

from .chart import Axis, Bars, draw_bars
from .cuts import rule_partition
from .results import Result, markdown, tracked
from .setting import NUM_MICROBATCHES, cluster_of, mixture_of, shape_of
from .systems import MEGATRON, NNSCALER, OPTIMUS, Systems

__all__ = ["run"]

_CASES = (("vlm_xl", 8192), ("vlm_xl", 16384), ("t2v_xl", 3072), ("t2v_xl", 6144))
_PUBLISHED_MFU = {"vlm_xl": 0.36, "t2v_xl": 0.39}
_PUBLISHED_GAIN = 0.828
_SYSTEMS = (MEGATRON, OPTIMUS, NNSCALER)
_OURS = "ours"
_GRADIENT_BYTES, _WEIGHT_BYTES = 4, 2
"""Of a parameter, on the network."""


class Cluster(NamedTuple):
    """One case."""

    model: str
    config: ClusterConfig
    builder: ProblemBuilder
    batches: list[Sequence[Any]]
    """Per replica, sizes of its items."""
    problems: list[Problem]
    """Of the replicas with most work, that with most first."""


def run(quick: bool) -> Result:
    """All cases; ``quick`` two small replicas of one."""
    cases = _CASES[2:3] if quick else _CASES
    size, num_planned, evaluations = (4, 1, 4) if quick else (NUM_MICROBATCHES, 4, 60)
    rows: list[dict[str, Any]] = []
    for model, num_gpus in tracked(cases, "large clusters"):
        cluster = _draw(model, num_gpus, 2 if quick else None, size, num_planned)
        fit = [cluster.builder.build(batch) for batch in cluster.batches[:2]]
        slowest_us = _slowest_us(cluster, fit, evaluations)
        exchange_us = _exchange_us(cluster)
        total_flops = sum(batch_flops(cluster.builder.model, b) for b in cluster.batches)
        gpus = cluster.config.num_model_gpus * len(cluster.batches)
        peak = cluster.config.device().peak_flops_per_us
        rows.append(
            {
                "model": model,
                "gpus": num_gpus,
                "replicas": len(cluster.batches),
                "ranks": cluster.config.pipeline_parallel,
                "exchange_s": exchange_us / 1e6,
                "seconds": {n: _or_none(t, exchange_us, 1e-6) for n, t in slowest_us.items()},
                "mfu": {
                    name: None if us is None else total_flops / (gpus * peak * (us + exchange_us))
                    for name, us in slowest_us.items()
                },
                "published_mfu": _PUBLISHED_MFU[model],
            }
        )
    data = {"published_gain": _PUBLISHED_GAIN, "cases": rows}
    return Result(data=data, table=_table(rows), picture=_picture(rows))


def _or_none(time_us: float | None, more_us: float, unit: float) -> float | None:
    return None if time_us is None else (time_us + more_us) * unit


def _draw(
    model: str, num_gpus: int, num_replicas: int | None, size: int, num_planned: int
) -> Cluster:
    config = cluster_of(f"h100_{num_gpus}")
    builder = cluster_builder(shape_of(model), config)
    replicas = range(num_replicas or config.data_parallel)
    batches = [draw_microbatches(mixture_of(model), size, 1000 + seed) for seed in replicas]
    problems = [builder.build(batch) for batch in batches]
    problems.sort(key=useful_work_us, reverse=True)
    return Cluster(model, config, builder, batches, problems[:num_planned])


def _slowest_us(
    cluster: Cluster, fit: Sequence[Problem], evaluations: int
) -> dict[str, float | None]:
    """Per system, the longest of the planned replicas; None where it cannot run one of them."""
    partition = rule_partition(fit)
    systems = Systems(fit, partition)
    times: dict[str, list[float]] = {name: [] for name in (*_SYSTEMS, _OURS)}
    for problem in cluster.problems:
        plan = make_plan(problem, partition, evaluations=evaluations)
        assert plan.estimate is not None
        times[_OURS].append(plan.estimate.makespan_us)
        for name in _SYSTEMS:
            try:
                times[name].append(systems.run(name, problem).makespan_us)
            except InfeasibleError:
                continue
    whole = len(cluster.problems)
    return {name: max(found) if len(found) == whole else None for name, found in times.items()}


def _exchange_us(cluster: Cluster) -> float:
    """Gradients reduced and scattered, weights gathered, over the network, by the fullest rank."""
    config = cluster.config
    trained = [module for module in cluster.builder.model.modules if module.trains_any]
    parameters = sum(module.num_layers * module.layer_linear_parameters() for module in trained)
    per_rank = parameters / config.num_model_gpus
    share = (config.data_parallel - 1) / config.data_parallel
    moved = share * per_rank * (_GRADIENT_BYTES + _WEIGHT_BYTES)
    return moved / config.link_bytes_per_us(config.num_gpus)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    def gain(row: dict[str, Any]) -> str:
        mfu = row["mfu"]
        known = [mfu[name] for name in _SYSTEMS if mfu[name] is not None]
        return f"{mfu[_OURS] / min(known) - 1:+.1%}, {mfu[_OURS] / max(known) - 1:+.1%}"

    return markdown(
        [
            "",
            "GPUs",
            "replicas x ranks",
            *(f"MFU, {name}" for name in (*_SYSTEMS, _OURS)),
            "published",
            "ours over the worst, the best",
            "step, s",
        ],
        [
            [
                row["model"].replace("_", "-").upper(),
                f"{row['gpus']:,}",
                f"{row['replicas']} x {row['ranks']}",
                *(
                    "-" if row["mfu"][name] is None else f"{row['mfu'][name]:.3f}"
                    for name in (*_SYSTEMS, _OURS)
                ),
                f"{row['published_mfu']:.2f}",
                gain(row),
                f"{row['seconds'][_OURS]:.1f}",
            ]
            for row in rows
        ],
    )


def _picture(rows: Sequence[dict[str, Any]]) -> str:
    groups = [
        Bars(
            name,
            [row["mfu"][name] for row in rows],
            [row["published_mfu"] for row in rows] if name == _OURS else (),
        )
        for name in (*_SYSTEMS, _OURS)
    ]
    return draw_bars(
        "Model FLOPs utilisation on large clusters",
        [f"{row['model'].replace('_', '-').upper()}, {row['gpus']:,} GPUs" for row in rows],
        Axis("MFU", 0.0, 0.5),
        groups,
    )
