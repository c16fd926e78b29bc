"""Images: grids, and the order of patches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_dip.errors import DataError
from megatron_dip.families.data.images import (
    Grid,
    ImageLimits,
    choose_grid,
    image_patches,
    patch_coordinates,
)

GROUP = Grid(2, 2, 2)
LIMITS = ImageLimits(patch_size=14, min_image_tokens=4, max_image_tokens=64)


def noise(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    fewest=st.integers(1, 40),
    more=st.integers(0, 300),
    merge=st.integers(1, 5),
)
def test_every_size_gets_a_grid_of_groups_within_the_limits(width, height, fewest, more, merge):
    grid = choose_grid(width, height, ImageLimits(14, fewest, fewest + more, merge))
    assert grid.rows % merge == 0 and grid.columns % merge == 0
    assert fewest <= grid.rows * grid.columns / merge**2 == grid.num_tokens <= fewest + more


@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_the_grid_is_the_best_of_all_grids(width, height):
    def cost(rows: int, columns: int) -> float:
        area = np.clip(width * height / 28**2, 4, 64)
        aspect = abs(np.log(columns / rows / (width / height)))
        return aspect + 0.5 * abs(np.log(rows * columns / area))

    grid = choose_grid(width, height, LIMITS)
    every = [(r, c) for r in range(1, 65) for c in range(1, 65) if 4 <= r * c <= 64]
    best = min(cost(r, c) for r, c in every)
    assert cost(grid.rows // 2, grid.columns // 2) == pytest.approx(best)


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
    assert choose_grid(*size, LIMITS) == Grid(*grid, 2)


def test_sixteen_patches_of_a_large_image_become_one_token():
    grid = choose_grid(728, 728, ImageLimits(14, 4, 1024, 4))
    assert grid == Grid(52, 52, 4) and (grid.num_patches, grid.num_tokens) == (2704, 169)


@pytest.mark.parametrize("sides", [(4, 6, 4), (6, 4, 4), (0, 4, 4), (4, 4, 0)])
def test_a_grid_that_does_not_fall_into_groups_is_refused(sides):
    message = rf"{sides[0]} x {sides[1]} patches does not fit merge_size {sides[2]} \(expected"
    with pytest.raises(DataError, match=message):
        Grid(*sides)


def test_limits_that_no_image_can_meet_are_reported():
    with pytest.raises(DataError, match="min_image_tokens is 9 and max_image_tokens is 8"):
        choose_grid(10, 10, ImageLimits(14, 9, 8))
    with pytest.raises(DataError, match="patch_size is 0"):
        choose_grid(10, 10, ImageLimits(0, 4, 8))
    with pytest.raises(DataError, match="merge_size is 0"):
        choose_grid(10, 10, ImageLimits(14, 4, 8, 0))


@pytest.mark.parametrize("merge", [1, 2, 4])
def test_merging_patches_as_a_view_gives_a_square_of_pixels(merge):
    side = merge * 14
    image = noise(5 * side, 3 * side)
    patches = image_patches(image, Grid(3 * merge, 5 * merge, merge), 14)
    assert patches.shape == (15 * merge**2, 3 * 14 * 14)
    groups = patches.view(15, merge, merge, 3, 14, 14)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    for number in range(15):
        row, column = divmod(number, 5)
        square = torch.cat([torch.cat(list(line), 2) for line in groups[number]], 1)
        expected = pixels[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
        torch.testing.assert_close(square, expected)


def test_coordinates_name_the_pixels_of_every_patch():
    image = noise(6 * 14, 4 * 14)
    grid = Grid(4, 6, 2)
    patches = image_patches(image, grid, 14).view(24, 3, 14, 14)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    coordinates = patch_coordinates(grid).tolist()
    assert coordinates[:5] == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]]
    for patch, (row, column) in zip(patches, coordinates, strict=True):
        expected = pixels[:, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
        torch.testing.assert_close(patch, expected)


def test_values_reach_from_minus_one_to_one():
    assert image_patches(Image.new("RGB", (28, 28), "black"), GROUP, 14).unique().item() == -1
    assert image_patches(Image.new("RGB", (28, 28), "white"), GROUP, 14).unique().item() == 1
