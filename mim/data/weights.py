"""How much each training image counts in the loss: a file, a column of the source, a function.

A weight of 0 leaves an image out: it adds nothing to loss and gradients. Weights follow from the
image and the epoch alone, so that every process knows those of the global batch. A custom function
is registered in a file named under ``plugins``, and named in the config::

    @WEIGHTS.register("mine")
    def mine(source: ImageSource, indices: Tensor, epoch: int) -> Tensor: ...
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mim.core.config import DataConfig
from mim.core.errors import UserError, setting_error
from mim.core.files import NPY_ERRORS, decode_text
from mim.core.registry import Registry
from mim.core.rng import name_to_int
from mim.data.sources.base import ImageSource

Weigh: TypeAlias = Callable[[ImageSource, Tensor, int], Tensor]
"""Source, positions (B,) and epoch -> weights (B,), numbers or booleans; must pickle."""

WEIGHTS: Registry[Weigh] = Registry("data.weights")
_ENDINGS = (".csv", ".npy")


class _Column:
    """One weight an image, whatever the epoch."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __call__(self, source: ImageSource, indices: Tensor, epoch: int) -> Tensor:
        return self.values[indices]


def open_weights(source: ImageSource, config: DataConfig) -> Weigh | None:
    """What weighs the training images; None where all count alike.

    ``data.weights`` names a function of :data:`WEIGHTS`, or a file:
        - an ``.npy`` (images,), booleans or numbers: sample id i has weight i;
        - a ``.csv`` with the columns ``image`` and ``weight``: an image is named by its path below
          ``data.path``, or by its sample id where the source has no paths.

    Without it the source's own ``weights`` are used, if it has any.

    Raises:
        UserError: for a missing or unreadable file, an image without a weight, a weight that is
            negative or not finite, or weights that leave out every image.
    """
    given = config.weights
    if given is None:
        if source.weights is None:
            return None
        values = source.weights
    elif given in WEIGHTS:
        return WEIGHTS.get(given)
    else:
        path = Path(given)
        if path.suffix.lower() not in _ENDINGS:
            known = ", ".join(WEIGHTS) or "none"
            reason = f"is no .csv or .npy file, nor a registered function (known: {known})"
            raise setting_error("data.weights", given, reason)
        if not path.is_file():
            raise setting_error("data.weights", given, "is no file")
        read = _read_csv if path.suffix.lower() == ".csv" else _read_npy
        values = read(path, given, source)
    values = check_weights(given or source.name, values, len(source))
    if not bool((values > 0).any()):
        raise setting_error("data.weights", given, "leaves out every training image")
    return _Column(values)


def check_weights(given: str | None, values: Tensor, count: int) -> Tensor:
    """(count,) float64 weights, none of them negative.

    Raises:
        UserError: if they are not.
    """
    values = torch.as_tensor(values)
    if values.shape != (count,):
        reason = f"gives weights of shape {tuple(values.shape)} for {count} images"
        raise setting_error("data.weights", given, reason)
    values = values.double()
    wrong = ~(values.isfinite() & (values >= 0))
    if bool(wrong.any()):
        reason = f"gives a weight of {float(values[wrong][0])}; it must be finite and at least 0"
        raise setting_error("data.weights", given, reason)
    return values


def _read_npy(path: Path, given: str, source: ImageSource) -> Tensor:
    try:
        values = np.load(path, allow_pickle=False)
        numbers = torch.from_numpy(np.asarray(values, dtype=np.float64))
    except NPY_ERRORS as error:
        reason = f"cannot be read: {' '.join(str(error).split())}"
        raise setting_error("data.weights", given, reason) from error
    if numbers.ndim != 1:
        reason = f"has shape {tuple(numbers.shape)}; weights are (images,)"
        raise setting_error("data.weights", given, reason)
    return _by_id(torch.arange(len(numbers)), numbers, given, source)


def _read_csv(path: Path, given: str, source: ImageSource) -> Tensor:
    ids, numbers = [], []
    known = set(source.sample_ids.tolist())
    try:
        with io.StringIO(decode_text(path.read_bytes()), newline="") as file:
            rows = csv.DictReader(file)
            if not {"image", "weight"} <= {*(rows.fieldnames or ())}:
                raise setting_error("data.weights", given, "needs the columns image and weight")
            for row in rows:
                name, weight = row["image"] or "", row["weight"] or ""
                by_path = name_to_int(name)
                if by_path not in known:  # accents are written in two ways
                    others = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
                    by_path = next((i for i in map(name_to_int, others) if i in known), by_path)
                is_number = by_path not in known and name.lstrip("-").isdecimal()
                ids.append(int(name) if is_number else by_path)
                numbers.append(float(weight))
    except ValueError as error:
        reason = f"cannot be read, line {rows.line_num}: {error}"
        raise setting_error("data.weights", given, reason) from error
    except (OSError, csv.Error) as error:
        raise setting_error("data.weights", given, f"cannot be read: {error}") from error
    order = torch.tensor(ids, dtype=torch.int64).sort(stable=True)
    twice = (order.values[1:] == order.values[:-1]).nonzero()
    if len(twice):
        line = int(order.indices[int(twice[0]) + 1]) + 2
        raise setting_error("data.weights", given, f"names an image twice, in line {line} again")
    values = torch.tensor(numbers, dtype=torch.float64)[order.indices]
    return _by_id(order.values, values, given, source)


def _by_id(ids: Tensor, values: Tensor, given: str, source: ImageSource) -> Tensor:
    """The weights of the source's images, in its order; ``ids`` are ascending."""
    sample_ids = source.sample_ids
    if not len(ids):
        raise setting_error("data.weights", given, "holds no weights")
    place = torch.searchsorted(ids, sample_ids).clamp(max=len(ids) - 1)
    lacking = (ids[place] != sample_ids).nonzero()[:, 0]
    if len(lacking):
        first = source.describe(int(lacking[0]))
        reason = f"has no weight for {len(lacking)} of {len(source)} images, the first of them"
        raise setting_error("data.weights", given, f"{reason} {first}")
    return values[place]


def batch_weights(
    weigh: Weigh, source: ImageSource, indices: Tensor, epoch: int, step: int, given: str | None
) -> Tensor:
    """(B,) float64, of the images of one step over all processes.

    Raises:
        UserError: if they are no weights, or none is above 0: there would be nothing to learn from.
    """
    values = check_weights(given, weigh(source, indices, epoch), len(indices))
    if not bool((values > 0).any()):
        what = f"leaves out all {len(indices)} images of step {step} (epoch {epoch})"
        raise UserError(f"data.weights: {what}; raise data.batch_size, or leave out fewer images")
    return values
