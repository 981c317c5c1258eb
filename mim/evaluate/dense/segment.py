"""Semantic segmentation: a label for each pixel, from a frozen or a fine-tuned encoder.

Two heads: ``linear``, a batch norm and one linear layer on the last block's patch tokens (DINOv2's
frozen protocol, https://arxiv.org/abs/2304.07193), and ``upernet`` (Xiao et al. 2018,
https://arxiv.org/abs/1807.10221) on maps of four blocks and scales, as BEiT and MAE use it, without
their auxiliary head. Whole images are predicted by sliding windows whose logits are averaged;
mIoU is that of the pixels of all images together, at their own size, void left out.

Shapes: B images, C channels, H x W pixels of a window, K classes, D width of the encoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from mim.core.config import FREE, DataConfig
from mim.core.device import to_device
from mim.core.fields import Natural, Share
from mim.core.rng import seed_of
from mim.data import Batch, Picture, normalize
from mim.data.images.transforms import size_of
from mim.data.sources.base import Split
from mim.evaluate.base import EVALUATIONS
from mim.evaluate.dense.pictures import segmentation_picture, shown
from mim.evaluate.dense.pyramid import Pyramid, layer_maps, quarter_layers
from mim.evaluate.dense.segmentation_data import (
    VOID,
    MaskedBatch,
    SegmentationBatches,
    SegmentationSource,
    SegmentationSpec,
    base_factor,
    open_segmentation,
    pair,
)
from mim.evaluate.dense.training import (
    DenseEvaluation,
    DenseModel,
    DenseSettings,
    encoder_at_size,
    fill_of,
    share_of,
    statistics_of,
)
from mim.evaluate.dense.views import stack_pixels, whole_view
from mim.evaluate.features import check_finite
from mim.evaluate.predictions import Measured, gather_rows
from mim.training.runtime.precision import autocast

if TYPE_CHECKING:
    from torchmetrics import Metric

    from mim.evaluate.encoders import Encoder

_POOLS = (1, 2, 3, 6)
_WINDOWS_AT_ONCE = 16


@dataclass(frozen=True)
class SegmentSettings(DenseSettings):
    """Settings of segmentation."""

    source: str = "folders"
    """folders (path/images/{train,val} and path/masks/{train,val}, of equal stems),
    torchvision/VOCSegmentation or torchvision/OxfordIIITPet."""
    download: bool = field(default=True, metadata=FREE)
    """Whether torchvision may download."""
    void: int = 255
    """Label in the masks of pixels that never count (folders)."""
    head: Literal["upernet", "linear"] = "upernet"
    """upernet, or linear: one linear layer on the last block."""
    resize: Natural = 0
    """Short side in pixels to which images are brought before windows are cut from them; 0: until
    they just cover image_size."""
    stride: Share = 0.67
    """Step of the sliding window over its side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head == "upernet" and len(self.scales) != 4:
            raise self.error("scales", "must be 4, one for each quarter of the depth")

    @property
    def spec(self) -> SegmentationSpec:
        """Where images and masks come from."""
        return SegmentationSpec(self.source, self.path, self.download, self.classes, self.void)


def _convolution(inside: int, out: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, out, kernel, padding=kernel // 2, bias=False),
        # At least 8 channels a group, so that a map of one pixel is not normalised to 0.
        nn.GroupNorm(max(out // 8, 1) if out % 8 == 0 else 1, out),
        nn.ReLU(),
    )


class SharedBatchNorm(nn.BatchNorm2d):
    """torch's, whose batch is that of all processes, which hold equal shares of it."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> the same shape."""
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if world == 1 or not self.training:
            normed: Tensor = super().forward(x)
            return normed
        x = x.float()
        count = x.numel() // x.shape[1] * world
        mean = all_reduce(x.sum((0, 2, 3), keepdim=True)) / count
        var = all_reduce((x - mean).square().sum((0, 2, 3), keepdim=True)) / count
        with torch.no_grad():
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * count / (count - 1), self.momentum)
        scale = (var + self.eps).rsqrt() * self.weight[:, None, None]
        return (x - mean) * scale + self.bias[:, None, None]


class LinearHead(nn.Module):
    """Maps (B, D, h, w), of which the last counts -> logits (B, K, h, w)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = SharedBatchNorm(width)
        self.classifier = nn.Conv2d(width, classes, kernel_size=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        logits: Tensor = self.classifier(self.norm(maps[-1]))
        return logits


class UperHead(nn.Module):
    """UPerNet: pyramid pooling on the coarsest map, a top-down path, all scales fused."""

    def __init__(self, inside: int, width: int, scales: tuple[float, ...], classes: int) -> None:
        super().__init__()
        self.pyramid = Pyramid(inside, width, scales)
        self.pools = nn.ModuleList(_convolution(width, width, 1) for _ in _POOLS)
        self.bottleneck = _convolution(width * (1 + len(_POOLS)), width, 3)
        self.outputs = nn.ModuleList(_convolution(width, width, 3) for _ in scales[:-1])
        self.fuse = _convolution(width * len(scales), width, 3)
        self.classifier = nn.Conv2d(width, classes, kernel_size=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps (B, D, h, w) -> logits (B, K, h', w') at the finest scale."""
        *fine, coarse = self.pyramid(maps)
        size = coarse.shape[2:]
        pooled = [
            _resize(pool(F.adaptive_avg_pool2d(coarse, side)), size)
            for side, pool in zip(_POOLS, self.pools, strict=True)
        ]
        levels = [self.bottleneck(torch.cat([coarse, *pooled], dim=1))]
        for lateral in reversed(fine):
            levels.insert(0, lateral + _resize(levels[0], lateral.shape[2:]))
        levels[:-1] = [out(x) for out, x in zip(self.outputs, levels[:-1], strict=True)]
        finest = levels[0].shape[2:]
        fused = self.fuse(torch.cat([_resize(level, finest) for level in levels], dim=1))
        logits: Tensor = self.classifier(fused)
        return logits


def _resize(x: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class Segmenter(DenseModel):
    """Images to a class for each pixel."""

    task: ClassVar[str] = "segment"

    def __init__(
        self,
        encoder: Any,
        settings: SegmentSettings,
        classes: list[str],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.encoder, self.frozen, self.classes = encoder, settings.freeze, classes
        self.mean, self.std, self.seed = mean, std, settings.seed
        linear = settings.head == "linear"
        layers = quarter_layers(len(encoder.blocks))
        self.layers = layers[-1:] if linear else layers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(settings.seed, "head"))
            self.head: nn.Module = (
                LinearHead(encoder.embed_dim, len(classes))
                if linear
                else UperHead(encoder.embed_dim, settings.width, settings.scales, len(classes))
            )

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised -> logits (B, K, H, W)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = layer_maps(self.encoder, images, self.layers)
        return _resize(self.head(maps), images.shape[2:])

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy over the pixels that count; 0 where none does."""
        assert isinstance(batch, MaskedBatch)
        device = next(self.parameters()).device
        self.draw_drop_paths(batch)
        images = to_device(batch.images, device)
        logits = self(normalize(images, self.mean, self.std))
        masks = to_device(batch.masks, device)
        summed = F.cross_entropy(logits.float(), masks, ignore_index=VOID, reduction="sum")
        return summed / (masks != VOID).sum().clamp(min=1)

    def counted(self, batch: Batch) -> int:
        """Pixels that count."""
        assert isinstance(batch, MaskedBatch)
        return int((batch.masks != VOID).sum())

    @torch.no_grad()
    def predict(self, images: Tensor, stride: float) -> Tensor:
        """Logits of a whole image by sliding windows.

        Args:
            images: (1, C, height, width), normalised; smaller than a window, it is padded.
            stride: step of the window over its side.

        Returns:
            (1, K, height, width).
        """
        window = self.encoder.patch_embed.img_size
        height, width = images.shape[2:]
        below, right = max(window[0] - height, 0), max(window[1] - width, 0)
        padded = F.pad(images, (0, right, 0, below))
        corners = [
            (top, left)
            for top in window_starts(padded.shape[2], window[0], stride)
            for left in window_starts(padded.shape[3], window[1], stride)
        ]
        total = padded.new_zeros(1, len(self.classes), *padded.shape[2:])
        count = padded.new_zeros(1, 1, *padded.shape[2:])
        for start in range(0, len(corners), _WINDOWS_AT_ONCE):
            part = corners[start : start + _WINDOWS_AT_ONCE]
            cut = [padded[0, :, t : t + window[0], x : x + window[1]] for t, x in part]
            for (top, left), logits in zip(part, self(torch.stack(cut)).float(), strict=True):
                place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
                total[place] += logits
                count[place] += 1
        return (total / count)[..., :height, :width]


def window_starts(length: int, window: int, stride: float) -> list[int]:
    """Where windows begin so that they cover ``length``; the last one ends there."""
    step = max(round(window * stride), 1)
    starts = list(range(0, length - window, step))
    return [*starts, length - window]


def intersection_over_union(confusion: Tensor) -> Tensor:
    """(K, K) counts, truth by prediction -> (K,) IoU, NaN for a class in neither."""
    hits = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return hits / union


def _confusion_metric(classes: int) -> Metric:
    from torchmetrics.classification import MulticlassConfusionMatrix  # slow to import

    return MulticlassConfusionMatrix(
        classes, ignore_index=VOID, validate_args=False, sync_on_compute=False
    )


@EVALUATIONS.register("segment", SegmentSettings)
class Segment(DenseEvaluation):
    """A label for each pixel; mIoU."""

    settings: SegmentSettings

    def measures(self) -> tuple[str, ...]:
        return ("miou", "pixel_accuracy", "class_accuracy", "image_miou")

    def open(self, split: Split) -> SegmentationSource:
        return open_segmentation(self.settings.spec, split)

    def build(self, encoder: Encoder) -> Segmenter:
        s, classes = self.settings, list(self.sources[0].classes)
        return Segmenter(encoder_at_size(encoder, s), s, classes, *statistics_of(encoder, s))

    def batches(
        self, model: Segmenter, source: SegmentationSource, data: DataConfig
    ) -> SegmentationBatches:
        s = self.settings
        return SegmentationBatches(source, data, s.seed, s.resize, s.scale, fill_of(model.mean))

    def labels(
        self,
        model: Segmenter,
        source: SegmentationSource,
        index: int,
        device: torch.device,
        precision: str = "fp32",
    ) -> tuple[Tensor, Tensor]:
        """Predicted and true labels of an image, (height, width) int64 each, at its own size."""
        image, mask = pair(source, index, len(model.mean))
        predicted = self.labels_of(model, image, device, precision, source.describe(index))
        return predicted, torch.from_numpy(np.array(mask)).long()

    @torch.no_grad()
    def labels_of(
        self,
        model: Segmenter,
        image: Picture,
        device: torch.device,
        precision: str = "fp32",
        called: str = "an image",
    ) -> Tensor:
        """Predicted labels of an image, (height, width) int64, at its own size."""
        model.eval()
        original = size_of(image)
        window: tuple[int, int] = model.encoder.patch_embed.img_size
        view = whole_view(original, base_factor(original, window, self.settings.resize))
        if math.prod(view.scaled) > DataConfig().max_pixels:
            reason = f"scales {called} of {original[0]} x {original[1]} pixels to "
            reason += f"{view.scaled[0]} x {view.scaled[1]}; leave it out"
            raise self.settings.error("resize", reason)
        pixels = to_device(stack_pixels([view.pixels(image, 0)]), device)
        with autocast(precision, device):
            logits = model.predict(normalize(pixels, model.mean, model.std), self.settings.stride)
        check_finite(logits, precision, "maps")
        return _resize(logits.float(), original).argmax(1)[0].cpu()

    def measure(
        self, model: Segmenter, source: SegmentationSource, accelerator: Accelerator, precision: str
    ) -> dict[str, float]:
        """miou, pixel_accuracy, class_accuracy (mean recall), iou_CLASS of each class there is, and
        image_miou, the mean over images of each one's own mIoU."""
        metric = _confusion_metric(len(model.classes))
        images = share_of(len(source), accelerator)
        own = torch.zeros(len(images), dtype=torch.float64)
        counts = torch.zeros(len(model.classes), len(model.classes), dtype=torch.int64)
        for place, index in enumerate(images):
            metric.reset()
            metric.update(*self.labels(model, source, index, accelerator.device, precision))
            found: Tensor = metric.compute()
            counts += found
            own[place] = intersection_over_union(found).nanmean()
        confusion = accelerator.reduce(counts.to(accelerator.device), "sum").cpu()
        each = intersection_over_union(confusion)
        recall = confusion.diagonal().double() / confusion.sum(1)
        numbers = {
            "miou": float(each.nanmean()),
            "pixel_accuracy": float(confusion.diagonal().sum() / confusion.sum()),
            "class_accuracy": float(recall.nanmean()),
        }
        for name, value in zip(model.classes, each.tolist(), strict=True):
            if not math.isnan(value):  # NaN: in neither truth nor prediction
                numbers[f"iou_{name}"] = value
        alone = gather_rows(own)
        numbers["image_miou"] = float(alone.nanmean())
        answers = {"image_miou": alone} if not alone.isnan().any() else {}
        return Measured(numbers, torch.as_tensor(source.sample_ids), answers)

    def draw(
        self,
        model: Segmenter,
        source: SegmentationSource,
        indices: list[int],
        device: torch.device,
        precision: str,
        path: Path,
    ) -> None:
        rows = []
        for index in indices:
            predicted, truth = self.labels(model, source, index, device, precision)
            image = shown(pair(source, index, len(model.mean))[0], source)
            rows.append((image, truth.numpy(), predicted.numpy()))
        segmentation_picture(rows, model.classes, path)
