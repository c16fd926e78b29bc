"""Samples and tokenizer: what is refused, what becomes a mark, what is learned."""

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.errors import DataError
from megatron_dip.families.data.samples import encode_text, parse_sample, read_samples
from megatron_dip.families.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_tokenizer

TEXTS = [f"What is this? <image> It is a cat number {n} <eos>." for n in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def conversation(*turns: str) -> list[dict[str, str]]:
    return [
        {"from": role, "value": text}
        for role, text in zip(["human", "gpt"] * len(turns), turns, strict=False)
    ]


def parsed(raw, number=4):
    return parse_sample(raw, number)


GOOD = {"id": "cat", "image": "a.png", "conversations": conversation("<image>What?", "A cat.")}


def test_one_image_may_be_a_name_or_a_list_and_may_be_absent():
    assert parsed(GOOD).images == ("a.png",)
    assert parsed(GOOD | {"image": ["a.png"]}).images == ("a.png",)
    text_only = {"id": 7, "conversations": conversation("What?", "A cat.")}
    assert parsed(text_only).images == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": []}, r"sample 'cat' \(number 4\): 1 <image> marks .* but 0 images"),
        ({"image": ["a", "b"]}, "1 <image> marks .* but 2 images"),
        ({"image": 3}, "field 'image' is 3; expected a name or a list"),
        ({"id": None}, "sample number 4: field 'id' is missing"),
        ({"conversations": []}, "'cat'.*field 'conversations' is missing or empty"),
        ({"conversations": ["hello"]}, "turn 0: expected an object, found str"),
        ({"conversations": [{"from": "human"}]}, "turn 0: field 'value' is missing"),
        ({"conversations": [{"value": "a"}]}, "turn 0: field 'from' is missing"),
        (
            {"conversations": [{"from": "robot", "value": "a"}]},
            "turn 0: unknown role 'robot'; expected 'human' or 'gpt'",
        ),
        ({"conversations": conversation("<image>What?")}, "has no turn of 'gpt'"),
    ],
)
def test_a_bad_sample_is_named_with_its_fault(change, message):
    with pytest.raises(DataError, match=message):
        parsed(GOOD | change)


def test_a_sample_that_is_no_object_is_named_by_its_number():
    with pytest.raises(DataError, match="sample number 4: expected an object, found str"):
        parsed("cat")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "expected a JSON list of samples, found dict"), ("[]", "an empty list"), ("[", "not")],
)
def test_a_file_without_a_list_of_samples_is_reported(tmp_path, content, message):
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(DataError, match=rf"samples\.json: .*{message}"):
        read_samples(tmp_path / "samples.json")


def test_only_answers_and_their_ends_are_learned(tokenizer):
    sample = parsed(
        {"id": 1, "conversations": conversation("What is this?", "It is a cat", "What?", "number")}
    )
    text = encode_text(sample, tokenizer)
    learned = [t for t, learn in zip(text.tokens, text.trained, strict=True) if learn]
    assert tokenizer.decode(learned) == "It is a cat<eos>number<eos>"
    assert tokenizer.decode(text.tokens) == (
        "<bos><human>What is this?<gpt>It is a cat<eos><human>What?<gpt>number<eos>"
    )


def test_image_marks_count_in_human_turns_only(tokenizer):
    raw = GOOD | {"conversations": conversation("a<image>b", "I see no <image> here")}
    text = encode_text(parsed(raw), tokenizer)
    assert text.tokens.count(tokenizer.image_id) == 1
    expanded = text.expand(tokenizer.image_id, [5])
    assert expanded.tokens.count(tokenizer.image_id) == 5
    assert len(expanded.tokens) == len(expanded.trained) == text.num_text_tokens(3) + 5


@pytest.mark.parametrize("mark", SPECIAL_TOKENS)
def test_a_mark_typed_by_a_user_stays_text(tokenizer, mark):
    ids = tokenizer.encode_text(f"cat {mark} cat")
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == f"cat {mark} cat"


@settings(max_examples=50)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode_text(text)
    assert all(number >= len(SPECIAL_TOKENS) for number in ids)
    assert tokenizer.decode(ids) == text


def test_a_tokenizer_survives_its_file_pickling_and_copying(tokenizer, tmp_path):
    again = train_tokenizer(TEXTS, 400, tmp_path / "tokenizer.json")
    assert again.digest == tokenizer.digest
    text = "A cat <eos> number 3"
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    for other in (loaded, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode_text(text) == tokenizer.encode_text(text)
        assert other.vocab_size == tokenizer.vocab_size <= 400
    assert tokenizer.pad_id == 0


def test_a_file_that_is_no_tokenizer_is_reported(tmp_path, tokenizer):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(path)
    train_tokenizer(TEXTS, 400, path)
    path.write_text(path.read_text().replace("<gpt>", "<bot>"))
    with pytest.raises(DataError, match=r"has no token <gpt>; expected"):
        load_tokenizer(path)


def test_a_vocabulary_without_room_for_the_bytes_is_reported(tmp_path):
    with pytest.raises(DataError, match="vocab_size is 100; expected at least 262"):
        train_tokenizer(TEXTS, 100, tmp_path / "tokenizer.json")
