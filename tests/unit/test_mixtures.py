"""Drawn batches, and the command that makes problems of them."""

import json
from statistics import mean, pstdev

import pytest
from cost_cases import GPUS, MODELS, ROOT
from typer.testing import CliRunner

from megatron_dip.cli.main import app
from megatron_dip.costs.distributions import Counts
from megatron_dip.costs.mixtures import BUILT_IN, built_in_mixture, draw_microbatches, load_workload
from megatron_dip.errors import ConfigError
from megatron_dip.partition import uniform_partition
from megatron_dip.plan.validation import validate_plan
from megatron_dip.planner import make_plan
from megatron_dip.simulator import simulate, useful_work_us
from megatron_dip.workload import load_problem


def run(output, name, *more):
    arguments = [
        "problem",
        "--model",
        ROOT / "configs" / "models" / f"{name}.yaml",
        "--cluster",
        ROOT / "configs" / "clusters" / f"h100_{GPUS[name]}.yaml",
        "-o",
        output,
        *more,
    ]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def made(output, name, *more):
    result = run(output, name, "--mixture", name[:3], *more)
    assert result.exit_code == 0, result.output
    return load_problem(output)


def image_share(microbatch):
    return sum(image.tokens for image in microbatch["vision"]) / 4 / 8192


def test_images_and_text_range_from_all_text_to_nearly_all_images():
    batch = draw_microbatches(built_in_mixture("vlm"), 200, 0)
    shares = [image_share(microbatch) for microbatch in batch]
    assert min(shares) == 0
    assert 0.85 < max(shares) < 1
    assert 0.3 < sum(shares) / len(shares) < 0.5
    for microbatch in batch:
        (sequence,) = microbatch["language"]
        assert sum(sequence.spans) == sequence.tokens == 8192
        assert sequence.needs == {"vision": tuple(range(len(microbatch["vision"])))}
        assert all(196 <= image.tokens <= 2704 for image in microbatch["vision"])


def test_clips_read_their_own_captions():
    batch = draw_microbatches(built_in_mixture("t2v"), 200, 0)
    sizes = {microbatch["dit"][0].tokens for microbatch in batch}
    assert (min(sizes), max(sizes)) == (256, 30720)
    for microbatch in batch:
        (clip,) = microbatch["dit"]
        assert clip.context_tokens == sum(caption.tokens for caption in microbatch["text"])
        assert clip.needs == {"text": tuple(range(len(microbatch["text"])))}


def test_each_of_two_clips_reads_the_captions_that_follow_the_firsts():
    pairs = built_in_mixture("t2v").model_copy(
        update={
            "clips_per_microbatch": Counts(values=(2,)),
            "captions_per_clip": Counts(values=(3,)),
        }
    )
    (microbatch,) = draw_microbatches(pairs, 1, 0)
    lengths = [caption.tokens for caption in microbatch["text"]]
    first, second = microbatch["dit"]
    assert (first.needs, second.needs) == ({"text": (0, 1, 2)}, {"text": (3, 4, 5)})
    assert (first.context_tokens, second.context_tokens) == (sum(lengths[:3]), sum(lengths[3:]))


def test_dips_sequences_hold_images_of_one_size_from_few_to_as_many_as_fit():
    batch = draw_microbatches(built_in_mixture("dip-vlm"), 640, 0)
    counts = [len(microbatch["vision"]) for microbatch in batch]
    assert min(counts) < 5 and 43 < max(counts) <= 48
    assert 21 < mean(counts) < 24  # as in batches made elsewhere from the same description
    assert 9.5 < pstdev(counts) < 11.5
    for microbatch in batch:
        (sequence,) = microbatch["language"]
        assert sum(sequence.spans) == sequence.tokens == 8192
        assert sequence.needs == {"vision": tuple(range(len(microbatch["vision"])))}
        assert {(image.tokens, image.output_tokens) for image in microbatch["vision"]} == {
            (2704, 169)
        }


def test_dips_clips_of_a_microbatch_are_alike_in_length_and_bounded():
    batch = draw_microbatches(built_in_mixture("dip-t2v"), 640, 0)
    for microbatch in batch:
        lengths = [clip.tokens / 2048 for clip in microbatch["dit"]]
        assert 1 <= len(lengths) <= 8 and sum(lengths) <= 16
        assert max(lengths) <= 1.3 * min(lengths)
        for number, clip in enumerate(microbatch["dit"]):
            assert clip.needs == {"text": (number,)}
            assert clip.context_tokens == microbatch["text"][number].tokens
    assert {len(microbatch["dit"]) for microbatch in batch} == set(range(1, 9))


@pytest.mark.parametrize("kind", ["vlm", "dip-vlm"])
def test_samples_are_the_parts_of_the_sequences_with_the_images_that_each_reads(kind):
    mixture = built_in_mixture(kind)
    sequences = draw_microbatches(mixture, 30, 5)
    samples = draw_microbatches(mixture, 30, 5, "samples")
    for whole, parts in zip(sequences, samples, strict=True):
        assert whole["vision"] == parts["vision"]
        (sequence,) = whole["language"]
        assert sequence.spans == tuple(part.tokens for part in parts["language"])
        read = [number for part in parts["language"] for number in part.needs["vision"]]
        assert read == list(range(len(parts["vision"])))
    assert any(part.needs == {"vision": ()} for each in samples for part in each["language"])


def test_a_problem_of_samples_costs_what_that_of_sequences_does(tmp_path):
    half = ("--cluster", ROOT / "configs" / "clusters" / "h100_16_half_peak.yaml")
    arguments = ("--mixture", "dip-vlm", "--seed", "4", *half)
    for name, more in (("sequences", ()), ("samples", ("--language-items", "samples"))):
        result = run(tmp_path / f"{name}.json", "vlm_s", *arguments, *more)
        assert result.exit_code == 0, result.output
    whole, parts = (load_problem(tmp_path / f"{n}.json") for n in ("sequences", "samples"))
    assert whole.num_microbatches == parts.num_microbatches == 64
    assert useful_work_us(parts) == pytest.approx(useful_work_us(whole))
    assert all(len(microbatch["language"]) == 1 for microbatch in whole.microbatches)
    texts = [
        i for each in parts.microbatches for i in each["language"] if i.needs == {"vision": ()}
    ]
    assert texts  # a sample without an image waits for none


@pytest.mark.parametrize("kind", BUILT_IN)
def test_a_seed_gives_one_batch_and_another_seed_another(kind):
    mixture = built_in_mixture(kind)
    assert draw_microbatches(mixture, 8, 3) == draw_microbatches(mixture, 8, 3)
    assert draw_microbatches(mixture, 8, 3) != draw_microbatches(mixture, 8, 4)


@pytest.mark.parametrize("name", MODELS)
def test_a_made_problem_loads_plans_and_stays_within_memory(tmp_path, name):
    problem = made(tmp_path / "p.json", name, "--microbatches", "6", "--seed", "1")
    assert problem.num_microbatches == 6
    layers = {module.name: module.num_layers for module in problem.modules}
    partition = uniform_partition(layers, dict.fromkeys(layers, 1), problem.num_ranks)
    plan = make_plan(problem, partition)
    validate_plan(plan)
    assert max(simulate(plan).peak_bytes) <= min(problem.memory_limit_bytes)


def test_the_same_command_writes_the_same_bytes(tmp_path):
    made(tmp_path / "a.json", "vlm_s", "--microbatches", "3", "--seed", "7")
    made(tmp_path / "b.json", "vlm_s", "--microbatches", "3", "--seed", "7")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_statistics_file_replaces_the_mixture(tmp_path):
    path = tmp_path / "statistics.json"
    path.write_text(built_in_mixture("vlm").model_dump_json())
    assert load_workload(path) == built_in_mixture("vlm")
    result = run(tmp_path / "a.json", "vlm_s", "--statistics", path, "--microbatches", "2")
    assert result.exit_code == 0, result.output
    assert load_problem(tmp_path / "a.json") == made(
        tmp_path / "b.json", "vlm_s", "--microbatches", "2"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "audio"}, "tag 'audio' found"),
        ({"image_patches": {"values": [30]}}, r"image_patches.values: \[30\] are no multiples"),
        ({"image_share": {"values": [1.5]}}, "vlm.image_share.values.0: .*less than or equal"),
        ({"text_tokens": {"values": []}}, "vlm.text_tokens.values: .*at least 1 item"),
        ({"text_tokens": {"values": [1, 2], "weights": [1]}}, "text_tokens: .*1 weights for 2"),
        ({"text_tokens": {"values": [1], "weights": [0]}}, "text_tokens: .*weights sum to 0"),
        ({"sequence_tokens": None}, "vlm.sequence_tokens"),
        ({"frames": 3}, "vlm.frames: Extra inputs"),
    ],
)
def test_a_malformed_statistics_file_names_the_field(tmp_path, change, message):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(built_in_mixture("vlm").model_dump(mode="json") | change))
    with pytest.raises(ConfigError, match=f"s.json: .*{message}"):
        load_workload(path)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("vlm_s", (), "--mixture or --statistics: expected exactly one"),
        ("vlm_s", ("--mixture", "vlm", "--statistics", "x"), "expected exactly one"),
        ("vlm_s", ("--mixture", "vlm", "--microbatches", "0"), "0 microbatches (expected"),
        ("vlm_s", ("--mixture", "t2v"), "unknown modules ['dit', 'text']"),
        ("t2v_s", ("--mixture", "t2v", "--language-items", "samples"), "packs no sequences"),
        ("t2v_s", ("--mixture", "dip-t2v", "--language-items", "samples"), "packs no sequences"),
        ("vlm_s", ("--statistics", "nowhere.json"), "nowhere.json: cannot be read"),
        ("vlm_s", ("--mixture", "vlm", "--profile", "no.json"), "no.json: cannot be read"),
        ("vlm_s", ("--mixture", "vlm", "--cluster", "no.yaml"), "no.yaml: cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, name, more, message):
    result = run(tmp_path / "p.json", name, *more)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
