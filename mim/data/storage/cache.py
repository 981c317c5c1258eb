"""Cache decoded images in memory, a memory-mapped file or on the accelerator (``data.cache``).

Images are decoded once and stored at their own size, as ``transforms.prepare`` leaves them: bytes,
or float32 for images of more than 8 bits. Crops are computed by the same arithmetic as without a
cache, so that a batch is the same bytes. An image that cannot be decoded remains unreadable.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from mim.core.config import DataConfig
from mim.core.errors import UserError, setting_error
from mim.core.files import prepare_folder, remove_leftovers
from mim.data.images.batched import crop_resize
from mim.data.images.decode import UnreadableImage
from mim.data.images.transforms import Picture, covering, drawn_crops, padded_crops, resizer
from mim.data.sources.base import ImageSource, Subset, View
from mim.data.storage.packed import (
    Packed,
    Recipe,
    as_pixels,
    content_key,
    pack_split,
    read_spans,
)
from mim.data.unreadable import Fault

_SHARED = Path("/dev/shm")
_SPAN = 512  # images read at once


class CachedSource(View):
    """The images of a source, decoded already."""

    def __init__(self, source: ImageSource) -> None:
        self._take(source)
        self.labels, self.sample_ids = source.labels, source.sample_ids
        self.weights = source.weights

    def _find(self, index: int) -> tuple[ImageSource, int]:
        return self.source, index

    @property
    def epoch_size(self) -> int:
        return self.source.epoch_size

    def order(self, seed: int, epoch: int) -> Tensor:
        return self.source.order(seed, epoch)

    def content_digest(self) -> str:
        return self.source.content_digest()

    def _unreadable(self, index: int) -> UnreadableImage:
        return UnreadableImage(self.describe(index), "it could not be read when it was cached")


class MemoryMapped(CachedSource):
    """Images in files of ``packed.py``; the system keeps what is read in memory."""

    def __init__(self, source: ImageSource, packed: Packed) -> None:
        super().__init__(source)
        self.packed = packed

    def image(self, index: int) -> Picture:
        if not self.packed.rows["bytes"][index]:
            raise self._unreadable(index)
        return self.packed.image(index)


class InSharedMemory(CachedSource):
    """Images in one block of shared memory, which loader processes read without a copy.

    Args:
        source: what is cached.
        pixels: (bytes,) uint8, one image after the other.
        offsets: (n,) int64, where each begins.
        sizes: (n, 2) int64, height and width; 0 where an image cannot be read.
        channels: of all images.
    """

    def __init__(
        self, source: ImageSource, pixels: Tensor, offsets: Tensor, sizes: Tensor, channels: int
    ) -> None:
        super().__init__(source)
        self.pixels, self.offsets, self.sizes, self.channels = pixels, offsets, sizes, channels
        self._devices: dict[torch.device, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_devices": {}}

    def image(self, index: int) -> Picture:
        height, width = self.sizes[index].tolist()
        if not height:
            raise self._unreadable(index)
        begin = int(self.offsets[index])
        last = index + 1 == len(self.offsets)
        end = len(self.pixels) if last else int(self.offsets[index + 1])
        return as_pixels(self.pixels[begin:end].numpy(), height, width, self.channels)

    @property
    def readable(self) -> Tensor:
        """(n,) bool."""
        return self.sizes[:, 0] > 0

    def stacked(self) -> Tensor:
        """(m, C, h, w) uint8, the m readable images; they must be of one size."""
        height, width = self.sizes[self.readable][0].tolist()
        images = self.pixels.reshape(-1, height, width, self.channels)
        return images.permute(0, 3, 1, 2).contiguous()

    def on_device(self, device: torch.device) -> Tensor:
        """:meth:`stacked` on a device, moved there once."""
        if device not in self._devices:
            self._devices[device] = self.stacked().to(device)
        return self._devices[device]


def resident(source: ImageSource) -> tuple[InSharedMemory, Tensor | None] | None:
    """The cache below a source and positions in it, None for all; None if it has no such cache."""
    if isinstance(source, InSharedMemory):
        return source, None
    if isinstance(source, Subset) and (below := resident(source.source)) is not None:
        cache, indices = below
        return cache, source.indices if indices is None else indices[source.indices]
    return None


def cached(source: ImageSource, config: DataConfig) -> CachedSource:
    """The same images, decoded now by ``data.workers`` processes or by an earlier run.

    Raises:
        UserError: if there is too little room, or ``device`` meets images of different sizes.
    """
    recipe = Recipe(channels=config.channels)
    if config.cache == "mmap":
        return _memory_mapped(source, config, recipe)
    spans = [range(at, min(at + _SPAN, len(source))) for at in range(0, len(source), _SPAN)]
    parts: list[NDArray[np.uint8]] = []
    rows: list[NDArray[Any]] = []
    faults: list[Fault] = []
    total = 0
    for data, found, unreadable in read_spans(source, recipe, spans, config.workers):
        parts.append(np.frombuffer(data, dtype=np.uint8))
        rows.append(found)
        faults += [Fault(*fault) for fault in unreadable]
        if len(parts) == 1:  # before much is read: is there room?
            _check_room(config, len(data) * len(spans))
        total += len(data)
    if source.ledger is not None:
        source.ledger.add(faults)
    index = np.concatenate(rows)
    sizes = torch.from_numpy(np.stack([index["height"], index["width"]], axis=1).astype(np.int64))
    if config.cache == "device" and len(sizes[sizes[:, 0] > 0].unique(dim=0)) > 1:
        reason = (
            "needs images of one size: pack them with mim data pack --size N --square, or choose "
            "memory or mmap"
        )
        raise setting_error("data.cache", config.cache, reason)
    lengths = torch.from_numpy(index["bytes"].astype(np.int64))  # 0 of an unreadable image
    if config.cache == "device" and (lengths > sizes.prod(1) * config.channels).any():
        reason = "holds 8-bit images alone, and these have more bits: choose memory or mmap"
        raise setting_error("data.cache", config.cache, reason)
    pixels = torch.empty(total, dtype=torch.uint8).share_memory_()
    for into in pixels.split([len(part) for part in parts]):
        into.numpy()[:] = parts.pop(0)  # and free it: memory never holds all images twice
    return InSharedMemory(source, pixels, lengths.cumsum(0) - lengths, sizes, config.channels)


def _check_room(config: DataConfig, needed: int) -> None:
    free = psutil.virtual_memory().available
    if _SHARED.is_dir():
        free = min(free, shutil.disk_usage(_SHARED).free)
    if needed > free:
        reason = (
            f"needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of shared memory are free: "
            "choose mmap"
        )
        raise setting_error("data.cache", config.cache, reason)


def _memory_mapped(source: ImageSource, config: DataConfig, recipe: Recipe) -> MemoryMapped:
    root = Path(config.cache_path or Path.home() / ".cache/mim/decoded")
    folder = root / content_key(source, recipe, config)
    prepare_folder(folder, "data.cache_path")
    with FileLock(folder / "lock"):  # one process decodes, the others of a run wait for it
        remove_leftovers(folder)
        if not (folder / "all.npy").is_file():
            try:
                entry = pack_split(source, folder, "all", recipe, config.workers, folder.name)
            except OSError as error:
                reason = f"cannot hold the cache: {os.strerror(error.errno or 0)}"
                raise setting_error("data.cache_path", str(root), reason) from error
            if source.ledger is not None:
                source.ledger.add(Fault(*fault) for fault in entry["unreadable"])
    rows = np.load(folder / "all.npy", mmap_mode="r")
    names = [f"all-{number:05d}.bin" for number in range(int(rows["part"].max()) + 1)]
    if any(not (folder / name).is_file() for name in names):
        raise UserError(f"data.cache_path: {str(folder)!r} is damaged: delete it")
    return MemoryMapped(source, Packed(folder, rows, names, "pixels", config.channels))


class DeviceReader:
    """Cuts batches out of images that stay on the accelerator (or, without one, on the CPU).

    ``indices`` are positions in the cache of the source's images, None for all.
    """

    def __init__(self, cache: InSharedMemory, indices: Tensor | None, device: torch.device) -> None:
        self.device = device
        self.images = cache.on_device(device)
        positions = torch.arange(len(cache)) if indices is None else indices
        rows = cache.readable.long().cumsum(0) - 1  # where each readable image stands
        self.rows = torch.where(cache.readable, rows, -1)[positions]

    def can_read(self, part: Tensor) -> bool:
        """Whether all images at positions (B,) could be decoded."""
        return bool((self.rows[part] >= 0).all())

    def train(self, part: Tensor, keys: Tensor, config: DataConfig) -> Tensor:
        """What ``train_transform`` gives for the images at positions (B,), byte for byte."""
        if config.augment == "none":
            return self.eval(part, config)
        height, width = self.images.shape[2:]
        sizes = torch.tensor([height, width]).expand(len(part), 2)
        if config.augment == "padded_crop":
            whole, _ = self._covering(part, config, 1.0)
            room = whole.new_empty(*whole.shape[:2], *config.size)
            return padded_crops(list(whole), keys, config, room)
        boxes, mirrored = drawn_crops(keys, sizes, config)
        return self._cut(part, boxes, mirrored, config.size, resizer(config))

    def eval(self, part: Tensor, config: DataConfig) -> Tensor:
        """What ``eval_transform`` gives, byte for byte."""
        whole, (top, left) = self._covering(part, config, config.eval_share)
        return whole[:, :, top : top + config.size[0], left : left + config.size[1]].contiguous()

    def _covering(
        self, part: Tensor, config: DataConfig, share: float
    ) -> tuple[Tensor, tuple[int, int]]:
        """Images scaled as :func:`covering` says, and where their centre begins."""
        given = self.images.shape[2], self.images.shape[3]
        box, scaled, centre = covering(given, config.size, share)
        boxes = torch.tensor(box).expand(len(part), 4)
        plain = torch.zeros(len(part), dtype=torch.bool)
        return self._cut(part, boxes, plain, scaled, resizer(config)), centre

    def _cut(
        self, part: Tensor, boxes: Tensor, mirrored: Tensor, size: tuple[int, int], how: str
    ) -> Tensor:
        images = self.images[self.rows[part].to(self.device)]  # (B, C, h, w)
        return crop_resize(images, boxes.to(self.device), mirrored.to(self.device), size, how)


def device_reader(source: ImageSource, config: DataConfig) -> DeviceReader | None:
    """The reader of batches on the accelerator; None where ``data.cache`` is not ``device``."""
    below = resident(source) if config.cache == "device" else None
    if below is None:
        return None
    if not torch.cuda.is_available():
        return DeviceReader(*below, torch.device("cpu"))
    return DeviceReader(*below, torch.device("cuda", torch.cuda.current_device()))
