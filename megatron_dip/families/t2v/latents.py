"""From frames to latents: what a diffusion transformer learns to make.

Where no trained encoder is given, a fixed transform stands in, so that training runs on anything:
the cosine transform (DCT-II, orthonormal) of every block of 8x8 pixels in each of the components
luma, blue and red difference (BT.601), of which the lowest frequencies are kept.  It has no time
axis: a latent frame is a frame.  With 16 channels: 10 of luma and 3 of each difference, ordered by
frequency; a mean is divided by 4, which brings it to the size of the others.  Nothing is learned
and nothing is random, so that the same clip has the same latents everywhere.

A folder in the format of ``diffusers`` (``AutoencoderKL``) is used in its place where one is given:
its latents are the means of its posterior, shifted and scaled as its configuration says.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dip.errors import DataError

__all__ = ["BlockTransform", "DiffusersEncoder", "LatentEncoder", "make_encoder", "patches_of"]

PATCH_SIDE = 2
"""Latent cells per side of a patch."""
_BLOCK = 8
_MEAN_SCALE = 0.25
# How much later than luma a frequency of the color differences is kept.
_COLOR_DELAY = 2.5
_TO_LUMA_AND_DIFFERENCES = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)


class LatentEncoder(Protocol):
    """Frames to latents."""

    num_channels: int
    pixels_per_cell: int
    digest: str
    """Equal where the same frames give the same latents."""

    def encode(self, frames: NDArray[np.uint8]) -> Tensor:
        """``[F, H, W, 3]`` to ``[F, channels, H / pixels, W / pixels]`` float32."""
        ...


def _cosine_matrix() -> Tensor:
    """``[8, 8]``, orthonormal: row u is the u-th cosine."""
    place = torch.arange(_BLOCK, dtype=torch.float64)
    matrix = torch.cos((2 * place[None, :] + 1) * place[:, None] * torch.pi / (2 * _BLOCK))
    matrix[0] /= 2**0.5
    return matrix * (2 / _BLOCK) ** 0.5


def _kept(num_channels: int) -> list[tuple[int, int, int]]:
    """Component, vertical and horizontal frequency of every channel."""
    every = [
        (component, u, v) for component in range(3) for u in range(_BLOCK) for v in range(_BLOCK)
    ]
    every.sort(key=lambda c: (c[1] + c[2] + (_COLOR_DELAY if c[0] else 0.0), c))
    return every[:num_channels]


class BlockTransform:
    """The fixed transform.

    Args:
        num_channels: 1 to 192; with 192 nothing is lost.
    """

    pixels_per_cell = _BLOCK

    def __init__(self, num_channels: int = 16) -> None:
        if not 1 <= num_channels <= 3 * _BLOCK**2:
            raise DataError(
                f"latent_channels is {num_channels}; the block transform has 1 to {3 * _BLOCK**2}"
            )
        self.num_channels = num_channels
        self.digest = f"block-transform-1-{num_channels}"
        self._cosines = _cosine_matrix()
        self._channels = _kept(num_channels)

    def encode(self, frames: NDArray[np.uint8]) -> Tensor:
        """See :class:`LatentEncoder`."""
        pixels = torch.tensor(frames, dtype=torch.float64) / 127.5 - 1.0
        components = pixels @ torch.tensor(_TO_LUMA_AND_DIFFERENCES, dtype=torch.float64).T
        blocks = components.unflatten(2, (-1, _BLOCK)).unflatten(1, (-1, _BLOCK))
        # f frames, r rows and c columns of blocks, y and x inside a block, k components
        found = torch.einsum("frycxk,uy,vx->frckuv", blocks, self._cosines, self._cosines)
        found[..., 0, 0] *= _MEAN_SCALE
        kept = [found[..., k, u, v] for k, u, v in self._channels]
        return torch.stack(kept, dim=1).float()

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """The frames whose kept frequencies are ``latents``; for looking at them."""
        num_frames, _, rows, columns = latents.shape
        found = torch.zeros(num_frames, rows, columns, 3, _BLOCK, _BLOCK, dtype=torch.float64)
        for place, (k, u, v) in enumerate(self._channels):
            found[..., k, u, v] = latents[:, place].double()
        found[..., 0, 0] /= _MEAN_SCALE
        blocks = torch.einsum("frckuv,uy,vx->frycxk", found, self._cosines, self._cosines)
        components = blocks.flatten(1, 2).flatten(2, 3)
        matrix = torch.tensor(_TO_LUMA_AND_DIFFERENCES, dtype=torch.float64)
        pixels = components @ torch.linalg.inv(matrix).T
        return ((pixels + 1.0) * 127.5).round().clamp(0, 255).byte().numpy()


class DiffusersEncoder:
    """A variational autoencoder for pictures in a folder of ``diffusers``, frame by frame.

    Raises:
        DataError: ``diffusers`` is not installed, or the folder holds no such encoder.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise DataError(
                f"{folder}: reading it takes diffusers; install megatron-dip[video]"
            ) from error
        try:
            model: Any = AutoencoderKL.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # The library raises whatever its parts raise.
            raise DataError(
                f"{folder}: not an AutoencoderKL of diffusers ({error}); check data.vae"
            ) from error
        self._model = model.eval().requires_grad_(False)
        self.num_channels = int(model.config.latent_channels)
        self.pixels_per_cell = 2 ** (len(model.config.block_out_channels) - 1)
        weights = hashlib.sha256()
        for file in sorted(folder.iterdir()):
            weights.update(file.read_bytes() if file.is_file() else b"")
        self.digest = f"diffusers-{weights.hexdigest()}"

    def encode(self, frames: NDArray[np.uint8]) -> Tensor:
        """See :class:`LatentEncoder`."""
        pixels = torch.tensor(frames).permute(0, 3, 1, 2)
        settings = self._model.config
        with torch.no_grad():
            means = [
                self._model.encode(frame[None].float() / 127.5 - 1.0).latent_dist.mode()
                for frame in pixels
            ]
        shift = settings.get("shift_factor") or 0.0
        latents: Tensor = (torch.cat(means) - shift) * settings.scaling_factor
        return latents


def make_encoder(num_channels: int, vae: Path | None) -> LatentEncoder:
    """The encoder in the folder ``vae``, or the fixed transform.

    Raises:
        DataError: The encoder cannot be used, or does not have ``num_channels`` channels.
    """
    if vae is None:
        return BlockTransform(num_channels)
    encoder = DiffusersEncoder(vae)
    if encoder.num_channels != num_channels:
        raise DataError(
            f"{vae} has {encoder.num_channels} latent channels but model.dit.latent_channels is "
            f"{num_channels} (make them equal)"
        )
    return encoder


def patches_of(latents: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Latents ``[F, channels, rows, columns]`` as patches of 2x2 cells, and their grid.

    Returns:
        ``[frames * rows / 2 * columns / 2, channels * 4]``, frame by frame and row by row.
    """
    frames, _, height, width = latents.shape
    grid = (frames, height // PATCH_SIDE, width // PATCH_SIDE)
    cells = latents.unflatten(3, (-1, PATCH_SIDE)).unflatten(2, (-1, PATCH_SIDE))
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(grid[0] * grid[1] * grid[2], -1), grid


def frames_of(patches: Tensor, grid: Sequence[int]) -> Tensor:
    """The inverse of :func:`patches_of`."""
    cells = patches.reshape(*grid, -1, PATCH_SIDE, PATCH_SIDE)
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
