"""VLM-XL and T2V-XL on 3,072 to 16,384 GPUs.

Every replica has a batch of its own.  A step ends when the slowest replica has ended and gradients
and weights have been exchanged over the network, one after the other.  The replicas with most work
are planned, because the slowest is among them; MFU is that of all replicas.  Once with the
microbatches that every replica drew, once with whole microbatches assigned to replicas.  Times are
those of the device preset, collectives included; the cut is by the paper's rule.  Published: MFU
.36 for VLM-XL and .39 for T2V-XL, up to 82.8% over the baselines.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from replicas_batches import Batches

from megatron_dip.costs.flops import batch_flops
from megatron_dip.costs.machine import ClusterConfig
from megatron_dip.costs.shapes import ModelShape
from megatron_dip.errors import InfeasibleError
from megatron_dip.partition import Partition
from megatron_dip.planner import make_plan

from .chart import Axis, Bars, draw_bars
from .cuts import rule_partition
from .results import Result, markdown, tracked
from .setting import NUM_MICROBATCHES, ROOT, cluster_of
from .systems import MEGATRON, MEGATRON_4, NNSCALER, OPTIMUS, Systems

__all__ = ["run"]

_CASES = (("vlm_xl", 8192), ("vlm_xl", 16384), ("t2v_xl", 3072), ("t2v_xl", 6144))
_PUBLISHED_MFU = {"vlm_xl": 0.36, "t2v_xl": 0.39}
_PUBLISHED_GAIN = 0.828
_SYSTEMS = (MEGATRON, MEGATRON_4, OPTIMUS, NNSCALER)
_OURS, _OURS_ASSIGNED, _BEST_ASSIGNED = "ours", "ours, assigned", "best other, assigned"
_FIRST_SEED = 1000
_GRADIENT_BYTES, _WEIGHT_BYTES = 4, 2
"""Of a parameter, on the network."""


def run(quick: bool) -> Result:
    """All cases; ``quick`` two small replicas of one."""
    cases = _CASES[2:3] if quick else _CASES
    size, evaluations = (4, 4) if quick else (NUM_MICROBATCHES, 60)
    rows: list[dict[str, Any]] = []
    for model, num_gpus in tracked(cases, "large clusters"):
        config = cluster_of(f"h100_{num_gpus}")
        seeds = range(_FIRST_SEED, _FIRST_SEED + (2 if quick else config.data_parallel))
        given = Batches.draw(
            ROOT, model, config.name, seeds, num_microbatches=size, whole_sequences=True
        )
        shape = given.builder.model
        fit = [given.problem(replica) for replica in (0, 1)]
        partition = rule_partition(fit)
        systems = Systems(fit, partition)
        slowest_us = _slowest_us(given, systems, partition, evaluations)
        assigned_us = _slowest_us(given.assigned(within=False), systems, partition, evaluations)
        known_us = [us for name in _SYSTEMS if (us := assigned_us[name]) is not None]
        slowest_us[_OURS_ASSIGNED] = assigned_us[_OURS]
        slowest_us[_BEST_ASSIGNED] = min(known_us, default=None)
        exchange_us = _exchange_us(config, shape)
        total_flops = sum(batch_flops(shape, given.contents(n)) for n in range(len(seeds)))
        gpus_peak = config.num_model_gpus * len(seeds) * config.device().peak_flops_per_us
        step_us = {n: None if us is None else us + exchange_us for n, us in slowest_us.items()}
        rows.append(
            {
                "model": model,
                "gpus": num_gpus,
                "replicas": len(seeds),
                "ranks": config.pipeline_parallel,
                "exchange_s": exchange_us / 1e6,
                "seconds": {n: us and us / 1e6 for n, us in step_us.items()},
                "mfu": {n: us and total_flops / (gpus_peak * us) for n, us in step_us.items()},
                "assigned_s": {n: us and (us + exchange_us) / 1e6 for n, us in assigned_us.items()},
                "most_work_over_mean": float(given.work_us.max() / given.work_us.mean()),
                "published_mfu": _PUBLISHED_MFU[model],
            }
        )
    data = {"published_gain": _PUBLISHED_GAIN, "cases": rows}
    return Result(data=data, table=_table(rows), picture=_picture(rows))


def _slowest_us(
    batches: Batches, systems: Systems, partition: Partition, evaluations: int
) -> dict[str, float | None]:
    """Per system, the longest of the heaviest replicas; None where it cannot run one of them."""
    times: dict[str, list[float]] = {name: [] for name in (*_SYSTEMS, _OURS)}
    for replica in batches.heaviest:
        problem = batches.problem(replica)
        plan = make_plan(problem, partition, evaluations=evaluations)
        assert plan.estimate is not None
        times[_OURS].append(plan.estimate.makespan_us)
        for name in _SYSTEMS:
            try:
                times[name].append(systems.run(name, problem).makespan_us)
            except InfeasibleError:
                continue
    whole = len(batches.heaviest)
    return {name: max(found) if len(found) == whole else None for name, found in times.items()}


def _exchange_us(config: ClusterConfig, shape: ModelShape) -> float:
    """Gradients reduced and scattered, weights gathered, over the network, by the fullest rank."""
    trained = [module for module in shape.modules if module.trains_any]
    parameters = sum(module.num_layers * module.layer_linear_parameters() for module in trained)
    per_rank = parameters / config.num_model_gpus
    share = (config.data_parallel - 1) / config.data_parallel
    moved = share * per_rank * (_GRADIENT_BYTES + _WEIGHT_BYTES)
    return moved / config.link_bytes_per_us(config.num_gpus)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = (*_SYSTEMS, _OURS, _BEST_ASSIGNED, _OURS_ASSIGNED)

    def gain(row: Mapping[str, Any]) -> str:
        mfu = row["mfu"]
        known = [mfu[name] for name in _SYSTEMS if mfu[name] is not None]
        return f"{mfu[_OURS] / min(known) - 1:+.1%}, {mfu[_OURS] / max(known) - 1:+.1%}"

    return markdown(
        [
            "",
            "GPUs",
            "replicas x ranks",
            *(f"MFU, {name}" for name in names),
            "published",
            "ours over the worst, the best",
            "step, s",
        ],
        [
            [
                row["model"].replace("_", "-").upper(),
                f"{row['gpus']:,}",
                f"{row['replicas']} x {row['ranks']}",
                *("-" if row["mfu"][name] is None else f"{row['mfu'][name]:.3f}" for name in names),
                f"{row['published_mfu']:.2f}",
                gain(row),
                f"{row['seconds'][_OURS]:.1f}",
            ]
            for row in rows
        ],
    )


def _picture(rows: Sequence[Mapping[str, Any]]) -> str:
    groups = [
        Bars(
            name,
            [row["mfu"][name] for row in rows],
            [row["published_mfu"] for row in rows] if name == _OURS else (),
        )
        for name in (*_SYSTEMS, _OURS, _OURS_ASSIGNED)
    ]
    return draw_bars(
        "Model FLOPs utilisation on large clusters",
        [f"{row['model'].replace('_', '-').upper()}, {row['gpus']:,} GPUs" for row in rows],
        Axis("MFU", 0.0, 0.5),
        groups,
    )
