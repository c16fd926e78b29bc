"""Tokenizers of other projects: nothing that their files store changes texts, their own special
tokens and markup of turns are written, and answers alone are learned.

The tokenizers are made here in the manner of Qwen (byte-level, ChatML), Llama 3 (headers) and T5.
Their ids can be told by hand: a byte is its place in the alphabet, special tokens follow.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import REPOSITORY
from tiny_data_set import conversation, make_settings, sample_of, with_samples
from tiny_vlm import make_tiny_data, write_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from training_runs import train

from megatron_dip.errors import ConfigError, DataError
from megatron_dip.families.configs import load_config
from megatron_dip.families.data.conversation import EncodedText
from megatron_dip.families.data.index import build_index
from megatron_dip.families.data.samples import encode_text, parse_sample
from megatron_dip.families.data.tokenizer import VlmTokenizer, load_tokenizer, train_tokenizer
from megatron_dip.families.vlm.dataset import VlmDataset
from megatron_dip.text_form import OUR_TEXT_FORM, SpecialTokens, TextForm

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
# The library's order of bytes: those that can be printed stand for themselves.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
CHARACTERS = {byte: chr(byte) for byte in PRINTABLE} | {
    byte: chr(256 + place) for place, byte in enumerate(OTHERS)
}

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
QWEN = (*QWEN, "<|image_pad|>")
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
LLAMA = (*LLAMA, "<|eot_id|>", "<|image|>")
# As tokenizer_config.json of Qwen2.5 has it, without its part for tools.
QWEN_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or
           (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
"""
LLAMA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | "
    "trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
)
QWEN_TOKENS = {
    "pad": "<|endoftext|>",
    "bos": None,
    "eos": "<|im_end|>",
    "image": "<|image_pad|>",
    "image_start": "<|vision_start|>",
    "image_end": "<|vision_end|>",
}
LLAMA_TOKENS = {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "image": "<|image|>"}
SAMPLE = {
    "id": 1,
    "image": "a.png",
    "conversations": conversation(" <image>\nWhat <|im_end|>? ", " A cat.\n"),
}


def byte_tokenizer(special: Sequence[str]) -> Tokenizer:
    """Every byte is a token; special tokens follow."""
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate(ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return tokenizer


def ids(special: Sequence[str], *parts: str) -> list[int]:
    """By hand: the ids of parts, each a special token or a text."""
    found = []
    for part in parts:
        if part in special:
            found.append(256 + special.index(part))
        else:
            found += [ALPHABET.index(CHARACTERS[byte]) for byte in part.encode()]
    return found


def saved(folder: Path, tokenizer: Tokenizer, change: Callable[[Any], None] | None = None) -> Path:
    data = json.loads(tokenizer.to_str())
    if change is not None:
        change(data)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(data))
    return path


def form_of(folder: Path, template: str = "", **data: Any) -> TextForm:
    """What a configuration with these keys of ``data`` says."""
    if template:
        config = {"chat_template": [{"name": "tools", "template": "?"}]}
        config["chat_template"].append({"name": "default", "template": template})
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        data["chat_template"] = "tokenizer_config.json"
    content = yaml.safe_load((REPOSITORY / "configs" / "vlm_tiny.yaml").read_text())
    content["data"] |= data
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return load_config(folder / "config.yaml").data.text_form()


def learned(text: EncodedText) -> list[int]:
    return [token for token, learn in zip(text.tokens, text.trained, strict=True) if learn]


# ---- markup ------------------------------------------------------------------------------------


def test_conversations_are_written_as_qwen_writes_them(tmp_path: Path) -> None:
    form = form_of(tmp_path, QWEN_TEMPLATE, tokens=QWEN_TOKENS)
    tokenizer = load_tokenizer(saved(tmp_path, byte_tokenizer(QWEN)), form)
    text = encode_text(parse_sample(SAMPLE, 0), tokenizer)
    expected = ids(
        QWEN,
        *("<|im_start|>", "system\nYou are Qwen.", "<|im_end|>", "\n"),
        *("<|im_start|>", "user\n ", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
        *("\nWhat <|im_", "end|>? ", "<|im_end|>", "\n"),
        *("<|im_start|>", "assistant\n", " A cat.\n", "<|im_end|>", "\n"),
    )
    assert list(text.tokens) == expected
    assert learned(text) == ids(QWEN, " A cat.\n", "<|im_end|>")
    system = {"from": "system", "value": "Be brief."}
    chat = SAMPLE | {"conversations": [system, *SAMPLE["conversations"]]}
    text = encode_text(parse_sample(chat, 0), tokenizer)
    assert list(text.tokens[:18]) == ids(QWEN, "<|im_start|>", "system\nBe brief.", "<|im_end|>")
    assert learned(text) == ids(QWEN, " A cat.\n", "<|im_end|>")


def test_conversations_are_written_as_llama_writes_them(tmp_path: Path) -> None:
    form = form_of(tmp_path, LLAMA_TEMPLATE, tokens=LLAMA_TOKENS)
    tokenizer = load_tokenizer(saved(tmp_path, byte_tokenizer(LLAMA)), form)
    text = encode_text(parse_sample(SAMPLE, 0), tokenizer)
    # The template trims its texts.
    assert list(text.tokens) == ids(
        LLAMA,
        *("<|begin_of_text|>", "<|start_header_id|>", "user", "<|end_header_id|>", "\n\n"),
        *("<|image|>", "\nWhat <|im_end|>?", "<|eot_id|>"),
        *("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n", "A cat.", "<|eot_id|>"),
    )
    assert learned(text) == ids(LLAMA, "A cat.", "<|eot_id|>")


def test_white_space_that_a_template_writes_itself_is_no_part_of_a_text(tmp_path: Path) -> None:
    names = ("<s>", "</s>")
    # As Llama 2 and Mistral write turns.
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + "
        "m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
        "{% endif %}{% endfor %}"
    )
    form = form_of(tmp_path, template, tokens={"bos": "<s>", "eos": "</s>", "image": None})
    tokenizer = load_tokenizer(saved(tmp_path, byte_tokenizer(names)), form)
    sample = parse_sample({"id": 1, "conversations": conversation(" What? ", " A cat. ")}, 0)
    text = encode_text(sample, tokenizer)
    assert list(text.tokens) == ids(names, "<s>", "[INST] What? [/INST] A cat. ", "</s>")
    assert learned(text) == ids(names, "A cat. ", "</s>")


def test_turns_of_the_configuration_write_the_same_as_a_template(tmp_path: Path) -> None:
    turns = {
        "human": {"before": "<|im_start|>user\n", "after": "<|im_end|>\n"},
        "gpt": {"before": "<|im_start|>assistant\n", "after": "<|im_end|>\n"},
    }
    path = saved(tmp_path, byte_tokenizer(QWEN))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    template += "{% endfor %}"
    by_template = load_tokenizer(path, form_of(tmp_path, template, tokens=QWEN_TOKENS))
    by_turns = load_tokenizer(path, form_of(tmp_path, tokens=QWEN_TOKENS, turns=turns))
    sample = parse_sample(SAMPLE, 0)
    assert encode_text(sample, by_template) == encode_text(sample, by_turns)
    assert by_template.digest != by_turns.digest
    with_system = parse_sample(
        {"id": 1, "conversations": [{"from": "system", "value": "Be."}, *conversation("a", "b")]}, 0
    )
    with pytest.raises(DataError, match="turn 0: unknown role 'system'; expected 'gpt' or 'human'"):
        encode_text(with_system, by_turns)


def test_neighbouring_texts_are_encoded_together_as_when_the_model_is_used(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(QWEN)
    data = json.loads(tokenizer.to_str())
    newline = CHARACTERS[10]
    data["model"]["vocab"] |= {newline * 2: 300}
    data["model"]["merges"] = [[newline, newline]]
    data["pre_tokenizer"]["use_regex"] = False
    form = form_of(tmp_path, QWEN_TEMPLATE, tokens=QWEN_TOKENS)
    merged = VlmTokenizer(json.dumps(data), form=form)
    sample = parse_sample({"id": 1, "conversations": conversation("\nWhat?", "\nA cat.")}, 0)
    # "user\n" and "\nWhat?" meet inside what is given, "assistant\n" and the answer do not.
    text = encode_text(sample, merged)
    assert text.tokens.count(300) == 1 and 300 not in learned(text)


def test_an_order_that_a_template_refuses_is_a_bad_sample(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "data", num_samples=1)
    template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m.content }}"
        "<|im_end|>{% endfor %}"
    )
    form = form_of(tmp_path, template, tokens=QWEN_TOKENS)
    saved(settings.tokenizer.parent, byte_tokenizer(QWEN))
    gpt_first = sample_of("first") | {"conversations": conversation("a", "b", "c", "d")[1:]}
    settings = with_samples(settings, [sample_of("good"), gpt_first])
    settings = type(settings)(**(vars(settings) | {"text_form": form}))
    index, _ = build_index(settings, tmp_path, show_progress=False)
    assert index.samples[0].error is None
    assert "'first' (number 1): the chat template refuses it (roles must" in str(
        index.samples[1].error
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}", "does not write its 2 turns once each"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "once each"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "expected what ends an answer"),
        ("{{ 1 / 0 }}", "refuses it .division by zero"),
        ("{{ ''.__class__.__mro__ }}", "the chat template refuses it"),
        (
            "{% for m in messages %}<|image_pad|>{{ m.content }}<|im_end|>{% endfor %}",
            "of a medium",
        ),
    ],
)
def test_a_template_that_cannot_be_used_makes_bad_samples(
    tmp_path: Path, template: str, message: str
) -> None:
    form = form_of(tmp_path, template, tokens=QWEN_TOKENS)
    tokenizer = load_tokenizer(saved(tmp_path, byte_tokenizer(QWEN)), form)
    with pytest.raises(DataError, match=rf"sample 1 \(number 0\): .*{message}"):
        encode_text(parse_sample(SAMPLE, 0), tokenizer)


def test_images_of_a_foreign_tokenizer_are_trained(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "data", num_samples=1)
    settings = with_samples(settings, [sample_of("a", "0.jpg", "1.png")])
    saved(settings.tokenizer.parent, byte_tokenizer(QWEN))
    form = form_of(tmp_path, QWEN_TEMPLATE, tokens=QWEN_TOKENS)
    settings = type(settings)(**(vars(settings) | {"text_form": form, "seq_length": 300}))
    index, _ = build_index(settings, tmp_path, show_progress=False)
    dataset = VlmDataset(settings, index, num_samples=1, seed=1)
    sequence = dataset[0]
    rows = [image.num_tokens for image in sequence.images]
    assert len(rows) == 2 and len(sequence.image_positions) == sum(rows)
    first = int(sequence.image_positions[0])
    start, end = ids(QWEN, "<|vision_start|>", "<|vision_end|>")
    assert int(sequence.tokens[first - 1]) == start
    assert sequence.tokens[first + rows[0] : first + rows[0] + 2].tolist() == [end, start]


def test_the_examples_of_the_page_are_read_and_write_conversations(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    qwen, llama = (
        yaml.safe_load(text)["data"] for text in re.findall(r"```yaml\n(.*?)```", page, re.S)
    )
    for data, special, template in ((qwen, QWEN, QWEN_TEMPLATE), (llama, LLAMA, LLAMA_TEMPLATE)):
        folder = (tmp_path / data["tokenizer"]).parent
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        saved(folder, byte_tokenizer(special))
        tokenizer = load_tokenizer(tmp_path / data["tokenizer"], form_of(tmp_path, **data))
        sample = parse_sample(SAMPLE | {"conversations": conversation("<image>a", "b")}, 0)
        text = encode_text(sample, tokenizer)
        assert learned(text) == ids(special, "b", data["tokens"]["eos"])
        other = load_tokenizer(
            folder / "tokenizer.json", form_of(folder, template, tokens=data["tokens"])
        )
        assert encode_text(sample, other) == text


def test_a_run_trains_with_the_tokenizer_that_its_configuration_describes(tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "data", num_samples=60)
    saved(tmp_path / "data", byte_tokenizer(QWEN))
    (tmp_path / "template.jinja").write_text(QWEN_TEMPLATE)
    path = write_config(tmp_path / "config.yaml", tmp_path / "data", num_ranks=1)
    config = yaml.safe_load(path.read_text())
    config["data"] |= {"tokens": QWEN_TOKENS, "chat_template": "template.jinja"}
    config["model"]["language"]["seq_length"] = 400
    path.write_text(yaml.safe_dump(config))
    sizes = "--micro-batch-size 1 --global-batch-size 2 --lr 0.002 --train-iters 2"
    run = train(tmp_path / "run", 1, *sizes.split(), "--dip-schedule", "--dip-config", str(path))
    assert len(set(run.losses)) == 2 and "left out" not in run.log


# ---- what a file stores ------------------------------------------------------------------------


def test_truncation_padding_and_added_tokens_of_a_file_change_nothing(tmp_path: Path) -> None:
    trained = train_tokenizer(["what is this cat " * 5] * 9, 300, tmp_path / "ours.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "ours.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=40, pad_id=0, pad_token="<pad>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    path = saved(tmp_path, tokenizer, lambda data: data["model"].update(dropout=0.9))
    stored = load_tokenizer(path)
    text = "what is this cat? " * 20
    assert len({tuple(stored.encode_text(text)) for _ in range(5)}) == 1
    assert stored.encode_text(text) == trained.encode_text(text)
    assert stored.encode_text("a") == trained.encode_text("a")


def test_a_vocabulary_with_gaps_takes_as_many_rows_as_its_highest_id(tmp_path: Path) -> None:
    def move(data: Any) -> None:
        data["model"]["vocab"][ALPHABET[-1]] = 5000

    tokenizer = load_tokenizer(
        saved(tmp_path, byte_tokenizer(QWEN), move),
        form_of(tmp_path, QWEN_TEMPLATE, tokens=QWEN_TOKENS),
    )
    assert tokenizer.vocab_size == 5001 and tokenizer.num_tokens < 300


def test_no_text_becomes_a_mark_whatever_the_file_says_of_it(tmp_path: Path) -> None:
    def open_to_all(data: Any) -> None:
        for token in data["added_tokens"]:
            token["special"] = False

    form = form_of(tmp_path, QWEN_TEMPLATE, tokens=QWEN_TOKENS)
    tokenizer = load_tokenizer(saved(tmp_path, byte_tokenizer(QWEN), open_to_all), form)
    for mark in QWEN_TOKENS.values():
        if mark is not None:
            assert tokenizer.encode_text(mark) == ids(QWEN, mark[:1], mark[1:])
    with pytest.raises(DataError, match=r"'a' becomes the token data\.tokens\.eos"):
        VlmTokenizer(
            byte_tokenizer(QWEN).to_str(), form=TextForm(tokens=SpecialTokens(eos="a", **NO_OTHERS))
        )


NO_OTHERS: dict[str, None] = dict.fromkeys(("pad", "bos", "image", "human", "gpt"))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (OUR_TEXT_FORM, "has no token <pad>, <bos>, <eos>, .*names of its own .* data.tokens"),
        (TextForm(tokens=SpecialTokens(eos="<|none|>", **NO_OTHERS)), r"has no token <\|none\|>;"),
        (
            TextForm(
                tokens=SpecialTokens(eos="<|im_end|>", **(NO_OTHERS | {"image": "<|im_end|>"}))
            ),
            "stand for rows of media and for something else",
        ),
        (TextForm(tokens=SpecialTokens(eos="<|im_end|>", **NO_OTHERS), template="{% if"), "Jinja"),
    ],
)
def test_names_that_do_not_fit_the_tokenizer_are_refused(form: TextForm, message: str) -> None:
    with pytest.raises(DataError, match=message):
        VlmTokenizer(byte_tokenizer(QWEN).to_str(), form=form)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "not a tokenizer"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "drops characters of a text"),
        # The library's Rust panics here, which is no Exception.
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "not a tokenizer"),
        ({"pre_tokenizer": {"type": "nothing"}}, "not a tokenizer"),
    ],
)
def test_files_that_are_no_tokenizers_are_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    for name in (".", "tokenizer.model"):
        with pytest.raises(DataError, match="expected the file tokenizer"):
            load_tokenizer(tmp_path / name)
    path = saved(tmp_path, byte_tokenizer(QWEN), lambda data: data.update(change))
    form = TextForm(tokens=SpecialTokens(eos="<|im_end|>", **NO_OTHERS))
    with pytest.raises(DataError, match=rf"tokenizer\.json: {message}") as caught:
        load_tokenizer(
            path,
            form
            if "model" not in change
            else TextForm(tokens=SpecialTokens(eos=None, **NO_OTHERS)),
        )
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# ---- the configuration -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tokens": {"eos": None}}, "eos is null"),
        ({"tokens": {"begin": "<s>"}}, r"data\.tokens\.begin: Extra inputs"),
        ({"tokens": {"audio": "<a>"}}, "tokens.audio is not written by this family"),
        ({"tokens": {"eos": ""}}, r"data\.tokens\.eos"),
        ({"turns": {"human": {}}}, "turns has no gpt"),
        ({"turns": {"human": {}, "gpt": {"after": "\n"}}}, "expected tokens.eos in it, '<eos>'"),
        ({"turns": {"robot": {}}}, "turns.robot"),
        (
            {"turns": {"human": {}, "gpt": {"after": "<eos>"}}, "chat_template": "a.jinja"},
            "both given",
        ),
        ({"tokens": {"human": "<h>"}, "chat_template": "a"}, "tokens.human is given beside turns"),
        ({"chat_template": "none.jinja"}, r"none\.jinja: cannot be read"),
    ],
)
def test_what_is_wrong_with_the_names_of_tokens_is_said(
    tmp_path: Path, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        form_of(tmp_path, **data)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 5}')
    with pytest.raises(ConfigError, match="has no text 'chat_template'"):
        form_of(tmp_path, chat_template="tokenizer_config.json")


def test_names_that_are_not_given_are_ours_where_they_are_needed(tmp_path: Path) -> None:
    assert form_of(tmp_path) == OUR_TEXT_FORM
    ours = SpecialTokens(pad=None)
    assert form_of(tmp_path, tokens={}).tokens == ours
    assert form_of(tmp_path, tokens={"bos": None}).tokens == SpecialTokens(pad=None, bos=None)


def test_captions_and_instructions_have_the_marks_that_their_tokenizer_has() -> None:
    names = ("</s>", "<unk>")
    form = TextForm(tokens=SpecialTokens(eos="</s>", **NO_OTHERS))
    tokenizer = VlmTokenizer(byte_tokenizer(names).to_str(), form=form)
    assert tokenizer.begin() == [] and tokenizer.end() == ids(names, "</s>")
