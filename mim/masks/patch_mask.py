"""Which patches of a batch are hidden."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor

from mim.core.rng import mix, random_bits


@dataclass(frozen=True, eq=False)
class PatchMask:
    """The hidden patches of a batch of images, with everything derived from them once.

    ``is_masked[b, n] == True`` means patch n of image b is hidden; there is no other polarity.

    Args:
        is_masked: (B, N) bool.
        counts: (lowest, highest) number of visible patches in a row, where the caller knows it;
            spares a transfer from the device.
        keys: (B,) int64, one for each image, for draws that depend on the mask (a decoder that
            predicts a share of the hidden patches); by default hashed from the mask itself.
        valid: (B, N) bool, False for padding, which is neither visible nor masked; None where all
            images have N patches.
        targets: (B, T, N) bool, the target blocks of each image; None where there are none.

    Attributes:
        visible_ids: (B, K) int64, ascending; K is the largest number of visible patches.
        masked_ids: (B, M) int64, ascending; M is the largest number of masked patches.
        visible_valid: (B, K) bool, False where a shorter row is padded; None where rows are equal.
        masked_valid: (B, M) bool, likewise.
        target_ids: (B, T, A) int64, ascending, the patches of each block; None without any.
        target_valid: (B, T, A) bool, False where a smaller block is padded; None where they are
            equal.

    Raises:
        TypeError: if ``is_masked`` is no bool tensor.
        ValueError: if it is not (B, N) with B and N above 0, the keys are not (B,), ``valid`` is
            not (B, N), or padding is masked.
    """

    is_masked: Tensor
    counts: tuple[int, int] | None = None
    keys: Tensor | None = None
    valid: Tensor | None = None
    targets: InitVar[Tensor | None] = None
    visible_ids: Tensor = field(init=False)
    masked_ids: Tensor = field(init=False)
    visible_valid: Tensor | None = field(init=False)
    masked_valid: Tensor | None = field(init=False)
    target_ids: Tensor | None = field(init=False)
    target_valid: Tensor | None = field(init=False)

    def __post_init__(self, targets: Tensor | None) -> None:
        if not isinstance(self.is_masked, Tensor) or self.is_masked.dtype != torch.bool:
            kind = getattr(self.is_masked, "dtype", type(self.is_masked).__name__)
            raise TypeError(f"is_masked must be a bool tensor (True = hidden), not {kind}")
        if self.is_masked.ndim != 2 or 0 in self.is_masked.shape:
            shape = tuple(self.is_masked.shape)
            raise ValueError(f"is_masked must have shape (images, patches), not {shape}")
        if self.keys is not None and self.keys.shape != self.is_masked.shape[:1]:
            shape, images = tuple(self.keys.shape), len(self.is_masked)
            raise ValueError(f"keys must have shape ({images},), one an image, not {shape}")
        if self.valid is not None and self.valid.shape != self.is_masked.shape:
            raise ValueError(f"valid must have the mask's shape, not {tuple(self.valid.shape)}")
        if self.valid is not None and bool((self.is_masked & ~self.valid).any()):
            raise ValueError("padding is masked: it is neither visible nor masked")
        self._derive()
        ids = valid = None
        if targets is not None:
            number = targets.sum(dim=2)  # (B, T)
            low, high = int(number.min()), int(number.max())
            ids = targets.logical_not().to(torch.uint8).argsort(dim=2, stable=True)[..., :high]
            if low != high:
                valid = torch.arange(high, device=ids.device) < number[..., None]
                ids = ids * valid
        object.__setattr__(self, "target_ids", ids)
        object.__setattr__(self, "target_valid", valid)

    def _derive(self) -> None:
        # Lowest and highest number in a row; where they are not known, they are read back.
        bounds = self.counts if self.valid is None else None
        for name, flags in (("visible", self.is_visible), ("masked", self.is_masked)):
            number = flags.sum(dim=1)  # (B,)
            low, high = bounds or (int(number.min()), int(number.max()))
            ids = flags.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :high]
            valid = None
            if low != high:
                valid = torch.arange(high, device=flags.device) < number[:, None]
                ids = ids * valid  # padding points at patch 0, never elsewhere
            object.__setattr__(self, f"{name}_ids", ids)
            object.__setattr__(self, f"{name}_valid", valid)
            if name == "visible":
                object.__setattr__(self, "counts", (low, high))
                bounds = None
                if self.valid is None:  # what is not visible is masked
                    bounds = self.num_patches - high, self.num_patches - low

    @classmethod
    def from_ranks(cls, ranks: Tensor, hidden: Tensor | int) -> PatchMask:
        """Hide the first ``hidden`` patches, for all rows or (B,) each, in the order of ``ranks``.

        ``ranks`` are (B, N) int64, each row a permutation of 0..N-1.
        """
        patches = ranks.shape[1]
        if isinstance(hidden, int):
            return cls(ranks < hidden, counts=(patches - hidden, patches - hidden))
        return cls(ranks < hidden.to(ranks.device)[:, None])

    @classmethod
    def empty(cls, images: int, patches: int, device: torch.device | str = "cpu") -> PatchMask:
        """Hide nothing."""
        nothing = torch.zeros(images, patches, dtype=torch.bool, device=device)
        return cls(nothing, counts=(patches, patches))

    @classmethod
    def empty_of(cls, valid: Tensor) -> PatchMask:
        """Hide nothing of images whose numbers of patches differ, ``valid`` (B, N)."""
        return cls(torch.zeros_like(valid), valid=valid)

    def __len__(self) -> int:
        return self.is_masked.shape[0]

    def __getitem__(self, rows: slice) -> PatchMask:
        """Keep some images; rows stay as long as the longest of all.

        The longest of those that are kept would have to be read from the device.
        """
        return self._each(lambda value: value[rows])

    @property
    def num_patches(self) -> int:
        """N, visible and masked, of the image with the most."""
        return self.is_masked.shape[1]

    @property
    def num_visible(self) -> int:
        """K, the largest number of visible patches in a row."""
        return self.visible_ids.shape[1]

    @property
    def least_visible(self) -> int:
        """The smallest number of visible patches in a row."""
        assert self.counts is not None  # set at construction
        return self.counts[0]

    @property
    def num_masked(self) -> int:
        """M, the largest number of masked patches in a row."""
        return self.masked_ids.shape[1]

    @property
    def is_visible(self) -> Tensor:
        """(B, N) bool: neither masked nor padding."""
        return ~self.is_masked if self.valid is None else self.valid & ~self.is_masked

    @property
    def is_equal(self) -> bool:
        """Whether all rows show, and hide, the same number of patches."""
        return self.visible_valid is None and self.masked_valid is None

    def masked_share(self, share: float) -> tuple[Tensor, Tensor | None]:
        """Draw a share, in (0, 1], of the masked patches of each image by key.

        The count is the nearest integer, halves up, and at least one where any patch is masked.

        Returns:
            ids (B, M') int64 ascending, and (B, M') bool, False for padding, or None without any.
        """
        if share >= 1:
            return self.masked_ids, self.masked_valid
        keys = self.keys
        if keys is None:  # a hash of the mask itself: still no global randomness
            places = mix(torch.arange(1, self.num_patches + 1, device=self.is_masked.device))
            keys = mix((self.is_masked * places).sum(dim=1))
        noise = random_bits(keys, self.num_patches, stream=3).masked_fill(
            ~self.is_masked, torch.iinfo(torch.int64).max
        )
        hidden = self.is_masked.sum(dim=1)  # (B,)
        counts = torch.floor(hidden.double() * share + 0.5).long().clamp(min=1).minimum(hidden)
        highest = self.num_masked
        most = min(max(math.floor(highest * share + 0.5), 1), highest)
        ids = noise.argsort(dim=1, stable=True)[:, :most]  # (B, M')
        if self.is_equal:
            return ids.sort(dim=1).values, None
        valid = torch.arange(most, device=ids.device) < counts[:, None]
        ids = ids.masked_fill(~valid, self.num_patches).sort(dim=1).values  # padding goes last
        return ids.masked_fill(~valid, 0), valid

    @property
    def device(self) -> torch.device:
        """Where the mask is."""
        return self.is_masked.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PatchMask:
        """Move to another device."""
        if self.device == torch.device(device):
            return self
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PatchMask:
        """The same mask in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PatchMask:
        changed = object.__new__(PatchMask)
        for name, value in vars(self).items():
            object.__setattr__(changed, name, change(value) if isinstance(value, Tensor) else value)
        return changed
