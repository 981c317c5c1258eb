"""Robustness: a classifier on corrupted images and on other renderings of its classes.

The classifier is the run's fine-tuned one, as in MAE's table (He et al. 2022, table 13), or a
linear probe. It is measured on corruptions of the run's own val images, made on the fly, or on a
folder in ImageNet-C's layout (Hendrycks and Dietterich 2019, https://arxiv.org/abs/1903.12261),
and on folders of other images of its classes: ImageNet-A, ImageNet-R, ImageNet-Sketch. Where a
folder has some of the classes only, predictions are restricted to these, as its authors do.

The corruption error CE of a corruption is the sum of the errors over its severities over the same
sum of a baseline; ``mce`` is its mean over the corruptions. Without a baseline there is
``mean_error`` alone, the mean over corruptions and severities, which is not normalised.

Shapes: B images, K classes, P classes that are present.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from mim.core.config import DataConfig
from mim.core.device import to_device
from mim.core.errors import choice_error, setting_error
from mim.core.fields import Count, Natural
from mim.core.files import load_yaml
from mim.core.progress import RunProgress
from mim.data import (
    ClassFolders,
    Corrupted,
    ImageSource,
    Subset,
    eval_loader,
    match_classes,
    normalize,
)
from mim.data.corruptions import BENCHMARK, CORRUPTIONS, SEVERITIES, check_channels
from mim.evaluate.base import (
    EVALUATIONS,
    NOT_EMPTY,
    AnyEvaluation,
    EncoderEvaluation,
    EvaluationSettings,
    keyed_subset,
)
from mim.evaluate.encoders import Encoder
from mim.evaluate.features import (
    check_finite,
    check_precision,
    extract_features,
    image_tokens,
    pool_tokens,
)
from mim.evaluate.finetune import FILE as FINETUNED
from mim.evaluate.finetune import FinetuneSettings, load_classifier
from mim.evaluate.predictions import Measured, gather_rows
from mim.evaluate.probes.linear import Linear, LinearSettings
from mim.evaluate.training import start_accelerator
from mim.training.checkpoint import prepare_folder, read_result, write_atomic
from mim.training.runtime.precision import autocast

ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's mean error over the severities of ImageNet-C, by which its mCE is normalised."""

Predict = Callable[[Tensor], Tensor]
"""Normalised images (B, C, H, W) -> logits (B, K)."""


@dataclass(frozen=True)
class RobustnessSettings(EvaluationSettings):
    """Settings of the evaluation of robustness."""

    classifier: str = "finetune"
    """What is measured: finetune (the run folder's finetune.safetensors, which the evaluation
    finetune writes), linear (a linear probe, fitted here), or a classifier's file."""
    corruptions: tuple[str, ...] = ()
    """Which corruptions; by default those of ImageNet-C's benchmark that can be made or that are
    in the folder."""
    severities: Annotated[tuple[int, ...], NOT_EMPTY] = SEVERITIES
    """Which severities, from 1 to 5."""
    images: Natural = 0
    """How many val images are corrupted on the fly, the same ones for every encoder; 0 is all."""
    imagenet_c: str = ""
    """Folder of corrupted images, CORRUPTION/SEVERITY/CLASS/...; then none are made on the fly."""
    folders: dict[str, str] = field(default_factory=dict)
    """Name and folder, CLASS/..., of other images of the classes, whose accuracy is measured:
    {imagenet_a: DIR, imagenet_r: DIR, sketch: DIR}."""
    unknown_classes: Literal["refuse", "leave_out"] = "refuse"
    """What to do with a class of a folder that the classifier does not know: refuse, or leave_out
    its images."""
    baseline: str = ""
    """Errors by which the mean corruption error is normalised: alexnet (of ImageNet-C alone), a
    run folder with this evaluation, or a YAML or JSON file: corruption to its mean error."""
    batch_size: Count = 256
    """Images in the classifier at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool == "both" and self.classifier != "linear":
            raise choice_error(f"{self.where}.pool", self.pool, ("mean", "cls"))
        if not set(self.severities) <= set(SEVERITIES):
            raise self.error("severities", f"must be some of {SEVERITIES}")
        if len(set(self.severities)) < len(self.severities):
            raise self.error("severities", "names a severity twice")
        if not self.imagenet_c:
            for name in self.corruptions:
                if name not in CORRUPTIONS:
                    raise choice_error("evaluations.robustness.corruptions", name, CORRUPTIONS)
        if self.baseline == "alexnet" and not self.imagenet_c:
            reason = "is for ImageNet-C's own images: set imagenet_c, or another baseline"
            raise self.error("baseline", reason)
        if self.baseline == "alexnet" and sorted(self.severities) != list(SEVERITIES):
            raise self.error("baseline", "is the mean over all five severities")
        if self.classifier not in ("linear", "finetune") and not Path(self.classifier).is_file():
            raise self.error("classifier", "is not finetune, linear or a file")
        for name, path in self.folders.items():
            if not isinstance(path, str) or not name:
                raise self.error("folders", "must map names to folders")


def corrupted_folders(root: Path) -> dict[str, dict[int, Path]]:
    """Corruption -> severity -> folder, ``CORRUPTION/SEVERITY`` or ``GROUP/CORRUPTION/SEVERITY``.

    The second is how ImageNet-C's archives (noise, blur, ...) lie beside each other.
    """
    found: dict[str, dict[int, Path]] = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        if inside := _severities(folder):
            found[folder.name] = inside
            continue
        for below in sorted(p for p in folder.iterdir() if p.is_dir()):
            if inside := _severities(below):
                found[below.name] = inside
    return found


def _severities(folder: Path) -> dict[int, Path]:
    with os.scandir(folder) as entries:
        return {int(e.name): Path(e.path) for e in entries if e.name.isdigit() and e.is_dir()}


def corruption_error(errors: Sequence[float], baseline: float) -> float:
    """CE: the sum of the errors over the severities, over that of a baseline.

    Args:
        errors: of one corruption, one a severity.
        baseline: mean of the baseline's over the same severities.
    """
    return sum(errors) / (len(errors) * baseline)


def mean_corruption_error(
    errors: Mapping[str, Sequence[float]], baseline: Mapping[str, float]
) -> float:
    """mCE: the mean of :func:`corruption_error` over the corruptions; 1 is the baseline itself."""
    each = [corruption_error(values, baseline[name]) for name, values in errors.items()]
    return sum(each) / len(each)


def read_baseline(
    given: str, corruptions: Sequence[str], severities: Sequence[int]
) -> dict[str, float]:
    """Corruption -> the baseline's mean error over the severities.

    Raises:
        UserError: if it cannot be read, or lacks one of these.
    """
    setting = "evaluations.robustness.baseline"
    if given == "alexnet":
        errors: dict[str, Any] = dict(ALEXNET)
    elif Path(given).is_dir():
        numbers = read_result(given).get("evaluations", {}).get("robustness")
        if numbers is None:
            raise setting_error(setting, given, "is a folder without the evaluation robustness")
        errors = {}
        for name in corruptions:
            keys = [error_key(name, severity) for severity in severities]
            if all(key in numbers for key in keys):
                errors[name] = sum(numbers[key] for key in keys) / len(keys)
    elif not Path(given).is_file():
        raise setting_error(setting, given, "is not alexnet, a run folder or a file")
    else:
        try:
            errors = load_yaml(given)
        except ValueError as error:
            raise setting_error(setting, given, f"cannot be read: {error}") from error
        if not isinstance(errors, dict):
            raise setting_error(setting, given, "does not map corruptions to their mean errors")
    for name in corruptions:
        value = errors.get(name)
        if value is None:
            raise setting_error(setting, given, f"has no error for {name}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value <= 1:
            reason = f"has the error {value!r} for {name}; it must be above 0 and at most 1"
            raise setting_error(setting, given, reason)
    return {name: float(errors[name]) for name in corruptions}


def error_key(corruption: str, severity: int) -> str:
    """What the number of one corruption and severity is called."""
    return f"error_{corruption}_severity_{severity}"


@torch.no_grad()
def right_answers(
    predict: Predict,
    source: ImageSource,
    data: DataConfig,
    batch_size: int,
    accelerator: Accelerator,
    classes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The ids (I,) of a source's images that can be read, and whether each is classified right.

    Args:
        predict: see :data:`Predict`.
        source: labelled images.
        data: how they are read.
        batch_size: images at once.
        accelerator: its processes share the images.
        classes: (P,) what the labels stand for among the K; predictions are restricted to these.
            By default the labels are those of the classifier.
    """
    device = accelerator.device
    ids, right = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.bool)]
    rank, world = accelerator.process_index, accelerator.num_processes
    for batch in eval_loader(source, data, batch_size, rank, world):
        images = to_device(batch.images, device)
        logits = predict(normalize(images, source.mean, source.std))  # (B, K)
        if classes is not None:
            logits = logits[:, torch.as_tensor(classes, device=device)]  # (B, P)
        assert batch.labels is not None
        ids.append(batch.sample_ids)
        right.append((logits.argmax(1) == to_device(batch.labels, device)).cpu())
    return gather_rows(torch.cat(ids)), gather_rows(torch.cat(right))


def _share(answers: tuple[Tensor, Tensor]) -> float:
    return float(answers[1].double().mean())


def _with_answers(
    numbers: dict[str, float],
    clean: tuple[Tensor, Tensor],
    corrupted: Sequence[tuple[Tensor, Tensor]],
) -> Measured:
    """The numbers, with the answers to each image that was corrupted, or to the clean images."""
    ids, right = clean
    if not corrupted or any(not torch.equal(other, corrupted[0][0]) for other, _ in corrupted):
        return Measured(numbers, ids, {"clean_accuracy": right})
    own = corrupted[0][0]
    answers = {"mean_error": 1 - torch.stack([each for _, each in corrupted]).double().mean(0)}
    if torch.equal(own, ids):
        answers["clean_accuracy"] = right
    return Measured(numbers, own, answers)


@EVALUATIONS.register("robustness", RobustnessSettings)
class Robustness(EncoderEvaluation):
    """Errors of a classifier on corrupted images, and its accuracy on other renderings."""

    settings: RobustnessSettings
    reads_others = True

    def measures(self) -> tuple[str, ...]:
        s = self.settings
        first = ("mce",) if s.baseline else ()
        return (*first, "mean_error", "clean_accuracy", *(f"accuracy_{name}" for name in s.folders))

    def check_files(self, folder: Path | None, others: Mapping[str, AnyEvaluation]) -> None:
        if self.settings.classifier != "finetune":
            return
        finetune = others.get("finetune")
        settings = None if finetune is None else finetune.settings
        written = isinstance(settings, FinetuneSettings) and settings.save
        if folder is not None and ((folder / FINETUNED).is_file() or written):
            return
        where = f"{folder} has no {FINETUNED}" if folder is not None else "there is no run folder"
        reason = (
            f"needs a fine-tuned classifier, and {where}: evaluate finetune,robustness, or name a "
            "file, or linear for a probe"
        )
        raise self.settings.error("classifier", reason)

    def check(self, train: ImageSource, val: ImageSource) -> None:
        """Refuses folders without the classes, corruptions or severities they need, too."""
        super().check(train, val)
        s = self.settings
        names = self._names()
        if s.imagenet_c:
            folders = corrupted_folders(Path(s.imagenet_c))
            for name in names:
                for severity in s.severities:
                    self._known(folders[name][severity], "imagenet_c", train.classes)
        for name, path in s.folders.items():
            self._known(Path(path), f"folders.{name}", train.classes)
        if s.baseline:
            read_baseline(s.baseline, names, s.severities)

    def check_encoder(self, encoder: Encoder) -> None:
        super().check_encoder(encoder)
        if not self.settings.imagenet_c:
            for name in self._names():
                check_channels(name, encoder.data.channels)

    def _names(self) -> list[str]:
        """The corruptions that are measured."""
        s = self.settings
        if not s.imagenet_c:
            return list(s.corruptions) or [name for name in BENCHMARK if name in CORRUPTIONS]
        root = Path(s.imagenet_c)
        if not root.is_dir():
            raise s.error("imagenet_c", "is no folder")
        folders = corrupted_folders(root)
        if not folders:
            raise s.error("imagenet_c", "holds no CORRUPTION/SEVERITY/CLASS, as ImageNet-C does")
        for name in s.corruptions:
            if name not in folders:
                raise choice_error("evaluations.robustness.corruptions", name, folders)
        names = list(s.corruptions) or [n for n in BENCHMARK if n in folders] or list(folders)
        for name in names:
            lacks = [str(k) for k in s.severities if k not in folders[name]]
            if lacks:
                raise s.error("imagenet_c", f"lacks {name}/{lacks[0]}")
        return names

    def _known(self, folder: Path, setting: str, classes: Sequence[str]) -> list[int | None]:
        """The position among ``classes`` of each of a folder's; None for one that is left out."""
        setting = f"evaluations.robustness.{setting}"
        if not folder.is_dir():
            raise setting_error(setting, str(folder), "is no folder")
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
        if not names:
            raise setting_error(setting, str(folder), "has no class sub-folders")
        found = match_classes(names, classes)
        unknown = [n for n, place in zip(names, found, strict=True) if place is None]
        if len(unknown) == len(names) or (unknown and self.settings.unknown_classes == "refuse"):
            reason = (
                f"has {len(unknown)} of {len(names)} classes that the classifier does not know, "
                f"such as {unknown[0]!r}; it knows {len(classes)}, such as {', '.join(classes[:3])}"
            )
            if len(unknown) < len(names):
                reason += " (unknown_classes: leave_out leaves them out)"
            raise setting_error(setting, str(folder), reason)
        return found

    def _opened(
        self,
        folder: Path,
        setting: str,
        classes: Sequence[str],
        like: ImageSource,
        data: DataConfig,
    ) -> tuple[ImageSource, list[int]]:
        """A folder's images of known classes, and what their labels stand for."""
        known = self._known(folder, setting, classes)
        source: ImageSource = ClassFolders(
            str(folder), data, f"evaluations.robustness.{setting}", like.mean, like.std
        )
        places = [place for place in known if place is not None]
        if len(places) == len(known):
            return source, places
        assert source.labels is not None
        is_known = torch.tensor([place is not None for place in known])
        kept = Subset(source, is_known[source.labels].nonzero()[:, 0])
        assert kept.labels is not None
        kept.labels = (is_known.cumsum(0) - 1)[kept.labels]
        return kept, places

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
        """Also draws the errors, to ``pictures/robustness.png``.

        Returns:
            mce with a baseline, mean_error, clean_accuracy, accuracy_FOLDER; error_CORRUPTION, the
            mean over severities, ce_CORRUPTION, and error_CORRUPTION_severity_N.
        """
        s = self.settings
        accelerator = start_accelerator(device)
        accelerator.wait_for_everyone()  # another process may still write the classifier
        place = accelerator.device
        predict, classes, statistics = self._classifier(encoder, train, place, precision, folder)
        val = _normalised_as(val, *statistics)
        given: dict[str, Any] = {"batch_size": s.batch_size, "accelerator": accelerator}
        answered = right_answers(predict, val, encoder.data, **given)
        clean = _share(answered)
        few = keyed_subset(val, s.images, s.seed, s.name) if s.images else val
        folders = corrupted_folders(Path(s.imagenet_c)) if s.imagenet_c else {}

        names = self._names()
        errors: dict[str, list[float]] = {}
        each: list[tuple[Tensor, Tensor]] = []
        main = accelerator.is_main_process
        total, done = len(names) * len(s.severities), 0
        label = f"robustness {encoder.name}"
        with RunProgress(label, total, enabled=main, measure="error") as progress:
            for name in names:
                errors[name] = []
                for severity in s.severities:
                    source: ImageSource
                    if folders:
                        images = folders[name][severity]
                        source, known = self._opened(
                            images, "imagenet_c", classes, val, encoder.data
                        )
                    else:
                        source, known = Corrupted(few, encoder.data, name, severity, s.seed), None
                    found = right_answers(predict, source, encoder.data, **given, classes=known)
                    each.append(found)
                    errors[name].append(1 - _share(found))
                    done += 1
                    progress.update(done, errors[name][-1])
        numbers: dict[str, float] = {}
        baseline = read_baseline(s.baseline, names, s.severities) if s.baseline else {}
        if baseline:
            numbers["mce"] = mean_corruption_error(errors, baseline)
        means = {name: sum(values) / len(values) for name, values in errors.items()}
        numbers["mean_error"] = sum(means.values()) / len(means)
        numbers["clean_accuracy"] = clean
        for name, path in s.folders.items():
            source, known = self._opened(Path(path), f"folders.{name}", classes, val, encoder.data)
            found = right_answers(predict, source, encoder.data, **given, classes=known)
            numbers[f"accuracy_{name}"] = _share(found)
        for name in names:
            numbers[f"error_{name}"] = means[name]
            if baseline:
                numbers[f"ce_{name}"] = corruption_error(errors[name], baseline[name])
        for name in names:
            for severity, value in zip(s.severities, errors[name], strict=True):
                numbers[error_key(name, severity)] = value
        if folder is not None and main:
            _save_figure(folder / "pictures" / "robustness.png", errors, s.severities, 1 - clean)
        return _with_answers(numbers, answered, [] if folders else each)

    def _classifier(
        self,
        encoder: Encoder,
        train: ImageSource,
        device: torch.device,
        precision: str,
        folder: Path | None,
    ) -> tuple[Predict, list[str], tuple[tuple[float, ...], tuple[float, ...]]]:
        """What predicts, its classes, and mean and standard deviation of what it reads."""
        s = self.settings
        assert train.labels is not None
        count = max(len(train.classes), int(train.labels.max()) + 1)
        classes = list(train.classes) or [str(label) for label in range(count)]
        check_precision(precision)
        vit = encoder.vit
        if s.classifier == "linear":
            features = extract_features(encoder, train, s.pool, s.batch_size, device, precision)
            settings = LinearSettings(few_shot=(), seed=s.seed, pool=s.pool)
            probe = Linear(settings).fit(features.to(device))

            def by_probe(images: Tensor) -> Tensor:
                assert vit is not None
                with autocast(precision, device):
                    tokens = image_tokens(vit, images)
                pooled = pool_tokens(vit, tokens.float(), s.pool)
                check_finite(pooled, precision)
                return probe.logits(pooled.float())[0, 0]

            return by_probe, classes, (train.mean, train.std)

        setting = "evaluations.robustness.classifier"
        if s.classifier == "finetune":
            assert folder is not None
            path = folder / FINETUNED
        else:
            path = Path(s.classifier)
        loaded = load_classifier(path, encoder, setting)
        if loaded.classes != classes:
            reason = f"has {len(loaded.classes)} classes ({_listed(loaded.classes)}), the images "
            reason += f"{len(classes)} ({_listed(classes)})"
            raise setting_error(setting, str(path), reason)
        model = loaded.model.to(device)

        def by_model(images: Tensor) -> Tensor:
            with autocast(precision, device):
                logits: Tensor = model(images)
            check_finite(logits, precision, "answers")
            return logits.float()

        return by_model, classes, (loaded.mean, loaded.std)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _normalised_as(
    source: ImageSource, mean: tuple[float, ...], std: tuple[float, ...]
) -> ImageSource:
    same = Subset(source, torch.arange(len(source)))
    same.mean, same.std = mean, std
    return same


def _save_figure(
    path: Path, errors: Mapping[str, Sequence[float]], severities: Sequence[int], clean: float
) -> None:
    """Error against severity: a panel a family, a line a corruption, 0 the images as they are."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families: dict[str, list[str]] = {}
    for name in errors:
        weather = "weather" if name in ("frost", "spatter") else "other"
        family = CORRUPTIONS[name].family if name in CORRUPTIONS else weather
        families.setdefault(family, []).append(name)
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    order = sorted(range(len(severities)), key=lambda place: severities[place])
    with mpl.rc_context({"text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=(3.3 * len(families), 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
        for axes, (family, names) in zip(panels, families.items(), strict=True):
            for number, name in enumerate(names):
                x = [0, *(severities[place] for place in order)]
                y = [100 * clean, *(100 * errors[name][place] for place in order)]
                colour, line = colours[number % 6], ("-", "--", ":")[number // 6 % 3]
                look = {"marker": "os^DvP"[number % 6], "markersize": 4, "color": colour}
                axes.plot(x, y, line, label=name.replace("_", " "), **look)
            axes.set(title=family, xlabel="severity", xticks=[0, *sorted(severities)])
            axes.grid(True, color="#E3E3E3", linewidth=0.7)
            axes.spines[["top", "right"]].set_visible(False)
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
            axes.legend(frameon=False, fontsize=8, **below)
        panels[0].set_ylabel("error (%)")
        prepare_folder(path.parent)
        write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
