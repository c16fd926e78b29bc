"""The memory model against what autograd holds: all families, under all that stores something.

Every case builds a first, a middle and a last stage of each module that has a backward, runs a
forward in CPU mode, counts the tensors that its graph keeps, and offloads its layers: what they are
predicted to keep leaves the device.
"""

import json
from pathlib import Path

import pytest
import yaml
from forked_ranks import fork_ranks
from launching import REPOSITORY

WORKER = Path(__file__).with_name("kept_memory_worker.py")
LARGEST_ERROR = 0.02
LEAST_MOVED = 0.96
"""Of what layers keep: what others read too stays, such as what a final modulation is made of."""
FAMILIES = ("vlm", "omni", "t2v", "lavin")

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
BF16 = {"bf16": True}
SEQUENCE = {"sequence_parallel": True}
ROTARY = {
    "model.vision.positions": "rotary_2d",
    "model.vision.merge_size": 4,
    "model.vision.position_grid": None,
}


def selective(*modules):
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def full(count, method="uniform"):
    return {
        "recompute_granularity": "full",
        "recompute_method": method,
        "recompute_num_layers": count,
    }


def experts(shared):
    sizes = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 128}
    return {"model.language.experts": sizes | ({"shared_ffn_hidden_size": 64} if shared else {})}


# A family, what is changed in its tiny configuration, and Megatron's fields.
CASES = {
    **{name: (name, {}, {}) for name in FAMILIES},
    **{f"{name} in 16 bits": (name, {}, BF16) for name in FAMILIES},
    **{
        f"{name} with dropout{text}": (name, {}, DROPOUT | fields)
        for name in ("vlm", "omni", "t2v")
        for text, fields in (("", {}), (" in 16 bits", BF16))
    },
    "dropout of rows alone": ("vlm", {}, {"hidden_dropout": 0.1}),
    "dropout of scores alone": ("vlm", {}, {"attention_dropout": 0.1}),
    "fused activation": ("vlm", {}, {"bias_activation_fusion": True}),
    "fused dropout": ("vlm", {}, DROPOUT | {"bias_dropout_fusion": True}),
    "selective": ("vlm", {}, selective("core_attn")),
    "selective with dropout": ("vlm", {}, DROPOUT | selective("core_attn")),
    "selective, two parts": ("vlm", {}, DROPOUT | BF16 | selective("core_attn", "mlp")),
    "selective of adapters": ("lavin", {}, selective("core_attn")),
    "full": ("vlm", {}, full(1)),
    "full, two layers a chunk": ("omni", {}, BF16 | full(2)),
    "full, one layer of a stage": ("vlm", {}, DROPOUT | full(1, "block")),
    "projector alone": (
        "vlm",
        {"model.vision.trainable": ["projector"], "model.language.trainable": False},
        DROPOUT,
    ),
    "projector frozen": ("vlm", {"model.vision.trainable": ["tower"]}, {}),
    "last layers": (
        "omni",
        {
            "model.audio.trainable": {"layers": {"last": 2}, "norm": True},
            "model.vision.trainable": False,
            "model.language.trainable": ["embedding", "layers"],
        },
        BF16,
    ),
    "head alone": (
        "vlm",
        {"model.vision.trainable": False, "model.language.trainable": ["head"]},
        {},
    ),
    "output alone": ("t2v", {"model.dit.trainable": ["output"]}, {}),
    "language frozen": ("vlm", {"model.language.trainable": False}, DROPOUT | BF16),
    "text trained": ("t2v", {"model.text.trainable": True}, DROPOUT),
    "transformer frozen": (
        "t2v",
        {"model.text.trainable": True, "model.dit.trainable": False},
        {},
    ),
    "towers trained": ("lavin", {"model.adapter.tuning": "full"}, BF16),
    "rotary tower": ("vlm", ROTARY, DROPOUT),
    "rotary tower, full": ("vlm", ROTARY, BF16 | full(1)),
    "experts": ("vlm", experts(shared=False), {}),
    "experts with a shared one": ("vlm", experts(shared=True), DROPOUT | BF16),
    "experts exchanged": ("vlm", experts(shared=True), {"moe_token_dispatcher_type": "alltoall"}),
    "experts repeated": ("vlm", experts(shared=False), selective("moe")),
    "shared expert repeated": ("vlm", experts(shared=True), selective("shared_experts")),
}
TWO_RANKS = {
    **{f"{name} halved": (name, {}, {}) for name in FAMILIES},
    **{f"{name} halved in sequence": (name, {}, SEQUENCE) for name in FAMILIES},
    "rotary tower halved in sequence": ("vlm", ROTARY, SEQUENCE),
    "halved with dropout": ("vlm", {}, DROPOUT | BF16),
    "halved in sequence with dropout": ("vlm", {}, DROPOUT | SEQUENCE),
    "halved in sequence in 16 bits": ("vlm", {}, BF16 | SEQUENCE),
    "halved in sequence, full": ("vlm", {}, SEQUENCE | full(1)),
    "experts halved": (
        "vlm",
        experts(shared=True),
        SEQUENCE | {"moe_token_dispatcher_type": "alltoall"},
    ),
}


def _changed(family, changes, path):
    data = yaml.safe_load((REPOSITORY / "configs" / f"{family}_tiny.yaml").read_text())
    for name, value in changes.items():
        *above, field = name.split(".")
        place = data
        for part in above:
            place = place[part]
        if value is None:
            del place[field]
        else:
            place[field] = value
    path.write_text(yaml.safe_dump(data))
    return str(path)


def _measured(folder, cases, num_ranks):
    found = {
        name: [_changed(family, changes, folder / f"{number}.yaml"), fields]
        for number, (name, (family, changes, fields)) in enumerate(cases.items())
    }
    (folder / "cases.json").write_text(json.dumps(found))
    arguments = [str(WORKER), str(folder / "cases.json"), str(folder / "results.json")]
    for rank in fork_ranks(folder / "run", num_ranks, arguments, timeout_seconds=240):
        assert rank.returncode == 0, rank.output
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return _measured(tmp_path_factory.mktemp("one"), CASES, 1)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return _measured(tmp_path_factory.mktemp("two"), TWO_RANKS, 2)


def _check(results):
    assert results
    for module, places in results.items():
        for place, found in places.items():
            held, predicted = found["held"], found["predicted"]
            error = predicted / held - 1.0
            assert abs(error) <= LARGEST_ERROR, (
                f"{module}, {place} stage: {held} bytes held, {predicted} predicted ({error:+.1%})"
            )


def _check_moves(results):
    for module, places in results.items():
        for place, found in places.items():
            moved, layers = found["moved"], found["layers"]
            assert moved >= LEAST_MOVED * layers, (
                f"{module}, {place} stage: {moved} bytes moved, of {layers} that layers keep"
            )


@pytest.mark.parametrize("name", CASES)
def test_stages_hold_what_the_memory_model_says(one_rank, name):
    _check(one_rank[name])
    # Megatron's own chunks of layers keep their input, and nothing of a layer.
    if "full" not in name:
        _check_moves(one_rank[name])


@pytest.mark.parametrize("name", TWO_RANKS)
def test_each_of_two_tensor_parallel_ranks_holds_what_the_memory_model_says(two_ranks, name):
    _check(two_ranks[name])
    if not name.endswith("full"):
        _check_moves(two_ranks[name])
