"""What a configuration says of a vision tower: positions, and patches that become one token."""

import pytest
from pydantic import ValidationError

from megatron_dip.families.forms import VisionConfig

SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}


def test_without_a_word_there_is_a_table_and_four_patches_are_a_token():
    shape = VisionConfig(**SIZES, position_grid=8).shape("vision", 48)
    assert (shape.positions, shape.num_positions, shape.is_rotary) == ("table", 64, False)
    assert shape.projector.merge == 4


def test_rotary_positions_have_no_weights_and_a_wider_merge_has_more():
    table = VisionConfig(**SIZES, position_grid=8).shape("vision", 48)
    form = VisionConfig(**SIZES, positions="rotary_2d", merge_size=4)
    shape = form.shape("vision", 48)
    assert shape.is_rotary and shape.projector.merge == form.patches_per_token == 16
    before, after = (table.first_parameters(), shape.first_parameters())
    assert before - after == 64 * 32
    assert shape.last_parameters() - table.last_parameters() == (16 - 4) * 32 * 4 * 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_grid": 8}, r"position_grid is given but .*leave it out"),
        ({"num_attention_heads": 16}, r"num_attention_heads = 2 \(expected a multiple of 4\)"),
        ({"merge_size": 0}, "merge_size"),
        ({"merge_size": 1.5}, "merge_size"),
        ({"positions": "rotary"}, "positions"),
    ],
)
def test_what_rotary_positions_cannot_mean_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        VisionConfig(**SIZES | {"positions": "rotary_2d"} | fields)
