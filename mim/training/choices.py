"""Settings that follow from the images and the machine, where the user gives none.

What is chosen goes into the run's ``config.yaml``: a run that resumes keeps it, on any machine.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from mim.core.config import Config, DataConfig
from mim.core.errors import UserError, setting_error
from mim.core.settings import flatten, read_tree, to_dict
from mim.data import ImageSource, UnreadableImage, open_source
from mim.data.detection import detect
from mim.data.images.transforms import size_of
from mim.data.places.splits import find_splits
from mim.model.backbones import Family, build_backbone, family_of
from mim.training.runtime.machine import pick_device

MODEL = "vit_small_patch16_224"
_SIZES = (32, 48, 64, 96, 128, 160, 224)
_LOOKED_AT = 16  # images whose size is read
_LEAST_GRID = 8  # patches along a side
_AT_ONCE = {"cpu": 64, "mps": 128}  # images, for the time a step takes; of a GPU below
_AT_ONCE_GPU = 256
# Bytes of activations in fp32 for each token, channel and block (Korthikanti et al. 2022, eq. 2,
# without the attention map, which fused attention does not keep).
_BYTES = 68
_MAE_LR, _MAE_BATCH = 1.5e-4, 4096


class Choice(NamedTuple):
    """A setting that was chosen."""

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {self.value} ({self.why})"


def is_given(key: str, known: Collection[str]) -> bool:
    """Whether a dotted setting, its block or a part of it is among those that a user gave."""
    return any(k == key or k.startswith(f"{key}.") or key.startswith(f"{k}.") for k in known)


def choose(
    data: str | Path,
    tree: Mapping[str, Any],
    files: Sequence[str | Path] = (),
    earlier: Path | None = None,
) -> list[Choice]:
    """Chooses what is not given.

    Args:
        data: folder of images, or what else ``data.path`` may be.
        tree: dotted settings that are given, those of the files too.
        files: YAML files of the config, for the plug-ins that they name.
        earlier: a run folder, which keeps what was chosen when it began.

    Raises:
        UserError: for a folder without images, or settings that are refused.
    """
    found = [Choice("data.path", str(data), "given")]
    if earlier is not None and (earlier / "config.yaml").is_file():
        old = flatten(to_dict(read_tree(Config, [earlier / "config.yaml"])))
        why = f"as {earlier} began"
        found += [Choice(key, old[key], why) for key in _KEYS if key in old]
    else:
        if not is_given("model.backbone", tree):
            found.append(Choice("model.backbone", MODEL, "the default"))
        if not is_given("data.source", tree):
            found.append(Choice("data.source", *source_of(Path(data))))
        begun = {**tree, **{choice.key: choice.value for choice in found}}
        found += _chosen(read_tree(Config, files, begun), tree)
    return [choice for choice in found if not is_given(choice.key, tree)]


_KEYS = (
    *("model.backbone", "model.backbone_args.patch_size", "model.position_embedding"),
    *("model.decoder.transformer.width", "model.decoder.transformer.depth"),
    *("model.decoder.transformer.heads", "data.source", "data.channels", "data.image_size"),
    *("data.batch_size", "data.workers", "optim.base_lr", "optim.warmup_epochs"),
    *("train.epochs", "train.precision"),
)
"""What may be chosen."""


def source_of(path: Path) -> tuple[str, str]:
    """The ``data.source`` that reads a path, and how that was seen.

    Raises:
        UserError: if there is nothing.
    """
    if not path.exists():
        raise setting_error("data.path", str(path), "does not exist")
    if path.is_dir():
        try:
            find_splits(item.name for item in path.iterdir() if item.is_dir())
        except UserError as error:
            raise setting_error("data.path", str(path), str(error)) from error
    return detect(str(path))


def _chosen(config: Config, given: Mapping[str, Any]) -> Iterator[Choice]:
    """Chooses for a config in which source, path and model are settled."""
    data, model = config.data, config.model
    if not is_given("data.channels", given):  # which statistics would need
        data = replace(data, stats="source")
    train = open_source(data, "train")
    device = torch.device(pick_device(config.train.device, "train.device"))
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if half:
        yield Choice("train.precision", "bf16", "the GPU computes in it")
    data = config.data
    side, channels = _look(train)
    if not is_given("data.channels", given) and channels not in (1, 3):
        yield Choice("data.channels", channels, "those of the images")
        data = replace(data, channels=channels)
    if not is_given("data.image_size", given) and not data.keeps_aspect:
        size = max([s for s in _SIZES if s <= side * 1.15], default=_SIZES[0])
        yield Choice("data.image_size", size, f"the short side of the images is about {side:g}")
        data = replace(data, image_size=size)
    size = min(data.size)
    patch = model.backbone_args.get("patch_size")
    if not is_given("model.backbone_args", given) and _own_patch(model, data) > size // _LEAST_GRID:
        patch = next(p for p in (16, 8, 4, 2, 1) if size % p == 0 and size // p >= _LEAST_GRID)
        yield Choice("model.backbone_args.patch_size", patch, f"{size // patch} along a side")
        model = replace(model, backbone_args={**model.backbone_args, "patch_size": patch})
    with torch.device("meta"):
        family = family_of(build_backbone(model, data.size, data.channels))
    if family.takes_fixed_positions and family.width % 4 == 0:
        yield Choice("model.position_embedding", "sincos2d", "fixed, as MAE's")
    width, depth = decoder_size(family)
    for key, value in (("width", width), ("depth", depth), ("heads", width // 32)):
        why = "half the encoder's width" if key == "width" else "sized to the encoder"
        yield Choice(f"model.decoder.transformer.{key}", value, why)
    batch, why = _batch(config, family, device, len(train), 0.5 if half else 1.0)
    yield Choice("data.batch_size", batch, why)
    batch = data.batch_size if is_given("data.batch_size", given) else batch
    epochs = min(max(round(40_000 / len(train) ** 0.5 / 50) * 50, 50), 800)
    yield Choice("train.epochs", epochs, f"for {len(train):,} training images")
    epochs = config.train.epochs if is_given("train.epochs", given) else epochs
    yield Choice("optim.warmup_epochs", max(1.0, epochs / 20), "a twentieth of the epochs, as MAE")
    rate = float(f"{_MAE_LR * (_MAE_BATCH / batch) ** 0.5:.1e}")
    yield Choice("optim.base_lr", rate, f"MAE's, by the square root of {_MAE_BATCH} / {batch}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if device.type != "cpu":
        workers = min(8, max((cores or 1) // max(torch.cuda.device_count(), 1) - 1, 0))
        yield Choice("data.workers", workers, f"{cores} cores here")


def decoder_size(family: Family) -> tuple[int, int]:
    """(width, depth) of a transformer decoder for an encoder: MAE's 512 and 8 for a ViT-L."""
    width = min(max(family.width // 64 * 32, 64), 512)
    return width, 8 if family.width >= 1024 else 4


def _own_patch(model: Any, data: DataConfig) -> int:
    """The model's own patch size; 0 where its patches cannot be set, as of a Swin."""
    with torch.device("meta"):
        family = family_of(build_backbone(model, (224, 224), data.channels))
    return max(family.patch_size) if family.is_uniform else 0


def _look(source: ImageSource) -> tuple[float, int]:
    """The median of the short sides of a few images, evenly spread over the source, and how many
    channels the arrays among them have; 3 where there are none."""
    sides, channels = [], 3
    for index in range(0, len(source), max(len(source) // _LOOKED_AT, 1)):
        try:
            image = source.image(index)
        except UnreadableImage:
            continue
        sides.append(min(size_of(image)))
        if isinstance(image, np.ndarray):
            channels = image.shape[2]
    if not sides:
        raise setting_error("data.path", source.name, "has no image that can be read")
    return median(sides), channels


def _batch(
    config: Config, family: Family, device: torch.device, count: int, narrow: float
) -> tuple[int, str]:
    """The images of a step, a power of 2, and what bounds them."""
    patches = family.grid[0] * family.grid[1]
    shown = 1 - config.mask.ratio_range[0] if config.model.regime.name == "drop" else 1
    width, depth = decoder_size(family)
    tokens = patches * shown * family.width * len(family.blocks) + patches * width * depth
    if device.type == "cuda":
        room, most = torch.cuda.get_device_properties(device).total_memory, _AT_ONCE_GPU
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        most = _AT_ONCE.get(device.type, _AT_ONCE_GPU)
    fits = int(room / 2 / (_BYTES * narrow * tokens))
    bounds = {
        f"half of the memory, {room / 2**30:.0f} GiB, would hold {fits:,}": fits,
        f"a step of a {device.type.upper()} takes no longer": most,
        f"a quarter of the {count:,} training images": count // 4,
    }
    why = min(bounds, key=lambda key: bounds[key])
    return 1 << max(bounds[why].bit_length() - 1, 1), why
