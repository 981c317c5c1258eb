"""Object detection, with masks where there are any: torchvision's Faster and Mask R-CNN on a ViT.

The ViT's last map becomes ViTDet's simple feature pyramid (Li et al. 2022,
https://arxiv.org/abs/2203.16527), on which torchvision's region proposals and heads stand;
attention stays global. Images are scaled until they fit into the encoder's size, in training times
a random scale (large-scale jitter), and padded. mAP is COCO's, by torchmetrics.

Shapes: B images, C channels, H x W pixels, n objects, D width of the encoder.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from mim.core.config import DataConfig
from mim.core.device import to_device
from mim.core.fields import Count, Positive, Span
from mim.core.rng import image_keys, seed_of
from mim.data import Batch
from mim.data.sources.base import Split
from mim.evaluate.base import EVALUATIONS
from mim.evaluate.dense.detection_data import (
    DetectionBatches,
    DetectionSource,
    DetectionSpec,
    ObjectBatch,
    Objects,
    coco_tools,
    open_detection,
    picture_of,
    whole_images,
)
from mim.evaluate.dense.pictures import detection_picture, shown
from mim.evaluate.dense.pyramid import Pyramid, layer_maps
from mim.evaluate.dense.training import (
    DenseEvaluation,
    DenseModel,
    DenseSettings,
    encoder_at_size,
    fill_of,
    share_of,
    statistics_of,
)
from mim.evaluate.dense.views import View
from mim.evaluate.features import check_finite
from mim.evaluate.predictions import Measured, gather_rows
from mim.model.backbones import patch_size_of
from mim.training.runtime.precision import autocast

if TYPE_CHECKING:
    from mim.evaluate.encoders import Encoder

_ASPECTS = (0.5, 1.0, 2.0)
_DRAWN_ABOVE = 0.5  # score of the predictions that pictures show


@dataclass(frozen=True)
class DetectSettings(DenseSettings):
    """Settings of detection."""

    source: str = "coco"
    """coco (JSON) or voc (XML); the layouts are those of COCO and Pascal VOC."""
    bad_boxes: Literal["refuse", "mend"] = "refuse"
    """What to do with boxes outside their image or without an area: refuse, or mend (cut them at
    the rim, leave out what has no area)."""
    masks: bool = True
    """Whether masks are learnt and measured too (Mask R-CNN), where every object has one."""
    anchor: Positive = 8.0
    """Side of the anchors over the pixels between two places of their map."""
    proposals: Count = 1000
    """Regions of an image that reach the second stage; twice as many in training."""
    samples: Count = 512
    """Regions of an image on which the second stage is trained."""
    lr: Positive = 2e-4
    """Peak learning rate of the head; half a cosine to 0. Not scaled with the batch."""
    scale: Span = (0.5, 1.5)
    """From and to of the random scale of a training image; at 1 it just fits into image_size."""

    @property
    def spec(self) -> DetectionSpec:
        """Where images and boxes come from."""
        return DetectionSpec(self.source, self.path, self.classes, self.bad_boxes)


class _Maps(nn.Module):
    """torchvision's backbone: images (B, C, H, W) -> named maps, the coarsest pooled once more."""

    def __init__(self, encoder: Any, settings: DetectSettings) -> None:
        super().__init__()
        self.encoder, self.frozen = encoder, settings.freeze
        self.out_channels = settings.width
        self.pyramid = Pyramid(encoder.embed_dim, settings.width, settings.scales)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            (last,) = layer_maps(self.encoder, images, [len(self.encoder.blocks) - 1])
        levels = self.pyramid([last] * len(self.pyramid.levels))
        levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return OrderedDict((str(number), level) for number, level in enumerate(levels))


class KeyedSampler:
    """Draws an image's regions by its key, and counts what it has drawn."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self.keys: list[int] = []
        self.positive, self.drawn = torch.zeros(()), torch.zeros(())

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """For each image which regions are positive, and which negative."""
        positive, negative = [], []
        for key, regions in zip(self.keys, matched, strict=True):
            torch.manual_seed(key)
            ones, others = self.plain([regions])
            positive += ones
            negative += others
        self.positive = torch.stack([one.sum() for one in positive]).sum().float()
        self.drawn = self.positive + torch.stack([one.sum() for one in negative]).sum()
        return positive, negative


class Detector(DenseModel):
    """Images to boxes, classes, scores and perhaps masks."""

    task: ClassVar[str] = "detect"

    def __init__(
        self,
        encoder: Any,
        settings: DetectSettings,
        classes: list[str],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        masks: bool,
    ) -> None:
        super().__init__()
        self.frozen, self.classes, self.masks = settings.freeze, classes, masks
        self.mean, self.seed = mean, settings.seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(settings.seed, "head"))
            self.network = _network(encoder, settings, len(classes), mean, std, masks)
        self.samplers = [KeyedSampler(part.fg_bg_sampler) for part in self._stages]
        for part, sampler in zip(self._stages, self.samplers, strict=True):
            part.fg_bg_sampler = sampler

    @property
    def _stages(self) -> tuple[Any, Any]:
        return self.network.rpn, self.network.roi_heads

    @property
    def encoder(self) -> Any:
        """The ViT within the network."""
        encoder: Any = self.network.backbone.encoder
        return encoder

    def loss(self, batch: Batch) -> Tensor:
        """The sum of torchvision's losses: proposals, classes, boxes and masks.

        Each is a mean over regions; with several processes over those of all of them.
        """
        assert isinstance(batch, ObjectBatch)
        device = next(self.parameters()).device
        self.draw_drop_paths(batch)
        for stage, sampler in enumerate(self.samplers):
            purpose = f"regions-{stage}"
            keys = image_keys(self.seed, batch.epoch, batch.sample_ids, purpose=purpose)
            sampler.keys = keys.tolist()
        images = list(_unit(to_device(batch.images, device)))
        targets = [
            {key: to_device(value, device) for key, value in t.items()} for t in batch.targets
        ]
        losses: dict[str, Tensor] = self.network(images, targets)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            losses = self._over_processes(losses)
        return torch.stack(list(losses.values())).sum()

    def _over_processes(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses whose mean over the processes is that over the regions of all of them."""
        proposals, regions = self.samplers
        counts = torch.stack([proposals.drawn, regions.drawn, regions.positive])
        total = counts.clone()
        dist.all_reduce(total)
        shares = counts * dist.get_world_size() / total.clamp(min=1)
        of = dict.fromkeys(losses, shares[1])
        of |= {"loss_objectness": shares[0], "loss_rpn_box_reg": shares[0], "loss_mask": shares[2]}
        return {name: loss * of[name] for name, loss in losses.items()}

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        """(B, C, H, W) as read -> for each image boxes (n, 4), labels (n,) from 1, scores (n,), and
        masks (n, 1, H, W) in [0, 1]."""
        device = next(self.parameters()).device
        found: list[dict[str, Tensor]] = self.network(list(_unit(to_device(images, device))))
        return found


def _unit(images: Tensor) -> Tensor:
    """Bytes, or float32 from 0 to 1, as the latter."""
    return images if images.is_floating_point() else images.float() / 255


def _network(
    encoder: Any,
    settings: DetectSettings,
    classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    masks: bool,
) -> Any:
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.ops import MultiScaleRoIAlign

    (height, width), channels = settings.size, settings.width
    steps = [patch_size_of(encoder)[0] / scale for scale in settings.scales]
    steps.append(2 * steps[-1])
    names = [str(number) for number in range(len(settings.scales))]
    hidden = 4 * channels  # torchvision's 1024 for 256
    arguments: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator(
            sizes=tuple((settings.anchor * step,) for step in steps),
            aspect_ratios=(_ASPECTS,) * len(steps),
        ),
        "box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        "rpn_post_nms_top_n_train": 2 * settings.proposals,
        "rpn_post_nms_top_n_test": settings.proposals,
        "box_batch_size_per_image": settings.samples,
        "box_head": TwoMLPHead(channels * 7 * 7, hidden),
        "box_predictor": FastRCNNPredictor(hidden, classes + 1),
        # Views have the encoder's size already; torchvision only normalises.
        "min_size": min(height, width),
        "max_size": max(height, width),
        "fixed_size": (width, height),
        "size_divisible": 1,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    if not masks:
        return FasterRCNN(_Maps(encoder, settings), **arguments)
    return MaskRCNN(
        _Maps(encoder, settings),
        mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes + 1),
        **arguments,
    )


def _original(found: dict[str, Tensor], view: View, size: tuple[int, int]) -> dict[str, Tensor]:
    """What was found in a view, in the image's own pixels, on the CPU; labels from 0."""
    result = {
        "boxes": view.original_boxes(found["boxes"].cpu(), size),
        "labels": found["labels"].cpu() - 1,
        "scores": found["scores"].cpu(),
    }
    if "masks" in found:
        rows, columns = view.kept
        kept = found["masks"][..., :rows, :columns].float()
        grown = kept.new_zeros(0, 1, *size)
        if len(kept):
            grown = F.interpolate(kept, size=size, mode="bilinear", align_corners=False)
        result["masks"] = (grown[:, 0] > 0.5).cpu()
    return result


@EVALUATIONS.register("detect", DetectSettings)
class Detect(DenseEvaluation):
    """Boxes around objects, and masks; COCO's mAP."""

    settings: DetectSettings

    def measures(self) -> tuple[str, ...]:
        names = (*_MEASURES, "image_map")
        return (*names, *(f"mask_{name}" for name in names if self.settings.masks))

    def open(self, split: Split) -> DetectionSource:
        coco_tools()
        source = open_detection(self.settings.spec, split)
        if not source.classes:
            raise self.settings.error("path", "has training images in which nothing is marked")
        return source

    def build(self, encoder: Encoder) -> Detector:
        s, (own, other) = self.settings, self.sources
        masks = s.masks and own.has_masks and other.has_masks
        mean, std = statistics_of(encoder, s)
        return Detector(encoder_at_size(encoder, s), s, list(own.classes), mean, std, masks)

    def batches(
        self, model: Detector, source: DetectionSource, data: DataConfig
    ) -> DetectionBatches:
        s = self.settings
        return DetectionBatches(source, data, s.seed, s.scale, fill_of(model.mean), model.masks)

    def data_numbers(self) -> dict[str, float]:
        mended = sum(source.mended for source in self.sources)
        return {"mended_boxes": float(mended)} if mended else {}

    @torch.no_grad()
    def predict(
        self,
        model: Detector,
        source: DetectionSource,
        indices: list[int],
        device: torch.device,
        precision: str = "fp32",
    ) -> list[dict[str, Tensor]]:
        """Boxes, labels from 0, scores and masks of images, in their own pixels."""
        model.eval()
        data = DataConfig(image_size=self.settings.size, channels=len(model.mean))
        images, views = whole_images(source, indices, data, fill_of(model.mean))

        def refuse(_: nn.Module, __: object, maps: dict[str, Tensor]) -> None:
            for values in maps.values():  # torchvision drops boxes that are not finite
                check_finite(values, precision, "maps")

        watch = model.network.backbone.register_forward_hook(refuse)
        with autocast(precision, device):
            found = model(images)
        watch.remove()
        return [
            _original(f, view, source.objects[index].size)
            for f, view, index in zip(found, views, indices, strict=True)
        ]

    def measure(
        self, model: Detector, source: DetectionSource, accelerator: Accelerator, precision: str
    ) -> dict[str, float]:
        """map (over IoU 0.5 to 0.95), map_50, map_75, those of the sizes that there are, mar_100,
        map_class_NAME, and image_map, the mean over images with objects of each one's own map; the
        same under ``mask_`` with masks."""
        from torchmetrics.detection import MeanAveragePrecision  # slow to import

        kinds: Any = ("bbox", "segm") if model.masks else ("bbox",)
        metric = MeanAveragePrecision(iou_type=kinds, class_metrics=True, sync_on_compute=False)
        alone = MeanAveragePrecision(iou_type=kinds, sync_on_compute=False)
        names, rows = _kinds(model.masks), list[list[float]]()
        share, size = share_of(len(source), accelerator), self.settings.batch_size
        for start in range(0, len(share), size):
            indices = list(share[start : start + size])
            found = self.predict(model, source, indices, accelerator.device, precision)
            truths = [_truth(source.objects[i], model.masks) for i in indices]
            metric.update(found, truths)
            for prediction, truth in zip(found, truths, strict=True):
                alone.reset()
                alone.update([prediction], [truth])
                image = alone.compute()
                rows.append([float(image[f"{theirs}map"]) for theirs in names])
        if accelerator.num_processes > 1:
            kept = {name: getattr(metric, name) for name in metric._defaults}
            states = gather_object([kept])
            for name in kept:
                setattr(metric, name, [value for state in states for value in state[name]])
            metric._update_count = 1  # those of a process without images came from the others
        numbers = _numbers(metric.compute(), model.classes, model.masks)
        own = gather_rows(torch.tensor(rows, dtype=torch.float64).reshape(-1, len(names)))
        told = own[:, 0] >= 0  # torchmetrics has -1 where there are no objects
        answers = {f"{ours}image_map": own[told, i] for i, ours in enumerate(names.values())}
        if not told.any():
            return numbers
        numbers |= {name: float(each.mean()) for name, each in answers.items()}
        ids = torch.as_tensor(source.sample_ids)
        return Measured(numbers, ids[told], answers)

    def draw(
        self,
        model: Detector,
        source: DetectionSource,
        indices: list[int],
        device: torch.device,
        precision: str,
        path: Path,
    ) -> None:
        rows = []
        found = self.predict(model, source, indices, device, precision)
        for index, prediction in zip(indices, found, strict=True):
            keep = prediction["scores"] >= _DRAWN_ABOVE
            kept = {key: value[keep].numpy() for key, value in prediction.items()}
            truth = _truth(source.objects[index], model.masks)
            image = shown(picture_of(source, index, len(model.mean)), source)
            rows.append((image, {key: value.numpy() for key, value in truth.items()}, kept))
        detection_picture(rows, model.classes, path)


def _truth(objects: Objects, masks: bool) -> dict[str, Tensor]:
    """The objects of an image, as torchmetrics reads them."""
    truth = {"boxes": objects.boxes, "labels": objects.labels, "iscrowd": objects.crowd.long()}
    return {**truth, "masks": objects.masks()} if masks else truth


_MEASURES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")


def _kinds(masks: bool) -> dict[str, str]:
    """torchmetrics' prefix of each kind of outline -> ours."""
    return {"bbox_": "", "segm_": "mask_"} if masks else {"": ""}


def _numbers(found: dict[str, Tensor], classes: list[str], masks: bool) -> dict[str, float]:
    """torchmetrics' results by plain names; what it marks by -1, having nothing, is left out."""
    numbers: dict[str, float] = {}
    for prefix, ours in _kinds(masks).items():
        for key in _MEASURES:
            value = float(found[f"{prefix}{key}"])
            if value >= 0 or key == "map":
                numbers[f"{ours}{key}"] = value
        each = found[f"{prefix}map_per_class"].reshape(-1).tolist()
        for label, value in zip(found["classes"].reshape(-1).tolist(), each, strict=True):
            if value >= 0:
                numbers[f"{ours}map_class_{classes[int(label)]}"] = value
    return numbers
