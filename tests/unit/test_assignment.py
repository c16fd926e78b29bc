"""Assignment of a batch's items to replicas and microbatches: what it keeps, and what it gains."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import MODULE_GRAPHS, cases, make_item, make_problem
from typer.testing import CliRunner

from megatron_dip.assignment import (
    Groups,
    Limits,
    assign,
    assigned_problems,
    batch_groups,
    measure_spread,
    problem_groups,
)
from megatron_dip.cli.main import app
from megatron_dip.errors import ConfigError, ProblemError
from megatron_dip.simulator import useful_work_us
from megatron_dip.workload import Problem, load_problem


def make_groups(time_us, tokens=None, microbatch=None, replica=None, kept_bytes=None):
    """Groups of one item, by default a microbatch each."""
    num_groups = len(time_us)
    time_us = np.array(time_us, dtype=np.float64).reshape(num_groups, -1)
    whole = {
        "tokens": np.ones(time_us.shape) if tokens is None else tokens,
        "kept_bytes": [0] * num_groups if kept_bytes is None else kept_bytes,
        "moved_bytes": [1] * num_groups,
        "num_items": [1] * num_groups,
        "replica": [0] * num_groups if replica is None else replica,
        "microbatch": range(num_groups) if microbatch is None else microbatch,
    }
    arrays = {name: np.array(values, dtype=np.int64) for name, values in whole.items()}
    arrays["tokens"] = arrays["tokens"].reshape(time_us.shape)
    return Groups(time_us=time_us, **arrays)


def sample_problem(samples: list[list[tuple[int, float]]]) -> Problem:
    """Per microbatch, its samples: how many images each has, and the time of its text."""
    microbatches = []
    for microbatch in samples:
        images, texts = [], []
        for number, (num_images, text_us) in enumerate(microbatch):
            own = range(len(images), len(images) + num_images)
            images += [make_item(image, 1.0) for image in own]
            texts.append(make_item(number, text_us, needs={"vision": list(own)}))
        microbatches.append({"vision": images, "language": texts})
    return make_problem(
        MODULE_GRAPHS["encoder"], {"vision": 2, "language": 2}, microbatches, num_ranks=2
    )


def contents(problems: list[Problem]) -> Counter[str]:
    """The items of all problems, without their numbers."""
    return Counter(
        f"{name} {item.model_dump(exclude={'item', 'needs'})}"
        for problem in problems
        for microbatch in problem.microbatches
        for name, items in microbatch.items()
        for item in items
    )


def reads(problem: Problem, microbatch: int) -> Counter[tuple[str, ...]]:
    """What stays together, without the numbers of items."""
    return Counter(
        tuple(f"{name} {item.model_dump(exclude={'item', 'needs'})}" for name, item in group)
        for group in problem_groups(problem, microbatch)
    )


def test_whole_microbatches_are_exchanged_where_that_is_enough():
    groups = make_groups(
        [5.0, 5.0, 3.0, 3.0], replica=[0, 0, 1, 1], microbatch=[0, 1, 0, 1], tokens=[1, 1, 1, 1]
    )
    made = assign(groups, [2, 2])
    assert measure_spread(groups.time_us, made.replica, 2).slowest == 1.0
    assert made.between.groups == 2 and made.within.groups == 0


def test_single_groups_move_between_replicas_where_whole_microbatches_are_too_coarse():
    groups = make_groups(
        [3.0, 1.0, 1.0, 1.0], replica=[0, 0, 1, 1], microbatch=[0, 0, 0, 0], tokens=[1, 1, 1, 1]
    )
    limits = Limits(tokens=[3], kept_bytes=0)
    made = assign(groups, [1, 1], limits=limits)
    assert made.replica.tolist() == [0, 1, 1, 1]
    kept = assign(groups, [1, 1])
    assert kept.replica.tolist() == [0, 0, 1, 1], "no microbatch may hold three tokens"


def test_modalities_are_spread_over_the_microbatches_of_a_replica():
    problem = sample_problem([[(2, 4.0)] * 4, [(0, 4.0)] * 4])
    groups, members = batch_groups([problem])
    made = assign(groups, [2])
    (written,) = assigned_problems([problem], members, made)
    assert [len(microbatch["vision"]) for microbatch in written.microbatches] == [4, 4]
    assert made.within.groups == 4 and made.within.items == 8


def test_a_full_sequence_is_divided_anew_where_no_exchange_of_two_samples_fits():
    # Ten pairs of an image and little text against one long text: token limits are full.
    time_us = [[1.0, 1.0]] * 20 + [[0.0, 10.0]] * 2
    tokens = [[1, 1]] * 20 + [[0, 10]] * 2
    microbatch = [0] * 10 + [1] * 10 + [2, 3]
    groups = make_groups(time_us, tokens=tokens, microbatch=microbatch)
    made = assign(groups, [4], limits=Limits(tokens=[10, 10]))
    # Nothing but whole sequences can be exchanged: they are as full as they may be.
    assert made.within.groups == 0
    roomy = make_groups(
        time_us[:20] + [[0.0, 5.0]] * 4, tokens[:20] + [[0, 5]] * 4, [*microbatch, 2, 3]
    )
    spread = assign(roomy, [4], limits=Limits(tokens=[10, 10]))
    images = np.bincount(spread.microbatch, weights=roomy.time_us[:, 0])
    assert images.tolist() == [5.0] * 4


def test_full_sequences_of_other_lengths_are_divided_so_that_both_stay_full():
    # No two samples are alike in tokens: one goes against two others.
    groups = make_groups(
        [[1.0, 3.0], [1.0, 3.0], [1.0, 4.0], [0.0, 1.0], [0.0, 2.0], [0.0, 7.0]],
        tokens=[[1, 3], [1, 3], [1, 4], [0, 1], [0, 2], [0, 7]],
        microbatch=[0, 0, 0, 1, 1, 1],
    )
    made = assign(groups, [2], limits=Limits(tokens=[3, 10]))
    images, tokens = (
        np.bincount(made.microbatch, weights=weights).tolist()
        for weights in (groups.time_us[:, 0], groups.tokens[:, 1])
    )
    assert sorted(images) == [1.0, 2.0] and tokens == [10.0, 10.0]


def test_problems_with_one_sequence_each_exchange_whole_microbatches_and_stay_as_they_are():
    heavy = sample_problem([[(4, 4.0)], [(4, 4.0)]])
    light = sample_problem([[(0, 4.0)], [(0, 4.0)]])
    groups, members = batch_groups([heavy, light])
    made = assign(groups, [2, 2])
    written = assigned_problems([heavy, light], members, made)
    assert [sum(len(m["vision"]) for m in problem.microbatches) for problem in written] == [4, 4]
    before = [m for problem in (heavy, light) for m in problem.microbatches]
    assert all(m in before for problem in written for m in problem.microbatches)


def test_an_item_that_reads_all_of_its_microbatch_reads_the_same_after_it():
    # Text alone says nothing of what it needs: beside images of others it must.
    problem = make_problem(
        MODULE_GRAPHS["encoder"],
        {"vision": 1, "language": 1},
        [
            {
                "vision": [make_item(number, 4.0) for number in range(4)],
                "language": [make_item(n, 1.0, needs={"vision": [n]}) for n in range(4)],
            },
            {"language": [make_item(number, 1.0) for number in range(4)]},
        ],
        num_ranks=1,
    )
    groups, members = batch_groups([problem])
    (written,) = assigned_problems([problem], members, assign(groups, [2]))
    assert [len(microbatch["vision"]) for microbatch in written.microbatches] == [2, 2]
    for microbatch in written.microbatches:
        assert sorted(len(item.needs["vision"]) for item in microbatch["language"]) == [0, 0, 1, 1]


@settings(max_examples=40, deadline=None)
@given(st.lists(cases(), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_every_item_is_kept_once_with_what_it_needs(drawn, between, within):
    base = drawn[0][0]
    problems = [
        base.model_copy(update={"microbatches": problem.microbatches})
        for problem, _ in drawn
        if problem.module_order == base.module_order
    ]
    groups, members = batch_groups(problems)
    counts = [problem.num_microbatches for problem in problems]
    made = assign(groups, counts, between=between, within=within)
    written = assigned_problems(problems, members, made)
    written = [Problem.model_validate(problem.model_dump()) for problem in written]
    assert [problem.num_microbatches for problem in written] == counts
    assert contents(written) == contents(problems)
    together = [
        sum((reads(p, m) for p in each for m in range(p.num_microbatches)), Counter())
        for each in (problems, written)
    ]
    assert together[0] == together[1]
    if not between:
        assert all(contents([a]) == contents([b]) for a, b in zip(problems, written, strict=True))
    total = sum(map(useful_work_us, problems))
    assert groups.time_us.sum() == pytest.approx(total)
    assert sum(map(useful_work_us, written)) == pytest.approx(total)


@st.composite
def group_lists(draw: st.DrawFn) -> tuple[Groups, list[int]]:
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    num_modules = draw(st.integers(1, 3))
    rows = []
    for replica, count in enumerate(counts):
        for microbatch in range(count):
            for _ in range(draw(st.integers(1, 5))):
                times = draw(
                    st.lists(
                        st.sampled_from([0.0, 1.0, 2.5, 7.0]),
                        min_size=num_modules,
                        max_size=num_modules,
                    )
                )
                tokens = draw(
                    st.lists(st.integers(0, 4), min_size=num_modules, max_size=num_modules)
                )
                rows.append((times, tokens, draw(st.integers(0, 9)), replica, microbatch))
    times, tokens, kept, replica, microbatch = zip(*rows, strict=True)
    return make_groups(times, tokens, microbatch, replica, kept), counts


@settings(max_examples=60, deadline=None)
@given(group_lists())
def test_limits_hold_nothing_gets_slower_and_the_same_comes_out_again(drawn):
    groups, counts = drawn
    made = assign(groups, counts)
    again = assign(groups, counts)
    assert made.replica.tolist() == again.replica.tolist()
    assert made.microbatch.tolist() == again.microbatch.tolist()
    assert (made.microbatch < np.array(counts)[made.replica]).all()
    first = np.concatenate([[0], np.cumsum(counts)])
    before, after = first[groups.replica] + groups.microbatch, first[made.replica] + made.microbatch
    assert set(after) == set(range(sum(counts))), "a microbatch is empty"
    for values in (groups.tokens, groups.kept_bytes[:, None]):
        held = [np.zeros((sum(counts), values.shape[1])) for _ in range(2)]
        np.add.at(held[0], before, values)
        np.add.at(held[1], after, values)
        assert (held[1].max(axis=0) <= held[0].max(axis=0)).all()
    old = measure_spread(groups.time_us, groups.replica, len(counts))
    new = measure_spread(groups.time_us, made.replica, len(counts))
    for least, most in zip(
        (new.slowest, *new.slowest_modules), (old.slowest, *old.slowest_modules), strict=True
    ):
        assert least <= most * (1 + 1e-8)


def test_replicas_of_many_microbatches_get_within_the_tolerance():
    random = np.random.default_rng(0)
    num_replicas, num_microbatches = 32, 16
    num_groups = num_replicas * num_microbatches
    time_us = np.column_stack([random.integers(0, 48, num_groups), np.full(num_groups, 10)])
    places = np.arange(num_groups)
    groups = make_groups(
        time_us, microbatch=places % num_microbatches, replica=places // num_microbatches
    )
    made = assign(groups, [num_microbatches] * num_replicas)
    assert measure_spread(groups.time_us, groups.replica, num_replicas).slowest > 1.05
    assert measure_spread(groups.time_us, made.replica, num_replicas).slowest <= 1.003
    assert made.between.groups < num_groups / 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"limits": Limits(tokens=[1])}, "holds 2 tokens of module 0 .limit 1"),
        ({"limits": Limits(kept_bytes=3)}, "holds 4 bytes .limit 3"),
        ({"tolerance": -1.0}, "tolerance -1.0 .expected 0 or more"),
        ({"microbatch_tolerance": float("nan")}, "microbatch_tolerance nan"),
    ],
)
def test_what_a_batch_cannot_keep_is_refused(given, message):
    groups = make_groups([1.0, 1.0], tokens=[2, 1], kept_bytes=[4, 0])
    with pytest.raises(ConfigError, match=message):
        assign(groups, [2], **given)


def test_groups_outside_of_their_microbatches_and_broken_arrays_are_refused():
    with pytest.raises(ValueError, match="group 1 is in microbatch 1 of replica 0"):
        assign(make_groups([1.0, 1.0]), [1])
    with pytest.raises(ValueError, match="time_us has entries below 0"):
        make_groups([-1.0])
    with pytest.raises(ValueError, match="kept_bytes has 1 rows for 2 groups"):
        make_groups([1.0, 1.0], kept_bytes=[0])


def run(*arguments):
    return CliRunner().invoke(app, ["assign", *map(str, arguments)])


@pytest.fixture
def files(tmp_path):
    for name, samples in (("a", [[(2, 4.0)] * 3, [(2, 4.0)] * 3]), ("b", [[(0, 4.0)] * 3] * 2)):
        problem = sample_problem(samples)
        (tmp_path / f"{name}.json").write_text(problem.model_dump_json(exclude_none=True))
    return [tmp_path / "a.json", tmp_path / "b.json"]


def images(folder):
    problems = [load_problem(path) for path in sorted(folder.glob("*.json"))]
    return [[len(m.get("vision", ())) for m in problem.microbatches] for problem in problems]


def test_the_command_writes_problems_anew_and_says_what_moved(files):
    folder = files[0].parent / "new"
    result = run(*files, "-o", folder)
    assert result.exit_code == 0, result.output
    assert [sum(each) for each in images(folder)] == [6, 6]
    assert "moved to other replicas: 6 of 12 groups, 12 items" in result.output
    result = run(*files, "-o", folder, "--within")
    assert images(folder) == [[6, 6], [0, 0]]
    result = run(*files, "-o", folder, "--between-replicas-only")
    assert sorted(map(sorted, images(folder))) == [[0, 6], [0, 6]]


def test_the_command_refuses_what_cannot_be_assigned(files):
    problem = load_problem(files[1])
    other = problem.model_copy(update={"memory_limit_bytes": (1, 1)})
    files[1].write_text(other.model_dump_json())
    folder = files[0].parent / "new"
    result = run(*files, "-o", folder)
    assert result.exit_code == 2 and "replica 1 has another memory_limit_bytes" in result.output
    result = run(files[0], files[0], "-o", folder)
    assert result.exit_code == 2 and "several problems are called 'a.json'" in result.output
    result = run(files[0], "-o", folder, "--within", "--between-replicas-only")
    assert result.exit_code == 2 and "leave nothing to move" in result.output
    result = run(files[0], "-o", folder, "--max-tokens", "audio=4")
    assert result.exit_code == 2 and "'audio=4'" in result.output
    result = run(files[0], "-o", folder, "--max-tokens", "language=1")
    assert result.exit_code == 2 and "limit 1" in result.output
    assert not folder.exists()


def test_no_problems_are_no_batch():
    with pytest.raises(ProblemError, match="expected one per replica"):
        batch_groups([])
