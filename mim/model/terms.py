"""Extra parts of the loss, and measures, that components give by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mim.core.patches import Images
from mim.masks import PatchMask

if TYPE_CHECKING:
    from mim.model.regimes import Latents


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward pass in training, for a component that adds to the loss.

    Attributes:
        images: (B, C, H, W), normalised, or patches of images of different sizes.
        ids: (B, M) int64, the patches that were predicted; None for all N in order.
        valid: (B, M) bool, False for padding; None where there is none.
        prediction: (B, M, dim).
        target: (B, M, dim), without gradient.
        distance: (B, M), between the two.
    """

    images: Images
    mask: PatchMask
    latents: Latents
    ids: Tensor | None
    valid: Tensor | None
    prediction: Tensor
    target: Tensor
    distance: Tensor


class WithTerms:
    """A component that may add to the loss and to the curves: regime, decoder or target."""

    def terms(self, forward: Forward) -> dict[str, Tensor]:
        """Name terms of the loss, each (B,), for each image, or 0-d, for the batch.

        They are added to the loss in training, weighted by the component, and logged by name.
        """
        return {}

    def metrics(self, forward: Forward) -> dict[str, Tensor]:
        """Name what is measured in training, each 0-d without a gradient; asked after terms.

        Numbers are logged by these names and shown in the report; they must not wait for the
        device.
        """
        return {}
