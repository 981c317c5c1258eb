"""Fine-tuning: all of the encoder is trained with a linear head, by MAE's recipe.

The recipe is that of He et al. 2022 (https://arxiv.org/abs/2111.06377, table 9) for ViT-B, from
timm's parts. From an untrained encoder the same recipe is training from scratch.

What is drawn never depends on workers, batches or what was drawn before. Crop, mirror, RandAugment
and erasing of an image follow from (seed, epoch, sample id): timm's transforms read the global
generators of random, numpy and torch, so these are seeded from the image's key around each call
and put back. Mixup and CutMix, which pair the images of a batch, and drop path follow from (seed,
step).

Shapes: B images, K classes, C channels, H x W pixels.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import Mixup
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mim.backbone import build_backbone, family_of
from mim.checkpoint import save_encoder
from mim.config import DataConfig, ModelConfig
from mim.data import (
    ImageSource,
    Picture,
    Subset,
    eval_loader,
    eval_transform,
    normalize,
    open_source,
    train_loader,
)
from mim.errors import UserError, choice_error, setting_error
from mim.evaluate.base import (
    EVALUATIONS,
    EncoderEvaluation,
    EvaluationSettings,
    build_evaluation,
    holdout,
    low_shot,
)
from mim.evaluate.encoders import Encoder, open_encoder
from mim.evaluate.features import AUTOCAST, check_pool
from mim.keys import image_keys, random_bits, seed_of
from mim.optim import Schedule
from mim.progress import RunProgress

_HEAD_STD = 2e-5  # MAE's: the head begins almost at zero
_TOP = 5
# The norm stands before the pooling or behind it; the one a classifier has not is left out.
_NORMS = ("norm.", "fc_norm.")
FILE = "finetune.safetensors"
"""Name of the fine-tuned classifier in a run folder."""


@dataclass(frozen=True)
class FinetuneSettings(EvaluationSettings):
    """Settings of fine-tuning; the defaults are MAE's for ViT-B."""

    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 128
    """Images a step; fewer, and an even number, where there are fewer training images."""
    base_lr: float = 5e-4
    """Peak learning rate of the head for a batch of 256; scaled with the batch size."""
    min_lr: float = 1e-6
    """Where the half cosine ends."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up, at most half of all."""
    weight_decay: float = 0.05
    """AdamW's; vectors, tokens and position embeddings have none."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """AdamW's."""
    layer_decay: float = 0.65
    """Factor of the learning rate from each layer to the one before it; 1 is the same for all."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; it grows linearly from 0 in the first."""
    mixup: float = 0.8
    """Alpha of Mixup; 0 is none. With CutMix too, each batch takes one of the two at random."""
    cutmix: float = 1.0
    """Alpha of CutMix; 0 is none."""
    smoothing: float = 0.1
    """Label smoothing."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of a RandAugment policy; empty is none."""
    erasing: float = 0.25
    """Probability with which a rectangle of an image becomes noise (random erasing)."""
    crop_scale: tuple[float, ...] = (0.08, 1.0)
    """Share of the image's area a random crop covers, from and to; mirrored as data.flip says."""
    ema: float = 0.0
    """Decay of an average of the weights that is measured in their stead; 0 is none."""
    held_out: float = 0.1
    """Share of each class of the training images on which the best epoch is chosen."""
    fraction: float = 1.0
    """Share of each class of the training images that is used at all (low-shot: 0.1, 0.01)."""
    save: bool = True
    """Whether the classifier is written into the run folder."""

    name: ClassVar[str] = "finetune"

    def __post_init__(self) -> None:
        if self.pool == "both":
            raise choice_error("evaluations.finetune.pool", self.pool, ("mean", "cls"))
        super().__post_init__()
        self._positive("epochs", self.epochs)
        self._positive("base_lr", self.base_lr)
        if self.batch_size < 2:
            self._refuse("batch_size", "must be at least 2")
        for setting in ("min_lr", "warmup_epochs", "weight_decay", "mixup", "cutmix"):
            if not getattr(self, setting) >= 0:
                self._refuse(setting, "must not be below 0")
        for setting in ("layer_decay", "fraction"):
            if not 0 < getattr(self, setting) <= 1:
                self._refuse(setting, "must be above 0 and at most 1")
        for setting in ("drop_path", "smoothing", "ema"):
            if not 0 <= getattr(self, setting) < 1:
                self._refuse(setting, "must be at least 0 and below 1")
        if not 0 <= self.erasing <= 1:
            self._refuse("erasing", "must lie between 0 and 1")
        if not 0 < self.held_out < 1:
            self._refuse("held_out", "must lie between 0 and 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            self._refuse("betas", "must be two numbers, at least 0 and below 1")
        scale = self.crop_scale
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            self._refuse("crop_scale", "must be 0 < from <= to <= 1")
        if self.rand_augment:
            try:
                rand_augment_transform(self.rand_augment, {})
            except (AssertionError, ValueError, KeyError, TypeError):
                self._refuse("rand_augment", "is no policy of timm's, such as rand-m9-mstd0.5-inc1")

    def _refuse(self, setting: str, reason: str) -> None:
        raise setting_error(f"evaluations.finetune.{setting}", getattr(self, setting), reason)


@contextmanager
def _seeded(bits: int) -> Iterator[None]:
    """The global generators that timm's transforms read, from ``bits``; put back afterwards."""
    python, array = random.getstate(), np.random.get_state()
    random.seed(bits)
    np.random.seed(bits & 0xFFFFFFFF)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(bits)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def _posterize(image: Image.Image, bits: int, **arguments: Any) -> Image.Image:
    """timm asks for 0 bits at its strongest, which Pillow refuses."""
    posterized: Image.Image = posterize(image, max(bits, 1), **arguments)
    return posterized


class RandAugment:
    """timm's RandAugment of a batch of cut images, each by its key; pickles for loader workers.

    Args:
        policy: timm's name of it.
        size: (height, width) of the images.
        mean: of each channel on the scale 0 to 1; fills what an image is moved away from.
    """

    def __init__(self, policy: str, size: tuple[int, int], mean: Sequence[float]) -> None:
        fill = tuple(min(255, round(255 * value)) for value in mean)
        hparams = {
            "translate_const": int(min(size) * 0.45),
            "img_mean": fill if len(fill) == 3 else fill[0],
            "interpolation": Image.Resampling.BICUBIC,
        }
        self.transform = rand_augment_transform(policy, hparams)
        for op in self.transform.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """(B, C, H, W) uint8 and (B,) int64 -> (B, C, H, W) uint8, C of 1 or 3."""
        result = torch.empty_like(images)
        for row, bits in enumerate(random_bits(keys, 1, stream=1)[:, 0].tolist()):
            pixels = images[row].permute(1, 2, 0).numpy()  # (H, W, C)
            image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
            with _seeded(bits):
                image = self.transform(image)
            changed = np.array(image)  # (H, W) or (H, W, C)
            result[row] = torch.from_numpy(changed.reshape(pixels.shape)).permute(2, 0, 1)
        return result


def erase(images: Tensor, keys: Tensor, probability: float) -> Tensor:
    """timm's random erasing with noise, each image by its key.

    Args:
        images: (B, C, H, W) normalised; changed in place.
        keys: (B,) int64.
        probability: of an image to have a rectangle erased.

    Returns:
        ``images``.
    """
    if probability > 0:
        erasing = RandomErasing(probability, mode="pixel", device="cpu")
        for image, bits in zip(images, random_bits(keys, 1)[:, 0].tolist(), strict=True):
            with _seeded(bits):
                erasing(image)
    return images


def mix(
    images: Tensor, labels: Tensor, classes: int, settings: FinetuneSettings, step: int
) -> tuple[Tensor, Tensor]:
    """timm's Mixup or CutMix of a batch, and its smoothed labels.

    Args:
        images: (B, C, H, W), B even; may be changed in place.
        labels: (B,) int64.
        classes: K.
        settings: mixup, cutmix, smoothing and seed are read.
        step: from which, with the seed, follows what is drawn.

    Returns:
        images, and labels (B, K) that sum to 1.
    """
    if settings.mixup == settings.cutmix == 0:
        return images, mixup_target(labels, classes, 1.0, settings.smoothing)
    mixing = Mixup(
        settings.mixup,
        settings.cutmix,
        label_smoothing=settings.smoothing,
        num_classes=classes,
    )
    with _seeded(seed_of(settings.seed, "mixup", step)):
        mixed, targets = mixing(images, labels)
    return mixed, targets


def parameter_groups(model: Any, settings: FinetuneSettings) -> list[dict[str, Any]]:
    """AdamW's groups by layer, with ``lr_scale`` and ``weight_decay`` of each (BEiT, MAE).

    With L blocks, ``lr_scale`` is ``layer_decay`` to the power L + 1 for embeddings and tokens,
    L - i for block i counted from 0, and 0 for the head and the norm behind the pooling; a norm
    before the pooling goes with the last block.
    """
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        model,
        weight_decay=settings.weight_decay,
        no_weight_decay_list=model.no_weight_decay(),
        layer_decay=settings.layer_decay,
    )
    return groups


def build_classifier(encoder: Encoder, classes: int, settings: FinetuneSettings) -> Classifier:
    """The encoder with a head, every weight trainable; the encoder itself is not touched.

    With ``pool: mean`` a new norm behind the pooling takes the place of the encoder's last one, as
    in MAE. The head begins near zero.

    Args:
        encoder: with a ViT.
        classes: K.
        settings: pool, drop_path and seed are read.

    Raises:
        UserError: if the encoder does not say how it was built.
    """
    if encoder.vit is None or encoder.model is None:
        raise UserError(f"evaluation finetune: how {encoder.name} was built is not known")
    mean = settings.pool == "mean"
    arguments = {
        **encoder.model.backbone_args,
        **family_of(encoder.vit).classifier_args(mean),
    }
    model = replace(
        encoder.model, backbone_args={**arguments, "drop_path_rate": settings.drop_path}
    )
    data = encoder.data
    vit: Any = build_backbone(model, data.size, data.channels, settings.seed)
    own, given = vit.state_dict(), encoder.vit.state_dict()
    odd = [k for k in {*own} ^ {*given} if not k.startswith(_NORMS)]
    if odd:
        raise UserError(
            f"evaluation finetune: {encoder.name} and its classifier differ in {odd[0]}"
        )
    vit.load_state_dict({**own, **{k: v for k, v in given.items() if k in own}})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(settings.seed, "head"))
        vit.reset_classifier(classes)
        head = vit.get_classifier()
        assert isinstance(head, nn.Linear)
        nn.init.trunc_normal_(head.weight, std=_HEAD_STD)
        nn.init.zeros_(head.bias)
    vit.requires_grad_(True)
    return Classifier(vit, replace(model, backbone_args=arguments), data)


@dataclass(eq=False)
class Classifier:
    """A fine-tuned encoder with its head, and how it reads images."""

    model: Any
    """timm's model; ``model(images)`` gives (B, K) logits of normalised images."""
    built: ModelConfig
    """Its name and arguments in timm."""
    data: DataConfig
    """Size and channels of the images it reads."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes, in the order of the logits."""
    mean: tuple[float, ...] = ()
    """Mean of each channel, by which images are normalised."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel, likewise."""
    numbers: dict[str, float] = field(default_factory=dict)
    """What was measured."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Training loss and held-out accuracy of each epoch."""

    def usage(self, path: str | Path) -> str:
        """Python that loads the file at ``path`` with timm alone."""
        arguments = {
            "num_classes": self.model.num_classes,
            "img_size": self.data.image_size,
            "in_chans": self.data.channels,
            **self.built.backbone_args,
        }
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        first = "import timm\n"
        if self.built.norm_eps is not None:
            first = (
                "from functools import partial\n\nimport timm\nfrom timm.layers import LayerNorm\n"
            )
            given += f", norm_layer=partial(LayerNorm, eps={self.built.norm_eps!r})"
        name = self.built.backbone
        return f"{first}\ntimm.create_model({name!r}, checkpoint_path={str(path)!r}, {given})"

    def save(self, path: str | Path) -> Path:
        """Writes safetensors with timm's keys; the file says what the classes are called."""
        path = Path(path)
        details = {"classes": self.classes, "mean": self.mean, "std": self.std}
        metadata = {
            "backbone": self.built.backbone,
            "usage": self.usage(path.name),
            "classifier": json.dumps({**details, "numbers": self.numbers}),
        }
        save_encoder(path, self.model.state_dict(), metadata)
        return path

    @torch.inference_mode()
    def predict(self, images: Sequence[Picture | str | Path]) -> list[str]:
        """The class of each image, by name.

        Args:
            images: PIL images, (height, width, channels) uint8 arrays, or paths.

        Raises:
            UserError: if a file cannot be read.
        """
        pictures = [_open(i) if isinstance(i, (str, Path)) else i for i in images]
        pixels = eval_transform(pictures, self.data)
        device = next(self.model.parameters()).device
        logits = self.model(normalize(pixels.to(device), self.mean, self.std))
        return [self.classes[index] for index in logits.argmax(1).tolist()]


def _open(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    return image


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    dtype = AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@torch.no_grad()
def _logits(
    model: nn.Module, source: ImageSource, data: DataConfig, device: torch.device, precision: str
) -> tuple[Tensor, Tensor]:
    """(n, K) float32 and labels (n,) on the CPU, of every readable image in order."""
    model.eval()
    parts, labels = [], []
    for batch in eval_loader(source, data):
        images = normalize(batch.images.to(device), source.mean, source.std)
        with _autocast(device, precision):
            parts.append(model(images).float().cpu())
        labels.append(torch.as_tensor(batch.labels).long())
    return torch.cat(parts), torch.cat(labels)


def _labels(source: ImageSource) -> Tensor:
    assert source.labels is not None  # see check
    return torch.as_tensor(source.labels).long()


def _accuracy(logits: Tensor, labels: Tensor, top: int = 1) -> float:
    hits = (logits.topk(top, dim=1).indices == labels[:, None]).any(1)
    return float(hits.double().mean())


def _split(train: ImageSource, settings: FinetuneSettings) -> tuple[Tensor, Tensor]:
    """Positions of the images to fit, and of those on which the epoch is chosen."""
    ids, labels = torch.as_tensor(train.sample_ids), _labels(train)
    used = torch.arange(len(ids))
    if settings.fraction < 1:
        used = low_shot(ids, labels, settings.fraction, settings.seed)
    held = holdout(ids[used], labels[used], settings.seed, settings.held_out)
    return used[~held], used[held]


def fit(
    encoder: Encoder,
    train: ImageSource,
    settings: FinetuneSettings,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> Classifier:
    """Fine-tunes; the weights of the best epoch on the held-out part of ``train``.

    Args:
        encoder: with a ViT; it is not changed.
        train: labelled images.
        settings: the recipe.
        device: where it trains.
        precision: fp32, bf16 or fp16 (autocast).

    Raises:
        UserError: for an unknown precision, channels that RandAugment cannot have, or a loss that
            is not finite.
    """
    if precision not in AUTOCAST:
        raise choice_error("precision", precision, AUTOCAST)
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        return _fit(encoder, train, settings, device, precision)


def _fit(
    encoder: Encoder,
    train: ImageSource,
    settings: FinetuneSettings,
    device: torch.device,
    precision: str,
) -> Classifier:
    s = settings
    fit_on, held = (Subset(train, part) for part in _split(train, s))
    classes = max(len(train.classes), int(_labels(train).max()) + 1)
    classifier = build_classifier(encoder, classes, s)
    classifier.classes = list(train.classes) or [str(label) for label in range(classes)]
    classifier.mean, classifier.std = tuple(train.mean), tuple(train.std)
    model = classifier.model.to(device)
    ema = ModelEmaV3(model, decay=s.ema) if s.ema else None
    subject = model if ema is None else ema.module

    size = min(s.batch_size, len(fit_on)) // 2 * 2  # mixing pairs the images of a batch
    scale = (s.crop_scale[0], s.crop_scale[1])
    data = replace(encoder.data, batch_size=size, augment="mae", crop_scale=scale)
    augment = RandAugment(s.rand_augment, data.size, train.mean) if s.rand_augment else None
    if augment is not None and data.channels not in (1, 3):
        s._refuse("rand_augment", f"needs images of 1 or 3 channels, not {data.channels}")
    per_epoch = len(fit_on) // size
    total = s.epochs * per_epoch
    warmup = min(s.warmup_epochs * per_epoch, total / 2)
    schedule = Schedule(s.base_lr * size / 256, s.min_lr, warmup, total)
    groups = parameter_groups(model, s)
    optimizer = torch.optim.AdamW(
        groups, lr=schedule(0), betas=(s.betas[0], s.betas[1]), fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    criterion = SoftTargetCrossEntropy()
    batches = train_loader(fit_on, data, s.seed, start_step=0, total_steps=total, augment=augment)

    best, best_accuracy = copy.deepcopy(subject.state_dict()), -1.0
    losses: list[Tensor] = []
    began, label = time.monotonic(), f"finetune {encoder.name}"
    with RunProgress(label, total) as progress:
        model.train()
        for batch in batches:
            lr = schedule(batch.step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            images = normalize(batch.images.to(device), train.mean, train.std)
            keys = image_keys(s.seed, batch.epoch, batch.sample_ids, purpose="erase")
            images = erase(images, keys, s.erasing)
            assert batch.labels is not None
            images, targets = mix(images, batch.labels.to(device), classes, s, batch.step)
            torch.manual_seed(seed_of(s.seed, "step", batch.step))  # for drop path
            with _autocast(device, precision):
                logits = model(images)
            loss = criterion(logits.float(), targets)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if ema is not None:
                ema.update(model)
            losses.append(loss.detach())
            if (batch.step + 1) % per_epoch:
                continue
            mean = float(torch.stack(losses).mean())
            losses.clear()
            if not math.isfinite(mean):
                s._refuse("base_lr", f"gives a loss of {mean} in epoch {batch.epoch + 1}; lower it")
            accuracy = _accuracy(*_logits(subject, held, data, device, precision))
            classifier.history.append({"train_loss": mean, "held_out_accuracy": accuracy})
            if accuracy > best_accuracy:
                best, best_accuracy = copy.deepcopy(subject.state_dict()), accuracy
                classifier.numbers = {
                    "train_loss": mean,
                    "chosen_epoch": float(batch.epoch + 1),
                    "chosen_accuracy": accuracy,
                }
            model.train()
            rate = (batch.step + 1) * size / (time.monotonic() - began)
            progress.update(batch.step + 1, mean, rate)
    model.load_state_dict(best)
    model.eval()
    return classifier


@EVALUATIONS.register("finetune")
class Finetune(EncoderEvaluation):
    """All of the encoder trained with a head, its best epoch chosen on a split of train."""

    Settings = FinetuneSettings
    settings: FinetuneSettings

    def check(self, train: ImageSource, val: ImageSource) -> None:
        """See :meth:`AnyEvaluation.check`.

        Raises:
            UserError: also if train has one class only or too few images to choose an epoch on, or
                val a class that train has not.
        """
        super().check(train, val)
        s = self.settings
        present = _labels(train).unique()
        if len(present) < 2:
            raise UserError(
                f"evaluation finetune needs at least 2 classes; train has {len(present)}"
            )
        unknown = [k for k in _labels(val).unique().tolist() if k not in present.tolist()]
        if unknown:
            name = repr(val.classes[unknown[0]]) if val.classes else unknown[0]
            raise UserError(f"evaluation finetune: class {name} is in val but not in train")
        parts = _split(train, s)
        if len(parts[1]) == 0:
            reason = f"of each class holds none of the {len(parts[0])} training images out"
            raise setting_error("evaluations.finetune.held_out", s.held_out, reason)
        if len(parts[0]) < 2:
            reason = f"leaves {len(parts[0])} training images; at least 2 are needed"
            raise setting_error("evaluations.finetune.held_out", s.held_out, reason)

    def run(
        self,
        encoder: Encoder,
        train: ImageSource,
        val: ImageSource,
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        folder: Path | None = None,
    ) -> dict[str, float]:
        """See :meth:`EncoderEvaluation.run`; the classifier goes to ``finetune.safetensors``."""
        classifier = self.classifier(encoder, train, val, device=device, precision=precision)
        if folder is not None and self.settings.save:
            classifier.save(folder / FILE)
        return classifier.numbers

    def classifier(
        self,
        encoder: Encoder,
        train: ImageSource,
        val: ImageSource,
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
    ) -> Classifier:
        """The fine-tuned classifier; ``val`` is asked once, when its epoch has been chosen.

        Raises:
            UserError: see :meth:`check` and :func:`fit`.
        """
        check_pool(encoder.vit, self.settings.pool)
        self.check_encoder(encoder)
        self.check(train, val)
        classifier = fit(encoder, train, self.settings, device, precision)
        logits, labels = _logits(
            classifier.model, val, encoder.data, torch.device(device), precision
        )
        found = {"accuracy": _accuracy(logits, labels)}
        if logits.shape[1] > _TOP:
            found[f"accuracy_top{_TOP}"] = _accuracy(logits, labels, _TOP)
        classifier.numbers = {**found, **classifier.numbers}
        return classifier


def finetune(
    run: str | Path | Encoder,
    data: str | Path | DataConfig | None = None,
    *,
    output: str | Path | None = None,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    **settings: Any,
) -> Classifier:
    """From labelled images to a fine-tuned classifier.

    Args:
        run: a run folder, or what else :func:`mim.evaluate.open_encoder` takes without a config
            (``untrained:RUN`` trains from scratch), or an encoder.
        data: folder of images in one folder a class, divided or not (see the source
            ``imagefolder``), or where other images come from; by default the run's own. Images are
            read at the encoder's size, in its channels.
        output: file for the classifier, safetensors for ``timm.create_model``.
        device: by default cuda where there is one.
        precision: fp32, bf16 or fp16 (autocast).
        **settings: fields of :class:`FinetuneSettings`.

    Returns:
        The classifier: ``.model`` is timm's, ``.numbers`` what was measured, ``.predict(images)``
        names classes, and ``.usage(path)`` is the Python that loads the file.

    Raises:
        UserError: for a mistake in any of these.
    """
    evaluation = build_evaluation("finetune", settings)
    assert isinstance(evaluation, Finetune)
    encoder = run if isinstance(run, Encoder) else open_encoder(run)
    if isinstance(data, (str, Path)):
        encoder = replace(encoder, data=replace(encoder.data, source="imagefolder", path=str(data)))
    elif data is not None:
        own = encoder.data
        read = replace(data, image_size=own.image_size, channels=own.channels)
        encoder = replace(encoder, data=read)
    if output is not None and not Path(output).parent.is_dir():
        raise setting_error("output", str(output), "lies in a folder that does not exist")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    train, val = open_source(encoder.data, "train"), open_source(encoder.data, "val")
    classifier = evaluation.classifier(encoder, train, val, device=device, precision=precision)
    if output is not None:
        classifier.save(output)
    return classifier
