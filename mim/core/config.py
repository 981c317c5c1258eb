"""Every setting of the project, as frozen dataclasses that check themselves when read.

Values that only one component uses stand in a block named after it (``model.regime.zero.at``),
so that a comparison can vary ``model.regime.name`` and keep each regime's settings beside it.
What needs other modules to check (names of components, a timm model, a grid) is checked by
``mim.model.model.check_config``, which ``mim.load_config`` and the CLI call before anything runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from mim.core.errors import choice_error, setting_error


def _one_of(setting: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise choice_error(setting, value, choices)


def _above(setting: str, value: float, low: float, *, equal: bool = False) -> None:
    if not (value >= low if equal else value > low):
        raise setting_error(setting, value, f"must be {'at least' if equal else 'above'} {low}")
    if value == math.inf:
        raise setting_error(setting, value, "must be finite")


@dataclass(frozen=True)
class SubsetConfig:
    """Which of a source's images; what is chosen is written into the run folder."""

    list: str | None = None
    """Classes by name or WordNet id: a text file, one a line, or imagenet-100, imagenette,
    imagewoof. Train and val."""
    classes: int | None = None
    """So many classes, drawn by key; fewer are among more. Train and val."""
    per_class: int | None = None
    """So many training images of each class, drawn by key; fewer are among more."""
    fraction: float | None = None
    """Share of the training images of each class, drawn by key; a smaller one is inside a larger
    one, and each class keeps at least one."""
    files: str | None = None
    """Text file that names the training images, one a line, by path or file name: SimCLR's lists
    of 1 % and 10 % of ImageNet have this form."""

    def __post_init__(self) -> None:
        for name in ("classes", "per_class"):
            if (value := getattr(self, name)) is not None:
                _above(f"data.subset.{name}", value, 1, equal=True)
        if self.fraction is not None and not 0 < self.fraction <= 1:
            reason = "must be above 0 and at most 1"
            raise setting_error("data.subset.fraction", self.fraction, reason)
        given = [n for n in ("per_class", "fraction", "files") if getattr(self, n) is not None]
        if len(given) > 1:
            reason = f"cannot be combined with data.subset.{given[0]}: choose one"
            raise setting_error(f"data.subset.{given[1]}", getattr(self, given[1]), reason)

    @property
    def chooses(self) -> bool:
        """Whether anything is left out."""
        return self != SubsetConfig()


STREAMED = ("shards", "huggingface")
"""The sources that can be read in place by URL."""


@dataclass(frozen=True)
class HuggingFaceConfig:
    """Settings of the source huggingface."""

    name: str | None = None
    """Which configuration of a data set on the hub."""
    revision: str | None = None
    """Its commit, branch or tag."""
    image: str | None = None
    """The column of images; by default image, img, jpg or what is there of that kind."""
    label: str | None = None
    """The column of labels; by default label, labels or fine_label, if there is one."""
    pool: int = 1024
    """With data.streaming: about so many rows, of row groups drawn by key, are shuffled together.
    More mix a set better that is sorted by class; each loader process holds so many files."""

    def __post_init__(self) -> None:
        _above("data.huggingface.pool", self.pool, 1, equal=True)


@dataclass(frozen=True)
class MixConfig:
    """One source of a mixture."""

    source: str
    """As data.source."""
    path: str | None = None
    """As data.path."""
    val_path: str | None = None
    """As data.val_path."""
    weight: float = 1.0
    """How often an image is drawn from it, in ratio to the others."""

    def __post_init__(self) -> None:
        _above("data.mix.weight", self.weight, 0)
        if self.source == "mixed":
            raise setting_error("data.mix.source", "mixed", "cannot be one of the sources mixed")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they reach the model."""

    source: str = "photos"
    """Where images come from: an embedded set (digits, mnist5k, photos), imagefolder, flat
    (unlabelled images), shards (tar files), huggingface, mixed (several), or torchvision/NAME."""
    path: str | None = None
    """Folder of the images (imagefolder, flat: holds train/ and optionally val/) or of the download
    (torchvision: by default ~/.cache/mim/torchvision); shards: a file, folder, pattern such as
    train-{000..146}.tar, or URL; huggingface: parquet files likewise, or a name on the hub."""
    val_path: str | None = None
    """Shards or parquet files of the val images, where data.path names training ones alone."""
    streaming: bool = False
    """Whether files by URL are read in place by range requests instead of being fetched first:
    shards an image at a time, in the same order; parquet files of huggingface, on disk too, a row
    group at a time, in the order of data.huggingface.pool. Resume is exact. Files of a server that
    answers no range requests are fetched."""
    download: bool = True
    """Whether a torchvision data set may be downloaded."""
    image_size: int | tuple[int, int] = 224
    """Side of the square images in pixels, or (height, width)."""
    aspect: str = "square"
    """square (all images become image_size), or keep: each keeps its aspect ratio and is
    made smaller to at most max_patches patches, never larger. A training crop then has the image's
    own proportions, crop_ratio is not used, and image_size is where a ViT's position embeddings are
    learned, from which those of each image's grid are interpolated."""
    max_patches: int = 256
    """With aspect keep: the most patches an image may have."""
    batching: str = "padded"
    """How images of several sizes share a batch: padded to the longest, or packed (several images
    in one sequence, none reads another). The numbers are the same."""
    channels: int = 3
    """Channels of an image: 1 converts to grayscale, 3 to RGB."""
    batch_size: int = 256
    """Images a step, over all processes and accumulated parts."""
    workers: int = 0
    """Loader processes of each training process; 0 loads in the training process."""
    augment: str = "mae"
    """Training augmentation: mae (random resized crop, flip) or none (resize, centre crop)."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area a random crop covers, from and to."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Width over height of a random crop, from and to."""
    flip: bool = True
    """Whether half the images are mirrored left to right."""
    decode: str = "auto"
    """What decodes JPEG: torchvision (libjpeg-turbo, straight to an array), pil, nvjpeg (on a GPU)
    or auto, the fastest that gives PIL's very pixels: torchvision, PIL for odd files."""
    resize: str = "auto"
    """Whose antialiased bicubic resizes: pil, torch (several times as fast, rounds otherwise) or
    auto: pil for results of less than 128 pixels a side, else torch."""
    cache: str = "none"
    """Where decoded images are kept, uint8 at their own size: none, memory (shared with the loader
    processes), mmap (a memory-mapped file that later runs find again) or device (on the
    accelerator, where whole batches are cut, resized and mirrored; images of one size). Batches
    are the same bytes in all four."""
    cache_path: str | None = None
    """Folder of mmap caches; by default ~/.cache/mim/decoded."""
    index_cache: bool = True
    """Whether the list of a folder with many images (imagefolder, flat) is kept in ~/.cache/mim (or
    $MIM_CACHE) for later runs, which list it again only if a folder in it has changed."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel on the scale 0 to 1; by default the source's own."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel on the scale 0 to 1; by default the source's own."""
    val_fraction: float = 0.1
    """Share of the images held out where the source has no val split of its own."""
    mix: tuple[MixConfig, ...] = ()
    """The sources of data.source=mixed, each with source, path, val_path and weight."""
    huggingface: HuggingFaceConfig = field(default_factory=HuggingFaceConfig)
    """Settings of the source huggingface."""
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    """Which of the source's images."""
    fingerprint: str | None = None
    """Digest of the source, ids and labels of all images; a run writes it into its config, and a
    run that starts from such a config refuses other images. null takes what is there."""
    max_unreadable: float = 0.001
    """Share of the images that may be unreadable: each is named in unreadable.txt in the run folder
    and another stands in for it. More stop the run."""
    max_pixels: int = 89_478_485
    """Larger images count as unreadable: a small file can decode to more than the memory."""
    weights: str | None = None
    """How much each training image counts in the loss, 0 leaves it out: a .csv with the columns
    image and weight, an .npy indexed by sample id, or the name of a function that a plug-in
    registers. Held-out images count alike."""

    def __post_init__(self) -> None:
        for side in self.size:
            _above("data.image_size", side, 1, equal=True)
        _one_of("data.aspect", self.aspect, ("square", "keep"))
        _above("data.max_patches", self.max_patches, 1, equal=True)
        _one_of("data.batching", self.batching, ("padded", "packed"))
        if self.batching == "packed" and self.aspect == "square":
            reason = "needs data.aspect=keep: images of one size have no padding"
            raise setting_error("data.batching", self.batching, reason)
        _above("data.channels", self.channels, 1, equal=True)
        _above("data.batch_size", self.batch_size, 1, equal=True)
        _above("data.workers", self.workers, 0, equal=True)
        _one_of("data.augment", self.augment, ("mae", "none"))
        _one_of("data.decode", self.decode, ("auto", "pil", "torchvision", "nvjpeg"))
        if self.decode == "nvjpeg" and self.workers:
            reason = "needs data.workers=0: loader processes have no GPU"
            raise setting_error("data.decode", self.decode, reason)
        _one_of("data.cache", self.cache, ("none", "memory", "mmap", "device"))
        _one_of("data.resize", self.resize, ("auto", "pil", "torch"))
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise setting_error("data.crop_scale", self.crop_scale, "must be 0 < from <= to <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise setting_error("data.crop_ratio", self.crop_ratio, "must be 0 < from <= to")
        if not 0 < self.val_fraction < 1:
            raise setting_error("data.val_fraction", self.val_fraction, "must lie between 0 and 1")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.channels:
                reason = f"must have {self.channels} values, one for each of data.channels"
                raise setting_error(f"data.{name}", values, reason)
        if self.std is not None and min(self.std) <= 0:
            raise setting_error("data.std", self.std, "must be above 0")
        if self.streaming and self.source not in (*STREAMED, "mixed"):
            reason = f"needs data.source={', '.join(STREAMED)} or mixed, not {self.source}"
            raise setting_error("data.streaming", self.streaming, reason)
        if self.mix and self.source != "mixed":
            raise setting_error("data.mix", [m.source for m in self.mix], "needs data.source=mixed")
        if not 0 <= self.max_unreadable < 1:
            reason = "must be at least 0 and below 1"
            raise setting_error("data.max_unreadable", self.max_unreadable, reason)
        _above("data.max_pixels", self.max_pixels, 1, equal=True)

    @property
    def keeps_aspect(self) -> bool:
        """Whether images of several sizes share a batch."""
        return self.aspect == "keep"

    def as_square(self) -> DataConfig:
        """The same with all images of ``image_size``, for what takes images of one size only."""
        return replace(self, aspect="square", batching="padded")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size


Ratio = float | tuple[float, float]


def _range(ratio: Ratio) -> tuple[float, float]:
    if isinstance(ratio, (int, float)):
        return float(ratio), float(ratio)
    return ratio


def _check_ratio(setting: str, ratio: Ratio) -> None:
    low, high = _range(ratio)
    if not 0 < low <= high < 1:
        what = "(from, to) must satisfy 0 < from <= to < 1"
        raise setting_error(setting, ratio, f"must lie between 0 and 1; {what}")


@dataclass(frozen=True)
class MaskScheduleConfig:
    """A mask ratio that moves from ``mask.ratio`` to another one, epoch by epoch."""

    to: float | tuple[float, float] | None = None
    """Where the ratio ends, or (from, to) to draw one for each image; none does not move it."""
    epochs: int | None = None
    """The epoch, counted from 0, in which the end is reached; the ratio then stays. Needed with
    ``to``."""
    shape: str = "linear"
    """How it moves: linear or cosine."""

    def __post_init__(self) -> None:
        if self.to is not None:
            _check_ratio("mask.schedule.to", self.to)
            if self.epochs is None:
                reason = "is needed with mask.schedule.to: the epoch in which the end is reached"
                raise setting_error("mask.schedule.epochs", None, reason)
        if self.epochs is not None:
            _above("mask.schedule.epochs", self.epochs, 1, equal=True)
        _one_of("mask.schedule.shape", self.shape, ("linear", "cosine"))


@dataclass(frozen=True)
class AttentionMaskConfig:
    """Masks guided by the EMA teacher's attention (AttMask)."""

    hide: str = "most"
    """Which patches are hidden: the most or the least attended."""
    randomness: float = 0.5
    """Scale of keyed Gumbel noise on the log-attention: 0 is strict, 1 samples in proportion."""

    def __post_init__(self) -> None:
        _one_of("mask.attention.hide", self.hide, ("most", "least"))
        _above("mask.attention.randomness", self.randomness, 0, equal=True)


@dataclass(frozen=True)
class LearnedMaskConfig:
    """Masks from a small network that is trained against the reconstruction."""

    objective: str = "adamae"
    """adamae (show what is hard to guess) or adversarial (hide it)."""
    sampling: str = "gumbel"
    """gumbel (sample without replacement by score, keyed for each image) or topk (strict)."""
    width: int = 64
    """Width of the network."""

    def __post_init__(self) -> None:
        _one_of("mask.learned.objective", self.objective, ("adamae", "adversarial"))
        _one_of("mask.learned.sampling", self.sampling, ("gumbel", "topk"))
        _above("mask.learned.width", self.width, 1, equal=True)


def _check_span(setting: str, span: tuple[float, float], most: float | None = None) -> None:
    low, high = span
    if not (0 < low <= high and math.isfinite(high) and (most is None or high <= most)):
        limit = "" if most is None else f" <= {most:g}"
        raise setting_error(setting, span, f"must be 0 < from <= to{limit}")


@dataclass(frozen=True)
class BlockMaskConfig:
    """Settings of the generator block: rectangles that pile up."""

    area: tuple[float, float] = (16 / 196, 1.0)
    """Share of the grid a rectangle covers, from and to; never more than is still to be hidden."""
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    """Height over width of a rectangle, from and to; drawn log-uniformly."""
    exact: bool = True
    """Whether the last rectangle is cut so that the number of hidden patches is exact; false
    keeps rectangles whole, as BEiT does, and may hide fewer."""

    def __post_init__(self) -> None:
        _check_span("mask.block.area", self.area, 1)
        _check_span("mask.block.aspect", self.aspect)


@dataclass(frozen=True)
class AlignedMaskConfig:
    """Settings of the generator aligned: units larger than a patch."""

    unit: int | tuple[int, int] = 32
    """Side in pixels of the square that is hidden as one, or (height, width)."""

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise setting_error("mask.aligned.unit", self.unit, "must be at least 1")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.unit, self.unit) if isinstance(self.unit, int) else self.unit


@dataclass(frozen=True)
class InverseBlockMaskConfig:
    """Settings of the generator inverse_block: one visible rectangle."""

    aspect: tuple[float, float] = (0.5, 2.0)
    """Height over width of the rectangle, from and to; drawn log-uniformly."""
    roll: bool = False
    """Whether the rectangle may leave the grid on one side and come in on the other, so that
    every patch is visible equally often."""

    def __post_init__(self) -> None:
        _check_span("mask.inverse_block.aspect", self.aspect)


@dataclass(frozen=True)
class MultiblockMaskConfig:
    """Settings of the generator multiblock: hidden targets inside a visible context."""

    targets: int = 4
    """Number of target rectangles, which may overlap."""
    aspect: tuple[float, float] = (0.75, 1.5)
    """Height over width of a target, from and to."""
    context_scale: tuple[float, float] = (0.85, 1.0)
    """Share of the grid the context covers, from and to; what lies outside it is hidden first."""

    def __post_init__(self) -> None:
        _above("mask.multiblock.targets", self.targets, 1, equal=True)
        _check_span("mask.multiblock.aspect", self.aspect)
        _check_span("mask.multiblock.context_scale", self.context_scale, 1)


@dataclass(frozen=True)
class FileMaskConfig:
    """Settings of the generator file; it does not use ``mask.ratio``."""

    path: str | None = None
    """One .npy or .png for all images, one .npy (images, rows, columns) indexed by sample id, or a
    folder with the same paths as the image folder. 1, true and white hide."""
    share: float = 0.5
    """Share of a patch's pixels from which on it is hidden, where a mask is given in pixels."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise setting_error("mask.file.share", self.share, "must be above 0 and at most 1")


@dataclass(frozen=True)
class MaskConfig:
    """Which patches are hidden."""

    name: str = "random"
    """The mask generator."""
    ratio: float | tuple[float, float] = 0.75
    """Share of the patches that is hidden, or (from, to) to draw one for each image."""

    schedule: MaskScheduleConfig = field(default_factory=MaskScheduleConfig)
    """A ratio that moves over training."""
    block: BlockMaskConfig = field(default_factory=BlockMaskConfig)
    """Settings of the generator block."""
    aligned: AlignedMaskConfig = field(default_factory=AlignedMaskConfig)
    """Settings of the generator aligned."""
    inverse_block: InverseBlockMaskConfig = field(default_factory=InverseBlockMaskConfig)
    """Settings of the generator inverse_block."""
    multiblock: MultiblockMaskConfig = field(default_factory=MultiblockMaskConfig)
    """Settings of the generator multiblock."""
    file: FileMaskConfig = field(default_factory=FileMaskConfig)
    """Settings of the generator file."""
    attention: AttentionMaskConfig = field(default_factory=AttentionMaskConfig)
    """Settings of the generator attention."""
    learned: LearnedMaskConfig = field(default_factory=LearnedMaskConfig)
    """Settings of the generator learned."""

    def __post_init__(self) -> None:
        _check_ratio("mask.ratio", self.ratio)

    @property
    def ratio_range(self) -> tuple[float, float]:
        """(lowest, highest) share of hidden patches; the same twice where the ratio is fixed."""
        return _range(self.ratio)

    def ratio_at(self, epoch: int) -> tuple[float, float]:
        """:attr:`ratio_range` in an epoch; below epoch 0 it has not moved yet."""
        if self.schedule.to is None or self.schedule.epochs is None or epoch <= 0:
            return self.ratio_range
        share = min(epoch / self.schedule.epochs, 1.0)
        if self.schedule.shape == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        start, end = self.ratio_range, _range(self.schedule.to)
        return (
            start[0] + (end[0] - start[0]) * share,
            start[1] + (end[1] - start[1]) * share,
        )

    def all_ratios(self) -> list[tuple[str, float]]:
        """(setting, ratio) of the ends of every range, between which all ratios lie."""
        ratios = [("mask.ratio", ratio) for ratio in self.ratio_range]
        if self.schedule.to is not None:
            ratios += [("mask.schedule.to", ratio) for ratio in _range(self.schedule.to)]
        return ratios


@dataclass(frozen=True)
class ZeroConfig:
    """The zero-and-attend-mask regime."""

    at: str = "pixels"
    """Where hidden patches are set to 0: pixels (after normalisation) or embedding."""
    attend_mask: bool = True
    """Whether hidden patches' keys get -inf in every layer; false is the ablation."""
    attention: str = "split"
    """split projects keys of visible tokens only and needs no mask; dense is the literal form."""
    predict_share: float = 1.0
    """Share of the hidden patches, drawn by key, whose latents are computed and predicted in
    training; the loss stays unbiased. Below 1 only with attention split and decoder linear or
    mlp."""

    def __post_init__(self) -> None:
        _one_of("model.regime.zero.at", self.at, ("pixels", "embedding"))
        _one_of("model.regime.zero.attention", self.attention, ("dense", "split"))
        setting = "model.regime.zero.predict_share"
        if not 0 < self.predict_share <= 1:
            raise setting_error(setting, self.predict_share, "must be above 0 and at most 1")
        if self.predict_share < 1 and not (self.attend_mask and self.attention == "split"):
            reason = "needs model.regime.zero.attend_mask=true and attention=split: only then do "
            reason += "hidden patches not read each other"
            raise setting_error(setting, self.predict_share, reason)


@dataclass(frozen=True)
class RegimeConfig:
    """How hidden patches meet the encoder."""

    name: str = "drop"
    """drop (MAE), zero (zero and attend mask) or token (SimMIM)."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """Settings of the regime zero."""
    order: str = "bidirectional"
    """Who reads whom in the encoder, in pre-training: bidirectional, or causal (a patch reads
    itself and the patches before it, row by row, as in autoregressive image models)."""
    causal_prefix: int = 0
    """With order causal: so many first patches of the grid read each other in both directions."""

    def __post_init__(self) -> None:
        _one_of("model.regime.order", self.order, ("bidirectional", "causal"))
        _above("model.regime.causal_prefix", self.causal_prefix, 0, equal=True)
        if self.causal_prefix and self.order != "causal":
            reason = "needs model.regime.order=causal"
            raise setting_error("model.regime.causal_prefix", self.causal_prefix, reason)


def _check_decoder_sizes(
    setting: str, width: int, depth: int, heads: int, mlp_ratio: float
) -> None:
    for name, value in (("width", width), ("depth", depth), ("heads", heads)):
        _above(f"{setting}.{name}", value, 1, equal=True)
    _above(f"{setting}.mlp_ratio", mlp_ratio, 0)
    if width % heads:
        raise setting_error(
            f"{setting}.width", width, f"is not divisible by {setting}.heads={heads}"
        )
    if width % 4:
        reason = "must be divisible by 4 for its 2-D sin-cos position embedding"
        raise setting_error(f"{setting}.width", width, reason)


@dataclass(frozen=True)
class TransformerDecoderConfig:
    """MAE's decoder."""

    width: int = 512
    """Width of a token in the decoder."""
    depth: int = 8
    """Number of blocks."""
    heads: int = 16
    """Attention heads; must divide the width."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over the decoder's width."""

    def __post_init__(self) -> None:
        setting = "model.decoder.transformer"
        _check_decoder_sizes(setting, self.width, self.depth, self.heads, self.mlp_ratio)


@dataclass(frozen=True)
class MlpDecoderConfig:
    """A multilayer perceptron on each latent."""

    width: int = 512
    """Width of a hidden layer."""
    depth: int = 1
    """Number of hidden layers."""

    def __post_init__(self) -> None:
        for name in ("width", "depth"):
            _above(f"model.decoder.mlp.{name}", getattr(self, name), 1, equal=True)


@dataclass(frozen=True)
class CrossDecoderConfig:
    """CrossMAE's decoder."""

    width: int = 512
    """Width of a token in the decoder."""
    depth: int = 8
    """Number of blocks."""
    heads: int = 16
    """Attention heads; must divide the width."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over the decoder's width."""
    share: float = 0.25
    """Share of the hidden patches that is decoded in training, drawn for each image and epoch; must
    be 1 with model.target.loss_on=all."""
    layers: str = "weighted"
    """What the blocks read: last (the encoder's output) or weighted (each block its own learned
    sum of the outputs of the encoder's blocks)."""

    def __post_init__(self) -> None:
        setting = "model.decoder.cross_attention"
        _check_decoder_sizes(setting, self.width, self.depth, self.heads, self.mlp_ratio)
        if not 0 < self.share <= 1:
            raise setting_error(f"{setting}.share", self.share, "must be above 0 and at most 1")
        _one_of(f"{setting}.layers", self.layers, ("last", "weighted"))


@dataclass(frozen=True)
class DecoderConfig:
    """What predicts the hidden patches."""

    name: str = "transformer"
    """transformer (MAE), cross_attention (CrossMAE), linear (SimMIM) or mlp; the last two need a
    regime that keeps every token."""
    transformer: TransformerDecoderConfig = field(default_factory=TransformerDecoderConfig)
    """Settings of the transformer decoder."""
    cross_attention: CrossDecoderConfig = field(default_factory=CrossDecoderConfig)
    """Settings of the cross-attention decoder."""
    mlp: MlpDecoderConfig = field(default_factory=MlpDecoderConfig)
    """Settings of the MLP decoder."""


@dataclass(frozen=True)
class HogConfig:
    """Histograms of oriented gradients."""

    bins: int = 9
    """Directions a histogram tells apart, over 180 degrees."""
    cell: int = 8
    """Side in pixels of the squares that have a histogram each; must divide the patch."""
    normalize: bool = True
    """Whether each histogram is divided by its length, so that contrast does not count."""

    def __post_init__(self) -> None:
        for name in ("bins", "cell"):
            _above(f"model.target.hog.{name}", getattr(self, name), 1, equal=True)


@dataclass(frozen=True)
class LowPassConfig:
    """Pixels without their high spatial frequencies."""

    cutoff: float = 0.36
    """Highest frequency that stays, as a share of the Nyquist frequency; PixMIM's 40 of 112."""
    filter: str = "ideal"
    """ideal (all or nothing) or gaussian (half the power at the cutoff, no ringing)."""
    normalize: bool = False
    """Whether each filtered patch is brought to mean 0 and variance 1."""

    def __post_init__(self) -> None:
        if not 0 < self.cutoff <= math.sqrt(2):
            reason = "must be above 0 and at most 1.41, where every frequency stays"
            raise setting_error("model.target.low_pass.cutoff", self.cutoff, reason)
        _one_of("model.target.low_pass.filter", self.filter, ("ideal", "gaussian"))


@dataclass(frozen=True)
class FrequencyConfig:
    """Each patch's cosine transform."""

    coefficients: int | None = None
    """How many of a patch's coefficients per channel, lowest frequencies first; by default all."""
    whiten: bool = True
    """Whether a coefficient is measured against the 1 / frequency amplitudes of natural images;
    false, with all coefficients and mse, is the loss of pixels."""

    def __post_init__(self) -> None:
        if self.coefficients is not None:
            _above("model.target.frequency.coefficients", self.coefficients, 1, equal=True)


@dataclass(frozen=True)
class FeaturesConfig:
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
        if self.pretrained and self.checkpoint is not None:
            reason = "cannot be combined with model.target.features.checkpoint: choose one"
            raise setting_error("model.target.features.pretrained", True, reason)


@dataclass(frozen=True)
class EmaFeaturesConfig:
    """Features of the encoder's own moving average (data2vec)."""

    top: int | None = None
    """How many of the last blocks are averaged; by default half of the depth, as data2vec's 6 of
    12 for images."""
    normalize_mean: bool = True
    """Whether their mean is layer-normalised too, as data2vec does for images."""

    def __post_init__(self) -> None:
        if self.top is not None:
            _above("model.target.ema_features.top", self.top, 1, equal=True)


@dataclass(frozen=True)
class TargetConfig:
    """What must be predicted."""

    name: str = "normalized_pixels"
    """normalized_pixels (each patch to mean 0, variance 1), pixels, low_pass, frequency (cosine
    transform), hog (histograms of oriented gradients), features (of a frozen timm model) or
    ema_features (of the encoder's moving average)."""
    loss: str = "auto"
    """Distance between prediction and target: auto (smooth_l1 for features, mse for the rest),
    mse, l1, smooth_l1 or cosine."""
    smooth_l1_beta: float = 2.0
    """Where smooth_l1 turns from a square into a line; 2.0 is data2vec's for images."""
    loss_on: str = "masked"
    """Which patches count: masked or all."""
    hog: HogConfig = field(default_factory=HogConfig)
    """Settings of the target hog."""
    low_pass: LowPassConfig = field(default_factory=LowPassConfig)
    """Settings of the target low_pass."""
    frequency: FrequencyConfig = field(default_factory=FrequencyConfig)
    """Settings of the target frequency."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """Settings of the target features."""
    ema_features: EmaFeaturesConfig = field(default_factory=EmaFeaturesConfig)
    """Settings of the target ema_features."""

    def __post_init__(self) -> None:
        _one_of("model.target.loss", self.loss, ("auto", "mse", "l1", "smooth_l1", "cosine"))
        _above("model.target.smooth_l1_beta", self.smooth_l1_beta, 0)
        _one_of("model.target.loss_on", self.loss_on, ("masked", "all"))


@dataclass(frozen=True)
class ModelConfig:
    """Encoder, regime, decoder and target."""

    backbone: str = "vit_tiny_patch16_224"
    """Name of a timm model: a VisionTransformer, an Eva (EVA-02, RoPE-ViT, DINOv3), a Swin (v1 or
    v2: token) or a Hiera (drop or token)."""
    backbone_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the timm model: patch_size, embed_dim, depth, num_heads, reg_tokens, ... timm's
    own defaults hold for the rest, such as a Swin's drop_path_rate of 0.1."""
    position_embedding: str = "learned"
    """learned, or sincos2d: fixed 2-D sine and cosine, as MAE's."""
    norm_eps: float | None = None
    """Epsilon of every layer norm; by default the backbone's own, mostly 1e-6."""
    regime: RegimeConfig = field(default_factory=RegimeConfig)
    """How hidden patches meet the encoder."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """What predicts the hidden patches."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """What must be predicted."""
    teacher_decay: float = 0.999
    """Decay of the EMA teacher that the generator attention and the target ema_features read."""

    def __post_init__(self) -> None:
        if not 0 <= self.teacher_decay < 1:
            reason = "must be at least 0 and below 1"
            raise setting_error("model.teacher_decay", self.teacher_decay, reason)
        _one_of("model.position_embedding", self.position_embedding, ("learned", "sincos2d"))
        if self.norm_eps is not None:
            _above("model.norm_eps", self.norm_eps, 0)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with MAE's parameter groups; warm-up, then a half cosine, by step."""

    base_lr: float = 1.5e-4
    """Learning rate at a batch of 256 images; scaled by data.batch_size / 256."""
    min_lr: float = 0.0
    """Where the cosine ends, as an absolute rate."""
    warmup_epochs: float = 40.0
    """Epochs of linear warm-up; may be fractional. At most a half of the run."""
    weight_decay: float = 0.05
    """Decay of matrices; vectors, biases, tokens and position embeddings have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    clip_grad: float | None = None
    """Largest norm of the gradient; none does not clip."""

    def __post_init__(self) -> None:
        _above("optim.base_lr", self.base_lr, 0)
        _above("optim.min_lr", self.min_lr, 0, equal=True)
        _above("optim.warmup_epochs", self.warmup_epochs, 0, equal=True)
        _above("optim.weight_decay", self.weight_decay, 0, equal=True)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise setting_error("optim.betas", self.betas, "must each lie in [0, 1)")
        if self.clip_grad is not None:
            _above("optim.clip_grad", self.clip_grad, 0)


@dataclass(frozen=True)
class TrainConfig:
    """Length, precision and bookkeeping of a run."""

    epochs: int = 800
    """Passes over the training images; the learning-rate schedule spans them."""
    max_steps: int | None = None
    """Bound for short runs: the run, and its schedule, end after so many steps at most."""
    precision: str = "fp32"
    """fp32, bf16 or fp16 (autocast), or fp8: as bf16, but the blocks' linear layers multiply in
    float8, by torchao (``pip install "mim[float8]"``); a CPU emulates that."""
    weights: str = "fp32"
    """What weights are kept in: fp32, or bf16, with gradients and first moments (12 bytes a weight
    instead of 16). What rounding takes from a small update is kept beside it."""
    attention: str = "auto"
    """fused (one operation), plain (products and a softmax), or auto: the faster by measurement,
    which is plain on a CPU in bf16 and fused elsewhere."""
    linear: str = "auto"
    """Which library computes linear layers in fp32 on a CPU: torch (its own choice, MKL), onednn,
    or auto: the faster by measurement, which is onednn on x86 processors with AVX-512 that are not
    Intel's. The same numbers up to rounding."""
    compile: bool = False
    """Whether the model runs under torch.compile."""
    accumulate: int = 1
    """Parts a process cuts its share of a batch into, to save memory."""
    gradient_checkpointing: bool = False
    """Whether encoder blocks are computed again in the backward pass, to save memory."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights; none keeps no average."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl; a line holds the mean loss since the last."""
    validate_every: float = 1.0
    """Epochs between two held-out losses; 0 measures only at the end."""
    picture_every: float = 0.0
    """Epochs between two reconstruction pictures; 0 draws only at the end."""
    checkpoint_every: float = 1.0
    """Epochs between two checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    milestone_every: float = 0.0
    """Epochs between two checkpoints that are kept for ever; 0 keeps none so."""
    deterministic: bool = False
    """Whether torch may use deterministic operations alone: slower on a GPU, and one that has no
    such form there ends the run with its name. On the CPU runs repeat bit for bit in any case."""
    async_save: bool = False
    """Whether a checkpoint is copied to host memory, which must have room for it, and written while
    training goes on; the next one waits for it, and so do a signal and the end of the run."""
    on_nonfinite: str = "stop"
    """What a step does whose loss or gradient is not finite, and which therefore never reaches the
    weights: stop the run, or skip (the run goes on with the next batch)."""
    max_nonfinite: int = 5
    """With skip: so many such steps in a row stop the run."""
    spike_deviations: float = 10.0
    """A loss that is so many robust standard deviations above the median of the last 100 steps is
    told, and counted in metrics.jsonl; 0 tells none."""
    shard: bool = False
    """Of several processes: whether each keeps only a part of weights, gradients and moments, but
    for the step itself (FSDP2); the numbers are the same, and so are the files."""
    hooks: tuple[str, ...] = field(default=(), metadata={"free": True})
    """Names of hooks that plug-ins register, run after those of mim in this order."""
    timeout: float = 600.0
    """Of several processes: seconds that one waits for the others before the run ends and names who
    is missing. Must exceed the longest time that one works alone, such as a checkpoint's."""

    def __post_init__(self) -> None:
        _above("train.epochs", self.epochs, 1, equal=True)
        if self.max_steps is not None:
            _above("train.max_steps", self.max_steps, 1, equal=True)
        _one_of("train.precision", self.precision, ("fp32", "bf16", "fp16", "fp8"))
        _one_of("train.weights", self.weights, ("fp32", "bf16"))
        if self.weights == "bf16" and self.precision not in ("bf16", "fp8"):
            reason = f"needs train.precision bf16 or fp8, and that is {self.precision!r}"
            raise setting_error("train.weights", self.weights, reason)
        _one_of("train.attention", self.attention, ("auto", "fused", "plain"))
        _one_of("train.linear", self.linear, ("auto", "torch", "onednn"))
        _one_of("train.on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        for name in ("accumulate", "log_every", "keep_checkpoints", "max_nonfinite"):
            _above(f"train.{name}", getattr(self, name), 1, equal=True)
        for name in ("validate_every", "picture_every", "milestone_every", "spike_deviations"):
            _above(f"train.{name}", getattr(self, name), 0, equal=True)
        _above("train.checkpoint_every", self.checkpoint_every, 0)
        _above("train.timeout", self.timeout, 0)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise setting_error("train.ema_decay", self.ema_decay, "must lie between 0 and 1")
        if self.shard and self.ema_decay is not None:
            raise setting_error("train.shard", True, "does not work with train.ema_decay")
        if self.shard and self.precision == "fp16":
            raise setting_error("train.shard", True, "does not work with fp16; choose bf16 or fp32")


@dataclass(frozen=True)
class OnlineProbeConfig:
    """A linear probe on full images that learns during pre-training and does not touch it."""

    enabled: bool = False
    """Whether there is one; it costs a forward pass of the full images in each step, and writes
    online_loss and online_accuracy, and at each held-out loss online_val_accuracy."""
    lr: float = 1e-3
    """Learning rate of its AdamW."""

    def __post_init__(self) -> None:
        _above("online_probe.lr", self.lr, 0)


@dataclass(frozen=True)
class LogConfig:
    """Where curves go besides metrics.jsonl."""

    tensorboard: bool = True
    """Whether TensorBoard files are written into the run folder."""
    wandb: str = "disabled"
    """disabled, offline or online."""
    project: str = "mim"
    """Name of the wandb project."""
    grad_norm: bool = False
    """Whether each line of metrics.jsonl holds the norm of the gradient, before it is clipped."""
    timeout: float = 120.0
    """Seconds that TensorBoard or wandb may take for one call, and for all that is left at the end;
    then the run goes on without it. Training does not wait for them before its end."""

    def __post_init__(self) -> None:
        _above("log.timeout", self.timeout, 0)
        _one_of("log.wandb", self.wandb, ("disabled", "offline", "online"))


@dataclass(frozen=True)
class Config:
    """One pre-training run."""

    seed: int = 0
    """Weights, order, augmentation and masks follow from it."""
    output: str = "runs/pretrain"
    """The run folder."""
    resume: str = "never"
    """never refuses a folder that holds a run; auto goes on from its newest checkpoint."""
    plugins: tuple[str, ...] = ()
    """Python modules or files imported first: they register your own components."""
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
    """A linear probe beside the training."""
    log: LogConfig = field(default_factory=LogConfig)
    """Trackers."""

    def __post_init__(self) -> None:
        _above("seed", self.seed, 0, equal=True)
        _one_of("resume", self.resume, ("never", "auto"))
        if self.train.shard and self.online_probe.enabled:
            raise setting_error("train.shard", True, "does not work with online_probe.enabled")
