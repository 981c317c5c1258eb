"""Adapt weights to another image size, patch size or number of channels, where that is sound."""

from __future__ import annotations

import math

import torch
from timm.layers import resample_patch_embed, resize_rel_pos_bias_table
from timm.models import adapt_input_conv
from torch import Tensor

from mim.core.errors import UserError
from mim.core.patches import Grid
from mim.model.backbones import resample_positions


def square_grid(count: int) -> Grid | None:
    """(side, side) of a square grid of ``count`` patches; None if there is none."""
    side = math.isqrt(count)
    return (side, side) if side and side * side == count else None


def adapt_positions(
    positions: Tensor, old: Grid, new: Grid, prefix: int, name: str
) -> tuple[Tensor, str]:
    """Resample position embeddings from an old grid (rows, columns) to a new one, as timm does.

    Args:
        positions: (1, prefix + rows * columns, D) of the old grid; those of the prefix stay.
        name: for the message.

    Returns:
        The embeddings, and what was done: empty where the grids are the same.

    Raises:
        UserError: if the count of positions does not fit the old grid.
    """
    if positions.ndim != 3 or positions.shape[1] != prefix + old[0] * old[1]:
        raise UserError(
            f"{name}: shape {tuple(positions.shape)} is not (1, {prefix} + {old[0]} x {old[1]}, D)"
        )
    if old == new:
        return positions, ""
    resampled = resample_positions(positions, new, old, prefix)
    return resampled, f"bicubic from a grid of {_by(old)} to {_by(new)}"


def adapt_bias_table(
    table: Tensor, window: Grid, shape: tuple[int, ...], name: str
) -> tuple[Tensor, str]:
    """Resample a table of relative position biases (offsets, heads), as BEiT and SimMIM do.

    Args:
        table: of a square window, with or without BEiT's three offsets of the class token.
        window: (rows, columns) of patches, of the new one.
        shape: of the new table.
        name: for the message.

    Returns:
        The table, and what was done.

    Raises:
        UserError: if the table is of no square window.
    """
    try:
        found = resize_rel_pos_bias_table(table, window, shape)
    except ValueError as error:
        reason = "offsets are of no square window, and only such are resampled"
        raise UserError(f"{name}: {len(table)} {reason}") from error
    return found, f"resampled to windows of {_by(window)}"


def _by(sides: Grid) -> str:
    return f"{sides[0]} x {sides[1]}"


def adapt_patch_embedding(
    weight: Tensor, channels: int, patch: tuple[int, int]
) -> tuple[Tensor, str]:
    """Adapt a patch embedding (D, C, height, width) to other channels and another patch size.

    Sound are: from several channels to 1, by their sum, exact where all channels of the images hold
    the same values; from 1 to several, in equal parts, exact in the same sense; and another patch
    size by the pseudo-inverse of the resize (FlexiViT, Beyer et al. 2022, arXiv:2212.08013).

    Returns:
        The weight, and what was done: empty where it fits already.

    Raises:
        UserError: for channels that the file says nothing about, such as from 3 to 4.
    """
    had, notes = weight.shape[1], []
    if channels != had:
        if channels == 1:
            notes.append(f"summed over {had} channels")
        elif had == 1:
            notes.append(f"repeated for {channels} channels, each 1/{channels}")
        else:
            raise UserError(
                f"data.channels: {channels} is neither the file's {had} nor 1: which of its "
                f"channels another one resembles cannot be known; use {had} or 1"
            )
        weight = adapt_input_conv(channels, weight, base_chans=had)
    size = (int(weight.shape[2]), int(weight.shape[3]))
    if size != patch:
        with torch.no_grad():
            weight = resample_patch_embed(weight, list(patch))
        notes.append(f"resampled from patches of {_by(size)} to {_by(patch)} pixels")
    return weight, "; ".join(notes)
