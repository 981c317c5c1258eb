"""What an evaluation is: settings, the features or the encoder it reads, named numbers out.

All of them choose their hyper-parameters by the keyed splits below, which depend on the seed and
the images' ids alone: every encoder is probed on the same images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from mim.core.errors import UserError, choice_error, setting_error
from mim.core.fields import Bound, Count, Settings, build, hints
from mim.core.registry import Registry
from mim.core.rng import image_keys
from mim.data import ImageSource, Subset

if TYPE_CHECKING:
    from mim.evaluate.encoders import Encoder

POOLS = ("mean", "cls", "both")

HOLDOUT = 0.2
"""Share of the training images on which hyper-parameters are chosen."""

FOLDS = 5
"""Parts of a few-shot set that are held out in turn; fewer where a class has fewer images."""


class Features(NamedTuple):
    """What a frozen encoder makes of a set of images."""

    values: Tensor  # (n, D) float32
    labels: Tensor | None  # (n,) int64
    sample_ids: Tensor  # (n,) int64

    def to(self, device: torch.device | str) -> Features:
        """The same on ``device``."""
        labels = None if self.labels is None else self.labels.to(device)
        return Features(self.values.to(device), labels, self.sample_ids.to(device))


WITHOUT_LABELS = (
    "Measure it on labelled images (mim evaluate ... --data DIR, with a folder for each class), "
    "use mim evaluate label_free, look at mim visualize, or take features with mim embed"
)
"""What can be done instead of an evaluation that needs labels."""

NOT_EMPTY = Bound(bool, "must not be empty")


@dataclass(frozen=True)
class AnySettings(Settings):
    """Settings that all evaluations share."""

    seed: int = 0
    """Splits and all that is drawn follow from it; the same for all that is to be compared."""

    @property
    def name(self) -> str:
        """Of the evaluation."""
        return self.where.rpartition(".")[2]

    @classmethod
    def presets(cls, given: dict[str, Any], encoder: Encoder | None) -> dict[str, Any]:
        """Values that replace defaults, but none of those given; the encoder may be unknown."""
        return {}


@dataclass(frozen=True)
class EvaluationSettings(AnySettings):
    """Settings of the evaluations that have one vector for an image."""

    pool: Literal["mean", "cls", "both"] = "mean"
    """What stands for an image: mean (of the patch tokens), cls (the class token) or both."""


@dataclass(frozen=True)
class ProbeSettings(EvaluationSettings):
    """Settings that all probes of frozen features share."""

    few_shot: tuple[Count, ...] = (10,)
    """Numbers of training images a class; each is measured beside all of the training images."""
    draws: Count = 5
    """How many few-shot sets are drawn for each of these numbers."""


class AnyEvaluation(ABC):
    """What all kinds of evaluations share."""

    name: ClassVar[str] = ""
    """As registered."""
    Settings: ClassVar[type[AnySettings]]
    """As registered."""
    settings: AnySettings
    precision: ClassVar[str | None] = None
    """The one it measures in whatever is asked for; None: in that which is asked for."""

    def __init__(self, settings: AnySettings | None = None) -> None:
        self.settings = self.Settings() if settings is None else settings

    def measures(self) -> tuple[str, ...]:
        """Names the qualities that it gives; the first one decides where none is asked for.

        ``*`` stands for more, whose names are known once it has run.
        """
        return ("accuracy", "*")

    def check(self, train: ImageSource, val: ImageSource) -> None:
        """Refuses, before anything is computed, images that ``run`` could not use.

        Raises:
            UserError: if there are no images or no labels.
        """
        for source in (train, val):
            if source.labels is None:
                raise UserError(
                    f"data.source {source.name!r} has no labels; evaluation {self.name} "
                    f"needs them. {WITHOUT_LABELS}"
                )
            if len(source) == 0:
                raise UserError(
                    f"data.source {source.name!r} has no images; "
                    f"evaluation {self.name} needs train and val"
                )


class Evaluation(AnyEvaluation):
    """A measurement of a frozen encoder, by its features.

    A new one subclasses this and registers itself, with its settings, in :data:`EVALUATIONS`.
    """

    settings: ProbeSettings

    def check(self, train: ImageSource, val: ImageSource) -> None:
        """Refuses a class that is too small for ``few_shot``, too."""
        super().check(train, val)
        assert train.labels is not None
        check_few_shot(torch.as_tensor(train.labels), self.settings, train.classes)

    @abstractmethod
    def run(self, train: Features, val: Features) -> dict[str, float]:
        """Measures on ``val`` what was chosen and fitted on ``train``.

        Returns:
            Named numbers; ``accuracy`` lies between 0 and 1.
        """


def few_shot_measures(probe: Evaluation) -> tuple[str, ...]:
    """Names the accuracies after all training images and after each few-shot number of them."""
    return ("accuracy", *(f"accuracy_{n}_per_class" for n in probe.settings.few_shot))


class EncoderEvaluation(AnyEvaluation):
    """A measurement that needs the encoder itself and the images, not only features.

    It leaves the encoder it is given as it was. Raw pixels, which have no encoder, are refused;
    ``mim compare`` leaves it out of their row.
    """

    reads_others: ClassVar[bool] = False
    """Whether it reads files that other evaluations leave in the run folder: it then comes last."""

    def check_encoder(self, encoder: Encoder) -> None:
        """Refuses an encoder that :meth:`run` could not use.

        Raises:
            UserError: for raw pixels.
        """
        if encoder.vit is None:
            reason = f"needs an encoder, and {encoder.name} has none"
            raise UserError(f"evaluation {self.name} {reason}")

    def check_files(self, folder: Path | None, others: Mapping[str, AnyEvaluation]) -> None:
        """Refuses what needs files that are not there and that no other evaluation will leave.

        Args:
            folder: of the run; None where there is none.
            others: evaluations of the same call, by name.

        Raises:
            UserError: naming the file and what writes it.
        """

    @abstractmethod
    def run(
        self,
        encoder: Encoder,
        train: ImageSource,
        val: ImageSource,
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        folder: Path | None = None,
    ) -> dict[str, float]:
        """Measures on ``val`` what was chosen and fitted on ``train``.

        Args:
            encoder: with a ViT.
            train: images to fit and to choose on.
            val: images to measure on, once.
            device: where it runs.
            precision: fp32, bf16 or fp16 (autocast).
            folder: where files that it makes go; None writes none.

        Returns:
            Named numbers; ``accuracy`` lies between 0 and 1.
        """


class TaskEvaluation(EncoderEvaluation):
    """A measurement with images of its own, which its settings name; it needs no others."""

    @abstractmethod
    def check(self, train: ImageSource | None = None, val: ImageSource | None = None) -> None:
        """Refuses settings and images that :meth:`run` could not use; opens its own.

        Raises:
            UserError: see the evaluation.
        """

    @abstractmethod
    def run(
        self,
        encoder: Encoder,
        train: ImageSource | None = None,
        val: ImageSource | None = None,
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        folder: Path | None = None,
    ) -> dict[str, float]:
        """Measures on images of its own; ``train`` and ``val`` are not read."""


EVALUATIONS: Registry[type[Evaluation] | type[EncoderEvaluation]] = Registry("evaluations")


def build_evaluation(
    name: str, settings: Mapping[str, Any] | None = None, encoder: Encoder | None = None
) -> Evaluation | EncoderEvaluation:
    """The evaluation of a name, with its settings.

    Args:
        name: as registered.
        settings: fields of its settings; the others keep their defaults.
        encoder: what will be measured; some defaults follow from it.

    Raises:
        UserError: for an unknown name, an unknown setting or a value of the wrong type.
    """
    cls, kind = EVALUATIONS.get(name), EVALUATIONS.settings(name)
    where = f"evaluations.{name}"
    if not isinstance(settings, Mapping | None):
        raise setting_error(where, settings, "must be a mapping of settings")
    given = dict(settings or {})
    for key in given:
        if key not in hints(kind):
            raise choice_error(where, key, hints(kind))
    return cls(build(kind, {**kind.presets(given, encoder), **given}, where))


def labels_of(features: Features) -> Tensor:
    """(n,) int64.

    Raises:
        UserError: if there are none.
    """
    if features.labels is None:
        raise UserError(f"the images have no labels; this evaluation needs them. {WITHOUT_LABELS}")
    return features.labels.long()


def classes_to_fit(labels: Tensor, name: str) -> int:
    """K, for an evaluation that fits a classifier.

    Raises:
        UserError: if the training images are of one class only.
    """
    if len(labels.unique()) < 2:
        raise UserError(f"evaluation {name} needs at least 2 classes; train has 1")
    return int(labels.max()) + 1


def check_few_shot(
    labels: Tensor, settings: ProbeSettings, classes: tuple[str, ...] | list[str] | None = None
) -> None:
    """Refuses a class with fewer training images than a few-shot set draws of it.

    Raises:
        UserError: naming the smallest class.
    """
    present, counts = labels.unique(return_counts=True)
    smallest = int(counts.argmin())
    for n in settings.few_shot:
        if counts[smallest] < n:
            index = int(present[smallest])
            known = classes is not None and index < len(classes)
            name = repr(classes[index]) if known and classes else str(index)
            reason = f"asks for {n} images a class, but class {name} has {int(counts[smallest])}"
            raise setting_error(f"evaluations.{settings.name}.few_shot", settings.few_shot, reason)


def _rank_in_class(keys: Tensor, labels: Tensor) -> Tensor:
    """(n,) int64: how many images of the same class have a smaller key."""
    rank = torch.empty_like(labels)
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        order = of_class[keys[of_class].argsort(stable=True)]
        rank[order] = torch.arange(len(order), device=rank.device)
    return rank


def stratified_holdout(
    sample_ids: Tensor, labels: Tensor, seed: int, share: float = HOLDOUT
) -> Tensor:
    """(n,) bool: the share of each class, a fifth, on which hyper-parameters are chosen."""
    keys = image_keys(seed, -1, sample_ids, purpose="probe-split")
    rank = _rank_in_class(keys, labels)
    counts = torch.bincount(labels)[labels]
    return rank < (counts * share).round()


def low_shot(sample_ids: Tensor, labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Positions of a share of each class, 1 image at least; larger shares hold smaller ones."""
    keys = image_keys(seed, -1, sample_ids, purpose="low-shot")
    counts = torch.bincount(labels)[labels]
    wanted = (counts * fraction).round().clamp_min(1)
    return (_rank_in_class(keys, labels) < wanted).nonzero()[:, 0]


def keyed_subset(source: ImageSource, count: int, seed: int, purpose: str) -> ImageSource:
    """At most ``count`` images, the same for every encoder."""
    if len(source) <= count:
        return source
    keys = image_keys(seed, -1, source.sample_ids, purpose=purpose)
    return Subset(source, keys.argsort(stable=True)[:count].sort().values)


def few_shot_draw(sample_ids: Tensor, labels: Tensor, n: int, seed: int, draw: int) -> Tensor:
    """Positions of ``n`` images of each class, ascending; larger ``n`` holds smaller ``n``."""
    keys = image_keys(seed, draw, sample_ids, purpose="few-shot")
    return (_rank_in_class(keys, labels) < n).nonzero()[:, 0]


def few_shot_folds(sample_ids: Tensor, labels: Tensor, n: int, seed: int, draw: int) -> Tensor:
    """(F, n) bool, True where an image of a few-shot set is held out.

    Every class has its images spread evenly over the min(n, 5) folds. There are none for n = 1.
    """
    keys = image_keys(seed, draw, sample_ids, purpose="few-shot-folds")
    count = min(n, FOLDS) if n > 1 else 0
    fold = _rank_in_class(keys, labels) % max(count, 1)
    return fold == torch.arange(count, device=fold.device)[:, None]


def few_shot_sets(
    features: Features, n: int, settings: ProbeSettings
) -> list[tuple[Tensor, Tensor]]:
    """For each draw the positions (m,) of its images, and which each fold holds out, (F, m)."""
    ids, labels, sets = features.sample_ids, labels_of(features), []
    for draw in range(settings.draws):
        part = few_shot_draw(ids, labels, n, settings.seed, draw)
        folds = few_shot_folds(ids[part], labels[part], n, settings.seed, draw)
        sets.append((part, folds))
    return sets


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) of a number over draws; 0 for a single draw."""
    t = torch.tensor(values, dtype=torch.float64)
    return float(t.mean()), float(t.std()) if len(t) > 1 else 0.0
