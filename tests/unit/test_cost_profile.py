"""Profiles: files that round-trip, interpolation, and errors that name the field."""

import json

import pytest
from cost_cases import dit, item, vit
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.costs import ModelShape, Parallelism, Profile, load_profile
from megatron_dip.costs.profile import ProfiledTimes
from megatron_dip.errors import ConfigError


def point(size, forward_us, **fields):
    return {
        "size": size,
        "forward_us": forward_us,
        "input_grad_us": 2 * forward_us,
        "weight_grad_us": forward_us,
    } | fields


def data(**fields):
    module = {
        "kind": "vit",
        "hidden_size": 8,
        "ffn_hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "overhead_us": 10.0,
        "linear": [point(4, 14.0), point(8, 18.0), point(32, 66.0)],
        "attention": [point(2, 1.0), point(32, 31.0)],
        "last_extra": [point(1, 5.0), point(32, 36.0)],
    }
    return {"device": "H100", "modules": {"vision": module | fields}}


def profiled(given=None, module=None, **parallel):
    profile = Profile.parse(given or data(), ConfigError, "p.json")
    model = ModelShape(name="small", modules=(module or vit(),))
    return ProfiledTimes.for_model(profile, model, Parallelism(**parallel))


def test_a_profile_round_trips_through_its_file(tmp_path):
    profile = Profile.parse(data(), ConfigError)
    path = tmp_path / "profile.json"
    path.write_text(profile.model_dump_json())
    assert load_profile(path) == profile
    assert json.loads(path.read_text())["version"] == 1


def test_measured_sizes_are_given_back_and_sizes_between_lie_between():
    times = profiled()
    # 14 at 4 tokens less 10 of overhead, and one span of 4: 1 + 2/30 of 30
    assert times.layer(vit(), item(4)).forward_us == pytest.approx(4 + 3)
    # 6 tokens: 16 - 10, two spans of 3: 2 each; input gradient 32 - 10 + 2 x 4
    assert times.layer(vit(), item(3, 3)) == pytest.approx((6 + 4, 22 + 8, 16))
    assert times.overhead_us(vit()) == 10
    assert times.last_extra(vit(), item(2)).forward_us == pytest.approx(6)
    assert times.first_extra(vit(), item(2)) == (0, 0, 0)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=8), st.data())
def test_more_tokens_never_take_less_time_even_between_noisy_points(measured, draw):
    curve = [point(2 ** (n + 1), time) for n, time in enumerate(measured)]
    times = profiled(data(linear=curve, attention=[point(1, 0.0), point(512, 0.0)]))
    sizes = st.integers(2, 2 ** len(measured))
    small, large = sorted((draw.draw(sizes), draw.draw(sizes)))
    before, after = (times.layer(vit(), item(size)) for size in (small, large))
    assert all(b <= a + 1e-6 for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (item(40), r"modules.vision.linear: size 40 lies outside the measured range 4 to 32"),
        (item(3), r"modules.vision.linear: size 3 lies outside"),
        (item(1, 3), r"modules.vision.attention: size 1 lies outside the measured range 2 to 32"),
    ],
)
def test_outside_the_measured_range_is_an_error_that_names_the_curve(size, message):
    with pytest.raises(ConfigError, match=message):
        profiled().layer(vit(), size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"linear": []}, "modules.vision.linear: Tuple should have at least 1 item"),
        ({"linear": [point(8, 1.0), point(4, 1.0)]}, r"linear: sizes \[8, 4\] do not grow"),
        ({"linear": [point(8, -1.0)]}, "modules.vision.linear.0.forward_us: .*greater than"),
        ({"overhead_us": None}, "modules.vision.overhead_us"),
        ({"lineal": 1}, "modules.vision.lineal: Extra inputs"),
    ],
)
def test_a_malformed_profile_names_the_field(fields, message):
    with pytest.raises(ConfigError, match=f"p.json: .*{message}"):
        profiled(data(**fields))


def test_another_version_is_refused():
    with pytest.raises(ConfigError, match="version: Input should be 1"):
        profiled(data() | {"version": 2})


@pytest.mark.parametrize(
    ("module", "parallel", "message"),
    [
        (vit(hidden_size=16), {}, "modules.vision.hidden_size is 8, but the model has 16"),
        (dit(name="vision"), {}, "modules.vision.kind is 'vit', but the model has 'dit'"),
        (vit(name="video"), {}, "modules.video is missing"),
        (vit(), {"tensor": 2}, "parallel.tensor is 1, but the cluster has 2"),
    ],
)
def test_a_profile_of_something_else_is_refused(module, parallel, message):
    with pytest.raises(ConfigError, match=message):
        profiled(module=module, **parallel)
