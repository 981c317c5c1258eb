"""The image itself as target: pixels, pixels of normalised patches, low-pass pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from mim.core.errors import setting_error
from mim.core.fields import Bound, Settings
from mim.core.patches import Images, Patches, patches_at, patchify, values_at
from mim.model.targets.base import TARGETS, Target, TargetContext
from mim.model.targets.frequency import cosine_basis, filter_images
from mim.model.teacher import Teacher

_EPSILON = 1e-6


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, P) -> mean and deviation of each patch, each (B, N, 1), over all channels."""
    mean = patches.mean(dim=-1, keepdim=True)
    # Several times faster on a CPU than torch.var, which goes through each patch number by number.
    squares = (patches - mean).square().sum(dim=-1, keepdim=True)
    return mean, (squares / (patches.shape[-1] - 1) + _EPSILON).sqrt()


def normalized(patches: Tensor) -> Tensor:
    """(..., P), each patch at mean 0 and variance 1."""
    mean, deviation = _statistics(patches)
    return (patches - mean) / deviation


def _denormalized(prediction: Tensor, patches: Tensor) -> Tensor:
    """Undo the normalisation with the statistics of the true patches, which a viewer must know."""
    mean, deviation = _statistics(patches)
    return prediction * deviation + mean


@TARGETS.register("pixels")
class Pixels(Target):
    """The pixels themselves."""

    shows_pixels = True
    takes_sizes = True

    def __init__(self, settings: Any, context: TargetContext) -> None:
        super().__init__(settings, context)
        self.dim = context.patch_size[0] * context.patch_size[1] * context.channels

    def _patches(self, images: Images, ids: Tensor | None = None) -> Tensor:
        """(B, N, P), or (B, M, P) at the patches ``ids``."""
        if isinstance(images, Patches):
            return images.values if ids is None else values_at(images.values, ids)
        if ids is None:
            return patchify(images, self.context.patch_size)
        return patches_at(images, self.context.patch_size, ids)

    def _of(self, patches: Tensor) -> Tensor:
        """Turn patches (B, M, P) into what is predicted, each by itself."""
        return patches

    @torch.no_grad()
    def forward(self, images: Images, teacher: Teacher | None = None) -> Tensor:
        return self._of(self._patches(images))

    @torch.no_grad()
    def at(self, images: Images, ids: Tensor, teacher: Teacher | None = None) -> Tensor:
        if type(self).forward is not Pixels.forward:  # a target of one's own that changes the whole
            return super().at(images, ids, teacher)
        return self._of(self._patches(images, ids))

    def to_pixels(self, prediction: Tensor, images: Images, target: Tensor | None = None) -> Tensor:
        return prediction


@TARGETS.register("normalized_pixels")
class NormalizedPixels(Pixels):
    """Each patch brought to mean 0 and variance 1 (MAE, arXiv:2111.06377).

    The variance is the unbiased one, with 1e-6 added before the root, as in MAE's code.
    """

    def _of(self, patches: Tensor) -> Tensor:
        return normalized(patches)

    def to_pixels(self, prediction: Tensor, images: Images, target: Tensor | None = None) -> Tensor:
        return _denormalized(prediction, self._patches(images))


_CUTOFF = Bound(
    lambda share: 0 < share <= math.sqrt(2),
    "must be above 0 and at most 1.41, where every frequency stays",
)


@dataclass(frozen=True)
class LowPassSettings(Settings):
    """Pixels without their high spatial frequencies."""

    cutoff: Annotated[float, _CUTOFF] = 0.36
    """Highest frequency that stays, as a share of the Nyquist frequency; PixMIM's 40 of 112."""
    filter: Literal["ideal", "gaussian"] = "ideal"
    """ideal (all or nothing) or gaussian (half the power at the cutoff, no ringing)."""
    normalize: bool = False
    """Whether each filtered patch is brought to mean 0 and variance 1."""
    transform: Literal["cosine", "fourier"] = "cosine"
    """cosine (nothing that leaves at one border enters at the opposite one) or fourier, PixMIM's
    own, which also normalises and has a cutoff of 40 / 112; it needs data.mean and data.std."""


@TARGETS.register("low_pass", LowPassSettings)
class LowPass(Pixels):
    """Pixels of the image without its high spatial frequencies (PixMIM, arXiv:2303.02416).

    The filter acts on the whole image: by ``transform: cosine`` on the Fourier transform of the
    image continued by its mirror image, by ``fourier`` on the plain one, where what leaves at one
    border enters at the opposite one. ``ideal`` keeps the frequencies up to
    ``model.target.low_pass.cutoff`` as they are and nothing above; ``gaussian`` weakens without
    ringing, to half the power at the cutoff. A frequency is the length of the vector (vertical,
    horizontal), each as a share of the Nyquist frequency, half a cycle a pixel.

    ``fourier`` measures frequencies as PixMIM's code does, from half a step below 0 and in steps of
    the shorter side. That filter is not symmetric and leaves an imaginary part, so that the image
    is the modulus, of pixels on the scale 0 to 1.
    """

    takes_sizes = False
    _gain: Tensor
    _vertical: Tensor
    _horizontal: Tensor
    _mean: Tensor
    _std: Tensor

    settings: LowPassSettings

    def __init__(self, settings: LowPassSettings, context: TargetContext) -> None:
        super().__init__(settings, context)
        height, width = context.image_size
        self.is_fourier = settings.transform == "fourier"
        rows, columns = (torch.arange(side, dtype=torch.float64) for side in (height, width))
        if self.is_fourier:
            nyquist = (min(height, width) / 2,) * 2
            rows, columns = rows - (height - 1) / 2, columns - (width - 1) / 2
        else:
            nyquist = height, width
        share = torch.hypot(rows[:, None] / nyquist[0], columns[None] / nyquist[1])
        share = share / settings.cutoff  # (H, W), 1 at the cutoff
        ideal = settings.filter == "ideal"
        gain = (share <= 1 + 1e-12).double() if ideal else torch.exp2(-(share**2) / 2)
        if self.is_fourier:
            gain = torch.fft.ifftshift(gain)
            if context.mean is None or context.std is None:
                reason = "needs data.mean and data.std: it filters pixels on the scale 0 to 1"
                raise setting_error("model.target.low_pass.transform", "fourier", reason)
            for name, values in (("_mean", context.mean), ("_std", context.std)):
                each = torch.tensor(values, dtype=torch.float64)[:, None, None]
                self.register_buffer(name, each, persistent=False)
        self.register_buffer("_gain", gain, persistent=False)
        self.register_buffer("_vertical", cosine_basis(height), persistent=False)
        self.register_buffer("_horizontal", cosine_basis(width), persistent=False)

    def _patches(self, images: Images, ids: Tensor | None = None) -> Tensor:
        assert isinstance(images, Tensor)  # see takes_sizes
        if self.is_fourier:
            images = images.float() if images.dtype.itemsize < 4 else images
            gain, mean, std = (m.to(images.dtype) for m in (self._gain, self._mean, self._std))
            filtered = torch.fft.ifft2(torch.fft.fft2(images * std + mean) * gain)
            return super()._patches((filtered.abs() - mean) / std, ids)
        low = filter_images(images, self._vertical, self._horizontal, self._gain)
        return super()._patches(low, ids)

    def _of(self, patches: Tensor) -> Tensor:
        return normalized(patches) if self.settings.normalize else patches

    def to_pixels(self, prediction: Tensor, images: Images, target: Tensor | None = None) -> Tensor:
        if not self.settings.normalize:
            return prediction
        return _denormalized(prediction, self._patches(images))
