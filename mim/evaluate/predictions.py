"""What an evaluation found for each test image, kept beside the run: ``predictions.npz``.

Two encoders that answer the same images can be compared image by image, class by class, and with
an interval that holds for new images; the accuracy alone allows none of this.

The file holds for each evaluation ``knn/sample_ids`` and ``knn/labels`` (I,), and one array a
measure, ``knn/accuracy`` (I,): whether (bool) or how well (float) each image was answered. The mean
of the array is the measure. A measure over few-shot draws has one row a draw, (draws, I).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from mim.core.errors import UserError
from mim.core.files import write_atomic
from mim.evaluate.base import spread

FILE = "predictions.npz"
Array = NDArray[Any]


class Measured(dict[str, float]):
    """Named numbers of an evaluation, and the answer to each test image behind them.

    An evaluation may return a plain dictionary instead; it then has no answers to keep.

    Args:
        numbers: as an evaluation returns them.
        sample_ids: (I,) of the images that were answered.
        answers: name of a measure -> (I,) or (draws, I), bool or float.
        labels: (I,) their classes, where there are any.
    """

    def __init__(
        self,
        numbers: Mapping[str, float],
        sample_ids: Tensor,
        answers: Mapping[str, Tensor],
        labels: Tensor | None = None,
    ) -> None:
        super().__init__(numbers)
        self.arrays: dict[str, Array] = {"sample_ids": sample_ids.cpu().numpy()}
        if labels is not None:
            self.arrays["labels"] = labels.cpu().numpy()
        self.arrays |= {name: answer.cpu().numpy() for name, answer in answers.items()}

    def add_draws(self, measure: str, answers: Sequence[Tensor]) -> None:
        """Adds a measure over few-shot draws, (I,) bool each: its mean and its deviation."""
        means = [float(answer.double().mean()) for answer in answers]
        self[measure], self[f"{measure}_std"] = spread(means)
        self.arrays[measure] = torch.stack(list(answers)).cpu().numpy()

    def include(self, other: Mapping[str, float], suffix: str) -> None:
        """Adds the numbers of a variant on the same test images, their names with a suffix."""
        self.update({f"{name}{suffix}": value for name, value in other.items()})
        if isinstance(other, Measured):
            own = {key: a for key, a in other.arrays.items() if key not in ("sample_ids", "labels")}
            added = {f"{key}{suffix}": array for key, array in own.items()}
            self.arrays = self.arrays | added  # a copy of these numbers may share the old one


def write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """Writes arrays by name, compressed and atomically."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # savez appends .npz to a path, not to a file
            np.savez_compressed(file, **dict[str, Any](arrays))

    write_atomic(path, write)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, those of the first process first; they may differ in number."""
    return torch.cat(gather_object([rows.cpu()]))


def save_predictions(folder: Path, measured: Mapping[str, Mapping[str, float]]) -> None:
    """Keeps the answers of evaluations in a run folder, beside those of earlier evaluations.

    Raises:
        UserError: if the file is there and cannot be read.
    """
    new = {
        name: numbers.arrays for name, numbers in measured.items() if isinstance(numbers, Measured)
    }
    if not new:
        return
    kept = {name: arrays for name, arrays in read_predictions(folder).items() if name not in new}
    flat = {
        f"{name}/{key}": a for name, arrays in {**kept, **new}.items() for key, a in arrays.items()
    }
    write_npz(folder / FILE, flat)


def read_predictions(folder: Path) -> dict[str, dict[str, Array]]:
    """Evaluation -> its arrays; empty where none were kept.

    Raises:
        UserError: if the file cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Array]] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                evaluation, _, key = name.partition("/")
                found.setdefault(evaluation, {})[key] = file[name]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as predictions ({error})") from error
    return found
