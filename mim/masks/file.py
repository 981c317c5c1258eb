"""Masks read from files: one for all images, or one for each."""

from __future__ import annotations

import itertools
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mim.core.errors import UserError, setting_error
from mim.core.fields import Settings, Share
from mim.core.files import IMAGE_EXTENSIONS, NPY_ERRORS, walk
from mim.core.rng import name_to_int
from mim.masks.generators import MASKS, Grid, MaskContext, MaskGenerator, MaskRequest

_KINDS = (".npy", ".png")
# What numpy and PIL are known to raise on damaged files.
_READ_ERRORS: tuple[type[Exception], ...] = (
    *NPY_ERRORS,
    *(struct.error, zlib.error, zipfile.BadZipFile),
    Image.DecompressionBombError,
)


@dataclass(frozen=True, eq=False)
class _Masks:
    """Masks as read from files."""

    flags: Tensor
    """(M, N) bool, True where a patch is hidden."""
    ids: Tensor | None = None
    """(I,) int64 ascending, the sample ids that have a mask; None where one mask serves all."""
    rows: Tensor | None = None
    """(I,) int64, the row of ``flags`` of each."""


@dataclass(frozen=True)
class FileSettings(Settings):
    """Settings of the generator file; it does not use ``mask.ratio``."""

    path: str | None = None
    """One .npy or .png for all images, one .npy (images, rows, columns) indexed by sample id, or a
    folder with the same paths as the image folder. 1, true and white hide."""
    share: Share = 0.5
    """Share of a patch's pixels from which on it is hidden, where a mask is given in pixels."""


@MASKS.register("file", FileSettings)
class FileMask(MaskGenerator):
    """Masks from ``mask.file.path``; ``mask.ratio`` and the keys play no part.

    The path is one of
        - an ``.npy`` or ``.png`` with one mask, used for all images;
        - an ``.npy`` of shape (images, rows, columns): sample id i has mask i. For the embedded
          and torchvision sets, whose ids are positions; torchvision's train and test parts both
          count from 0 and so share masks;
        - a folder for ``data.source: imagefolder``: the image ``train/cat/1.jpg`` of ``data.path``
          has the mask ``train/cat/1.png`` or ``.npy`` of this folder.

    An ``.npy`` holds booleans or the numbers 0 and 1, a ``.png`` black and white (0 and 255, or 0
    and 1); true, 1 and white hide. A mask has the shape of the grid of patches, or is given in
    pixels: any size whose sides are multiples of the grid's. A patch is then hidden if at least
    ``mask.file.share`` of its pixels are.

    A mask lies over the image as the model sees it: a crop or flip of the image does not move it
    (``data.augment: none`` keeps masks drawn on the image in place). All files are read, and
    checked, once for each generator.
    """

    settings: FileSettings

    def __init__(self, settings: FileSettings, context: MaskContext) -> None:
        super().__init__(settings, context)
        self._read: tuple[Grid, _Masks] | None = None

    def draw(self, request: MaskRequest) -> Tensor:
        """Look the masks up; raise a ``UserError`` that names an image without one."""
        masks, device = self._masks(request.grid), request.keys.device
        if masks.ids is None or masks.rows is None:
            return masks.flags.to(device).expand(len(request.keys), -1)
        if request.sample_ids is None:
            raise self._error("has a mask for each image: pass sample_ids")
        ids = request.sample_ids.cpu().long()  # (B,)
        lacking = self.missing(request.grid, ids)
        if len(lacking):
            raise self._error(f"has no mask for the image with id {int(ids[lacking[0]])}")
        index = torch.searchsorted(masks.ids, ids)
        return masks.flags[masks.rows[index]].to(device)  # (B, N)

    def missing(self, grid: Grid, sample_ids: Tensor) -> Tensor:
        ids = self._masks(grid).ids
        if ids is None:
            return super().missing(grid, sample_ids)
        index = torch.searchsorted(ids, sample_ids).clamp(max=len(ids) - 1)
        return (ids[index] != sample_ids).nonzero()[:, 0]

    def check(self, grid: Grid) -> None:
        """Read the masks; raise a ``UserError`` where one is unusable. The ratio plays no part."""
        self._masks(grid)

    def check_sizes(self) -> None:
        reason = "has masks for images of one size, and data.aspect is keep"
        raise setting_error("mask.name", self.name, reason)

    def _error(self, reason: str, name: str | None = None) -> UserError:
        return setting_error("mask.file.path", name or self.settings.path, reason)

    def _masks(self, grid: Grid) -> _Masks:
        if self._read is None or self._read[0] != grid:
            with torch.device("cpu"):  # a config is checked on the meta device
                self._read = grid, self._load(grid)
        return self._read[1]

    def _load(self, grid: Grid) -> _Masks:
        if self.settings.path is None:
            raise self._error("is needed by mask.name=file")
        path = Path(self.settings.path)
        if path.is_dir():
            return self._load_folder(path, grid)
        if not path.is_file():
            raise self._error("is no file or folder")
        if path.suffix.lower() not in _KINDS:
            raise self._error("is neither a folder nor an .npy or .png")
        name = self.settings.path
        values = self._values(path, name)
        if values.ndim == 2:
            return _Masks(self._patches(values[None], grid, [name]))
        ids = torch.arange(len(values))
        return _Masks(self._patches(values, grid, [f"{name}[{i}]" for i in ids.tolist()]), ids, ids)

    def _load_folder(self, root: Path, grid: Grid) -> _Masks:
        try:
            found = ((folder.path, name) for folder in walk(root) for name in folder.files)
            files = [
                name if path == "." else f"{path}/{name}"
                for path, name in found
                if name.lower().endswith(_KINDS)
            ]
            files.sort(key=lambda file: (file.rpartition(".")[0], file))
            stems = [file.rpartition(".")[0] for file in files]
            endings = [e for x in IMAGE_EXTENSIONS for e in (x, x.upper(), "." + x[1:].title())]
            ids = [name_to_int(stem + ending) for stem in stems for ending in endings]
        except (OSError, UnicodeEncodeError) as error:
            raise self._error(f"cannot be read: {error}") from error
        if not files:
            raise self._error("has no .npy or .png in it")
        for before, after in itertools.pairwise(files):
            if before.rpartition(".")[0] == after.rpartition(".")[0]:
                raise self._error(f"has two masks for one image, {before} and {after}")
        flags = torch.empty(len(files), grid[0] * grid[1], dtype=torch.bool)
        for row, file in enumerate(files):
            name = (root / file).as_posix()
            values = self._values(root / file, name)
            if values.ndim != 2:
                shape = " x ".join(map(str, values.shape))
                reason = f"has shape {shape}; a mask in a folder is (rows, columns)"
                raise self._error(reason, name)
            flags[row] = self._patches(values[None], grid, [name])[0]
        order = torch.tensor(ids, dtype=torch.int64).sort()
        return _Masks(flags, order.values, order.indices // len(endings))

    def _values(self, path: Path, name: str) -> NDArray[np.bool_]:
        """Read a file as (H, W) or (n, H, W) bool, True where hidden."""
        is_array = path.suffix.lower() == ".npy"
        if not path.is_file():
            raise self._error("cannot be read: it is no regular file", name)
        try:
            values: Any = np.load(path, allow_pickle=False) if is_array else _read_png(path)
        except _READ_ERRORS as error:
            reason = f"cannot be read: {' '.join(str(error).split())}"
            raise self._error(reason, name) from error
        if not isinstance(values, np.ndarray):  # an .npz under another name
            raise self._error("holds no array", name)
        dimensions = (2, 3) if is_array else (2,)
        if values.ndim not in dimensions or 0 in values.shape:
            shape = " x ".join(map(str, values.shape)) or "()"
            what = "(rows, columns) or (images, rows, columns)" if is_array else "(rows, columns)"
            raise self._error(f"has shape {shape}; a mask is {what}", name)
        if values.dtype == np.bool_:
            return values
        if not np.issubdtype(values.dtype, np.number) or np.iscomplexobj(values):
            reason = f"holds {values.dtype}; a mask holds booleans, or 0 and 1"
            raise self._error(reason, name)
        one = 255 if not is_array and (values > 1).any() else 1
        wrong = values[(values != 0) & (values != one)]
        if wrong.size:
            valid = "0 and 1" if is_array else "black and white, 0 and 255 (or 0 and 1)"
            raise self._error(f"holds the value {wrong.flat[0]}; a mask holds {valid}", name)
        return values != 0

    def _patches(self, values: NDArray[np.bool_], grid: Grid, names: list[str]) -> Tensor:
        """Turn masks (M, H, W) in pixels into (M, N) bool, True where a patch is hidden."""
        rows, cols = grid
        count, height, width = values.shape
        if height % rows or width % cols:
            reason = f"has shape {height} x {width}, whose sides are no multiples of the grid's"
            raise self._error(f"{reason} {rows} x {cols}", names[0] if count == 1 else None)
        cells = values.reshape(count, rows, height // rows, cols, width // cols)
        hidden = cells.mean(axis=(2, 4)) >= self.settings.share  # (M, rows, cols)
        flat = torch.from_numpy(hidden.reshape(count, -1))
        number = flat.sum(dim=1)
        bad = ((number == 0) | (number == rows * cols)).nonzero()[:, 0]
        if len(bad):
            which = "no patch" if number[bad[0]] == 0 else "every patch"
            reason = f"hides {which} of a grid of {rows} x {cols}"
            raise self._error(reason, names[int(bad[0])])
        return flat


def _read_png(path: Path) -> NDArray[np.generic]:
    """Read gray values (H, W); raise a ``ValueError`` for colours or transparency."""
    with Image.open(path, formats=["PNG"]) as image:
        image.load()
        if "A" in image.getbands() or "transparency" in image.info:
            raise ValueError("it has transparency; a mask is black and white")
        if image.mode in ("P", "RGB"):
            colours = np.asarray(image.convert("RGB"))
            if (colours != colours[:, :, :1]).any():
                raise ValueError("it has colours; a mask is black and white")
            return colours[:, :, 0]
        return np.asarray(image)
