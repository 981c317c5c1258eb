"""Features of another encoder as target: a frozen timm model, or the encoder's moving average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.core.config import ModelConfig
from mim.core.errors import UserError, setting_error
from mim.core.fields import Count, NonNegative, Settings
from mim.core.rng import seed_of
from mim.model.backbones import build_backbone, family_of, grid_of, load_weights
from mim.model.targets.base import TARGETS, Target, TargetContext
from mim.model.teacher import Teacher
from mim.model.terms import Forward


def _normalized(tokens: Tensor) -> Tensor:
    """Layer norm without weights, in float32 at least."""
    tokens = tokens.float() if tokens.dtype.itemsize < 4 else tokens
    return F.layer_norm(tokens, tokens.shape[-1:])


def _instance_normalized(tokens: Tensor) -> Tensor:
    """Normalise each channel of (B, N, D) over the tokens, without weights, in float32 at least."""
    tokens = tokens.float() if tokens.dtype.itemsize < 4 else tokens
    return F.instance_norm(tokens.transpose(1, 2)).transpose(1, 2)


def _weights_file(checkpoint: str) -> Path:
    path = Path(checkpoint)
    if not path.is_dir():
        return path
    file = path / "encoder.safetensors"
    if not file.is_file():
        reason = "holds no encoder.safetensors: it is no run folder, or its run has not ended"
        raise setting_error("model.target.features.checkpoint", checkpoint, reason)
    return file


@dataclass(frozen=True)
class FeaturesSettings(Settings):
    """Features of a frozen timm model. Without weights to load it is random, and the same always.

    It reads the images as the data settings normalise them: give data.mean and data.std the
    values it was trained with.
    """

    backbone: str = "vit_tiny_patch16_224"
    """Name of a timm VisionTransformer; its grid must be that of model.backbone."""
    backbone_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the timm model, as model.backbone_args."""
    checkpoint: str | None = None
    """Its weights: a file of timm or MAE, or a run folder whose run has ended."""
    pretrained: bool = False
    """Whether timm downloads the weights of that name instead."""
    layer: int = -1
    """The block whose output counts, from 0; negative ones count from the last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained and self.checkpoint is not None:
            reason = "cannot be combined with model.target.features.checkpoint: choose one"
            raise self.error("pretrained", reason)


@TARGETS.register("features", FeaturesSettings)
class FrozenFeatures(Target):
    """Patch tokens of a frozen timm model, layer-normalised without weights.

    As MaskFeat's features of trained models (arXiv:2112.09133) and their many successors; the
    layer norm without weights and the smooth L1 loss are those of data2vec (arXiv:2202.03555).
    The output of a block is taken before the model's final norm, whose first half this is for
    the last block. The teacher sees the full image as the student's data settings normalise it.

    Its weights are no part of this module's parameters or state dict: an optimizer cannot see
    them and a checkpoint does not hold them. Without weights to load they are random and the same
    in every run: a baseline that tells what the teacher's training is worth.
    """

    own_loss = "smooth_l1"

    settings: FeaturesSettings

    def __init__(self, settings: FeaturesSettings, context: TargetContext) -> None:
        super().__init__(settings, context)
        place = settings.where
        vit = build_backbone(
            ModelConfig(settings.backbone, settings.backbone_args),
            context.image_size,
            context.channels,
            seed_of(0, "teacher"),  # another one than a student's of the same shape
            setting=place,
            pretrained=settings.pretrained,
        )
        if grid_of(vit) != context.grid:
            theirs, ours = (" x ".join(map(str, grid)) for grid in (grid_of(vit), context.grid))
            reason = f"has a grid of {theirs} patches where model.backbone has {ours}: "
            reason += "the patch sizes must agree"
            raise setting_error(f"{place}.backbone", settings.backbone, reason)
        family = family_of(vit)
        if not family.is_uniform:
            reason = f"is a {family.kind}, whose blocks differ in width; choose a ViT"
            raise setting_error(f"{place}.backbone", settings.backbone, reason)
        depth = len(family.blocks)
        if not -depth <= settings.layer < depth:
            reason = f"must lie between {-depth} and {depth - 1}, for {depth} blocks"
            raise setting_error(f"{place}.layer", settings.layer, reason)
        if settings.checkpoint is not None:
            try:
                load_weights(vit, _weights_file(settings.checkpoint), settings.backbone)
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
        self._layer = settings.layer % depth
        # In a tuple, torch does not see that it is a module.
        self._teacher: tuple[Any] = (vit.eval().requires_grad_(False),)
        self.dim = family.width

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenFeatures:
        """Move the frozen model along with this module."""
        self._teacher[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, images: Tensor, teacher: Teacher | None = None) -> Tensor:
        blocks = self._teacher[0].forward_intermediates(
            images,
            indices=[self._layer],
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return _normalized(cast(list[Tensor], blocks)[0])  # (B, N, D)


@dataclass(frozen=True)
class EmaFeaturesSettings(Settings):
    """Features of the encoder's own moving average (data2vec)."""

    top: Count | None = None
    """How many of the last blocks are averaged; by default half of the depth, as data2vec's 6 of
    12 for images."""
    normalize_mean: bool = True
    """Whether their mean is layer-normalised too, as data2vec does for images."""
    layers: Literal["block", "mlp", "output"] = "block"
    """What counts: block (the output of a block), mlp (its MLP's output before it is added, as in
    data2vec 2.0) or output (the encoder's, after the final norm with its weights, as in I-JEPA; of
    one block alone)."""
    normalize: Literal["layer", "instance"] = "layer"
    """How each is normalised: layer (each token over its channels) or instance (each channel over
    the tokens of an image, as in data2vec 2.0)."""
    class_weight: NonNegative = 0.0
    """Weight of the term class_token: the distance between the encoder's class token and the mean
    of the target over all patches, a mean over images. data2vec 2.0's cls_loss of 0.01 is summed
    over the masked images of a GPU, 256 of them for ViT-B, and so is 2.56 here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers == "output" and self.top not in (None, 1):
            raise self.error("top", f"must be 1 with {self.where}.layers=output")


@TARGETS.register("ema_features", EmaFeaturesSettings)
class EmaFeatures(Target):
    """The mean of the teacher's last blocks, each normalised (data2vec, arXiv:2202.03555).

    Patch tokens of the full image after each of the last ``model.target.ema_features.top``
    blocks. Each token is layer-normalised without weights before the mean, so that no block rules
    by its norm, and the mean is normalised too where ``normalize_mean`` is set. data2vec's code
    for images does both; for speech it normalises over time instead. ``layers: mlp`` with
    ``normalize: instance`` is the target of data2vec 2.0 (arXiv:2212.07525), with all but the first
    two blocks of 12, and ``mse``; its blocks have the norm behind the residual, timm's before.
    ``layers: output`` is I-JEPA's (arXiv:2301.08243).
    """

    needs_teacher = True
    own_loss = "smooth_l1"

    settings: EmaFeaturesSettings

    def __init__(self, settings: EmaFeaturesSettings, context: TargetContext) -> None:
        super().__init__(settings, context)
        top, depth = settings.top, context.depth
        if top is not None and top > depth:
            reason = f"is more than the {depth} blocks of model.backbone"
            raise setting_error("model.target.ema_features.top", top, reason)
        self.top = max(1, depth // 2) if top is None else top
        if settings.layers == "output":
            self.top = 1
        self.dim = context.width
        self.needs_mlps = settings.layers == "mlp"
        if settings.class_weight and not context.has_class_token:
            reason = "needs a backbone with a class token"
            raise settings.error("class_weight", reason)
        self._class_target: Tensor | None = None

    @torch.no_grad()
    def forward(self, images: Tensor, teacher: Teacher | None = None) -> Tensor:
        if teacher is None:
            raise ValueError("the target ema_features must be given a teacher")
        if self.settings.layers == "output":
            layers = [teacher.output(images)]
        else:
            layers = teacher.mlp_outputs(images) if self.needs_mlps else teacher.layers(images)
        norm = _normalized if self.settings.normalize == "layer" else _instance_normalized
        each = [norm(tokens) for tokens in layers[-self.top :]]  # (B, N, D)
        target = torch.stack(each).mean(dim=0)
        if self.settings.normalize_mean:
            target = _normalized(target)
        if self.training and self.settings.class_weight:
            self._class_target = target.mean(dim=1)  # (B, D)
        return target

    def terms(self, forward: Forward) -> dict[str, Tensor]:
        if not self.settings.class_weight:
            return {}
        assert self._class_target is not None
        wanted, self._class_target = self._class_target, None
        tokens = forward.latents.prefix[:, 0]  # (B R, D), R masks of each image
        wanted = wanted.repeat_interleave(len(tokens) // len(wanted), dim=0)
        distance = self.distance(tokens, wanted)  # (B R,)
        return {"class_token": distance * self.settings.class_weight}
