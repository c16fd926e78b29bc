"""Problems for the planning tests: small ones with known numbers, and random ones."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

from megatron_dip.costs import BatchSizes, ItemSize
from megatron_dip.costs.work import static_bytes
from megatron_dip.partition import Partition, partition_from_layers
from megatron_dip.plan import Message, PipelineGraph, Work
from megatron_dip.planner import form_sub_microbatches
from megatron_dip.simulator import TaskTable, build_task_table
from megatron_dip.workload import Item, Module, Problem, parse_problem

UNLIMITED = 10**15

MODULE_GRAPHS: dict[str, tuple[tuple[str, tuple[str, ...], bool], ...]] = {
    "one module": (("language", (), True),),
    "encoder": (("vision", (), True), ("language", ("vision",), True)),
    "frozen encoder": (("vision", (), False), ("language", ("vision",), True)),
    "frozen backbone": (("vision", (), True), ("language", ("vision",), False)),
    "two encoders": (
        ("vision", (), True),
        ("audio", (), False),
        ("language", ("vision", "audio"), True),
    ),
    "read twice": (
        ("vision", (), True),
        ("text", ("vision",), False),
        ("dit", ("text", "vision"), True),
    ),
    "three in a row": (
        ("vision", (), True),
        ("connector", ("vision",), False),
        ("language", ("connector",), True),
    ),
}
"""Name, upstream, trainable of every module."""


def make_item(number: int = 0, forward_us: float = 1.0, **fields: Any) -> dict[str, Any]:
    """An item whose backward takes twice its forward."""
    return {
        "item": number,
        "tokens": 1,
        "forward_us": forward_us,
        "input_grad_us": forward_us,
        "weight_grad_us": forward_us,
        "activation_bytes": 10,
        "boundary_bytes": 4,
    } | fields


def make_problem(
    modules: Sequence[tuple[str, tuple[str, ...], bool]],
    num_layers: dict[str, int],
    microbatches: list[dict[str, list[dict[str, Any]]]],
    *,
    num_ranks: int,
    overhead_us: float = 0.0,
    layer_static_bytes: int = 0,
    module_fields: Mapping[str, Mapping[str, Any]] | None = None,
    latency_us: float = 0.0,
    bytes_per_us: float = 1e30,
    memory_limit_bytes: Sequence[int] | None = None,
) -> Problem:
    return parse_problem(
        {
            "num_ranks": num_ranks,
            "memory_limit_bytes": list(memory_limit_bytes or [UNLIMITED] * num_ranks),
            "transfer": {"latency_us": latency_us, "bytes_per_us": bytes_per_us},
            "modules": [
                {
                    "name": name,
                    "num_layers": num_layers[name],
                    "upstream": list(upstream),
                    "trainable": trainable,
                    "layer_overhead_us": overhead_us,
                    "layer_static_bytes": layer_static_bytes,
                }
                | dict((module_fields or {}).get(name, {}))
                for name, upstream, trainable in modules
            ],
            "microbatches": microbatches,
        }
    )


def sizes_of(problem: Problem) -> BatchSizes:
    """Sizes that the items of ``problem`` may have."""
    return tuple(
        {
            name: [
                ItemSize(tokens=item.tokens, spans=(item.tokens,), needs=item.needs or {})
                for item in items
            ]
            for name, items in microbatch.items()
        }
        for microbatch in problem.microbatches
    )


def chain_case(
    num_ranks: int, num_microbatches: int, forward_us: float = 1.0, **fields: Any
) -> tuple[Problem, Partition]:
    """One module with one layer per rank and equal microbatches."""
    problem = make_problem(
        MODULE_GRAPHS["one module"],
        {"language": num_ranks},
        [{"language": [make_item(0, forward_us)]} for _ in range(num_microbatches)],
        num_ranks=num_ranks,
        **fields,
    )
    return problem, partition_from_layers({"language": [[1] * num_ranks]}, num_ranks)


def encoder_case(graph: str = "encoder", **fields: Any) -> tuple[Problem, Partition]:
    """Two ranks; microbatch 0 has two images, microbatch 1 only text; stages 0 1 and 2 3."""
    problem = make_problem(
        MODULE_GRAPHS[graph],
        {"vision": 2, "language": 2},
        [
            {"vision": [make_item(0), make_item(1)], "language": [make_item(0, 2.0)]},
            {"language": [make_item(0, 2.0)]},
        ],
        num_ranks=2,
        **fields,
    )
    return problem, partition_from_layers({"vision": [[1, 1]], "language": [[1, 1]]}, 2)


def make_graph(problem: Problem, partition: Partition, max_tokens: int | None = 1) -> PipelineGraph:
    """The graph with sub-microbatches of at most ``max_tokens`` in every module."""
    limits = {module.name: max_tokens for module in problem.modules}
    return PipelineGraph(problem, partition, form_sub_microbatches(problem, limits))


def tightest_limits(graph: PipelineGraph) -> list[int]:
    """Per rank, what the largest microbatch needs with all of its activations stored."""
    table = build_task_table(graph)
    limits = []
    for rank in range(table.num_ranks):
        needs = [0] * graph.problem.num_microbatches
        for number, work in enumerate(graph.works):
            if table.rank[number] == rank:
                needs[work.microbatch] += table.stored_bytes[number].item()
        limits.append(max(needs) + static_bytes(graph.problem, graph.partition, rank))
    return limits


def items_of(graph: PipelineGraph, work: Work) -> list[Item]:
    """The items that ``work`` computes on."""
    group = graph.sub_microbatch(work)
    return [graph.problem.item(group.module, group.microbatch, number) for number in group.items]


class Element(NamedTuple):
    """A layer of a stage, or the extras (``layer`` None) at the ``end`` of its module."""

    layer: int | None
    end: str
    is_trained: bool
    has_backward: bool


def elements(problem: Problem, partition: Partition) -> dict[int, list[Element]]:
    """Per stage, what it is made of, in the order of a forward.

    An element is trained as the problem says, and has a backward if anything trained feeds it:
    found here by walking along the data, one element after the other.
    """
    found: dict[int, list[Element]] = {}
    feeds: dict[str, bool] = {}
    for name in problem.module_order:
        module = problem.module(name)
        carries = any(feeds[upstream] for upstream in module.upstream)
        for stage in partition.chains[name]:
            places = [(layer, "") for layer in stage.layers]
            places = [(None, "first")] * (stage is partition.chains[name][0]) + places
            places += [(None, "last")] * (stage is partition.chains[name][-1])
            for layer, end in places:
                is_trained = _is_trained(module, layer, end)
                carries = carries or is_trained
                found.setdefault(stage.stage, []).append(Element(layer, end, is_trained, carries))
        feeds[name] = carries
    return found


def _is_trained(module: Module, layer: int | None, end: str) -> bool:
    if layer is None:
        said = getattr(module, f"{end}_layer_extra").trainable
        return module.trainable if said is None else said
    if module.trained_layers is None:
        return module.trainable
    return any(start <= layer < stop for start, stop in module.trained_layers)


def written_cost(
    graph: PipelineGraph, work: Work, num_recomputed: int = 0
) -> tuple[float, float, float, int]:
    """Forward, input gradient, weight gradient and stored bytes, as the design states them."""
    module = graph.problem.module(graph.partition[work.stage].module)
    items = items_of(graph, work)
    forward = input_grad = weight_grad = 0.0
    stored = 0
    found = elements(graph.problem, graph.partition)[work.stage]
    reads_first = any(element.layer == 0 and element.has_backward for element in found)
    for element in found:
        extra = f"{element.end}_extra_" if element.layer is None else ""
        overhead = 0.0 if extra else module.layer_overhead_us
        forward += overhead + sum(getattr(item, f"{extra}forward_us") for item in items)
        if extra:
            forward += getattr(module, f"{element.end}_layer_extra").forward_us
        if element.has_backward:
            input_grad += overhead + sum(getattr(item, f"{extra}input_grad_us") for item in items)
        if element.has_backward or (element.end == "first" and reads_first):
            stored += sum(getattr(item, f"{extra}activation_bytes") for item in items)
        if element.is_trained:
            weight_grad += sum(getattr(item, f"{extra}weight_grad_us") for item in items)
    input_grad += num_recomputed * (
        module.layer_overhead_us + sum(item.effective_recompute_us for item in items)
    )
    stored -= num_recomputed * sum(item.activation_bytes - item.boundary_bytes for item in items)
    return forward, input_grad, weight_grad, stored


def message_bytes(graph: PipelineGraph, message: Message) -> int:
    """What a message moves: the boundary of the upstream items."""
    work = Work(message.upstream_stage, message.microbatch, message.sub)
    return sum(item.boundary_bytes for item in items_of(graph, work))


def feeds_from(table: TaskTable) -> list[list[tuple[int, float]]]:
    """Per work, the works whose forward its own waits for, and the delays between them."""
    feeds: list[list[tuple[int, float]]] = [[] for _ in table.graph.works]
    topology = table.topology
    edges = (topology.source.tolist(), topology.target.tolist(), topology.delay_us.tolist())
    for source, target, delay_us in zip(*edges, strict=True):
        feeds[target].append((source, delay_us))
    return feeds


def gradients_from(table: TaskTable) -> list[list[tuple[int, float]]]:
    """Per work, the works whose backward its own waits for, and the delays between them."""
    gradients: list[list[tuple[int, float]]] = [[] for _ in table.graph.works]
    for reader, feeds in enumerate(feeds_from(table)):
        for source, delay_us in feeds:
            if table.has_backward[source]:
                gradients[source].append((reader, delay_us))
    return gradients


@st.composite
def cases(draw: st.DrawFn) -> tuple[Problem, Partition]:
    """Any module graph on any partition: empty stages, frozen parts, text-only microbatches."""
    num_ranks = draw(st.integers(1, 4))
    modules = MODULE_GRAPHS[draw(st.sampled_from(sorted(MODULE_GRAPHS)))]
    layers: dict[str, list[list[int]]] = {}
    for name, _, _ in modules:
        segment = st.lists(st.integers(0, 2), min_size=num_ranks, max_size=num_ranks)
        layers[name] = draw(st.lists(segment, min_size=1, max_size=2))
        layers[name][0][0] += not any(map(sum, layers[name]))
    names = [name for name, _, _ in modules]
    microbatches = []
    for _ in range(draw(st.integers(1, 4))):
        counts = {name: draw(st.integers(0, 3)) for name in names[:-1]}
        counts[names[-1]] = draw(st.integers(1, 2))
        microbatches.append(
            {
                name: [_draw_item(draw, number, upstream, counts) for number in range(counts[name])]
                for name, upstream, _ in modules
            }
        )
    problem = make_problem(
        modules,
        {name: sum(map(sum, layers[name])) for name in names},
        microbatches,
        num_ranks=num_ranks,
        overhead_us=draw(st.sampled_from([0.0, 0.5])),
        layer_static_bytes=100,
        module_fields={name: _draw_trained(draw, sum(map(sum, layers[name]))) for name in names},
        latency_us=draw(st.sampled_from([0.0, 0.25])),
        bytes_per_us=draw(st.sampled_from([3.0, 1e12])),
    )
    return problem, partition_from_layers(layers, num_ranks)


def _draw_trained(draw: st.DrawFn, num_layers: int) -> dict[str, Any]:
    """Fields of a module that say which of its parts are trained; often none."""
    if draw(st.booleans()):
        return {}
    ends = draw(st.lists(st.integers(0, num_layers), min_size=0, max_size=4))
    ends = sorted(ends[: len(ends) // 2 * 2])
    pairs = [list(pair) for pair in zip(ends[::2], ends[1::2], strict=True)]
    extras = draw(st.tuples(st.booleans(), st.booleans()))
    return {
        "trainable": any(extras) or any(start < stop for start, stop in pairs),
        "trained_layers": pairs,
        "frozen_layer_static_bytes": draw(st.sampled_from([None, 20])),
        "first_layer_extra": {"trainable": extras[0], "static_bytes": 7},
        "last_layer_extra": {"trainable": extras[1], "forward_us": 0.25},
    }


def _draw_item(
    draw: st.DrawFn, number: int, upstream: tuple[str, ...], counts: dict[str, int]
) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "tokens": draw(st.integers(0, 3)),
        "input_grad_us": draw(st.sampled_from([0.0, 1.0, 2.5])),
        "activation_bytes": draw(st.integers(0, 9)),
        "boundary_bytes": draw(st.integers(0, 5)),
        "last_extra_forward_us": draw(st.sampled_from([0.0, 1.5])),
        "last_extra_input_grad_us": draw(st.sampled_from([0.0, 0.5])),
        "last_extra_weight_grad_us": draw(st.sampled_from([0.0, 0.75])),
        "first_extra_input_grad_us": draw(st.sampled_from([0.0, 0.125])),
        "last_extra_activation_bytes": draw(st.sampled_from([0, 3])),
        "first_extra_activation_bytes": draw(st.sampled_from([0, 2])),
    }
    if draw(st.booleans()):
        fields["needs"] = {
            name: sorted(draw(st.sets(st.integers(0, counts[name] - 1))))
            for name in upstream
            if counts[name]
        }
    return make_item(number, draw(st.sampled_from([0.0, 1.0, 3.0])), **fields)
