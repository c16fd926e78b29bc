"""Images: grids, and the order of patches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_dip.errors import DataError
from megatron_dip.families.data.images import (
    ImageLimits,
    choose_grid,
    image_patches,
    num_image_tokens,
    patch_coordinates,
)

LIMITS = ImageLimits(patch_size=14, min_image_tokens=4, max_image_tokens=64)


def noise(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    fewest=st.integers(1, 40),
    more=st.integers(0, 300),
)
def test_every_size_gets_an_even_grid_within_the_limits(width, height, fewest, more):
    rows, columns = choose_grid(width, height, ImageLimits(14, fewest, fewest + more))
    assert rows % 2 == 0 and columns % 2 == 0
    assert fewest <= num_image_tokens((rows, columns)) <= fewest + more


@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_the_grid_is_the_best_of_all_grids(width, height):
    def cost(rows: int, columns: int) -> float:
        area = np.clip(width * height / 28**2, 4, 64)
        aspect = abs(np.log(columns / rows / (width / height)))
        return aspect + 0.5 * abs(np.log(rows * columns / area))

    rows, columns = choose_grid(width, height, LIMITS)
    every = [(r, c) for r in range(1, 65) for c in range(1, 65) if 4 <= r * c <= 64]
    best = min(cost(r, c) for r, c in every)
    assert cost(rows // 2, columns // 2) == pytest.approx(best)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((56, 56), (4, 4)),  # exactly the minimum
        ((10, 10), (4, 4)),  # enlarged to the minimum
        ((4000, 4000), (16, 16)),  # reduced to the maximum
        ((112, 56), (4, 8)),  # kept as it is
        ((100, 300), (24, 8)),
    ],
)
def test_grid_of_known_sizes(size, grid):
    assert choose_grid(*size, LIMITS) == grid


def test_limits_that_no_image_can_meet_are_reported():
    with pytest.raises(DataError, match="min_image_tokens is 9 and max_image_tokens is 8"):
        choose_grid(10, 10, ImageLimits(14, 9, 8))
    with pytest.raises(DataError, match="patch_size is 0"):
        choose_grid(10, 10, ImageLimits(0, 4, 8))


def test_merging_four_patches_as_a_view_gives_a_square_of_pixels():
    image = noise(5 * 28, 3 * 28)
    patches = image_patches(image, (6, 10), 14)
    assert patches.shape == (60, 3 * 14 * 14)
    groups = patches.view(15, 4, 3, 14, 14)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    for number in range(15):
        row, column = divmod(number, 5)
        top, bottom = groups[number, :2], groups[number, 2:]
        square = torch.cat([torch.cat(list(top), 2), torch.cat(list(bottom), 2)], 1)
        expected = pixels[:, row * 28 : row * 28 + 28, column * 28 : column * 28 + 28]
        torch.testing.assert_close(square, expected)


def test_coordinates_name_the_pixels_of_every_patch():
    image = noise(6 * 14, 4 * 14)
    patches = image_patches(image, (4, 6), 14).view(24, 3, 14, 14)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    coordinates = patch_coordinates((4, 6)).tolist()
    assert coordinates[:5] == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]]
    for patch, (row, column) in zip(patches, coordinates, strict=True):
        expected = pixels[:, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
        torch.testing.assert_close(patch, expected)


def test_values_reach_from_minus_one_to_one():
    assert image_patches(Image.new("RGB", (28, 28), "black"), (2, 2), 14).unique().item() == -1
    assert image_patches(Image.new("RGB", (28, 28), "white"), (2, 2), 14).unique().item() == 1
