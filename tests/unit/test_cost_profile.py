"""Profiles: files that round-trip, times that they state, and errors that name the field."""

import json

import pytest
from cost_cases import item, vit

from megatron_dip.costs import ModelShape, Parallelism, Profile, load_profile
from megatron_dip.costs.profile import ProfiledTimes
from megatron_dip.errors import ConfigError


def data(**fields):
    times = {
        "overhead_us": 10.0,
        "forward": {"token_us": 2.0, "pair_us": 0.5},
        "backward": {"token_us": 3.0, "pair_us": 1.0},
        "last_extra": {"forward_us": 5.0, "backward_us": 6.0},
    }
    module = {
        "hidden_size": 8,
        "ffn_hidden_size": 32,
        "num_attention_heads": 4,
        "times": times | fields,
    }
    return {"device": "H100", "modules": {"vision": module}}


def profiled(given=None, module=None, **parallel):
    profile = Profile.parse(given or data(), ConfigError, "p.json")
    model = ModelShape(name="small", modules=(module or vit(),))
    return ProfiledTimes.for_model(profile, model, Parallelism(**parallel))


def test_a_profile_round_trips_through_its_file(tmp_path):
    profile = Profile.parse(data(), ConfigError)
    path = tmp_path / "profile.json"
    path.write_text(profile.model_dump_json())
    assert load_profile(path) == profile
    assert json.loads(path.read_text())["version"] == 2


def test_an_item_takes_its_tokens_and_pairs():
    times = profiled()
    assert times.overhead_us(vit()) == 10.0
    assert times.layer(vit(), item(3, 3)) == (6 * 2.0 + 18 * 0.5, 6 * 3.0 + 18 * 1.0, 6 * 3.0)
    # Cross-attention: every token with all of the context.
    assert times.layer(vit(), item(3, 3, context=2)).forward_us == 6 * 2.0 + (18 + 12) * 0.5
    assert times.last_extra(vit(), item(2)) == (10.0, 12.0, 12.0)
    assert times.first_extra(vit(), item(2)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"forward": {"token_us": -1.0}}, "times.forward.token_us: .*greater than"),
        ({"overhead_us": None}, "modules.vision.times.overhead_us"),
        ({"lineal": 1}, "modules.vision.times.lineal: Extra inputs"),
    ],
)
def test_a_malformed_profile_names_the_field(fields, message):
    with pytest.raises(ConfigError, match=f"p.json: .*{message}"):
        profiled(data(**fields))


def test_another_version_is_refused():
    with pytest.raises(ConfigError, match="version: Input should be 2"):
        profiled(data() | {"version": 1})


@pytest.mark.parametrize(
    ("module", "parallel", "message"),
    [
        (vit(hidden_size=16), {}, "modules.vision.hidden_size is 8, but the model has 16"),
        (vit(name="video"), {}, "modules.video is missing"),
        (vit(), {"tensor": 2}, "parallel.tensor is 1, but the run has 2"),
    ],
)
def test_a_profile_of_something_else_is_refused(module, parallel, message):
    with pytest.raises(ConfigError, match=message):
        profiled(module=module, **parallel)
