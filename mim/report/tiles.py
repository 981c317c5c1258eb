"""Reconstructions of a comparison: a sheet that prints, and a viewer with a ratio slider."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mim.report.charts import styles
from mim.report.collect import Comparison, Run, read_arrays
from mim.report.figures import Picture, data_uri

Pixels = NDArray[np.uint8]
_SMALL = 112
"""Images below this side are kept as they are and shown enlarged."""
_LARGE = 144
"""Larger ones are brought to at most this side; a multiple of 16, JPEG's unit."""
_TILES = 160
"""How many tiles the sheet, and the viewer, hold at most, so that a page stays small."""
_IMAGES = 8
_BAND = 3
"""Encoders side by side; more stand below."""
_NAMES = {"composite": "with visible patches"}


@dataclass(frozen=True)
class TileGroup:
    """A heading above some columns of reconstructions."""

    label: str
    colour: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Tiles:
    """Reconstructions: rows are images, columns stand under the headings of ``groups``."""

    groups: tuple[TileGroup, ...]
    rows: tuple[tuple[Picture, ...], ...]
    caption: str

    @property
    def starts(self) -> set[int]:
        """Indices of the columns that open a group, except the first: a gap stands before them."""
        return set(accumulate(len(group.columns) for group in self.groups[:-1]))

    @property
    def bands(self) -> list[Tiles]:
        """The sheet cut into parts that a page is wide enough for; each has the shared columns."""
        shared = [group for group in self.groups if not group.label]
        own = [group for group in self.groups if group.label]
        ends = list(accumulate(len(group.columns) for group in self.groups))
        places = {
            group.label: range(end - len(group.columns), end)
            for group, end in zip(self.groups, ends, strict=True)
        }
        bands = []
        for start in range(0, len(own), _BAND):
            groups = (*shared, *own[start : start + _BAND])
            columns = [place for group in groups for place in places[group.label]]
            rows = tuple(tuple(row[place] for place in columns) for row in self.rows)
            bands.append(Tiles(groups, rows, self.caption))
        return bands


def _shown_runs(comparison: Comparison) -> dict[str, Run]:
    """Label -> the run that is shown: each group's with the first seed that all groups have."""
    available = {
        group.label: {run.seed: run for run in group.finished if _pictures_of(run).is_file()}
        for group in comparison.groups
    }
    available = {label: runs for label, runs in available.items() if runs}
    if not available:
        return {}
    shared = set.intersection(*(set(runs) for runs in available.values()))
    return {label: runs[min(shared) if shared else min(runs)] for label, runs in available.items()}


def reconstructions(comparison: Comparison) -> Tiles | None:
    """The same images under the same masks in every group, side by side.

    What the groups share (originals, masked images) stands once; what they do not, under each.
    """
    shown = _shown_runs(comparison)
    if not shown:
        return None
    arrays = {label: _load(run) for label, run in shown.items()}
    look = styles(comparison)
    first = next(iter(arrays.values()))
    common = [
        key
        for key in ("original", "masked")
        if all(np.array_equal(first[key], other[key]) for other in arrays.values())
    ]
    own = [key for key in ("original", "masked", "prediction", "composite") if key not in common]
    columns: list[tuple[str, str]] = [("", key) for key in common]
    groups = [TileGroup("", "transparent", tuple(common))] if common else []
    for label in arrays:
        columns += [(label, key) for key in own]
        heads = tuple(_NAMES.get(key, key) for key in own)
        groups.append(TileGroup(label, look[label].colour, heads))
    count = min(
        _IMAGES,
        max(1, _TILES // len(columns)),
        *(len(array["original"]) for array in arrays.values()),
    )
    rows = []
    for index in range(count):
        row = []
        for label, key in columns:
            image = (arrays[label] if label else first)[key][index]
            alt = f"Image {index + 1}, {f'{label}, ' if label else ''}{_NAMES.get(key, key)}"
            row.append(encode_image(image, alt))
        rows.append(tuple(row))
    same = len(common) == 2
    what = "The same images under the same masks" if same else "Masks or images differ by group"
    seeds = sorted({run.seed for run in shown.values()})
    plural = "seed" if len(seeds) == 1 else "seeds"
    caption = (
        f"{what}; {plural} {', '.join(map(str, seeds))}. Prediction: what the decoder "
        "says of every patch. With visible patches: the hidden patches predicted, the others given."
    )
    return Tiles(tuple(groups), tuple(rows), caption)


def viewer(comparison: Comparison) -> dict[str, Any] | None:
    """What the page's viewer shows: predictions of every group at several mask ratios.

    Returns:
        ``width``, ``height`` of a tile in pixels; ``small``; ``count`` of images, and ``first``,
        which of them is shown at first; ``originals``, a sheet with an image a column; ``ratios``,
        ``start`` (the trained one); ``masks``, distinct masks as strings of 0 and 1; ``groups``
        with ``label``, ``colour``, ``grid``, ``sheet`` (a row a ratio, a column an image), ``row``
        and ``mask`` (by ratio; None where it has none).
        None where groups show other images than each other, or none.
    """
    shown = _shown_runs(comparison)
    arrays = {label: _load(run) for label, run in shown.items()}
    if not arrays:
        return None
    first = next(iter(arrays.values()))["original"]
    if not all(np.array_equal(first, array["original"]) for array in arrays.values()):
        return None
    own = {label: round(float(array["is_masked"].mean()), 2) for label, array in arrays.items()}
    seen = {label: {own[label]: (a["prediction"], a["is_masked"])} for label, a in arrays.items()}
    for label, run in shown.items():
        extra = _load_ratios(run, _is_grey(arrays[label]["original"]))
        for place, ratio in enumerate(extra.get("ratio", ())):
            pair = (extra["prediction"][place], extra["is_masked"][place])
            seen[label].setdefault(round(float(ratio), 2), pair)
    ratios = sorted({ratio for found in seen.values() for ratio in found})
    if len(ratios) * len(seen) > _TILES:
        ratios = sorted(set(own.values()))
    count = max(1, min(_IMAGES, len(first), _TILES // (len(ratios) * len(seen))))
    look = styles(comparison)
    masks: dict[str, int] = {}
    groups = []
    for label, found in seen.items():
        has = [ratio for ratio in ratios if ratio in found]
        sheet, _ = _encode(np.concatenate([found[ratio][0][:count] for ratio in has]), count)
        hidden = {
            ratio: [
                masks.setdefault("".join("01"[int(bit)] for bit in flags.ravel()), len(masks))
                for flags in found[ratio][1][:count]
            ]
            for ratio in has
        }
        groups.append(
            {
                "label": label,
                "colour": look[label].colour,
                "grid": [int(side) for side in found[has[0]][1].shape[1:]],
                "sheet": sheet,
                "row": [has.index(ratio) if ratio in has else None for ratio in ratios],
                "mask": [hidden.get(ratio) for ratio in ratios],
            }
        )
    originals, small = _encode(first[:count], count)
    height, width = _size(first.shape[1], first.shape[2])
    return {
        "width": width,
        "height": height,
        "small": small,
        "count": count,
        "first": _most_telling(first[:count]),
        "originals": originals,
        "ratios": ratios,
        "start": ratios.index(next(iter(own.values()))),
        "masks": list(masks),
        "groups": groups,
    }


def _most_telling(images: Pixels) -> int:
    """Position of the image whose parts differ most in colour: something is to be seen there."""
    count, height, width, channels = images.shape
    tall, wide = max(height // 8, 1), max(width // 8, 1)
    whole = images[:, : height // tall * tall, : width // wide * wide]
    parts = whole.reshape(count, height // tall, tall, width // wide, wide, channels).mean((2, 4))
    return int(parts.std((1, 2)).sum(-1).argmax())


def _pictures_of(run: Run) -> Path:
    return run.folder / "reconstructions.npz"


def _load(run: Run) -> dict[str, NDArray[Any]]:
    keys = ("original", "masked", "prediction", "composite", "is_masked")
    arrays = read_arrays(_pictures_of(run), "reconstructions", keys) or {}
    grey = _is_grey(arrays["original"])
    return arrays | {key: _as_grey(arrays[key], grey) for key in keys[1:-1]}


def _is_grey(images: Pixels) -> NDArray[np.bool_]:
    """(n,) which images have the same values in all channels, but for a rounding."""
    reach = images.max(-1).astype(np.int64) - images.min(-1)
    return np.asarray(reach.reshape(len(images), -1).max(1) <= 2)


def _as_grey(images: Pixels, grey: NDArray[np.bool_]) -> Pixels:
    """What is made of grey images, (..., n, H, W, C), as the mean of its channels.

    The decoder predicts every channel by itself, so that its error would be seen as a tint.
    """
    mean = images.mean(-1, keepdims=True).round().astype(np.uint8)
    return np.asarray(np.where(grey[:, None, None, None], mean, images))


def _load_ratios(run: Run, grey: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    path = run.folder / "reconstructions_ratios.npz"
    keys = ("ratio", "prediction", "is_masked")
    arrays = read_arrays(path, "reconstructions", keys) or {}
    if arrays and arrays["prediction"].shape[1] == len(grey):
        arrays["prediction"] = _as_grey(arrays["prediction"], grey)
    return arrays


def _size(height: int, width: int) -> tuple[int, int]:
    """(height, width) that a tile has in the page."""
    side = max(height, width)
    if side < _SMALL:
        return height, width
    factor = min(1.0, _LARGE / side)
    # Whole units of JPEG, so that neighbours in a sheet do not bleed into each other.
    return (max(round(height * factor / 16), 1) * 16, max(round(width * factor / 16), 1) * 16)


def encode_image(image: Pixels, alt: str) -> Picture:
    """One image (H, W, C) for the page."""
    source, small = _encode(image[None])
    return Picture(source, alt, small)


def _encode(images: Pixels, columns: int = 1) -> tuple[str, bool]:
    """Images (n, H, W, C) as one sheet; 1 channel gray, 3 colour, otherwise the first.

    Returns:
        (data URI, whether the images are small): small ones without loss.
    """
    n, height, width, channels = images.shape
    pixels = images if channels == 3 else images[..., :1].repeat(3, axis=-1)
    tall, wide = _size(height, width)
    sheet = Image.new("RGB", (columns * wide, -(-n // columns) * tall))
    for place, array in enumerate(pixels):
        tile = Image.fromarray(np.ascontiguousarray(array))
        if (tall, wide) != (height, width):
            tile = tile.resize((wide, tall), Image.Resampling.LANCZOS)
        sheet.paste(tile, (place % columns * wide, place // columns * tall))
    buffer = io.BytesIO()
    small = max(height, width) < _SMALL
    if small:
        sheet.save(buffer, format="PNG", optimize=True)
        return data_uri("image/png", buffer.getvalue()), True
    sheet.save(buffer, format="JPEG", quality=80)
    return data_uri("image/jpeg", buffer.getvalue()), False
