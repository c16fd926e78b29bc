"""What is trained, part by part: the same under plans as under Megatron's own schedule."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from equality_runs import largest_difference
from forked_ranks import fork_ranks
from parts_cases import CASES, RATE, PartsCase
from tiny_vlm import make_tiny_data, write_config

PROGRAM = Path(__file__).with_name("parts_program.py")
ARGUMENTS = f"""
    --micro-batch-size 2 --global-batch-size 8 --train-iters 3 --optimizer sgd --lr {RATE}
    --min-lr {RATE} --lr-decay-style constant --hidden-dropout 0 --attention-dropout 0
    --num-workers 0 --eval-iters 0 --ckpt-format torch_dist --dip-timeout-seconds 60
    --distributed-timeout-minutes 2 --make-vocab-size-divisible-by 1
    --save-interval 100 --pipeline-model-parallel-size 2 --dist-ckpt-optim-fully-reshardable
"""
Seen = dict[tuple[str, bool], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Of every case and schedule, what both ranks saw."""
    folder = tmp_path_factory.mktemp("parts")
    make_tiny_data(folder / "data")
    for case in CASES:
        path = write_config(
            folder / f"{case.name}.yaml",
            folder / "data",
            num_ranks=2,
            layers=case.layers,
            num_segments={name: len(rows) for name, rows in case.layers.items()},
            sub_microbatch_tokens=(90, 96),
        )
        config = yaml.safe_load(path.read_text())
        config["model"]["vision"] |= case.vision
        config["model"]["language"] |= case.language
        path.write_text(yaml.safe_dump(config))
    command = [str(PROGRAM), "--dip-config", str(folder / f"{CASES[0].name}.yaml")]
    command += [*shlex.split(ARGUMENTS), "--save", str(folder / "saved")]
    found: Seen = {}
    for rank in fork_ranks(folder / "run", 2, command, timeout_seconds=280):
        assert rank.returncode == 0, rank.output[-6000:]
        for line in rank.output.splitlines():
            if line.startswith("SEEN "):
                record = json.loads(line.removeprefix("SEEN "))
                found.setdefault((record["case"], record["is_dip"]), []).append(record)
    return found


def trained_of(ranks: list[dict[str, Any]]) -> set[str]:
    """Names of what is trained on any of them."""
    return {name for rank in ranks for name in rank["trained"]}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parts_train_alike_under_both_schedules(case: PartsCase, seen: Seen) -> None:
    ours, stock = seen[case.name, True], seen[case.name, False]
    assert largest_difference(ours[-1]["losses"], stock[-1]["losses"]) <= case.tolerance
    assert largest_difference(ours[-1]["norms"], stock[-1]["norms"]) <= case.tolerance
    assert min(stock[-1]["norms"]) > 0
    trained = [
        sorted(name for rank in ranks for name in rank["trained"]) for ranks in (ours, stock)
    ]
    assert trained[0] == trained[1]
    for rank in (*ours, *stock):
        assert rank["changed"] == rank["trained"], "frozen weights changed, or trained ones did not"


def test_what_a_configuration_names_is_trained_and_nothing_else(seen: Seen) -> None:
    projector = trained_of(seen["projector-alone", True])
    assert projector and all(name.startswith("vision_projection.") for name in projector)
    frozen_tower = trained_of(seen["projector-and-language", True])
    assert {name.partition(".")[0] for name in frozen_tower} == {
        "vision_projection",
        "language_model",
    }
    layers = {
        ".".join(name.split(".")[:4])
        for name in trained_of(seen["last-layers", True])
        if ".layers." in name
    }
    expected = {f"vision_model.decoder.layers.{number}" for number in (6, 7)}
    expected |= {f"language_model.decoder.layers.{number}" for number in (0, 6, 7)}
    assert layers == expected
    first, last = seen["nothing-on-the-first-rank", True]
    assert first["trained"] == [] and last["trained"]


def test_learning_rates_are_multiplied_by_part_and_go_through_a_checkpoint(seen: Seen) -> None:
    assert seen["projector-alone", True][1]["rates"] == {"10": pytest.approx(10 * RATE)}
    for is_dip in (True, False):
        rates: dict[str, float] = {}
        for rank in seen["projector-and-language", is_dip]:
            rates |= rank["rates"]
        expected = {"1": RATE, "0.5": 0.5 * RATE, "0.25": 0.25 * RATE}
        assert rates == {factor: pytest.approx(rate) for factor, rate in expected.items()}
    ours = seen["projector-and-language", True]
    for rank in ours:
        assert rank["resumed"]["rates"] == rank["rates"]
    assert largest_difference(ours[1]["resumed"]["losses"], ours[1]["losses"][-1:]) <= 1e-5
    assert largest_difference(ours[1]["resumed"]["norms"], ours[1]["norms"][-1:]) <= 1e-5


def test_a_checkpoint_whose_optimizer_is_of_other_parts_is_refused(seen: Seen) -> None:
    for rank in seen["projector-and-language", True]:
        assert "trains of vision: 'projector'; this one trains" in rank["refusal"]
        assert "'projector at 10.0 of the learning rate' (go on from" in rank["refusal"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operations_are_those_of_the_batches_under_either_schedule(
    case: PartsCase, seen: Seen
) -> None:
    ours, stock = seen[case.name, True], seen[case.name, False]
    for rank in (*ours, *stock):
        assert rank["flops"] == ours[0]["flops"]
        assert rank["mean_flops"] == pytest.approx(sum(rank["flops"]) / len(rank["flops"]))
        assert rank["params_norm"] == pytest.approx(ours[0]["params_norm"], rel=1e-6)
    assert len(set(ours[0]["flops"])) > 1, "batches of other images have other operations"


def test_less_trained_is_less_operations(seen: Seen) -> None:
    first = {case.name: seen[case.name, True][0]["flops"][0] for case in CASES}
    assert first["nothing-on-the-first-rank"] < first["projector-alone"] < first["frozen-language"]
