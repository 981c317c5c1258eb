"""Read images of a source and replace unreadable ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mim.core.errors import UserError
from mim.core.rng import image_keys, uniforms
from mim.data.images.decode import UnreadableImage
from mim.data.images.transforms import Picture
from mim.data.sources.base import ImageSource
from mim.data.unreadable import Fault

_TRIES = 32


def read_images(
    source: ImageSource, indices: Tensor, *, replace: bool
) -> tuple[list[Picture], Tensor, list[Fault]]:
    """The images at positions (B,), with those positions (m,) and the faults met.

    With ``replace``, a keyed substitute takes the place of an unreadable image and m = B; without,
    the image is left out.

    Raises:
        UserError: if no substitute can be read either.
    """
    images: list[Picture] = []
    positions: list[int] = []
    faults: list[Fault] = []
    source.ahead(indices)
    for index in indices.tolist():
        for position in _candidates(source, index, replace):
            try:
                images.append(source.image(position))
            except UnreadableImage as error:
                faults.append(Fault(error.name, error.reason))
            else:
                positions.append(position)
                break
        else:
            if replace:
                where = f"{source.name}: {source.describe(index)}"
                raise UserError(f"{where} and {_TRIES} images in its place are unreadable")
    return images, torch.tensor(positions, dtype=torch.int64), faults


def _candidates(source: ImageSource, index: int, replace: bool) -> Iterator[int]:
    yield index
    if replace:
        key = image_keys(0, -1, source.sample_ids[index : index + 1], purpose="replace")
        yield from (uniforms(key, _TRIES)[0] * len(source)).long().tolist()
