"""Where a token stands in the picture: sines added to it, a learned table, or rotated queries.

All are made for any size of picture, and each has a way to sizes that training never showed. `base`
is the side, in tokens, of the pictures that a network was trained with; None never rescales.

N = rows * columns tokens in row-major order, D width, d head width.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_THETA = math.log(10_000.0)
"""Logarithm of the slowest wavelength over that of one token, of sines and rotations alike."""


def sincos_positions(
    rows: int,
    columns: int,
    width: int,
    *,
    base: int | None = None,
    interpolation: float = 1.0,
    column_first: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Fixed 2-D sin-cos positions, (rows * columns, width) float32 (He et al. 2022, MAE).

    Half of the channels encode the row and half the column.

    Args:
        rows: of tokens.
        columns: of tokens.
        width: D, a multiple of 4.
        base: each axis is stretched to this length, so a larger picture holds the same range of
            positions in finer steps; None counts tokens.
        interpolation: positions are divided by it (PixArt's `interpolation_scale`).
        column_first: the first half of the channels encodes the column, as MAE, DiT and diffusers
            have it.
        device: where the result is.
    """
    values = (rows, columns, width, base, interpolation, column_first, torch.device(device))
    return _sincos(*values) if torch.compiler.is_compiling() else _sincos_kept(*values)


def rotary_positions(
    rows: int,
    columns: int,
    head_dim: int,
    *,
    base: int | None = None,
    scaling: str = "none",
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation of every token, (rows * columns, head_dim / 2) float32.

    Su et al. 2021 (arXiv 2104.09864), eq. 34, on two axes: half of the pairs of channels turn with
    the row and half with the column, so an attention logit depends on the offset of two tokens.

    Args:
        rows: of tokens.
        columns: of tokens.
        head_dim: d, a multiple of 4.
        base: the length of an axis beyond which `scaling` acts.
        scaling: `interpolate` squeezes the positions of a longer axis into `base` (Chen et al.
            2023, arXiv 2306.15595); `ntk` slows the slow rotations only, the slowest just as much,
            so that neighbours keep their distance (Peng et al. 2023, arXiv 2309.00071, section
            3.1); `none` leaves all as it is.
        device: where the results are.
    """
    values = (rows, columns, head_dim, base, scaling, torch.device(device))
    return _rotary(*values) if torch.compiler.is_compiling() else _rotary_kept(*values)


def rotated(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys (B, heads, N, d) turned by their positions, in their own dtype.

    `turns`: cosines and sines of `rotary_positions`, (N, d / 2) or (B, 1, N, d / 2). Channel i and
    channel d / 2 + i are one pair. The products are float32, whatever x is.
    """
    cos, sin = turns
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1).to(x.dtype)


def resized_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """A learned table (side, side, D) for a grid of rows x columns: (rows * columns, D).

    Itself at its own size, elsewhere interpolated (bicubic, Dosovitskiy et al. 2021).
    """
    side = table.shape[0]
    if (rows, columns) == (side, side):
        return table.flatten(0, 1)
    image = table.permute(2, 0, 1)[None].float()  # (1, D, side, side)
    image = F.interpolate(image, (rows, columns), mode="bicubic", align_corners=False)
    return image[0].flatten(1).T.to(table.dtype)


def _sincos(
    rows: int,
    columns: int,
    width: int,
    base: int | None,
    interpolation: float,
    column_first: bool,
    device: torch.device,
) -> Tensor:
    def axis(length: int) -> Tensor:
        places = torch.arange(length, dtype=torch.float64, device=device)
        if base is not None:
            places = places * (base / length)
        angles = (places / interpolation)[:, None] * _rates(width // 4, device)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (length, D / 2)

    halves = _on_grid(axis(rows), axis(columns))
    table = torch.cat(halves[::-1] if column_first else halves, dim=-1)
    return table.reshape(rows * columns, width).float()


def _rotary(
    rows: int,
    columns: int,
    head_dim: int,
    base: int | None,
    scaling: str,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    pairs = head_dim // 4  # of one axis

    def axis(length: int) -> Tensor:
        places = torch.arange(length, dtype=torch.float64, device=device)
        rates = _rates(pairs, device)
        if base is not None and scaling != "none":
            # a tensor, for a compiler would take a number for a constant
            stretch = (torch.ones((), dtype=torch.float64, device=device) * length / base).clamp(1)
            slowed = torch.arange(pairs, device=device) / max(1, pairs - 1)
            rates = rates / (stretch if scaling == "interpolate" else stretch**slowed)
        return places[:, None] * rates  # (length, d / 4)

    turns = torch.cat(_on_grid(axis(rows), axis(columns)), dim=-1)
    turns = turns.reshape(rows * columns, 2 * pairs)
    return turns.cos().float(), turns.sin().float()


def _on_grid(of_rows: Tensor, of_columns: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, D) and (columns, D) as two grids (rows, columns, D)."""
    rows, columns = len(of_rows), len(of_columns)
    return of_rows[:, None].expand(-1, columns, -1), of_columns[None].expand(rows, -1, -1)


def _rates(count: int, device: torch.device) -> Tensor:
    steps = torch.arange(count, dtype=torch.float64, device=device)
    return torch.exp(-LOG_THETA * steps / count)


# A table made while sampling must serve training as well: autograd refuses inference tensors.
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _sincos_kept(
    rows: int,
    columns: int,
    width: int,
    base: int | None,
    interpolation: float,
    column_first: bool,
    device: torch.device,
) -> Tensor:
    return _sincos(rows, columns, width, base, interpolation, column_first, device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _rotary_kept(
    rows: int, columns: int, head_dim: int, base: int | None, scaling: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    return _rotary(rows, columns, head_dim, base, scaling, device)
