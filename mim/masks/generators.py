"""Mask generators: pure functions of the grid and one key an image.

The number of hidden patches is ``hidden_count(ratio, N)``, computed in float64: by default the
nearest integer, halves up (``mask.rounding``). Every generator uses this one rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mim.core.config import MaskConfig
from mim.core.device import to_device
from mim.core.errors import setting_error
from mim.core.patches import Patches
from mim.core.registry import Registry
from mim.core.rng import image_keys, random_bits, uniforms
from mim.masks.patch_mask import PatchMask

Grid = tuple[int, int]

_UNMASKED, _REPEATS = 6, 7  # streams of the keys


def hidden_count(ratio: float, patches: int, rounding: str = "nearest") -> int:
    """Count the patches that a ratio hides, by default the nearest integer, halves up."""
    return int(
        hidden_counts(torch.tensor(ratio, dtype=torch.float64, device="cpu"), patches, rounding)
    )


def hidden_counts(ratios: Tensor, patches: int, rounding: str = "nearest") -> Tensor:
    """Count the patches that each of the ratios, float64, hides: int64; see ``mask.rounding``."""
    if rounding == "ceil":
        counts = torch.ceil(ratios * patches)
    elif rounding == "floor_visible":
        counts = patches - torch.floor((1 - ratios) * patches)
    else:
        counts = torch.floor(ratios * patches + 0.5)
    return counts.long()


@dataclass(frozen=True, eq=False)
class MaskRequest:
    """What a generator may look at.

    Attributes:
        grid: (rows, columns) of patches.
        keys: (B,) int64 from :func:`mim.core.rng.image_keys`; all randomness comes from them.
        ratios: (B,) float64, the share of patches to hide in each image.
        sample_ids: (B,) int64, the stable ids of the images; None where the caller has none.
        images: (B, C, H, W), normalised; None unless the generator asks for them.
        attention: (B, N), how much a teacher attends to each patch; None unless asked for.
        logits: (B, N), the scores of the generator's own network; None where it has none.
        rounding: how ratios become counts, as ``mask.rounding``.
        epoch: the pass over the data; below 0 for masks that do not change.
    """

    grid: Grid
    keys: Tensor
    ratios: Tensor
    sample_ids: Tensor | None = None
    images: Tensor | None = None
    attention: Tensor | None = None
    logits: Tensor | None = None
    rounding: str = "nearest"
    epoch: int = -1

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    def counts(self, units: int | None = None) -> Tensor:
        """(B,) int64: how many of the ``units``, by default patches, each image hides."""
        units = self.num_patches if units is None else units
        return hidden_counts(self.ratios, units, self.rounding)


def repeat_keys(keys: Tensor, repeats: int) -> Tensor:
    """Derive ``repeats`` keys of each key (B,), the first of which is itself: (B * repeats,)."""
    others = random_bits(keys, repeats - 1, _REPEATS)
    return torch.cat([keys[:, None], others], dim=1).flatten()


class Ratios(Protocol):
    """The part of :class:`MaskConfig` that all generators share."""

    @property
    def rounding(self) -> str: ...
    @property
    def unmasked(self) -> float: ...
    def ratio_at(self, epoch: int) -> tuple[float, float]: ...
    def all_ratios(self) -> list[tuple[str, float]]: ...


@dataclass(frozen=True)
class MaskContext:
    """What a generator is built for."""

    ratios: Ratios
    """Says which share of the patches is hidden."""
    patch_size: tuple[int, int] | None = None
    """(height, width) of a patch in pixels; None where it is not known."""


class MaskGenerator(ABC):
    """Draws masks.

    A new generator defines :meth:`draw`, or :meth:`ranks` of :class:`RankedMask`, and says by its
    flags what it needs to see. Its ``settings`` are those registered with it; None without any.
    """

    name: ClassVar[str] = ""
    """As registered."""

    needs_images: bool = False
    """Whether it looks at the images; its masks then follow from what they show, too."""
    needs_attention: bool = False
    """Whether it reads a teacher's attention; the model then keeps one (``model.teacher``)."""
    has_targets: bool = False
    """Whether its masks carry target blocks, each to be predicted by itself (:meth:`targets`)."""
    is_trained: bool = False
    """Whether it has a network of its own, trained with the model (``model.mask_network``)."""

    def __init__(self, settings: Any, context: MaskContext) -> None:
        self.settings = settings
        self.ratios = context.ratios
        self.patch_size = context.patch_size

    @property
    def sees_images(self) -> bool:
        """Whether masks depend on the images, by themselves, a teacher or a network."""
        return self.needs_images or self.needs_attention or self.is_trained

    def targets(self, request: MaskRequest) -> Tensor:
        """(B, T, N) bool, True where a patch is in a target block; blocks may overlap."""
        raise NotImplementedError(f"{type(self).__name__} has no target blocks")

    def network(self, channels: int, seed: int) -> nn.Module:
        """Build the network of a generator that is trained: images to logits (B, N)."""
        raise NotImplementedError(f"{type(self).__name__} has no network")

    def objective(self, logits: Tensor, ids: Tensor, error: Tensor, valid: Tensor | None) -> Tensor:
        """Compute the network's loss (B,) from the errors (B, M) at the hidden patches ``ids``."""
        raise NotImplementedError(f"{type(self).__name__} is not trained")

    @abstractmethod
    def draw(self, request: MaskRequest) -> Tensor:
        """(B, N) bool, True where a patch is hidden."""

    def __call__(
        self,
        grid: Grid,
        keys: Tensor,
        *,
        epoch: int = -1,
        sample_ids: Tensor | None = None,
        images: Tensor | None = None,
        attention: Callable[[Tensor], Tensor] | None = None,
        network: Callable[[Tensor], Tensor] | None = None,
    ) -> PatchMask:
        """Draw masks for images with the given keys.

        Args:
            grid: (rows, columns) of patches.
            keys: (B,) int64 from :func:`mim.core.rng.image_keys`.
            epoch: the pass over the data, for a ratio that moves; below 0 it has not moved yet.
            sample_ids: (B,) stable ids of the images, for masks that are given per image.
            images: (B, C, H, W), normalised, for generators that look at them.
            attention: images to a teacher's attention (B, N), for generators guided by it.
            network: images to logits (B, N), of a generator that is trained.

        Raises:
            TypeError: if the keys are no (B,) int64 tensor.
            ValueError: if there are not as many ids or images as keys.
            UserError: if the generator needs something that is not given.
        """
        if not isinstance(keys, Tensor) or keys.dtype != torch.int64 or keys.ndim != 1:
            raise TypeError("masks need one int64 key an image, from mim.core.rng.image_keys")
        for what, values in (("sample_ids", sample_ids), ("images", images)):
            if values is not None and len(values) != len(keys):
                raise ValueError(f"{len(keys)} keys and {len(values)} {what}: one each is needed")
        low, high = self.ratios.ratio_at(epoch)
        drawn = torch.full((len(keys),), low, dtype=torch.float64, device=keys.device)
        if high > low and len(keys):
            drawn = low + (high - low) * uniforms(keys, 1, stream=1)[:, 0]
            low, high = float(drawn.min()), float(drawn.max())  # before they leave the host
        seen = logits = None
        if self.sees_images:
            lacks_teacher = self.needs_attention and attention is None
            if images is None or lacks_teacher or (self.is_trained and network is None):
                reason = "looks at the images; draw its masks with model.draw_mask(images, keys)"
                raise setting_error("mask.name", self.name, reason)
            seen = attention(images) if self.needs_attention and attention else None
            logits = network(images) if self.is_trained and network else None
            keys, drawn = to_device(keys, images.device), to_device(drawn, images.device)
        rounding = self.ratios.rounding
        request = MaskRequest(grid, keys, drawn, sample_ids, images, seen, logits, rounding, epoch)
        targets = self.targets(request) if self.has_targets else None
        hidden, counts = self.draw(request), self.known_counts(grid, low, high)
        if self.ratios.unmasked and epoch >= 0:
            hidden &= uniforms(keys, 1, _UNMASKED) >= self.ratios.unmasked
            # On the host the true counts are read; elsewhere that would wait for the device.
            counts = (counts[0], request.num_patches) if counts and self.sees_images else None
        return PatchMask(hidden, counts, keys, targets=targets)

    def draw_sizes(
        self,
        images: Patches,
        keys: Tensor,
        *,
        epoch: int = -1,
        sample_ids: Tensor | None = None,
    ) -> PatchMask:
        """Draw masks for images of different sizes, each by its own grid.

        Raises:
            UserError: if the settings make no sense on the grid of an image, or the generator takes
                images of one size only.
        """
        self.check_sizes()
        keys = keys.cpu()
        longest = images.valid.shape[1]
        valid = torch.arange(longest) < torch.tensor(images.lengths)[:, None]  # not from the device
        hidden = torch.zeros_like(valid)
        by_grid: dict[Grid, list[int]] = {}
        for image, grid in enumerate(images.grids):
            by_grid.setdefault(grid, []).append(image)
        for grid, members in by_grid.items():
            self.check(grid)
            rows = torch.tensor(members)
            ids = None if sample_ids is None else sample_ids.cpu()[rows]
            drawn = self(grid, keys[rows], epoch=epoch, sample_ids=ids)
            hidden[rows, : drawn.num_patches] = drawn.is_masked
        return PatchMask(hidden, keys=keys, valid=valid)

    def check_sizes(self) -> None:
        """Raise a ``UserError`` if the generator cannot take images of different sizes."""
        if self.sees_images:
            reason = "looks at images of one size, and data.aspect is keep"
            raise setting_error("mask.name", self.name, reason)

    def known_counts(self, grid: Grid, low: float, high: float) -> tuple[int, int] | None:
        """Return (lowest, highest) number of visible patches for ratios from ``low`` to ``high``.

        None where only the drawn mask tells: it is then read back from the device.
        """
        return None

    def check(self, grid: Grid) -> None:
        """Raise a ``UserError`` if a ratio would hide no patch of this grid, or all of them."""
        self.check_units(grid, grid[0] * grid[1], "patch")

    def missing(self, grid: Grid, sample_ids: Tensor) -> Tensor:
        """Return the positions (n,) of images that have no mask; by default none."""
        return sample_ids.new_empty(0)

    def count(self, ratio: float, units: int) -> int:
        """Count the units that a ratio hides."""
        return hidden_count(ratio, units, self.ratios.rounding)

    def check_units(self, grid: Grid, units: int, kind: str) -> None:
        """Raise a ``UserError`` that names a ratio which hides none or all of the units."""
        for setting, ratio in self.ratios.all_ratios():
            hidden = self.count(ratio, units)
            if not 0 < hidden < units:
                which = f"no {kind}" if hidden == 0 else f"every {kind}"
                reason = f"hides {which} of a grid of {grid[0]} x {grid[1]}"
                raise setting_error(setting, ratio, reason)


class RankedMask(MaskGenerator):
    """Hides in each image the patches that come first in an order; exact in number."""

    @abstractmethod
    def ranks(self, request: MaskRequest) -> Tensor:
        """Order the patches: (B, N) int64, each row a permutation; low ranks are hidden first."""

    def known_counts(self, grid: Grid, low: float, high: float) -> tuple[int, int] | None:
        patches = grid[0] * grid[1]
        return patches - self.count(high, patches), patches - self.count(low, patches)

    def draw(self, request: MaskRequest) -> Tensor:
        return self.ranks(request) < request.counts()[:, None]


def rank_by(score: Tensor, keys: Tensor, stream: int = 0) -> Tensor:
    """Rank scores (B, N), lowest first; ties are broken at random by the ``stream`` of the keys.

    Returns:
        (B, N) int64, each row a permutation of 0..N-1.
    """
    shuffled = random_bits(keys, score.shape[1], stream).argsort(dim=1, stable=True)
    order = shuffled.gather(1, score.gather(1, shuffled).argsort(dim=1, stable=True))
    return order.argsort(dim=1, stable=True)


MASKS: Registry[type[MaskGenerator]] = Registry(
    "mask.name",
    MaskConfig,
    {"mae": "random", "uniform": "random", "beit": "block", "ijepa": "multiblock"},
)


@MASKS.register("random")
class RandomMask(RankedMask):
    """Hides patches uniformly at random, without replacement (MAE, arXiv:2111.06377)."""

    def ranks(self, request: MaskRequest) -> Tensor:
        noise = random_bits(request.keys, request.num_patches)  # (B, N)
        return noise.argsort(dim=1, stable=True).argsort(dim=1, stable=True)


def build_mask_generator(
    config: MaskConfig, grid: Grid | None = None, patch_size: tuple[int, int] | None = None
) -> MaskGenerator:
    """Build the generator that ``config`` names; check it against the grid where one is given.

    Raises:
        UserError: if the name is unknown or the settings do not fit the grid.
    """
    kind, settings = MASKS.get(config.name), MASKS.chosen(config, config.name)
    generator = kind(settings, MaskContext(config, patch_size))
    if grid is not None:
        generator.check(grid)
    return generator


def sample_masks(
    config: MaskConfig,
    grid: Grid,
    *,
    seed: int,
    epoch: int,
    sample_ids: Tensor | list[int],
    patch_size: tuple[int, int] | None = None,
) -> PatchMask:
    """Draw the masks that training uses for these images in this epoch.

    A mask is a pure function of the arguments, on any device and in any batch.

    Args:
        config: the settings under ``mask``.
        grid: (rows, columns) of patches.
        seed: the run's seed.
        epoch: the pass over the data.
        sample_ids: (B,) stable ids of the images.
        patch_size: (height, width) of a patch in pixels, for generators with a unit in pixels.

    Raises:
        UserError: for a generator that looks at the image; see ``model.draw_mask``.
    """
    generator = build_mask_generator(config, grid, patch_size)
    ids = torch.as_tensor(sample_ids, dtype=torch.int64)
    keys = image_keys(seed, epoch, ids, purpose="mask")
    return generator(grid, keys, epoch=epoch, sample_ids=ids)
