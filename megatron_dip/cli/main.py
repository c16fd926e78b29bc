"""The ``megatron-dip`` command: batch problems and plans: make, check, draw, rehearse."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperGroup

from megatron_dip.cli.adapters import export_to_released
from megatron_dip.cli.assign import assign_items
from megatron_dip.cli.comparison import Row, print_rows
from megatron_dip.cli.doctor import examine_machine
from megatron_dip.cli.launch_command import print_launch_command
from megatron_dip.cli.output import write_file
from megatron_dip.cli.partition import make_partition
from megatron_dip.cli.patch import patch_tree
from megatron_dip.cli.profile import measure_layers
from megatron_dip.cli.rehearse import rehearse_plan
from megatron_dip.cli.report import report_run
from megatron_dip.cli.simulate import simulate_plans
from megatron_dip.cli.unread import refuse_unread
from megatron_dip.costs import cluster_builder, load_cluster, load_model, load_profile
from megatron_dip.costs.mixtures import (
    BUILT_IN,
    LanguageItems,
    built_in_mixture,
    draw_microbatches,
    load_workload,
)
from megatron_dip.errors import ConfigError, DipError, one_line, shown
from megatron_dip.partition import load_partition
from megatron_dip.plan.channels import one_queue_model
from megatron_dip.plan.plan import load_plan, save_plan
from megatron_dip.plan.validation import check_memory, validate_plan
from megatron_dip.planner.joint import joint_problem
from megatron_dip.planner.planner import Algorithm, make_plan
from megatron_dip.planner.search import Search
from megatron_dip.simulator.simulate import simulate
from megatron_dip.workload import load_problem

__all__ = ["app", "main"]


class _Group(TyperGroup):
    """Shows an error of this package as one line and exits with 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DipError as error:
            typer.echo(f"megatron-dip: {one_line(str(error))}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Group,
    help="Dynamic interleaved pipelines for large multimodal models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class AlgorithmChoice(StrEnum):
    """Names of the planners, as typer wants them."""

    DUAL_QUEUE = "dual_queue"
    ONE_F_ONE_B = "one_f_one_b"


class SearchChoice(StrEnum):
    """Names of the searches, as typer wants them."""

    LOCAL = "local"
    MCTS = "mcts"


class QueueChoice(StrEnum):
    """Hardware queues of a rank."""

    ONE = "one"
    MANY = "many"


assert set(SearchChoice) == set(get_args(Search))
assert set(AlgorithmChoice) == set(get_args(Algorithm))


class MixtureChoice(StrEnum):
    """Names of the built-in mixtures."""

    VLM = "vlm"
    T2V = "t2v"
    DIP_VLM = "dip-vlm"
    DIP_T2V = "dip-t2v"


class LanguageItemsChoice(StrEnum):
    """What is an item of packed text."""

    SEQUENCES = "sequences"
    SAMPLES = "samples"


assert set(MixtureChoice) == set(BUILT_IN)
assert set(LanguageItemsChoice) == set(get_args(LanguageItems))


PlanFiles = Annotated[list[Path], typer.Argument(help="Plan files.")]


@app.command("problem")
def make_problem(
    model: Annotated[Path, typer.Option(help="Model (YAML).")],
    cluster: Annotated[Path, typer.Option(help="Cluster (YAML).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the problem goes (JSON).")],
    mixture: Annotated[MixtureChoice | None, typer.Option(help="Built-in mixture.")] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="Distributions of a data set (JSON), instead of a mixture.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Measured times of layers (JSON), instead of the GPU's.")
    ] = None,
    microbatches: Annotated[
        int | None,
        typer.Option(help="Microbatches of the batch: 64 of dip-vlm and dip-t2v, else 16."),
    ] = None,
    language_items: Annotated[
        LanguageItemsChoice,
        typer.Option(help="Whether a packed sequence is one item, or every sample in it."),
    ] = LanguageItemsChoice.SEQUENCES,
    seed: Annotated[int, typer.Option(help="Another seed draws another batch.")] = 0,
) -> None:
    """Make a batch problem from a model, a cluster and a workload."""
    if (mixture is None) == (statistics is None):
        raise ConfigError("--mixture or --statistics: expected exactly one of them")
    workload = built_in_mixture(mixture.value) if mixture else load_workload(str(statistics))
    builder = cluster_builder(
        load_model(model), load_cluster(cluster), load_profile(profile) if profile else None
    )
    if microbatches is None:
        microbatches = BUILT_IN[mixture.value].num_microbatches if mixture else 16
    drawn = draw_microbatches(workload, microbatches, seed, language_items.value)
    made = builder.build(drawn)
    write_file(output, lambda: output.write_text(made.model_dump_json(exclude_none=True) + "\n"))


@app.command()
def plan(
    context: typer.Context,
    problem: Annotated[
        list[Path],
        typer.Option(help="Batch problem (JSON); several get one plan that holds for each."),
    ],
    partition: Annotated[Path, typer.Option(help="Partition (JSON).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the plan goes (JSON).")],
    algorithm: Annotated[
        AlgorithmChoice, typer.Option(help="How actions are ordered.")
    ] = AlgorithmChoice.DUAL_QUEUE,
    max_tokens: Annotated[
        list[str] | None,
        typer.Option(help="MODULE=TOKENS: largest sub-microbatch of a module; may be repeated."),
    ] = None,
    split_backward: Annotated[
        bool, typer.Option("--split-backward", help="Input and weight gradients apart.")
    ] = False,
    search: Annotated[
        SearchChoice, typer.Option(help="How the dual queue's priorities are searched.")
    ] = SearchChoice.LOCAL,
    evaluations: Annotated[
        int | None, typer.Option(help="Schedules that the search may make; same seed, same plan.")
    ] = None,
    budget_ms: Annotated[
        float | None, typer.Option(help="Milliseconds that the search may take.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random numbers of the search.")] = 0,
    no_recompute: Annotated[
        bool, typer.Option("--no-recompute", help="Keep the memory limit by holding work back.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Searches at the same time, a core each.")] = 1,
    hardware_queues: Annotated[
        QueueChoice,
        typer.Option(help="Of the ranks: one on GPUs with CUDA_DEVICE_MAX_CONNECTIONS below 32."),
    ] = QueueChoice.MANY,
) -> None:
    """Plan one batch, or several together, and write the plan."""
    if algorithm == AlgorithmChoice.ONE_F_ONE_B:
        refuse_unread(
            context,
            ("search", "seed", "workers", "no_recompute"),
            "beside --algorithm one_f_one_b, which has nothing to search and does not look at "
            "memory (leave it out, or plan with dual_queue)",
        )
    elif evaluations is None and budget_ms is None:
        refuse_unread(
            context,
            ("search", "seed", "workers"),
            "without a search: give it --evaluations or --budget-ms",
        )
    problems = [load_problem(path) for path in problem]
    cut = load_partition(partition)
    upstream = {module.name: module.upstream for module in problems[0].modules}
    made = make_plan(
        joint_problem(problems) if len(problems) > 1 else problems[0],
        cut,
        algorithm=algorithm.value,
        max_tokens=_parse_max_tokens(max_tokens or []),
        split_backward=split_backward,
        search=search.value,
        evaluations=evaluations,
        budget_ms=budget_ms,
        seed=seed,
        memory_program=not no_recompute,
        workers=workers,
        queues=one_queue_model(cut, upstream) if hardware_queues == QueueChoice.ONE else None,
    )
    write_file(output, lambda: save_plan(made, output))
    print_rows([Row.of_plan(str(output), made, simulate(made))])


@app.command()
def validate(plans: PlanFiles) -> None:
    """Check that plans are correct schedules of their problems, within the memory limit."""
    for path in plans:
        loaded = load_plan(path)
        try:
            validate_plan(loaded)
            simulation = simulate(loaded)
            check_memory(loaded, simulation.peak_bytes, simulation.host_peak_bytes)
        except DipError as error:
            raise type(error)(f"{path}: {error}") from error
        typer.echo(f"{path}: ok ({sum(map(len, loaded.actions))} actions)")


app.command("assign")(assign_items)
app.command("partition")(make_partition)
app.command("simulate")(simulate_plans)
app.command("profile")(measure_layers)
app.command("doctor")(examine_machine)
app.command("launch-cmd")(print_launch_command)
app.command("rehearse")(rehearse_plan)
app.command("report")(report_run)
app.command("patch")(patch_tree)
app.command("export-adapters")(export_to_released)


def _parse_max_tokens(entries: list[str]) -> dict[str, int | None]:
    limits: dict[str, int | None] = {}
    for entry in entries:
        module, _, tokens = entry.partition("=")
        if not tokens.isdecimal():
            raise ConfigError(
                f"--max-tokens {shown(entry)} (expected MODULE=TOKENS, e.g. vision=4096)"
            )
        if module in limits:
            raise ConfigError(f"--max-tokens {shown(entry)}: {module} has one already (give one)")
        limits[module] = int(tokens)
    return limits


def main() -> None:
    """Entry point of the console command."""
    app()


if __name__ == "__main__":
    main()
