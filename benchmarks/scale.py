"""What a start and a step cost that grow with the number of GPUs, measured on one machine.

    .venv/bin/python benchmarks/scale.py [--output RESULTS.json]     measure, and draw
    .venv/bin/python benchmarks/scale.py --draw RESULTS.json         draw what was measured

- set-up: one process plays rank 0 of N on torch's ``fake`` backend.  It makes Megatron's groups
  (TP8, PP4) and ours, with rank lists as the gathers of N ranks bring them.  What the network takes
  is not in it; the number of groups, the seconds of the host and its memory are.
- inputs: what rank 0 has to read and write in the store of torch.distributed when N ranks compare
  their inputs; the store is a real one, on this machine.
- plans: size, packing and unpacking of plans of 64 microbatches of the five models.
- broadcast: of the largest of them, over gloo, on a few processes of this machine.
- weights: initial weights of the ranks of VLM-M, TP8 and PP4, drawn as shards and in full.
"""

import json
import os
import pickle
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from scale_picture import draw_scale

ROOT = Path(__file__).resolve().parents[1]
WORLDS = (64, 256, 1024, 4096, 16384)
TENSOR, PIPELINE = 8, 4
# Of every channel where a GPU has one hardware queue, as with CUDA_DEVICE_MAX_CONNECTIONS=1.
COMMUNICATORS = 2
MODELS = {"vlm_s": "h100_16", "vlm_m": "h100_32", "vlm_l": "h100_64"} | {
    "t2v_s": "h100_16",
    "t2v_l": "h100_64",
}
MICROBATCHES = 64
BROADCAST_RANKS = (2, 4, 8)
PICTURE = ROOT / "docs" / "scale.svg"
LIMIT_SECONDS = 600.0


def main(
    output: Annotated[Path, typer.Option(help="Where results go (JSON).")] = (
        ROOT / "runs" / "scale.json"
    ),
    draw: Annotated[Path | None, typer.Option(help="Results to draw; measures nothing.")] = None,
    part: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, write and draw; a part of it is what a child process measures."""
    if part is not None:
        name, *arguments = json.loads(part)
        print(json.dumps(PARTS[name](*arguments)))
        return
    if draw is None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(measure(), indent=1) + "\n")
        draw = output
    PICTURE.write_text(draw_scale(json.loads(draw.read_text())))


def measure() -> dict[str, Any]:
    """All parts, each in a process of its own."""
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "layout": f"TP{TENSOR} PP{PIPELINE}",
        "setup": {world: in_process("setup", world) for world in WORLDS},
        "inputs": {world: in_process("inputs", world) for world in WORLDS},
        "plans": {model: in_process("plans", model) for model in MODELS},
        "weights": in_process("weights"),
    }
    largest = max(plan["bytes"] for plan in results["plans"].values())
    results["broadcast"] = {n: broadcast(n, largest) for n in BROADCAST_RANKS}
    return results


def in_process(name: str, *arguments: Any, **environment: str) -> Any:
    command = [sys.executable, __file__, "--part", json.dumps([name, *arguments])]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        timeout=LIMIT_SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(name, *arguments, found, flush=True)
    return found


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Stopwatch:
    """Seconds of this process, its memory and its process groups, step by step."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._before = (time.process_time(), resident_mib(), 0)

    def step(self) -> dict[str, float]:
        now = (time.process_time(), resident_mib(), self.num_calls)
        seconds, mib, calls = (b - a for a, b in zip(self._before, now, strict=True))
        self._before = now
        return {"seconds": round(seconds, 4), "mib": round(mib, 2), "new_group_calls": int(calls)}


def setup(world: int) -> dict[str, Any]:
    """Groups of rank 0 among ``world``."""
    import torch.distributed as dist
    from megatron.core import mpu
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_dip.integration import groups
    from megatron_dip.partition import load_partition
    from megatron_dip.plan import pipeline_channels
    from megatron_dip.runtime import create_channel_groups

    watch = Stopwatch()
    make = dist.new_group

    def counted(ranks: Any = None, *rest: Any, backend: Any = None, **more: Any) -> Any:
        watch.num_calls += 1
        return make(ranks, *rest, backend="fake", **more)

    # Megatron and ours ask for gloo groups, too, whose peers are not there.
    dist.new_group = counted
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    mpu.initialize_model_parallel(TENSOR, PIPELINE)
    megatron = watch.step()
    dist.all_gather_object = gathered_by(world)
    partition = load_partition(ROOT / "configs" / "partitions" / "vlm_m.json")
    channels = pipeline_channels(partition, {"vision": (), "language": ("vision",)})
    pipeline = dist.get_process_group_ranks(mpu.get_pipeline_model_parallel_group())
    pipelines = groups.gather_distinct(pipeline)
    own = create_channel_groups(channels, pipelines, 60, num_communicators=COMMUNICATORS)
    transfers = watch.step()
    replica = groups.replica_ranks()
    groups.create_agreement(partition, replica, 60)
    groups.create_group(groups.gather_distinct(replica), 60, "times")
    groups.gather_places((), is_owner=True)
    return {
        "megatron": megatron,
        "transfers": transfers | {"own_groups": COMMUNICATORS * len(own)},
        "plans": watch.step(),
    }


def gathered_by(world: int) -> Any:
    """``all_gather_object`` of rank lists, and of places, as all ranks would have given them.

    Ranks are numbered as Megatron numbers them: tensor, then data, then pipeline.
    """
    per_stage = world // PIPELINE

    def gather(gathered: list[Any], own: Sequence[Any]) -> None:
        lists: list[Any]
        if isinstance(own, tuple):
            lists = [own] * world
        elif len(own) == 1:
            lists = [[r] for r in range(world)]
        elif len(own) == PIPELINE:
            lists = [[r % per_stage + p * per_stage for p in range(PIPELINE)] for r in range(world)]
        elif len(own) == TENSOR:
            lists = [[r - r % TENSOR + t for t in range(TENSOR)] for r in range(world)]
        else:
            lists = [
                [
                    p * per_stage + r % per_stage - r % TENSOR + t
                    for p in range(PIPELINE)
                    for t in range(TENSOR)
                ]
                for r in range(world)
            ]
        assert lists[0] == own
        # As they come through the network.
        gathered[:] = [pickle.loads(pickle.dumps(one)) for one in lists]

    return gather


def inputs(world: int) -> dict[str, float]:
    """Rank 0 compares inputs with ``world`` - 1 others, who have reported already."""
    from datetime import timedelta

    import torch.distributed as dist

    from megatron_dip.integration.same_inputs import Input, compare_inputs

    store = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=60))
    given = {"argument": Input("value", "value")}
    compare_inputs(store, given, rank=0, num_ranks=1, timeout_seconds=60)
    digest = store.get("digest/0")
    for rank in range(1, world):
        store.set(f"digest/{rank}", digest)
        store.set(f"read/{rank}", b"")
    start = time.perf_counter()
    compare_inputs(store, given, rank=0, num_ranks=world, timeout_seconds=60)
    return {"seconds": round(time.perf_counter() - start, 4)}


def plans(model: str) -> dict[str, Any]:
    """A plan of 64 microbatches as it travels."""
    from megatron_dip.costs.machine import cluster_builder, load_cluster
    from megatron_dip.costs.mixtures import built_in_mixture, draw_microbatches
    from megatron_dip.costs.shapes import load_model
    from megatron_dip.partition import load_partition
    from megatron_dip.planner import make_plan, pack_plan, unpack_plan

    configs = ROOT / "configs"
    partition = load_partition(configs / "partitions" / f"{model}.json")
    builder = cluster_builder(
        load_model(configs / "models" / f"{model}.yaml"),
        load_cluster(configs / "clusters" / f"{MODELS[model]}.yaml"),
    )
    sizes = draw_microbatches(built_in_mixture(f"dip-{model[:3]}"), MICROBATCHES, 0)
    plan = make_plan(builder.build(sizes), partition, evaluations=8, when_infeasible="relax")
    packed = pack_plan(plan, [sizes])
    return {
        "actions": sum(map(len, plan.actions)),
        "ranks": len(plan.actions),
        "bytes": len(packed),
        "pack_ms": seconds_of(partial(pack_plan, plan, [sizes])) * 1e3,
        "unpack_ms": seconds_of(partial(unpack_plan, packed, builder.build, partition)) * 1e3,
    }


def seconds_of(call: Any, repeats: int = 5) -> float:
    """Processor time, the median."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return round(median(taken), 5)


def weights() -> dict[str, Any]:
    """Seconds in which a rank of VLM-M draws its weights: a layer measured, layers counted."""
    import torch

    from megatron_dip.families.packed import initialization

    hidden, ffn, groups, vocab = 5120, 27648, 8, 152064
    head = hidden // 40
    layer = {
        "linear_qkv": ((hidden + 2 * groups * head, hidden), 0, 1),
        "linear_proj": ((hidden, hidden), 1, 1),
        "linear_fc1": ((2 * ffn, hidden), 0, 2),
        "linear_fc2": ((hidden, ffn), 1, 1),
    }
    init = partial(torch.nn.init.normal_, mean=0.0, std=0.02)

    def shard(name: str, shape: tuple[int, int], dimension: int, stride: int) -> None:
        own = list(shape)
        own[dimension] //= TENSOR
        parameter = torch.nn.Parameter(torch.empty(own, dtype=torch.bfloat16))
        marks = {"tensor_model_parallel": True, "partition_dim": dimension}
        vars(parameter).update(marks, partition_stride=stride)
        drawn = initialization._draw_shard(parameter, init, name, rank=1, size=TENSOR)
        parameter.data.copy_(drawn)

    def layer_seconds(draw: Any) -> float:
        return sum(seconds_of(partial(draw, name, *of), 1) for name, of in layer.items())

    def whole(name: str, shape: tuple[int, int], dimension: int, stride: int) -> None:
        init(torch.empty(shape, dtype=torch.float32))

    torch.set_num_threads(1)
    shard("warm-up", (16, 16), 0, 1)
    shard("warm-up", (16, 16), 1, 1)
    embedding = ((vocab, hidden), 0, 1)
    # Parameters of both modules over those of a language layer: the layers that a rank holds.
    per_layer = sum(shape[0] * shape[1] for shape, *_ in layer.values())
    layers = 36.6e9 / per_layer / PIPELINE
    found = {}
    for name, draw in (("shards", shard), ("in_full", whole)):
        one, table = layer_seconds(draw), seconds_of(partial(draw, "embedding", *embedding), 1)
        found[name] = {"layer_s": one, "embedding_s": table, "rank_s": one * layers + table}
    return found


def broadcast(num_ranks: int, num_bytes: int) -> dict[str, float]:
    """Milliseconds in which all of ``num_ranks`` processes have ``num_bytes`` of the first one."""
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(
            broadcast_rank, args=(num_ranks, num_bytes, folder), nprocs=num_ranks, join=True
        )
        taken = json.loads((Path(folder) / "taken").read_text())
    print("broadcast", num_ranks, taken, flush=True)
    return {"bytes": num_bytes, "ms": taken}


def broadcast_rank(rank: int, num_ranks: int, num_bytes: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks
    )
    plan = torch.zeros(num_bytes, dtype=torch.uint8)
    taken = []
    for _ in range(20):
        dist.barrier()
        start = time.perf_counter()
        dist.broadcast(plan, 0)
        dist.barrier()
        taken.append((time.perf_counter() - start) * 1e3)
    if rank == 0:
        (Path(folder) / "taken").write_text(str(round(median(taken), 3)))
    dist.destroy_process_group()


PARTS = {"setup": setup, "inputs": inputs, "plans": plans, "weights": weights}

if __name__ == "__main__":
    typer.run(main)
