"""Images: grids, decoding, orientation, order of patches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_dip.data.images import (
    ImageLimits,
    choose_grid,
    decode_image,
    image_patches,
    num_image_tokens,
    patch_coordinates,
    read_image_size,
)
from megatron_dip.errors import DataError

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


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_header_gives_the_same_size_as_decoding(tmp_path, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(90, 40).save(path, exif=exif.tobytes())
    decoded = decode_image(path)
    assert read_image_size(path) == decoded.size
    assert decoded.size == ((40, 90) if orientation in (6, 8) else (90, 40))
    assert choose_grid(*read_image_size(path), LIMITS) == choose_grid(*decoded.size, LIMITS)


def test_a_turned_photograph_is_turned_back(tmp_path):
    upright = noise(30, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter when shown
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif.tobytes())
    assert np.array_equal(np.asarray(decode_image(tmp_path / "a.png")), np.asarray(upright))


def test_transparent_parts_become_white_and_deep_grey_is_scaled(tmp_path):
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert decode_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert decode_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)
    noise(8, 8).convert("P").save(tmp_path / "palette.png")
    assert decode_image(tmp_path / "palette.png").mode == "RGB"


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_file_cut_short_is_named(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    noise(200, 200).save(path)
    assert decode_image(path).size == (200, 200)
    truncate(path)
    with pytest.raises(DataError, match=rf"cut\.{suffix}: does not decode .*skip bad samples"):
        decode_image(path)


def test_a_missing_file_and_a_text_file_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        decode_image(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("not an image")
    for read in (decode_image, read_image_size):
        with pytest.raises(DataError, match=r"text\.png: does not decode"):
            read(tmp_path / "text.png")


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
