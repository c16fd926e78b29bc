"""LaVIN's data: problems, prompts, scores, chats, rows, packing, and the weights of losses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from member_cases import check_members
from PIL import Image
from tiny_lavin import SEQUENCE_LENGTH, make_tiny_scienceqa, raw_problem

from megatron_dip.errors import DataError
from megatron_dip.families.data.packing import PackingOptions
from megatron_dip.families.data.tokenizer import load_tokenizer
from megatron_dip.families.lavin.chat import read_chat
from megatron_dip.families.lavin.dataset import LavinDataset, LavinSettings
from megatron_dip.families.lavin.images import IMAGE_MEAN, IMAGE_STD, load_patches
from megatron_dip.families.lavin.instructions import Instruction, encode_instruction
from megatron_dip.families.lavin.scienceqa import (
    answer_text,
    parse_problem,
    predicted_choice,
    prompt_text,
    read_scienceqa,
    score,
    to_instruction,
)

PROBLEM = {
    "question": "Which is  warm?",
    "choices": ["the moon", "a stone", "tea"],
    "answer": 2,
    "hint": "",
    "image": None,
    "lecture": "Things\ncool.",
    "solution": "Tea is  hot.",
    "subject": "natural science",
    "grade": "grade4",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scienceqa")
    make_tiny_scienceqa(folder)
    return folder


@pytest.fixture(scope="module")
def settings(folder):
    return LavinSettings(
        tokenizer=folder / "tokenizer.json",
        image_folder=folder / "images",
        image_size=42,
        patch_size=14,
        num_features=3,
        seq_length=SEQUENCE_LENGTH,
    )


def read(folder, split="train"):
    return read_scienceqa(folder / "problems.json", folder / "pid_splits.json", split)


def make_dataset(settings, folder, num_samples=70, **options):
    samples = [to_instruction(problem) for problem in read(folder).problems]
    return LavinDataset(settings, samples, num_samples=num_samples, seed=1, **options)


def parse(**changes):
    return parse_problem("17", PROBLEM | changes, "train")


def test_prompt_and_answer_have_the_published_form():
    assert prompt_text(parse()) == (
        "Question: Which is warm?\nContext: N/A\n"
        "Options: (A) the moon (B) a stone (C) tea\nResponse:"
    )
    assert prompt_text(parse(hint="At night.")).splitlines()[1] == "Context: At night."
    assert answer_text(parse()) == ("The answer is C. BECAUSE: Things\\ncool. Tea is hot.")
    assert answer_text(parse(lecture="")) == "The answer is C. BECAUSE: Tea is hot."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 3}, r"problem 17: answer 3 is not the number of a choice \(expected 0 to 2\)"),
        ({"answer": -1}, "problem 17: answer -1"),
        ({"answer": "2"}, "problem 17: answer '2'"),
        ({"choices": []}, "problem 17: field 'choices'"),
        ({"question": None}, "problem 17: field 'question'"),
        ({"solution": 4}, "problem 17: field 'solution'"),
        ({"image": 4}, "problem 17: field 'image'"),
    ],
)
def test_a_bad_field_is_named_with_its_problem(changes, message):
    with pytest.raises(DataError, match=message):
        parse(**changes)


def rewrite(folder, target, change):
    """A copy of the files' contents, changed; the images stay where they are."""
    problems = json.loads((folder / "problems.json").read_text())
    splits = json.loads((folder / "pid_splits.json").read_text())
    change(problems, splits)
    (target / "problems.json").write_text(json.dumps(problems))
    (target / "pid_splits.json").write_text(json.dumps(splits))
    return read_scienceqa(target / "problems.json", target / "pid_splits.json", "train")


def test_missing_problems_are_named_and_the_others_kept(folder, tmp_path, settings):
    def change(problems, splits):
        splits["train"].append("no-such")
        problems["3"]["choices"] = 4
        problems["5"]["answer"] = 9

    whole, found = read(folder), rewrite(folder, tmp_path, change)
    assert len(found.problems) == len(whole.problems) - 2
    choices, answer, missing = found.errors
    assert "problem 3: field 'choices'" in choices
    assert "problem 5: answer 9" in answer
    assert "problem no-such: is in split 'train'" in missing
    samples = [to_instruction(problem) for problem in found.problems]
    with pytest.raises(DataError, match=r"problem 3: field .* \(and 2 more bad samples\)"):
        LavinDataset(settings, samples, errors=found.errors, num_samples=4, seed=1)
    kept = LavinDataset(
        settings, samples, errors=found.errors, num_samples=62, seed=1, skip_bad_samples=True
    )
    # Every good problem is still seen once in the first epoch.
    numbers = [kept.sample_numbers(i)[0] for i in range(len(samples))]
    assert sorted(numbers) == list(range(len(samples)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("problems.json", "[]", "expected an object of problems by qid, found list"),
        ("pid_splits.json", '{"test": []}', "no split 'train'"),
        ("problems.json", "{", "not JSON"),
    ],
)
def test_files_of_another_form_are_refused(folder, tmp_path, name, content, message):
    rewrite(folder, tmp_path, lambda problems, splits: None)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_answers_are_read_by_their_letter():
    assert predicted_choice("The answer is B. BECAUSE: ...", 3) == 1
    assert predicted_choice("I say: The answer is C. And so", 3) == 2
    assert predicted_choice("The answer is D.", 3) is None
    assert predicted_choice("the answer is B", 3) is None


def test_scores_are_shares_of_right_answers_by_group():
    random = np.random.default_rng(0)
    problems = [
        parse_problem(str(n), raw_problem(n, image=n % 2 == 0, random=random), "test")
        for n in range(12)
    ]
    letters = {p.qid: "AB"[p.answer] for p in problems}
    right = {qid: f"The answer is {letter}. BECAUSE" for qid, letter in letters.items()}
    perfect = score(problems, right)
    assert perfect.average == 100.0 and perfect.num_guessed == 0
    assert perfect.by_group["SOC"] is None
    wrong = right | {"0": "The answer is B.", "1": "no idea"}
    found = score(problems, wrong, seed=1)
    assert found.num_guessed == 1
    assert found.by_group["IMG"] == pytest.approx(100 * 5 / 6)
    assert found.average in (pytest.approx(100 * 11 / 12), pytest.approx(100 * 10 / 12))
    assert score(problems, wrong, seed=1) == found
    del right["7"]
    with pytest.raises(DataError, match="problem 7: no answer"):
        score(problems, right)


def test_chats_are_read_turn_by_turn(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turns = [
        {"instruction": "What is it?", "answer": "A.", "image": "a.png", "image_source": None},
        {"instruction": "Say.", "answer": "B.", "image": None, "qid": "q2"},
        {"instruction": "See.", "answer": "C.", "image": "b.png", "qid": "q3"},
        {"instruction": 5, "answer": "D."},
    ]
    (tmp_path / "chat.json").write_text(json.dumps({"all": turns}))
    samples, errors = read_chat(tmp_path / "chat.json")
    assert samples[0].prompt == "Instruction: What is it? \nResponse:"
    named = [sample.image and sample.image.name for sample in samples]
    assert named == ["a.png", None, "b.png"]
    assert "sample number 3: field 'instruction'" in errors[0]
    (tmp_path / "chat.json").write_text("{}")
    with pytest.raises(DataError, match=r'expected \{"all"'):
        read_chat(tmp_path / "chat.json")


def test_rows_of_a_sample_have_the_published_order(folder, settings):
    tokenizer = load_tokenizer(settings.tokenizer)
    sample = Instruction(name="s", prompt="Why?", answer=" So.", image=settings.image_folder)
    encoded = encode_instruction(sample, tokenizer, num_features=3, max_rows=90)
    prefix, text = tokenizer.encode_text("Image: "), tokenizer.encode_text("Why?")
    answer = [*tokenizer.encode_text(" So."), tokenizer.eos_id]
    assert encoded.tokens == (tokenizer.bos_id, *prefix, 0, 0, 0, *text, *answer)
    assert encoded.image_rows == tuple(range(1 + len(prefix), 4 + len(prefix)))
    assert encoded.num_learned == len(answer) and all(encoded.learned[-len(answer) :])
    bare = encode_instruction(replace(sample, image=None), tokenizer, num_features=3, max_rows=90)
    start = (tokenizer.bos_id, *tokenizer.encode_text("Image: N/A"))
    assert bare.tokens[: len(start)] == start and bare.image_rows == ()
    room = len(encoded.tokens) - 2
    cut = encode_instruction(sample, tokenizer, num_features=3, max_rows=room)
    assert cut.tokens == encoded.tokens[:room]
    with pytest.raises(DataError, match="s: the instruction alone has"):
        start = len(encoded.tokens) - encoded.num_learned
        encode_instruction(sample, tokenizer, num_features=3, max_rows=start)


def test_images_are_squashed_and_scaled_by_imagenets_statistics(tmp_path):
    pixels = np.zeros((30, 60, 3), dtype=np.uint8)
    pixels[:, 30:, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    patches = load_patches(tmp_path / "half.png", image_size=28, patch_size=7)
    assert patches.shape == (16, 3 * 49)
    red = patches.view(4, 4, 3, 7, 7)[:, :, 0]
    low, high = -IMAGE_MEAN[0] / IMAGE_STD[0], (1 - IMAGE_MEAN[0]) / IMAGE_STD[0]
    assert red[:, 0].flatten().tolist() == pytest.approx([low] * 196, abs=1e-5)
    assert red[:, 3].flatten().tolist() == pytest.approx([high] * 196, abs=1e-5)


def test_a_sequence_begins_with_the_modality_rows_of_its_samples(folder, settings):
    packed = make_dataset(replace(settings, packing=PackingOptions(separation=0.0)), folder)
    sequence = next(packed[i] for i in range(70) if len(packed.sample_numbers(i)) > 1)
    count = len(sequence.sample_lengths)
    assert sequence.span_lengths[:count] == (1,) * count
    assert sequence.num_rows <= SEQUENCE_LENGTH
    batch = packed.collate_fn([sequence, packed[0]]).sub_batch("language", [1, 0])
    assert batch.modality_rows.tolist()[-count:] == [
        packed[0].num_rows + place for place in range(count)
    ]
    spans = torch.tensor(batch.span_lengths)
    own = batch.gate_of_row.split(spans.tolist())
    for span, gates in zip(batch.span_lengths, own, strict=True):
        assert len(set(gates.tolist())) == 1, span
    assert set(batch.gate_of_row.tolist()) == set(range(len(batch.modality_rows)))


def test_every_sample_is_seen_once_in_an_epoch_packed_or_not(folder, settings):
    for packing in (None, PackingOptions(separation=0.0)):
        dataset = make_dataset(replace(settings, packing=packing), folder)
        count = len(read(folder).problems)
        seen: list[int] = []
        number = 0
        while len(seen) < count:
            seen += dataset.sample_numbers(number)
            number += 1
        assert sorted(seen) == list(range(count))


def test_sizes_of_sequences_are_known_before_they_are_read_and_samples_fit_any_sequence(
    folder, settings
):
    for packing in (None, PackingOptions(separation=0.0)):
        check_members(make_dataset(replace(settings, packing=packing), folder), range(40, 46))


def total(dataset, sequences, losses):
    """The loss over ``sequences``, where ``losses[number][k]`` belongs to a sample's k-th answer
    token."""
    weighed, units = 0.0, 0
    for i in sequences:
        sequence, numbers = dataset[i], dataset.sample_numbers(i)
        rows = sequence.weights.split(list(sequence.span_lengths))[len(numbers) :]
        for number, weights in zip(numbers, rows, strict=True):
            learned = weights[weights > 0]
            weighed += float((learned * losses[number][: len(learned)]).sum())
        units += sequence.num_loss_units
    return weighed / units


def test_the_mean_of_means_does_not_depend_on_packing(folder, settings):
    alone = make_dataset(settings, folder, decode_images=False)
    packed = make_dataset(
        replace(settings, packing=PackingOptions(separation=0.0)), folder, decode_images=False
    )
    count = len(read(folder).problems)
    losses = torch.rand(count, SEQUENCE_LENGTH, generator=torch.Generator().manual_seed(0))
    order = [alone.sample_numbers(i)[0] for i in range(count)]
    # By hand: the mean over groups of four of the mean over their supervised tokens, each group
    # counted by its samples.
    expected = 0.0
    for start in range(0, count, 4):
        group = order[start : start + 4]
        tokens = [int((alone[order.index(n)].weights > 0).sum()) for n in group]
        sums = [losses[n, :length].sum() for n, length in zip(group, tokens, strict=True)]
        expected += len(group) * float(sum(sums)) / sum(tokens) / count
    assert total(alone, range(count), losses) == pytest.approx(expected, rel=1e-5)
    sequences = 0
    while sum(len(packed.sample_numbers(i)) for i in range(sequences)) < count:
        sequences += 1
    assert sequences < count
    assert total(packed, range(sequences), losses) == pytest.approx(expected, rel=1e-5)


def test_the_loss_per_token_weighs_all_supervised_tokens_alike(folder, settings):
    dataset = make_dataset(replace(settings, loss="per_token"), folder, decode_images=False)
    for i in range(8):
        sequence = dataset[i]
        assert set(sequence.weights.tolist()) == {0.0, 1.0}
        assert sequence.num_loss_units == int(sequence.weights.sum())


def test_blank_images_are_given_only_beside_others_and_read_by_nobody(folder, settings):
    dataset = make_dataset(replace(settings, fills_blank_images=True), folder)
    with_image = next(dataset[i] for i in range(70) if dataset[i].images)
    text = next(dataset[i] for i in range(70) if not dataset[i].images)
    assert dataset.collate_fn([text, text]).images == ()
    batch = dataset.collate_fn([text, with_image])
    assert len(batch.images) == 2 and batch.needs == ((), (1,))
    assert batch.images[0].abs().max() == 0
    assert batch.whole(SEQUENCE_LENGTH).wanted == (1,)
