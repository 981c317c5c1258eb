"""Histograms of oriented gradients: against scikit-image, and edges whose direction is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import sobel
from skimage.feature import hog
from torch import Tensor

from mim.core.config import HogConfig
from mim.core.errors import UserError
from mim.core.patches import unpatchify
from mim.model.targets import Target
from mim.model.targets.hog import oriented_gradients
from mim.training.checkpoint import read_config

Make = Callable[..., Target]


@pytest.mark.parametrize(("bins", "cell"), [(9, 4), (6, 2), (9, 8), (4, 1)])
def test_it_is_the_hog_of_scikit_image(bins: int, cell: int, make: Make, images_of: Any) -> None:
    target = make("hog", (8, 16), 3, (4, 3), hog=HogConfig(bins, cell, gradient="central"))
    images = images_of(target)
    images = torch.nn.functional.avg_pool2d(images, 3, 1, 1)  # neighbours alike, as in images
    rows, columns = 32 // cell, 48 // cell
    maps = unpatchify(target(images), (8 // cell, 16 // cell), (4, 3))  # (B, C * bins, ...)
    for image, got in zip(images.numpy(), maps.view(2, 3, bins, rows, columns), strict=True):
        for channel in range(3):
            expected = hog(
                image[channel],
                orientations=bins,
                pixels_per_cell=(cell, cell),
                cells_per_block=(1, 1),
                block_norm="L2",
                feature_vector=False,
            )[:, :, 0, 0]  # (rows, columns, bins)
            # scikit-image sums in float32. Borders included: both know no gradient across them.
            ours = got[channel].permute(1, 2, 0).numpy()
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def ramp(down: float, across: float) -> Tensor:
    """(1, 1, 8, 8), of constant gradient."""
    steps = torch.arange(8.0).double()
    return (down * steps[:, None] + across * steps[None])[None, None]


@pytest.mark.parametrize(
    ("down", "across", "bin_"),
    [
        (0, 1, 0),  # to the right: 0 degrees
        (0, -1, 0),  # and to the left, as good as to the right
        (1, 0, 4),  # down: 90 degrees, in the bin from 80 to 100
        (-1, 0, 4),
        (1, 1, 2),  # 45 degrees: from 40 to 60
        (-1, 1, 6),  # 135 degrees: from 120 to 140
        (1e-3, 1, 0),  # just above 0
        (-1e-3, 1, 8),  # just below 180
    ],
)
def test_directions_by_hand(down: float, across: float, bin_: int) -> None:
    inner = oriented_gradients(ramp(down, across), 9, 2)[0, 0, 1:-1, 1:-1]  # (2, 2, 9)
    expected = torch.zeros(2, 2, 9).double()
    expected[..., bin_] = 2 * np.hypot(down, across)  # over two pixels
    torch.testing.assert_close(inner, expected, rtol=1e-12, atol=0)


def test_each_pixel_votes_in_its_own_cell_with_its_length() -> None:
    image = torch.zeros(1, 1, 4, 4).double()
    image[0, 0, 1, 1] = 8.0  # its neighbours right, left, below and above have a gradient of 8
    got = oriented_gradients(image, 2, 2)[0, 0]  # bins: 0 to 90, 90 to 180
    expected = torch.zeros(2, 2, 2).double()
    # (1, 0) is a border, where no gradient is taken across; along it there is none either.
    expected[0, 1, 0] = 8 / 4  # (1, 2), across
    expected[1, 0, 1] = 8 / 4  # (2, 1), down
    assert torch.equal(got, expected)


GRADIENTS = pytest.mark.parametrize("gradient", ["sobel", "central"])


@GRADIENTS
def test_contrast_counts_only_without_normalisation(
    gradient: Any, make: Make, images_of: Any
) -> None:
    scaled = make("hog", (8, 8), 3, hog=HogConfig(gradient=gradient))
    plain = make("hog", (8, 8), 3, hog=HogConfig(normalize=False, gradient=gradient))
    images = images_of(scaled)
    torch.testing.assert_close(scaled(images * 5 + 2), scaled(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(plain(images * 5 + 2), plain(images) * 5, rtol=1e-9, atol=0)
    lengths = scaled(images).unflatten(-1, (3, 9)).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(2, 4, 3).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("bins", "cell", "window"), [(9, 8, 0), (9, 4, 16), (5, 2, 8)])
def test_it_is_the_hog_of_maskfeat(
    bins: int, cell: int, window: int, make: Make, images_of: Any
) -> None:
    target = make("hog", (8, 16), 2, (4, 3), hog=HogConfig(bins, cell, window=window)).double()
    images = images_of(target)
    rows, columns = 32 // cell, 48 // cell
    maps = unpatchify(target(images), (8 // cell, 16 // cell), (4, 3))
    got = maps.reshape(4, bins, rows, columns).permute(0, 2, 3, 1).numpy()
    expected = np.zeros_like(got)
    for channel, image in enumerate(images.flatten(0, 1).numpy()):
        across, down = (sobel(image, axis, mode="mirror") for axis in (1, 0))
        bin_ = np.floor(np.degrees(np.arctan2(across, down)) % 180 / (180 / bins)).astype(int)
        length = np.sqrt(across**2 + down**2)
        for y, x in np.ndindex(*image.shape):
            weight = 1.0
            if window:  # a Gaussian of half the window's side, around its middle
                off = [(place % window) - (window - 1) / 2 for place in (y, x)]
                weight = np.exp(-(off[0] ** 2 + off[1] ** 2) / (2 * (window / 2) ** 2))
            expected[channel, y // cell, x // cell, bin_[y, x]] += weight * length[y, x]
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-7)


def test_a_new_run_has_the_hog_of_maskfeat() -> None:
    assert HogConfig().gradient == "sobel" and HogConfig().window == 0


def test_an_old_run_keeps_the_hog_of_its_time(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "config.yaml"
    file.write_text("model: {target: {name: hog, hog: {bins: 9, cell: 8, normalize: true}}}\n")
    assert read_config(tmp_path).model.target.hog.gradient == "central"


def test_a_window_that_does_not_fit_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"model\.target\.hog\.window: 16 needs .*sobel"):
        HogConfig(window=16, gradient="central")
    with pytest.raises(UserError, match=r"model\.target\.hog\.window: 16 does not divide .* 8 x 8"):
        make("hog", (8, 8), grid=(1, 1), hog=HogConfig(window=16))


def test_a_flat_image_has_no_direction(make: Make) -> None:
    assert make("hog", (8, 8))(torch.full((1, 1, 16, 16), 3.0)).abs().max() == 0


@GRADIENTS
def test_a_patch_holds_its_own_cells_only(gradient: Any, make: Make, images_of: Any) -> None:
    target = make("hog", (4, 8), 2, (3, 2), hog=HogConfig(5, 2, gradient=gradient))
    images = images_of(target, 1)
    assert target.dim == 2 * 4 * 2 * 5
    before = target(images)
    images[..., 5:7, 11:13] += 3.0  # within patch (1, 1), off its border
    changed = (target(images) != before).any(-1)[0]
    assert changed.tolist() == [False] * 3 + [True] + [False] * 2


def test_a_cell_that_does_not_divide_the_patch_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"model\.target\.hog\.cell: 8 does not divide .* 16 x 4 "):
        make("hog", (16, 4))
