"""Labels as sources find them, to positions in the classes of train: one table for all sources."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim.core.errors import UserError

MOST_CLASSES = 1_000_000
"""Labels without names count the classes from 0; a larger one is no number of a class."""


def one_spelling(name: str) -> str:
    """A name as Unicode composes it (NFC): file systems and editors write accents in two ways."""
    return unicodedata.normalize("NFC", name)


def label_table(
    here: Sequence[Any] | NDArray[Any],
    train: Sequence[Any] | NDArray[Any],
    names: Sequence[str] | None = None,
) -> tuple[Tensor | None, list[str]]:
    """Labels (n,) int64 of a split, and the classes, which are those of train.

    ``here`` (n,) and ``train`` (m,) are numbers or words. ``names`` are those of the classes that
    numbers count, where they are known. Without labels, returns None and no names: where all are
    missing, or all are one negative number, as in test splits.

    Raises:
        UserError: if some are missing or negative, if they are neither numbers nor words, for one
            that train or ``names`` has not, or for more than a million classes.
    """
    values, known = _clean(here), _clean(train)
    if known is None or values is None or not len(known):
        return None, []
    if values.dtype.kind != known.dtype.kind and len(values):
        raise UserError("has numbers for labels in one split, and words in the other")
    if known.dtype.kind == "U":
        classes = np.unique(known)
        unknown = np.setdiff1d(values, classes)
        if len(unknown):
            raise UserError(f"has the class {str(unknown[0])!r} in val but not in train")
        return torch.from_numpy(np.searchsorted(classes, values).astype(np.int64)), classes.tolist()
    largest = int(max(known.max(), values.max(initial=0)))
    if names is not None:
        if largest >= len(names):
            reason = f"names {len(names)} classes, and there are labels up to {largest}"
            raise UserError(reason)
        return torch.from_numpy(values), [one_spelling(name) for name in names]
    if largest >= MOST_CLASSES:
        reason = f"has the label {largest}; labels count the classes, from 0 to {MOST_CLASSES - 1}"
        raise UserError(reason)
    count = int(known.max()) + 1
    if largest >= count:
        raise UserError(f"has the class '{largest}' in val but not in train")
    return torch.from_numpy(values), [str(number) for number in range(count)]


def _clean(given: Sequence[Any] | NDArray[Any]) -> NDArray[Any] | None:
    """(n,) int64, or words in one spelling; None without labels."""
    values: NDArray[Any] | None
    if isinstance(given, np.ndarray):
        values = given
    else:
        values = np.empty(len(given), dtype=object)
        values[:] = given
    if values.ndim != 1:
        raise UserError("has lists for labels; a label is one number or word")
    if values.dtype.kind == "f":
        values = values.astype(object)
    if values.dtype.kind == "O":
        values = _of_objects(values)
    if values is None:
        return None
    if values.dtype.kind in "bU":
        words = np.unique(values)
        same = np.array([one_spelling(str(word)) for word in words], dtype=np.str_)
        return same[np.searchsorted(words, values)]
    if values.dtype.kind not in "iu":
        raise UserError(f"has {values.dtype} for labels; a label is one number or word")
    if len(values) and values.dtype.kind == "u" and int(values.max()) > np.iinfo(np.int64).max:
        raise UserError(f"has the label {values.max()}; labels count the classes from 0")
    negative = values[values < 0]
    if len(negative) and len(negative) == len(values) and (negative == negative[0]).all():
        return None
    if len(negative):
        reason = f"has the label {negative[0]} for {len(negative)} of {len(values)} images"
        raise UserError(f"{reason}; labels count the classes from 0")
    return values.astype(np.int64)


def _of_objects(values: NDArray[Any]) -> NDArray[Any] | None:
    """An array of numbers or words in place of one of Python objects; None if all are missing."""
    missing = np.array([value is None or _is_nan(value) for value in values], dtype=bool)
    if missing.all() and len(values):
        return None
    if missing.any():
        raise UserError(f"lacks labels for {missing.sum()} of {len(values)} images")
    kinds = {type(value) for value in values}
    if kinds <= {str, np.str_, bool, np.bool_}:
        return values.astype(np.str_)
    if kinds <= {bytes}:
        return np.array([value.decode("utf-8", "replace") for value in values], dtype=np.str_)
    wrong = [value for value in values if not isinstance(value, (int, float, np.number))]
    if wrong:
        raise UserError(f"has the label {str(wrong[0])[:40]!r}; a label is one number or word")
    wrong = [value for value in values if not abs(value) < 2**63 or int(value) != value]
    if wrong:
        raise UserError(f"has the label {wrong[0]}; labels count the classes from 0")
    return values.astype(np.int64)


def _is_nan(value: Any) -> bool:
    return isinstance(value, (float, np.floating)) and bool(np.isnan(value))


def check_ids(sample_ids: Tensor) -> None:
    """Check that no two images share an id, and with it mask and augmentation.

    Raises:
        UserError: if some do.
    """
    ordered = sample_ids.sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise UserError(f"gives the id {int(twice[0])} to two images")


def check_labels(labels: Tensor | None, classes: Sequence[str], count: int) -> None:
    """Check that labels (n,) are positions in the classes.

    Raises:
        UserError: if they are not.
    """
    if labels is None:
        return
    if labels.shape != (count,):
        raise UserError(f"has labels of shape {tuple(labels.shape)} for {count} images")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        low, high = int(labels.min()), int(labels.max())
        raise UserError(f"has labels from {low} to {high}, and {len(classes)} classes")
