"""The settings that no component owns, as frozen dataclasses that check themselves.

Values that only one component uses stand in a block named after it (``model.regime.zero.at``),
which its registration adds to the block of its kind (:class:`ComponentSettings`): a comparison can
vary ``model.regime.name`` and keep each regime's settings beside it. What needs other modules to
check (a timm model, a grid) is checked by ``mim.model.check_config``, which ``mim.load_config`` and
the CLI call before anything runs.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mim import moved
from mim.core.errors import setting_error
from mim.core.fields import (
    BelowOne,
    Between,
    Bound,
    Count,
    Natural,
    NonNegative,
    Positive,
    Settings,
    Share,
    Span,
    SpanToOne,
    build,
)
from mim.core.plugins import import_plugin
from mim.core.schedule import CourseSettings, ScheduleSettings, remaining
from mim.core.settings import to_dict

FREE = {"free": True}
"""Metadata of what may change when a run resumes: it changes nothing that is computed, but for
rounding and, as another number of processes does, dropout."""


def __getattr__(name: str) -> Any:
    return moved.attribute(__name__, name)


class ComponentSettings(Settings):
    """Base of the blocks to which components add the blocks of their own settings."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Another process may know fewer plug-ins; what nobody uses does not travel.
        return build, (type(self), to_dict(self))


@dataclass(frozen=True)
class SubsetConfig(Settings, where="data.subset"):
    """Which of a source's images; what is chosen is written into the run folder."""

    list: str | None = None
    """Classes by name or WordNet id: a text file, one a line, or imagenet-100, imagenette,
    imagewoof. Train and val."""
    classes: Count | None = None
    """Number of classes, drawn by key; a smaller choice is part of a larger. Train and val."""
    per_class: Count | None = None
    """Training images of each class, drawn by key; a smaller choice is part of a larger."""
    fraction: Share | None = None
    """Share of the training images of each class, drawn by key; a smaller one is inside a larger
    one, and each class keeps at least one."""
    files: str | None = None
    """Text file that names the training images, one a line, by path or file name: SimCLR's lists
    of 1 % and 10 % of ImageNet have this form."""

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = [n for n in ("per_class", "fraction", "files") if getattr(self, n) is not None]
        if len(chosen) > 1:
            reason = f"cannot be combined with data.subset.{chosen[0]}: choose one"
            raise self.error(chosen[1], reason)

    @property
    def chooses(self) -> bool:
        """Whether anything is left out."""
        return self != SubsetConfig()


_ABOVE_ZERO = Bound(lambda values: min(values, default=1.0) > 0, "must be above 0")

_CROPPED_FROM = 128  # pixels a side, by default

STREAMED = ("shards", "huggingface")
"""The sources that can be read in place by URL."""


@dataclass(frozen=True)
class MixConfig(Settings, where="data.mix"):
    """One source of a mixture."""

    source: str
    """As data.source."""
    path: str | None = None
    """As data.path."""
    val_path: str | None = None
    """As data.val_path."""
    weight: Positive = 1.0
    """How often an image is drawn from it, in ratio to the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source == "mixed":
            raise self.error("source", "cannot be one of the sources mixed")


@dataclass(frozen=True)
class MeasuredConfig(Settings, where="data.measured"):
    """What was found by looking at the training images; a run writes it into its config."""

    source: str | None = None
    """What data.source=auto saw."""
    range: tuple[float, float] | None = None
    """What data.range=auto found, of images of more than 8 bits; none where there are none."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel on the scale 0 to 1; none where data.stats measures nothing."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel likewise."""


_ORDERED = Bound(lambda pair: pair[0] < pair[1], "must be from low to high")
Range = Annotated[tuple[float, float], _ORDERED]


@dataclass(frozen=True)
class DataConfig(ComponentSettings, where="data"):
    """Which images, and how they reach the model."""

    source: str = "photos"
    """Where images come from: an embedded set (digits, mnist5k, photos), imagefolder, flat
    (unlabelled images), shards (tar files), huggingface, packed, mixed (several), torchvision/NAME,
    or auto: what data.path holds says which."""
    path: str | None = field(default=None, metadata=FREE)
    """Folder of the images (imagefolder, flat: holds train/ and optionally val/) or of the download
    (torchvision: by default ~/.cache/mim/torchvision); shards: a file, folder, pattern such as
    train-{000..146}.tar, or URL; huggingface: parquet files likewise, or a name on the hub."""
    val_path: str | None = field(default=None, metadata=FREE)
    """Shards or parquet files of the val images, where data.path names training ones alone."""
    streaming: bool = False
    """Whether files by URL are read in place by range requests instead of being fetched first:
    shards an image at a time, in the same order; parquet files of huggingface, on disk too, a row
    group at a time, in the order of data.huggingface.pool. Resume is exact. Files of a server that
    answers no range requests are fetched."""
    download: bool = field(default=True, metadata=FREE)
    """Whether a torchvision data set may be downloaded."""
    image_size: Count | tuple[Count, Count] = 224
    """Side of the square images in pixels, or (height, width)."""
    aspect: Literal["square", "keep"] = "square"
    """square (all images become image_size), or keep: each keeps its aspect ratio and is
    made smaller to at most max_patches patches, never larger. A training crop then has the image's
    own proportions, crop_ratio is not used, and image_size is where a ViT's position embeddings are
    learned, from which those of each image's grid are interpolated."""
    max_patches: Count = 256
    """With aspect keep: the most patches an image may have."""
    batching: Literal["padded", "packed"] = "padded"
    """How images of different sizes share a batch: padded to the longest, or packed (some images in
    one sequence, none reads another). The numbers are the same."""
    channels: Count = 3
    """Channels of an image: 1 converts to grayscale, 3 to RGB."""
    range: Range | Literal["auto", "percentile", "window", "high_byte"] = field(
        default="auto", metadata={"before": "high_byte"}
    )
    """Which values of images of more than 8 bits become 0 and 1; they stay float32, and what lies
    outside is cut off: [low, high]; auto (low and high that hold every value of the training
    images looked at: 0 to 4095 for 12 bits); percentile (of each image, the 0.5th to the 99.5th);
    window (of each DICOM file); high_byte (the upper 8 bits alone, as before). 8-bit images are
    always 0 to 255."""
    pages: Literal["first", "channels", "images"] = "first"
    """Of a file of several pages (TIFF, DICOM): the first, all as channels, or each as an image of
    its own (imagefolder, flat)."""
    nonfinite: float | None = None
    """Value, in the unit of the pixels, that stands in for NaN and infinity; by default an image
    with such pixels is unreadable."""
    batch_size: Count = 256
    """Images a step, over all processes and accumulated parts."""
    workers: Natural = field(default=0, metadata=FREE)
    """Loader processes of each training process; 0 loads in the training process."""
    augment: Literal["mae", "padded_crop", "none"] = "mae"
    """Training augmentation: mae (random resized crop, flip), padded_crop (resized to cover the
    size, data.pad reflected pixels on each side, a random crop, flip: PixMIM, DeiT III) or none
    (as in evaluations)."""
    crop_scale: SpanToOne = (0.2, 1.0)
    """Share of the image's area a random crop covers, from and to."""
    crop_ratio: Span = (0.75, 4 / 3)
    """Width over height of a random crop, from and to."""
    crop_fit: Literal["redraw", "clamp"] = "redraw"
    """What becomes of a random crop that is larger than its image: it is drawn again, ten times at
    most (torchvision), or its sides are cut to the image's (MAE's linear probe)."""
    pad: Natural = 4
    """With augment padded_crop: reflected pixels on each side."""
    color_jitter: BelowOne = 0.0
    """Largest change of brightness, contrast and saturation as a share, before the crop: each
    becomes 1 - x to 1 + x times as much, in a random order (BEiT: 0.4). Needs 3 channels."""
    eval_crop: Share | None = field(default=None, metadata={"before": 1.0})
    """How evaluations, online ones too, cut an image of data.aspect square: it is resized until it
    covers the size divided by this share, and its centre is taken. 0.875 (224 of 256) is that of
    the published protocols, 1.0 leaves the shorter side whole. By default 0.875 from 128 pixels a
    side and 1.0 below, where images are mostly stored at the size they are used at. The held-out
    loss reads whole images."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """What resizes images, antialiased: bicubic, or bilinear (SimMIM)."""
    flip: bool = True
    """Whether half the images are mirrored left to right."""
    decode: Literal["auto", "pil", "torchvision", "nvjpeg"] = "auto"
    """What decodes JPEG: torchvision (libjpeg-turbo, straight to an array), pil, nvjpeg (on a GPU)
    or auto, the fastest that gives PIL's very pixels: torchvision, PIL for odd files."""
    resize: Literal["auto", "pil", "torch"] = "auto"
    """Whose antialiased bicubic resizes: pil, torch (several times as fast, rounds otherwise) or
    auto: pil for results of less than 128 pixels a side, else torch."""
    cache: Literal["none", "memory", "mmap", "device"] = field(default="none", metadata=FREE)
    """Where decoded images are kept, uint8 at their own size: none, memory (shared with the loader
    processes), mmap (a memory-mapped file that later runs find again) or device (on the
    accelerator, where whole batches are cut, resized and mirrored; images of one size). Batches
    are the same bytes in all four."""
    cache_path: str | None = field(default=None, metadata=FREE)
    """Folder of mmap caches; by default ~/.cache/mim/decoded."""
    index_cache: bool = field(default=True, metadata=FREE)
    """Whether the list of a folder with many images (imagefolder, flat) is kept in ~/.cache/mim (or
    $MIM_CACHE) for later runs, which list it again only if a folder in it has changed."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel on the scale 0 to 1; by default the source's own."""
    std: Annotated[tuple[float, ...], _ABOVE_ZERO] | None = None
    """Standard deviation of each channel on the scale 0 to 1; by default the source's own."""
    stats: Literal["auto", "source", "measured"] = "auto"
    """Where mean and std come from, unless they are given: source (its own; of folders ImageNet's),
    measured (once, on up to 1,024 training images), or auto: measured for images of more than 8
    bits and for channels other than 1 and 3."""
    measured: MeasuredConfig = field(default_factory=MeasuredConfig, metadata=FREE)
    """What range, stats and source found; a run writes it into its config."""
    show: tuple[Natural, Natural, Natural] | None = field(default=None, metadata=FREE)
    """Which channels, from 0, pictures show as red, green and blue; by default the first three."""
    val_fraction: Between = 0.1
    """Share of the images held out where the source has no val split of its own."""
    val_from_train: Between | None = None
    """Share of the chosen training images that stands in for val, drawn by key: what is chosen on
    it has not seen the val images, which are then not opened."""
    mix: tuple[MixConfig, ...] = ()
    """The sources of data.source=mixed, each with source, path, val_path and weight."""
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    """Which of the source's images."""
    fingerprint: str | None = field(default=None, metadata=FREE)
    """Digest of the source, ids and labels of all images; a run writes it into its config, and a
    run that starts from such a config refuses other images. null takes what is there."""
    max_unreadable: BelowOne | None = field(default=None, metadata=FREE)
    """Share of the images that may be unreadable: each is named in unreadable.txt in the run folder
    and another stands in for it. More stop the run. By default 0.001, or 3 images where that is
    more, but no more than a tenth."""
    max_pixels: Count = 89_478_485
    """Larger images count as unreadable: a small file can decode to more than the memory."""
    weights: str | None = None
    """How much each training image counts in the loss, 0 leaves it out: a .csv with the columns
    image and weight, an .npy indexed by sample id, or the name of a function that a plug-in
    registers. Held-out images count alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batching == "packed" and self.aspect == "square":
            reason = "needs data.aspect=keep: images of one size have no padding"
            raise self.error("batching", reason)
        if self.decode == "nvjpeg" and self.workers:
            raise self.error("decode", "needs data.workers=0: loader processes have no GPU")
        if self.color_jitter and (self.channels != 3 or self.cache == "device"):
            raise self.error(
                "color_jitter", "needs data.channels=3 and data.cache other than device"
            )
        if self.keeps_aspect and (self.augment == "padded_crop" or self.color_jitter):
            name = "color_jitter" if self.color_jitter else "augment"
            raise self.error(name, "needs data.aspect=square")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.channels:
                reason = f"must have {self.channels} values, one for each of data.channels"
                raise self.error(name, reason)
        if self.show is not None and max(self.show) >= self.channels:
            raise self.error("show", f"must be below {self.channels}, which are data.channels")
        if self.streaming and self.source not in (*STREAMED, "mixed", "auto"):
            reason = f"needs data.source={', '.join(STREAMED)}, mixed or auto, not {self.source}"
            raise self.error("streaming", reason)
        if self.mix and self.source != "mixed":
            raise setting_error("data.mix", [m.source for m in self.mix], "needs data.source=mixed")

    @property
    def keeps_aspect(self) -> bool:
        """Whether images of different sizes share a batch."""
        return self.aspect == "keep"

    @property
    def eval_share(self) -> float:
        """What share of an image's shorter side evaluations see."""
        if self.eval_crop is not None:
            return self.eval_crop
        return 0.875 if min(self.size) >= _CROPPED_FROM else 1.0

    def as_square(self) -> DataConfig:
        """The same with all images of ``image_size``, for what takes images of one size only."""
        return replace(self, aspect="square", batching="padded")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size


_RATIO = "must lie between 0 and 1; (from, to) must satisfy 0 < from <= to < 1"
Ratio = (
    Annotated[float, Bound(lambda ratio: 0 < ratio < 1, _RATIO)]
    | Annotated[tuple[float, float], Bound(lambda pair: 0 < pair[0] <= pair[1] < 1, _RATIO)]
)


def _range(ratio: Ratio) -> tuple[float, float]:
    if isinstance(ratio, (int, float)):
        return float(ratio), float(ratio)
    return ratio


@dataclass(frozen=True)
class MaskScheduleConfig(CourseSettings, where="mask.schedule"):
    """A mask ratio that moves from ``mask.ratio`` to another one, epoch by epoch."""

    to: Ratio | None = None
    """Where the ratio ends, or (from, to) to draw one for each image; none does not move it."""
    epochs: Count | None = None
    """The epoch, counted from 0, in which the end is reached; the ratio then stays. Needed with
    ``to``."""
    shape: Literal["linear", "cosine", "multistep"] = "linear"
    """How it moves: linear, cosine, or multistep (times ``factor`` at each of the ``milestones``,
    in epochs)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to is not None and self.shape == "multistep":
            raise self.error("to", "does not go with mask.schedule.shape=multistep")
        if self.to is not None and self.epochs is None:
            reason = "is needed with mask.schedule.to: the epoch in which the end is reached"
            raise self.error("epochs", reason)


@dataclass(frozen=True)
class MaskConfig(ComponentSettings, where="mask"):
    """Which patches are hidden."""

    name: str = "random"
    """The mask generator."""
    ratio: Ratio = 0.75
    """Share of the patches that is hidden, or (from, to) to draw one for each image."""
    rounding: Literal["nearest", "ceil", "floor_visible"] = "nearest"
    """How that becomes a number of patches: nearest (halves up), ceil (SimMIM rounds the hidden
    ones up) or floor_visible (MAE rounds the visible ones down)."""
    repeats: Count = 1
    """Masks of an image in a step of training (data2vec 2.0: 16). The encoder runs once for each, a
    teacher once for all; the loss is their mean."""
    unmasked: BelowOne = 0.0
    """Share of the images, drawn in each epoch, that training leaves unmasked; where only masked
    patches count, their loss is 0."""

    schedule: MaskScheduleConfig = field(default_factory=MaskScheduleConfig)
    """A ratio that moves over training."""

    @property
    def ratio_range(self) -> tuple[float, float]:
        """(lowest, highest) share of hidden patches; the same twice where the ratio is fixed."""
        return _range(self.ratio)

    def ratio_at(self, epoch: int) -> tuple[float, float]:
        """:attr:`ratio_range` in an epoch; below epoch 0 it has not moved yet."""
        moved, (low, high) = self.schedule, self.ratio_range
        if moved.shape == "multistep":
            factor = moved.factor ** bisect_right(moved.milestones, epoch)
            return low * factor, high * factor
        if moved.to is None or moved.epochs is None or epoch <= 0:
            return low, high
        progress = 1 - remaining(moved.shape, epoch / moved.epochs, moved.phase)
        end = _range(moved.to)
        return low + (end[0] - low) * progress, high + (end[1] - high) * progress

    def all_ratios(self) -> list[tuple[str, float]]:
        """(setting, ratio) of the ends of every range, between which all ratios lie."""
        ratios = [("mask.ratio", ratio) for ratio in self.ratio_range]
        if self.schedule.to is not None:
            ratios += [("mask.schedule.to", ratio) for ratio in _range(self.schedule.to)]
        if self.schedule.milestones:
            last = self.ratio_at(math.ceil(self.schedule.milestones[-1]))
            ratios += [("mask.schedule.factor", ratio) for ratio in last]
        return ratios


@dataclass(frozen=True)
class RegimeConfig(ComponentSettings, where="model.regime"):
    """How hidden patches meet the encoder."""

    name: str = "drop"
    """drop (MAE), zero (zero and attend mask) or token (SimMIM)."""
    order: Literal["bidirectional", "causal"] = "bidirectional"
    """Who reads whom in the encoder, in pre-training: bidirectional, or causal (a patch reads
    itself and the patches before it, row by row, as in autoregressive image models)."""
    causal_prefix: Natural = 0
    """With order causal: how many first patches of the grid read each other in both directions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.causal_prefix and self.order != "causal":
            raise self.error("causal_prefix", "needs model.regime.order=causal")


@dataclass(frozen=True)
class DecoderConfig(ComponentSettings, where="model.decoder"):
    """What predicts the hidden patches."""

    name: str = "transformer"
    """transformer (MAE), cross_attention (CrossMAE), rotary (CAPI), convolutional (data2vec 2.0),
    linear (SimMIM) or mlp; the last two need a regime that keeps every token."""


@dataclass(frozen=True)
class TargetConfig(ComponentSettings, where="model.target"):
    """What must be predicted."""

    name: str = "normalized_pixels"
    """normalized_pixels (each patch to mean 0, variance 1), pixels, low_pass, frequency (cosine
    transform), hog (histograms of oriented gradients), features (of a frozen timm model),
    ema_features (of the encoder's moving average), clusters (CAPI's, learnt online) or codes (of a
    codebook given as a file)."""
    loss: Literal["auto", "mse", "l1", "smooth_l1", "cosine"] = "auto"
    """Distance between prediction and target: auto (smooth_l1 for features, cross-entropy for
    clusters and codes, mse for the rest), mse, l1, smooth_l1 or cosine."""
    smooth_l1_beta: Positive = 2.0
    """Where smooth_l1 turns from a square into a line; 2.0 is data2vec's for images."""
    loss_on: Literal["masked", "all"] = "masked"
    """Which patches count: masked or all."""


@dataclass(frozen=True)
class TeacherSchedule(ScheduleSettings, where="model.teacher_schedule"):
    """How the teacher's decay moves from ``model.teacher_decay``."""


@dataclass(frozen=True)
class ModelConfig(Settings, where="model"):
    """Encoder, regime, decoder and target."""

    backbone: str = "vit_tiny_patch16_224"
    """Name of a timm model: a VisionTransformer, an Eva (EVA-02, RoPE-ViT, DINOv3), a Beit or
    VisionTransformerRelPos, a Swin (v1 or v2: token) or a Hiera (drop or token)."""
    backbone_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the timm model: patch_size, embed_dim, depth, num_heads, reg_tokens, ... timm's
    own defaults hold for the rest, such as a Swin's drop_path_rate of 0.1."""
    weights: str | None = field(default=None, metadata=FREE)
    """What the encoder starts from, and a decoder of the same size: a file of weights (of MAE,
    timm, DeiT, DINOv2, SimMIM or Hugging Face), a timm name such as vit_base_patch16_224.mae, or
    USER/NAME on the hub. In a comparison it is the encoder alone, for every run."""
    position_embedding: Literal["learned", "sincos2d"] = "learned"
    """learned, or sincos2d: fixed 2-D sine and cosine, as MAE's."""
    init: Literal["timm", "mae"] = "timm"
    """Initial weights of the encoder: timm's own, or mae: linear layers and the patch embedding,
    as a linear map, Xavier uniform; class and register tokens normal with deviation 0.02; biases of
    linear layers 0, layer norms 1 and 0. Decoders of blocks are always so initialised."""
    norm_eps: Positive | None = None
    """Epsilon of every layer norm; by default the backbone's own, mostly 1e-6."""
    regime: RegimeConfig = field(default_factory=RegimeConfig)
    """How hidden patches meet the encoder."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """What predicts the hidden patches."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """What must be predicted."""
    teacher_decay: BelowOne = 0.999
    """Decay of the EMA teacher that the generator attention and the targets ema_features and
    clusters read."""
    teacher_schedule: TeacherSchedule = field(default_factory=TeacherSchedule)
    """How that decay moves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("to", "warmup_from"):
            value = getattr(self.teacher_schedule, name)
            if value is not None and value > 1:
                raise self.teacher_schedule.error(name, "must be at most 1")


_RATES = Bound(lambda rates: all(0 <= rate < 1 for rate in rates), "must each lie in [0, 1)")


@dataclass(frozen=True)
class RateSchedule(ScheduleSettings, where="optim.schedule"):
    """How the learning rate moves from its peak, by step; ``to`` and ``warmup_from`` are absolute
    rates."""

    shape: Literal["constant", "linear", "cosine", "multistep"] = "cosine"
    """constant, linear, cosine (half a period) or multistep (times ``factor`` at each of the
    ``milestones``)."""
    to: NonNegative | None = None
    """Where linear, cosine and a cool-down end; by default at optim.min_lr."""
    warmup: NonNegative | None = None
    """How long the rate first rises, in a line; by default optim.warmup_epochs. At most a half of
    training."""

    def fills_in(self, name: str) -> bool:
        return True


@dataclass(frozen=True)
class DecaySchedule(ScheduleSettings, where="optim.decay_schedule"):
    """How the weight decay moves from ``optim.weight_decay``, by step."""


@dataclass(frozen=True)
class ScaleConfig(Settings, where="optim.scales"):
    """Multipliers of some parameters."""

    names: str
    """Pattern of their names in the model, with ``*`` and ``?``: ``backbone.patch_embed.*``."""
    lr: NonNegative = 1.0
    """Multiplies the learning rate."""
    decay: NonNegative | None = None
    """Multiplies optim.weight_decay, for parameters that else have none too; none leaves what they
    have."""


@dataclass(frozen=True)
class OptimConfig(Settings, where="optim"):
    """AdamW with MAE's parameter groups; warm-up, then a half cosine, by step."""

    base_lr: Positive = 1.5e-4
    """Learning rate at a batch of 256 images; scaled by data.batch_size / 256."""
    min_lr: NonNegative = 0.0
    """Where the cosine ends, as an absolute rate."""
    warmup_epochs: NonNegative = 40.0
    """Epochs of linear warm-up; may be fractional. At most a half of the run."""
    weight_decay: NonNegative = 0.05
    """Decay of matrices; vectors, biases, tokens (but see decay_tokens) and position embeddings
    have none."""
    betas: Annotated[tuple[float, float], _RATES] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    clip_grad: Positive | None = None
    """Largest norm of the gradient; none does not clip."""
    schedule: RateSchedule = field(default_factory=RateSchedule)
    """How the learning rate moves."""
    decay_schedule: DecaySchedule = field(default_factory=DecaySchedule)
    """How the weight decay moves."""
    scales: tuple[ScaleConfig, ...] = ()
    """Multipliers of rate and decay by names of parameters; of two that fit, the later holds."""
    decay_tokens: bool = False
    """Whether class, register and mask tokens decay too, as in MAE."""


@dataclass(frozen=True)
class TrainConfig(Settings, where="train"):
    """Length, precision and bookkeeping of a run."""

    epochs: Count = 800
    """Passes over the training images; the learning-rate schedule spans them."""
    max_steps: Count | None = None
    """Bound for short runs: the most steps of the run and its schedule."""
    device: str = field(default="auto", metadata=FREE)
    """Where to compute: auto (a GPU where there is one), cpu, cuda, cuda:1 or mps. Each of several
    processes takes a GPU of its own."""
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """fp32, bf16 or fp16 (autocast), or fp8: as bf16, but the blocks' linear layers multiply in
    float8, by torchao (``pip install -e '.[float8]'``); a CPU emulates that."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """What weights are kept in: fp32, or bf16, with gradients and first moments (12 bytes a weight
    instead of 16). What rounding takes from a small update is stored as well."""
    attention: Literal["auto", "fused", "plain"] = "auto"
    """fused (one operation), plain (products and a softmax), or auto: the faster by measurement,
    which is plain on a CPU in bf16 and fused elsewhere."""
    linear: Literal["auto", "torch", "onednn"] = field(default="auto", metadata=FREE)
    """Which library computes linear layers in fp32 on a CPU: torch (its own choice, MKL), onednn,
    or auto: the faster by measurement, which is onednn on x86 processors with AVX-512 that are not
    Intel's. The same numbers up to rounding."""
    compile: bool = field(default=False, metadata=FREE)
    """Whether the model runs under torch.compile."""
    accumulate: Count = field(default=1, metadata=FREE)
    """Parts a process cuts its share of a batch into, to save memory."""
    gradient_checkpointing: bool = False
    """Whether encoder blocks are computed again in the backward pass, to save memory."""
    ema_decay: Between | None = None
    """Decay of an exponential moving average of the weights; none keeps no average."""
    log_every: Count = field(default=10, metadata=FREE)
    """Steps between two lines of metrics.jsonl; a line holds the mean loss since the last."""
    validate_every: NonNegative = 1.0
    """Epochs between two held-out losses; 0 measures only at the end."""
    picture_every: NonNegative = field(default=0.0, metadata=FREE)
    """Epochs between two reconstruction pictures; 0 draws only at the end."""
    checkpoint_every: Positive = field(default=1.0, metadata=FREE)
    """Epochs between two checkpoints; one is always written at the end."""
    keep_checkpoints: Count = field(default=2, metadata=FREE)
    """How many of the newest checkpoints are kept."""
    milestone_every: NonNegative = field(default=0.0, metadata=FREE)
    """Epochs between two checkpoints that are kept for ever; 0 keeps none so."""
    deterministic: bool = field(default=False, metadata=FREE)
    """Whether torch may use deterministic operations alone: slower on a GPU, and one that has no
    such form there ends the run with its name. On the CPU runs repeat bit for bit in any case."""
    async_save: bool = field(default=False, metadata=FREE)
    """Whether a checkpoint is copied to host memory, which must have room for it, and written while
    training continues; the next one waits for it, and so do a signal and the end of the run."""
    on_nonfinite: Literal["stop", "skip"] = field(default="stop", metadata=FREE)
    """What a step does whose loss or gradient is not finite, and which therefore never reaches the
    weights: stop the run, or skip (the next batch follows)."""
    max_nonfinite: Count = field(default=5, metadata=FREE)
    """With skip: the number of such steps in a row that stops the run."""
    spike_deviations: NonNegative = field(default=10.0, metadata=FREE)
    """Robust standard deviations above the median of the last 100 steps from which on a loss is
    reported, and counted in metrics.jsonl; 0 reports none."""
    shard: bool = field(default=False, metadata=FREE)
    """With more than one process: whether each keeps only a part of weights, gradients and moments,
    but for the step itself (FSDP2); the numbers are the same, and so are the files."""
    hooks: tuple[str, ...] = field(default=(), metadata=FREE)
    """Names of hooks that plug-ins register, run after those of mim in this order."""
    timeout: Positive = field(default=600.0, metadata=FREE)
    """With more than one process: seconds that one waits for the others before the run ends and
    names the missing one. Must exceed the longest time one works alone, as for a checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights == "bf16" and self.precision not in ("bf16", "fp8"):
            reason = f"needs train.precision bf16 or fp8, and that is {self.precision!r}"
            raise self.error("weights", reason)
        if self.shard and self.ema_decay is not None:
            raise self.error("shard", "does not work with train.ema_decay")
        if self.shard and self.precision == "fp16":
            raise self.error("shard", "does not work with fp16; choose bf16 or fp32")


@dataclass(frozen=True)
class OnlineProbeConfig(Settings, where="online_probe"):
    """A linear probe on full images that learns during pre-training and does not touch it."""

    enabled: bool = False
    """Whether there is one; it costs a forward pass of the full images in each step, and writes
    online_loss and online_accuracy, and at each held-out loss online_val_accuracy."""
    lr: Positive = 1e-3
    """Learning rate of its AdamW."""


@dataclass(frozen=True)
class LogConfig(Settings, where="log"):
    """Where curves go besides metrics.jsonl."""

    tensorboard: bool = True
    """Whether TensorBoard files are written into the run folder."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """disabled, offline or online."""
    project: str = "mim"
    """Name of the wandb project."""
    grad_norm: bool = False
    """Whether each line of metrics.jsonl holds the norm of the gradient, before it is clipped."""
    timeout: Positive = 120.0
    """Seconds that TensorBoard or wandb may take for one call, and for all that is left at the end;
    then the run continues without it. Training does not wait for them before its end."""


@dataclass(frozen=True)
class Config(Settings):
    """One pre-training run."""

    seed: Natural = 0
    """Weights, order, augmentation and masks follow from it."""
    output: str = field(default="runs/pretrain", metadata=FREE)
    """The run folder."""
    resume: Literal["never", "auto"] = field(default="never", metadata=FREE)
    """never refuses a folder that holds a run; auto resumes from its newest checkpoint."""
    plugins: tuple[str, ...] = ()
    """Python modules or files imported first: they register your own components. Files are copied
    into the run folder, and a run resumes with the same code only."""
    data: DataConfig = field(default_factory=DataConfig)
    """Which images, and how they reach the model."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """Which patches are hidden."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Encoder, regime, decoder and target."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer and its schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, precision and bookkeeping."""
    online_probe: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)
    """A linear probe during training."""
    log: LogConfig = field(default_factory=LogConfig, metadata=FREE)
    """Trackers."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _with_plugins, (to_dict(self),)  # another process must import them first

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.shard and self.online_probe.enabled:
            raise setting_error("train.shard", True, "does not work with online_probe.enabled")


def _with_plugins(tree: dict[str, Any]) -> Config:
    for plugin in tree["plugins"]:
        import_plugin(plugin)
    return build(Config, tree)
