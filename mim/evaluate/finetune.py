"""Fine-tuning: all of the encoder is trained with a linear head, by MAE's recipe.

The recipe is that of He et al. 2022 (https://arxiv.org/abs/2111.06377, table 9) for ViT-B, from
timm's parts. From an untrained encoder the same recipe is training from scratch.

What is drawn never depends on workers, processes, batches or what was drawn before. Crop, mirror,
RandAugment, erasing and drop path of an image follow from (seed, epoch, sample id): timm's
transforms read the global generators of random, numpy and torch, so these are seeded from the
image's key around each call and put back. Mixup and CutMix mix neighbours of a batch, by what
follows from (seed, step). Hence an interrupted run resumes bit for bit, and any number of
processes computes the same.

Shapes: B images, K classes, C channels, H x W pixels.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError
from timm.data import Mixup
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from mim.core.config import DataConfig, ModelConfig
from mim.core.device import to_device
from mim.core.errors import UserError, setting_error
from mim.core.fields import BelowOne, Between, Bound, NonNegative, Positive, Share
from mim.core.progress import note_once
from mim.core.rng import image_keys, random_bits, seed_of
from mim.data import (
    Batch,
    ImageSource,
    Picture,
    depth_of,
    eval_transform,
    normalize,
    open_source,
    read_picture,
)
from mim.evaluate.base import EVALUATIONS, EncoderEvaluation, build_evaluation
from mim.evaluate.drop_path import draws_of, key_drop_paths
from mim.evaluate.encoders import Encoder, open_encoder
from mim.evaluate.features import check_pool, check_precision
from mim.evaluate.predictions import Measured
from mim.evaluate.training import (
    MEASURES,
    ClassificationTask,
    Labelled,
    TrainedSettings,
    accuracies,
    augmented,
    check_learnable,
    class_count,
    global_batch,
    identity_of,
    measured,
    split,
    start_accelerator,
    state_file,
)
from mim.model.backbones import build_backbone, family_of, load_backbone
from mim.training.checkpoint import TASK, read_safetensors, save_encoder
from mim.training.runtime.precision import autocast
from mim.training.trainer import Loss

_HEAD_STD = 2e-5  # MAE's: the head begins almost at zero
# The norm stands before the pooling or behind it; the one a classifier has not is left out.
_NORMS = ("norm.", "fc_norm.")
FILE = "finetune.safetensors"
"""Name of the fine-tuned classifier in a run folder."""


RECIPES: dict[str, dict[str, Any]] = {
    "base": {"epochs": 100, "base_lr": 5e-4, "layer_decay": 0.65, "drop_path": 0.1},
    "large": {"epochs": 50, "base_lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.2},
    "huge": {"epochs": 50, "base_lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.3},
}
"""What MAE's fine-tuning changes with the size of the ViT (its FINETUNE.md)."""


def recipe_of(width: int) -> str:
    """The recipe for an encoder of a width: ViT-L's is 1024, ViT-H's 1280."""
    return "huge" if width >= 1280 else "large" if width >= 1024 else "base"


@dataclass(frozen=True)
class FinetuneSettings(TrainedSettings):
    """Settings of fine-tuning; the defaults are MAE's for ViT-B."""

    pool: Literal["mean", "cls"] = "mean"
    """What stands for an image: mean (of the patch tokens) or cls (the class token)."""
    recipe: Literal["auto", "base", "large", "huge"] = "auto"
    """Which of MAE's recipes gives epochs, base_lr, layer_decay and drop_path where these are not
    set: base, large, huge, or auto, by the encoder's width."""
    base_lr: Positive = 5e-4
    """Peak learning rate of the head for a batch of 256; scaled with the batch size."""
    min_lr: NonNegative = 1e-6
    """Where the half cosine ends."""
    weight_decay: NonNegative = 0.05
    """AdamW's; vectors, tokens and position embeddings have none."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW's."""
    layer_decay: Share = 0.65
    """Factor of the learning rate from each layer to the one before it; 1 is the same for all."""
    drop_path: BelowOne = 0.1
    """Stochastic depth of the last block; it grows linearly from 0 in the first."""
    mixup: NonNegative = 0.8
    """Alpha of Mixup; 0 is none. With CutMix too, each batch takes one of the two at random."""
    cutmix: NonNegative = 1.0
    """Alpha of CutMix; 0 is none."""
    smoothing: BelowOne = 0.1
    """Label smoothing."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of a RandAugment policy; empty is none. By default none for images of more than 8
    bits, and of other than 1 or 3 channels, which it cannot take."""
    erasing: Annotated[float, Bound(lambda p: 0 <= p <= 1, "must lie between 0 and 1")] = 0.25
    """Probability with which a rectangle of an image becomes noise (random erasing)."""
    ema: BelowOne = 0.0
    """Decay of an average of the weights that is measured in their stead; 0 is none."""
    low_shot: tuple[Between, ...] = ()
    """Shares of each class at which it is fine-tuned besides, by the same recipe: [0.01, 0.1]."""
    save: bool = True
    """Whether the classifier is written into the run folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rand_augment:
            try:
                rand_augment_transform(self.rand_augment, {})
            except (AssertionError, ValueError, KeyError, TypeError):
                reason = "is no policy of timm's, such as rand-m9-mstd0.5-inc1"
                raise self.error("rand_augment", reason) from None

    @classmethod
    def presets(cls, given: dict[str, Any], encoder: Encoder | None) -> dict[str, Any]:
        recipe = given.get("recipe", "auto")
        if recipe == "auto":
            vit = None if encoder is None else encoder.vit
            recipe = "base" if vit is None else recipe_of(family_of(vit).width)
        found = {**RECIPES.get(recipe, {}), "recipe": recipe}
        if encoder is not None and not _is_plain(encoder.data):
            found["rand_augment"] = ""
        return found


def _is_plain(data: DataConfig) -> bool:
    """Whether images are what RandAugment knows: of 8 bits, and 1 or 3 channels."""
    return data.channels in (1, 3) and data.measured.range is None


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
        if images.dtype != torch.uint8:
            raise UserError(
                "evaluations.finetune.rand_augment: takes 8-bit images alone, and these have more "
                'bits: set it to ""'
            )
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
    erasing = RandomErasing(probability, mode="pixel", device="cpu")
    rows, noise = [], []
    for row, bits in enumerate(random_bits(keys, 1)[:, 0].tolist() if probability > 0 else ()):
        # timm's own first draw; seeding three generators for nothing would cost more than all.
        if random.Random(bits).random() > probability:
            continue
        rows.append(row)
        noise.append(torch.full(images.shape[1:], math.nan, dtype=images.dtype))
        with _seeded(bits):
            erasing(noise[-1])
    if rows:  # all of them go to the device at once, which a copy for each would wait for
        drawn, place = (
            to_device(x, images.device) for x in (torch.stack(noise), torch.tensor(rows))
        )
        images.index_copy_(0, place, torch.where(drawn.isnan(), images[place], drawn))
    return images


def mix_images(
    images: Tensor, labels: Tensor, classes: int, settings: FinetuneSettings, step: int
) -> tuple[Tensor, Tensor]:
    """timm's Mixup or CutMix of a batch, and its smoothed labels.

    timm pairs the first image with the last; here each is paired with its neighbour, so that the
    pairs are the same however many processes share the batch.

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
    shape = {"label_smoothing": settings.smoothing, "num_classes": classes}
    mixing = Mixup(settings.mixup, settings.cutmix, **shape)
    place = torch.arange(len(images), device=images.device)
    order = torch.cat([place[::2], place[1::2].flip(0)])  # its mirror image pairs neighbours
    with _seeded(seed_of(settings.seed, "mixup", step)):
        mixed, targets = mixing(images[order], labels[order])
    back = order.argsort()
    return mixed[back], targets[back]


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
    arguments = encoder.model.backbone_args | family_of(encoder.vit).classifier_args(mean)
    trained = {**arguments, "drop_path_rate": settings.drop_path}
    model, data = replace(encoder.model, backbone_args=trained), encoder.data
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
    key_drop_paths(vit)
    return Classifier(vit, replace(model, backbone_args=arguments), data, pool=settings.pool)


def load_classifier(path: Path, encoder: Encoder, setting: str) -> Classifier:
    """The classifier of a file that :meth:`Classifier.save` wrote.

    Args:
        path: the file.
        encoder: how the ViT is built and what it reads; its weights are not used.
        setting: what messages call the file.

    Raises:
        UserError: if the file cannot be read, holds no classifier, or one of another encoder.
    """
    try:
        state, metadata = read_safetensors(path)
    except (OSError, SafetensorError) as error:
        raise setting_error(setting, str(path), f"cannot be read: {error}") from error
    if "classifier" not in metadata:
        task = metadata.get(TASK)
        reason = f"has the head of {task}" if task else "is an encoder without a head"
        raise setting_error(setting, str(path), f"{reason}; a fine-tuned classifier is needed")
    details = json.loads(metadata["classifier"])
    pool = details.get("pool", "mean")
    classes = list(details["classes"])
    classifier = build_classifier(encoder, len(classes), FinetuneSettings(pool=pool))
    load_backbone(classifier.model, state, f"{setting}: {path}")
    classifier.model.eval()
    classifier.classes = classes
    classifier.mean, classifier.std = tuple(details["mean"]), tuple(details["std"])
    classifier.numbers = dict(details.get("numbers", {}))
    return classifier


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
    pool: str = "mean"
    """What stands for an image: mean or cls."""
    numbers: dict[str, float] = field(default_factory=dict)
    """What was measured."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Training loss and held-out accuracy of each epoch."""

    def usage(self, path: str | Path) -> str:
        """Returns Python that loads the file at ``path`` with timm alone."""
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
        kept = ("classes", "mean", "std", "pool", "numbers")
        metadata = {
            "backbone": self.built.backbone,
            "usage": self.usage(path.name),
            "classifier": json.dumps({name: getattr(self, name) for name in kept}),
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
        pictures = [
            read_picture(
                image, str(image), self.data.max_pixels, self.data.decode, depth_of(self.data)
            )
            if isinstance(image, (str, Path))
            else image
            for image in images
        ]
        pixels = eval_transform(pictures, self.data)
        device = next(self.model.parameters()).device
        logits = self.model(normalize(to_device(pixels, device), self.mean, self.std))
        return [self.classes[index] for index in logits.argmax(1).tolist()]


class FinetuneTask(ClassificationTask):
    """The classifier, on the device, trained by MAE's recipe."""

    settings: FinetuneSettings

    def __init__(
        self,
        classifier: Classifier,
        settings: FinetuneSettings,
        train: ImageSource,
        data: DataConfig,
        accelerator: Accelerator,
        precision: str,
    ) -> None:
        s = settings
        augment = RandAugment(s.rand_augment, data.size, train.mean) if s.rand_augment else None
        super().__init__(classifier.model, s, train, data, accelerator, augment=augment, ema=s.ema)
        self.classes, self.precision = len(classifier.classes), precision
        self.drop_paths = draws_of(self.model)

    def targets(self, batch: Batch, images: Tensor) -> Labelled:
        s, device = self.settings, images.device
        draws = None
        if self.drop_paths is not None:
            draws = to_device(self.drop_paths.draw(batch, s.seed), device)
        keys = image_keys(s.seed, batch.epoch, batch.sample_ids, purpose="erase")
        assert batch.labels is not None
        images = erase(images, keys, s.erasing)
        labels = to_device(batch.labels, device)
        mixed, targets = mix_images(images, labels, self.classes, s, batch.step)
        return Labelled(mixed, targets, draws)

    def loss(self, learner: nn.Module, part: Labelled) -> Loss:
        if self.drop_paths is not None:
            self.drop_paths.values = part.draws
        return super().loss(learner, part)

    def logits(self, learner: nn.Module, images: Tensor) -> Tensor:
        with autocast(self.precision, images.device):
            logits: Tensor = learner(images)
        return logits[None].float()


def fit(
    encoder: Encoder,
    train: ImageSource,
    settings: FinetuneSettings,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    state: Path | None = None,
    val: ImageSource | None = None,
) -> Classifier:
    """Fine-tunes; the weights of the best epoch on the held-out part of ``train``.

    Args:
        encoder: with a ViT; it is not changed.
        train: labelled images.
        settings: the recipe.
        device: where it trains.
        precision: fp32, bf16 or fp16 (autocast).
        state: file from which an interrupted training resumes; None keeps none.
        val: labelled images on which the chosen epoch is measured, once.

    Raises:
        UserError: for an unknown precision, channels that RandAugment cannot have, a batch that
            does not divide among the processes, or a loss that is not finite.
        Interrupted: after a signal, where there is a state.
    """
    s = settings
    check_precision(precision)
    accelerator = start_accelerator(device)
    classes = class_count(train)
    classifier = build_classifier(encoder, classes, s)
    classifier.classes = list(train.classes) or [str(label) for label in range(classes)]
    classifier.mean, classifier.std = tuple(train.mean), tuple(train.std)
    classifier.model.to(accelerator.device)
    size = global_batch(s, len(split(train, s)[0]), accelerator.num_processes)
    data = augmented(encoder.data, s, size)
    if s.rand_augment and data.channels not in (1, 3):
        raise s.error("rand_augment", f"needs images of 1 or 3 channels, not {data.channels}")
    usual = RECIPES.get(s.recipe, {}).get("epochs", 0)
    if s.epochs * 4 < usual and accelerator.is_main_process:
        note_once(
            f"evaluations.finetune.epochs: {s.epochs} of the {usual} that this recipe is for; its "
            "mixing and slow layers (mixup, cutmix, layer_decay) hold back so short a training"
        )
    task = FinetuneTask(classifier, s, train, data, accelerator, precision)
    schedule = task.schedule(s.base_lr)
    groups, betas = parameter_groups(task.model, s), (s.betas[0], s.betas[1])
    best = task.choose(
        torch.optim.AdamW(groups, lr=schedule(0), betas=betas, fused=True),
        schedule,
        f"finetune {encoder.name}",
        state,
        identity_of(encoder, precision),
        torch.amp.GradScaler(accelerator.device.type) if precision == "fp16" else None,
    )
    classifier.numbers, classifier.history = best.numbers("accuracy"), best.history
    if val is not None:
        found = accuracies(task, classifier.model, val)
        classifier.numbers = measured(found, 0, classes, classifier.numbers)
    return classifier


@EVALUATIONS.register("finetune", FinetuneSettings)
class Finetune(EncoderEvaluation):
    """All of the encoder trained with a head, its best epoch chosen on a split of train."""

    settings: FinetuneSettings

    def measures(self) -> tuple[str, ...]:
        shares = ("", *(f"_of_{100 * share:g}_percent" for share in self.settings.low_shot))
        return tuple(name + share for share in shares for name in MEASURES)

    def check(self, train: ImageSource, val: ImageSource) -> None:
        super().check(train, val)
        check_learnable(train, val, self.settings)
        for share in self.settings.low_shot:
            check_learnable(train, val, replace(self.settings, fraction=share))

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
        """Also writes the classifier, to ``finetune.safetensors``.

        The names of low-shot numbers end in ``_of_1_percent``, with the share in per cent.
        """
        s = self.settings
        given: dict[str, Any] = {"device": device, "precision": precision}
        states = {
            share: state_file(folder, s, f"{s.name}_{share:g}")
            for share in (s.fraction, *s.low_shot)
        }
        classifier = self.classifier(encoder, train, val, **given, state=states[s.fraction])
        numbers = copy(classifier.numbers)
        assert isinstance(numbers, Measured)
        for share in s.low_shot:
            part = Finetune(replace(s, fraction=share, low_shot=()))
            found = part.classifier(encoder, train, val, **given, state=states[share]).numbers
            numbers.include(found, f"_of_{100 * share:g}_percent")
        main = start_accelerator(device).is_main_process
        if folder is not None and s.save and main:
            classifier.save(folder / FILE)
        for state in states.values():
            if state is not None and main:
                state.unlink(missing_ok=True)
        return numbers

    def classifier(
        self,
        encoder: Encoder,
        train: ImageSource,
        val: ImageSource,
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        state: Path | None = None,
    ) -> Classifier:
        """The fine-tuned classifier; ``val`` is used once, when its epoch has been chosen.

        Raises:
            UserError: see :meth:`check` and :func:`fit`.
        """
        check_pool(encoder.vit, self.settings.pool)
        self.check_encoder(encoder)
        self.check(train, val)
        # Its augmentation and its classifier are for images of one size.
        encoder = replace(encoder, data=encoder.data.as_square())
        return fit(encoder, train, self.settings, device, precision, state, val)


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
    build_evaluation("finetune", settings)  # a mistake is reported before weights are read
    encoder = run if isinstance(run, Encoder) else open_encoder(run)
    evaluation = build_evaluation("finetune", settings, encoder)
    assert isinstance(evaluation, Finetune)
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
