"""Odd values and keys in samples: each makes one bad sample, which is named and can be skipped."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_data_set import conversation, make_settings, sample_of, with_samples

from megatron_dip.errors import DataError
from megatron_dip.families.data.fields import say_unread, unread_keys
from megatron_dip.families.data.images import ImageLimits
from megatron_dip.families.data.index import build_index, usable_samples
from megatron_dip.families.data.samples import encode_text, parse_sample
from megatron_dip.families.data.tokenizer import load_tokenizer
from megatron_dip.families.lavin.chat import parse_turn, read_chat
from megatron_dip.families.lavin.scienceqa import parse_problem, read_scienceqa
from megatron_dip.families.omni.data import OmniDataset, OmniSettings, build_omni_index
from megatron_dip.families.omni.samples import parse_omni_sample
from megatron_dip.families.t2v.samples import parse_clip_sample
from megatron_dip.families.vlm.dataset import VlmDataset

BASE64 = "iVBORw0KGgo" * 9000
DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]
ODD_TEXTS = {
    "half a surrogate pair": ("It is \ud800 here", "half a surrogate pair at character 6"),
    "nothing": ("", "is blank"),
    "blanks": (" \n\t", "is blank"),
    "null": (None, "is missing"),
    "a number": (5, "is 5; expected a text"),
    "a list": (["a"] * 9000, "is ['a', 'a'"),
    "an object": ({"text": BASE64}, "is {'text': 'iVB"),
    "deep": (DEEP, "is [[[["),
}
ODD_NAMES = {
    "a NUL": ("a\0.png", "which holds a NUL"),
    "half a surrogate pair": ("\ud800.png", "half a surrogate pair"),
    "nothing": ("", "expected the name of a file"),
    "too long": (BASE64, "(99,000 characters), too long"),
    "many folders": ("a/" * 3000, "too long"),
    "a number": (5, "is 5; expected"),
    "not a number": (float("nan"), "is nan; expected"),
    "an object": ({"bytes": BASE64}, "is {'bytes': 'iVB"),
    "content": (f"data:image/png;base64,{BASE64}", "no address and no content"),
    "an address": ("https://example.org/a.png", "no address"),
}
# Of each form of data: how one is read, one that is good, where texts and names of files are.
FORMS: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "vlm": (parse_sample, sample_of("s7", "a.png"), (), ("image",)),
    "omni": (
        parse_omni_sample,
        {"id": "s7", "image": "a", "audio": "b", "question": "What?", "answer": "A cat."},
        ("question", "answer"),
        ("image", "audio"),
    ),
    "t2v": (
        parse_clip_sample,
        {"id": "s7", "video": "a.mp4", "caption": "A cat."},
        ("caption",),
        ("video",),
    ),
    "chat": (
        parse_turn,
        {"qid": "s7", "instruction": "Say.", "answer": "A.", "image": "a.png"},
        ("instruction", "answer"),
        ("image", "image_source"),
    ),
    "scienceqa": (
        lambda raw, number: parse_problem("s7", raw, "train"),
        {"question": "Which?", "choices": ["a", "b"], "answer": 0, "image": "a.png"},
        ("question",),
        ("image",),
    ),
}
TEXTS = [(form, field) for form, (_, _, fields, _) in FORMS.items() for field in fields]
NAMES = [(form, field) for form, (_, _, _, fields) in FORMS.items() for field in fields]
EMPTY = ("nothing", "null")


def refusal(form: str, changes: dict[str, Any]) -> str:
    """What is said of a sample; asserts that it is one printable line that names the sample."""
    read, good, _, _ = FORMS[form]
    read(good, 3)
    with pytest.raises(DataError) as caught:
        read(good | changes, 3)
    message = str(caught.value)
    assert "s7" in message and message.isprintable() and len(message) < 500
    return message


@pytest.mark.parametrize(("form", "field"), TEXTS)
def test_an_odd_text_is_refused_in_one_line_that_names_the_sample(form: str, field: str) -> None:
    for value, expected in ODD_TEXTS.values():
        message = refusal(form, {field: value})
        assert f"field '{field}'" in message and expected in message


@pytest.mark.parametrize(("form", "field"), NAMES)
def test_an_odd_name_of_a_file_is_refused_in_one_line(form: str, field: str) -> None:
    for kind, (value, expected) in ODD_NAMES.items():
        if kind == "nothing" and field == "image_source":
            continue  # There, nothing means the folder of the images itself.
        message = refusal(form, {field: value})
        assert f"field '{field}'" in message and expected in message


@pytest.mark.parametrize("name", ["/photos/a.png", "../a.png", "a b\n.png", "图.png", "-"])
def test_names_of_files_anywhere_are_names(name: str) -> None:
    assert parse_sample(sample_of("s", name), 0).images == (name,)


@pytest.mark.parametrize("value", [True, 1.5, ["a"], {"a": 1}, float("nan")])
@pytest.mark.parametrize("form", ["vlm", "omni", "t2v"])
def test_an_id_is_a_text_or_a_whole_number(form: str, value: object) -> None:
    read, good, _, _ = FORMS[form]
    read(good | {"id": 7}, 3)
    with pytest.raises(DataError, match=r"\(number 3\): field 'id' is .*; expected a text"):
        read(good | {"id": value}, 3)


def test_odd_turns_are_refused_in_one_line() -> None:
    turns = conversation("What?", "A cat.")
    for value, expected in ODD_TEXTS.values():
        for change in ({"value": value}, {"from": value}):
            if "surrogate" in expected or "from" not in change:
                changed = [turns[0], turns[1] | change]
                assert "turn 1" in refusal("vlm", {"image": None, "conversations": changed})
    as_text = {"image": None, "conversations": json.dumps(turns)}
    assert "field 'conversations' is '[{" in refusal("vlm", as_text)
    openai = [{"role": "user", "content": "What?"}]
    message = refusal("vlm", {"image": None, "conversations": openai})
    assert "field 'from' is missing (the keys are 'role', 'content')" in message


# ---- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "key", "meant"),
    [
        ("vlm", "imge", "image"),
        ("vlm", "iamge", "image"),
        ("vlm", "Image", "image"),
        ("vlm", "images", "image"),
        ("vlm", "image_1", "image"),
        ("vlm", "conversation", "conversations"),
        ("omni", "answers", "answer"),
        ("omni", "Audio ", "audio"),
        ("t2v", "captions", "caption"),
        ("chat", "instructions", "instruction"),
        ("scienceqa", "lectures", "lecture"),
    ],
)
def test_a_key_that_is_nearly_one_of_the_form_is_refused_by_name(
    form: str, key: str, meant: str
) -> None:
    assert f"the key {key!r} is not read (expected {meant!r})" in refusal(form, {key: "a"})


@pytest.mark.parametrize(
    ("form", "key"),
    [
        *(("vlm", key) for key in ("video", "videos", "audio", "images_list", "img", "messages")),
        *(("vlm", key) for key in ("system", "tools", "weight", "image_base64", "frames")),
        *(("omni", key) for key in ("video", "speech", "system")),
        *(("t2v", key) for key in ("image", "audio", "frames")),
        *(("chat", key) for key in ("video", "system")),
        *(("scienceqa", key) for key in ("video", "audio")),
    ],
)
def test_a_key_that_says_what_would_not_be_trained_is_refused_by_name(form: str, key: str) -> None:
    if key == "images_list":
        key = "image_list"
    message = refusal(form, {key: ["a"]})
    assert f"the key {key!r} is not read by this form of data" in message


def test_a_key_of_a_turn_that_says_more_is_refused_by_name() -> None:
    turns = conversation("What?", "A cat.")
    for key, value in {"image": "a.png", "weight": 0, "loss": False, "valu": "b"}.items():
        changed = [turns[0], turns[1] | {key: value}]
        message = refusal("vlm", {"image": None, "conversations": changed})
        assert f"turn 1: the key {key!r} is not read" in message


def test_a_key_that_comes_twice_is_refused_by_name(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "data", num_samples=2)
    text = json.dumps([sample_of("a"), sample_of("b")])
    settings.samples.write_text(text.replace('"id": "b"', '"id": "b", "id": "c"'))
    index, _ = build_index(settings, tmp_path, show_progress=False)
    assert index.samples[0].error is None
    assert "sample 'c' (number 1): the key 'id' comes twice" in str(index.samples[1].error)


def test_empty_values_and_numbers_under_a_medium_say_nothing_more() -> None:
    raw = {"id": 1, "video": None, "images": [], "audio": "", "system": {}, "frames": 16}
    assert unread_keys(raw, ("id", "image"), "sample 1") == ("frames",)
    assert unread_keys({"_id": 1, "ids": 2}, ("id", "image"), "sample 1") == ("_id", "ids")
    address = {"image_url": "https://example.org"}
    assert unread_keys({"image": "a.png"} | address, ("image",), "sample 1") == ("image_url",)
    with pytest.raises(DataError, match="image_url"):
        unread_keys(address, ("image",), "sample 1")


def test_other_keys_are_counted_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = make_settings(tmp_path / "data", num_samples=1)
    extra = [sample_of("a") | {"source": "web", "width": 5}, sample_of("b") | {"source": "book"}]
    settings = with_samples(settings, extra)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            build_index(settings, tmp_path, show_progress=False)
    (line,) = caplog.messages
    assert line.endswith("keys that are not read: 'source' (2 times), 'width' (1 times)")
    caplog.clear()
    say_unread("file", [tuple(f"{BASE64}{n}" for n in range(500))])
    assert len(caplog.messages[0]) < 2500 and "and 488 more" in caplog.messages[0]


# ---- skipping ----------------------------------------------------------------------------------


def test_odd_samples_are_left_out_and_the_others_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = make_settings(tmp_path / "data", num_samples=1)
    texts = [{"id": k, "conversations": conversation("?", v)} for k, (v, _) in ODD_TEXTS.items()]
    names = [sample_of("f", "a.png") | {"image": v} for v, _ in ODD_NAMES.values()]
    samples = [sample_of("good"), *texts, *names, "odd", None, [], sample_of("fine", "0.jpg")]
    settings = with_samples(settings, samples)
    index, _ = build_index(settings, tmp_path, show_progress=False)
    with pytest.raises(DataError, match=r"'half a surrogate pair' .*and 20 more bad samples"):
        usable_samples(index, skip_bad_samples=False)
    dataset = VlmDataset(settings, index, num_samples=4, seed=1, skip_bad_samples=True)
    assert {n for i in range(4) for n in dataset.sample_numbers(i)} == {0, len(samples) - 1}
    assert len(dataset.collate_fn([dataset[i] for i in range(4)]).sequences) == 4
    assert f"left out 21 bad of {len(samples)} samples" in caplog.text
    assert max(map(len, caplog.messages)) < 2500


def test_odd_samples_of_questions_are_left_out_and_the_others_trained(tmp_path: Path) -> None:
    of_images = make_settings(tmp_path / "data", num_samples=1)
    settings = OmniSettings(
        samples=of_images.samples,
        media_folder=tmp_path,
        tokenizer=of_images.tokenizer,
        seq_length=200,
        limits=ImageLimits(4, 2, 16),
        audio_rate=8000,
        num_mels=16,
    )
    good = {"id": "good", "question": "What?", "answer": "A cat."}
    odd = [good | {field: v} for field in ("answer", "question") for v, _ in ODD_TEXTS.values()]
    odd += [good | {field: v} for field in ("image", "audio") for v, _ in ODD_NAMES.values()]
    with_samples(of_images, [*odd, good])
    index, _ = build_omni_index(settings, tmp_path)
    make = {"num_samples": 3, "seed": 1, "subset": range(len(odd) + 1)}
    with pytest.raises(DataError, match=f"and {len(odd) - 1} more bad samples"):
        OmniDataset(settings, index, **make)
    dataset = OmniDataset(settings, index, **make, skip_bad_samples=True)
    assert len({dataset[i].span_lengths for i in range(3)}) == 1


def test_odd_problems_and_chats_are_left_out(tmp_path: Path) -> None:
    good = {"question": "Which?", "choices": ["a", 2], "answer": 0}
    odd = [good | {"hint": "\ud800"}, good | {"choices": [None]}, good | {"choices": [""]}, None]
    problems = {"good": good} | {f"odd {n}": one for n, one in enumerate(odd)}
    for name, content in (
        ("problems.json", problems),
        ("pid_splits.json", {"train": [*problems, {"a": BASE64}, True, BASE64]}),
        ("chat.json", {"all": [FORMS["chat"][1] | {"answer": v} for v, _ in ODD_TEXTS.values()]}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    files = (tmp_path / "problems.json", tmp_path / "pid_splits.json")
    found = read_scienceqa(*files, "train")
    assert [problem.choices for problem in found.problems] == [("a", "2")]
    assert len(found.errors) == len(odd) + 3 and max(map(len, found.errors)) < 500
    samples, errors = read_chat(tmp_path / "chat.json")
    assert samples == () and len(errors) == len(ODD_TEXTS)


# ---- what is accepted, as docs/data.md says ----------------------------------------------------


def test_turns_stand_in_any_order_and_are_written_as_they_come(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_settings(tmp_path / "data", num_samples=1).tokenizer)

    def written(*turns: tuple[str, str]) -> tuple[str, str]:
        """A conversation as tokens, and what is learned of it."""
        raw = {"id": 1, "conversations": [{"from": role, "value": text} for role, text in turns]}
        text = encode_text(parse_sample(raw, 0), tokenizer)
        learned = [t for t, learn in zip(text.tokens, text.trained, strict=True) if learn]
        return tokenizer.decode(text.tokens), tokenizer.decode(learned)

    assert written(("gpt", "A"), ("human", "B"), ("gpt", "C")) == (
        "<bos><gpt>A<eos><human>B<gpt>C<eos>",
        "A<eos>C<eos>",
    )
    assert written(("human", "B"), ("gpt", "A"), ("gpt", "C")) == (
        "<bos><human>B<gpt>A<eos><gpt>C<eos>",
        "A<eos>C<eos>",
    )
    assert written(("gpt", "A"), ("human", "B")) == ("<bos><gpt>A<eos><human>B", "A<eos>")


def test_ids_may_repeat(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "data", num_samples=1)
    settings = with_samples(settings, [sample_of("same"), sample_of("same")])
    index, _ = build_index(settings, tmp_path, show_progress=False)
    assert usable_samples(index, skip_bad_samples=False) == (0, 1)


def test_nothing_is_cut_off(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "data", num_samples=1)
    settings = with_samples(settings, [sample_of("long", answer="cat " * 500)])
    index, _ = build_index(settings, tmp_path, show_progress=False)
    assert "longer than the sequence length 120" in str(index.samples[0].error)
