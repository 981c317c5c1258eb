"""Measurements of encoders, frozen or fine-tuned.

``evaluate`` measures any encoder, ``evaluate_run`` a run folder, whose ``result.json`` it adds to.
A new evaluation is one class in one file of this package, registered, and imported below.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mim.core.errors import UserError
from mim.core.fingerprints import check_images
from mim.data import ImageSource, open_source
from mim.evaluate.base import (
    EVALUATIONS,
    AnyEvaluation,
    EncoderEvaluation,
    Evaluation,
    EvaluationSettings,
    Features,
    ProbeSettings,
    TaskEvaluation,
    build_evaluation,
)
from mim.evaluate.dense.detect import Detect, DetectSettings
from mim.evaluate.dense.segment import Segment, SegmentSettings
from mim.evaluate.encoders import (
    Encoder,
    on_images,
    open_encoder,
    pixels_encoder,
    run_encoder,
    timm_encoder,
    untrained_encoder,
)
from mim.evaluate.features import check_pool, extract_features, pool_tokens
from mim.evaluate.finetune import Classifier, Finetune, FinetuneSettings
from mim.evaluate.predictions import save_predictions
from mim.evaluate.probes.analysis import Analysis, AnalysisSettings, effective_rank, linear_cka
from mim.evaluate.probes.attentive import Attentive, AttentiveSettings
from mim.evaluate.probes.knn import Knn, KnnSettings, knn_predict
from mim.evaluate.probes.label_free import LabelFree, LabelFreeSettings
from mim.evaluate.probes.linear import Linear, LinearSettings
from mim.evaluate.probes.linear_grid import LinearGrid, LinearGridSettings
from mim.evaluate.probes.linear_mae import LinearMae, LinearMaeSettings
from mim.evaluate.protocol import Protocol, encoder_digest, images_digest, protocol_of
from mim.evaluate.robustness import Robustness, RobustnessSettings
from mim.evaluate.training import TIMEOUT, several
from mim.training.checkpoint import FORMAT, read_config
from mim.training.results import UNFINISHED, read_result, update_result

__all__ = [
    "EVALUATIONS",
    "TIMEOUT",
    "Analysis",
    "AnalysisSettings",
    "Attentive",
    "AttentiveSettings",
    "Classifier",
    "Detect",
    "DetectSettings",
    "Encoder",
    "EncoderEvaluation",
    "Evaluation",
    "Features",
    "Finetune",
    "FinetuneSettings",
    "Knn",
    "KnnSettings",
    "LabelFree",
    "LabelFreeSettings",
    "Linear",
    "LinearGrid",
    "LinearGridSettings",
    "LinearMae",
    "LinearMaeSettings",
    "LinearSettings",
    "ProbeSettings",
    "Robustness",
    "RobustnessSettings",
    "Segment",
    "SegmentSettings",
    "TaskEvaluation",
    "build_evaluation",
    "check_files",
    "effective_rank",
    "evaluate",
    "evaluate_run",
    "extract_features",
    "knn_predict",
    "linear_cka",
    "on_images",
    "open_encoder",
    "pixels_encoder",
    "pool_tokens",
    "record",
    "run_encoder",
    "several",
    "timm_encoder",
    "untrained_encoder",
]

Settings = Mapping[str, Mapping[str, Any] | None]
"""Name of an evaluation -> settings that differ from its defaults."""
OnResult = Callable[[str, dict[str, float]], None]


def evaluate(
    encoder: Encoder,
    evaluations: Settings,
    *,
    train: ImageSource | None = None,
    val: ImageSource | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    folder: Path | None = None,
    on_result: OnResult | None = None,
) -> dict[str, dict[str, float]]:
    """Runs evaluations on one encoder; features are computed once for each pooling.

    Of several processes (``accelerate launch``), each calls it, within :func:`several`.

    Args:
        encoder: what is measured.
        evaluations: names and settings. All are checked before any feature is computed.
        train: images to fit and choose on; the train split of ``encoder.data`` by default. An
            evaluation with images of its own (segment, detect) does not read it.
        val: images to measure on; its val split by default.
        batch_size: images in the encoder at once.
        device: where encoder and probes run.
        precision: fp32, bf16 or fp16, of the encoder.
        folder: of the files that evaluations write, such as the answers to each test image
            (:mod:`mim.evaluate.predictions`) and a fine-tuned classifier; None writes none.
        on_result: is given each evaluation's name and numbers as it ends.

    Returns:
        Evaluation -> named numbers.

    Raises:
        UserError: for an unknown name or setting, missing labels, a class too small for few-shot,
            a pooling the encoder has no tokens for, or raw pixels where an encoder is needed.
    """
    built = {name: build_evaluation(name, given, encoder) for name, given in evaluations.items()}
    tasks = {n: e for n, e in built.items() if isinstance(e, TaskEvaluation)}
    for task in tasks.values():
        task.check_encoder(encoder)
        task.check()
    check_files(built, folder)
    numbers: dict[str, dict[str, float]] = {}

    def keep(name: str, found: dict[str, float]) -> None:
        numbers[name] = found
        if folder is not None and int(os.environ.get("RANK", "0")) == 0:
            save_predictions(folder, {name: found})
        if on_result is not None:
            on_result(name, found)

    others = {name: e for name, e in built.items() if name not in tasks}
    if others:
        own = train is None and val is None
        train = open_source(encoder.data, "train", folder) if train is None else train
        val = open_source(encoder.data, "val", folder) if val is None else val
        if own:
            present = f"{train.fingerprint()}-{val.fingerprint()}"
            check_images(encoder.data.fingerprint, present, "; --data DIR measures on others")
        _measure(encoder, others, train, val, batch_size, device, precision, folder, keep)
    for name, task in tasks.items():
        keep(name, task.run(encoder, device=device, precision=precision, folder=folder))
    return {name: numbers[name] for name in built}


def check_files(evaluations: Mapping[str, AnyEvaluation], folder: Path | None) -> None:
    """Refuses an evaluation that reads what none of the others will have left in the folder.

    Raises:
        UserError: naming the file and what writes it.
    """
    for name, evaluation in evaluations.items():
        if isinstance(evaluation, EncoderEvaluation):
            others = {key: other for key, other in evaluations.items() if key != name}
            evaluation.check_files(folder, others)


def _measure(
    encoder: Encoder,
    built: Mapping[str, Evaluation | EncoderEvaluation],
    train: ImageSource,
    val: ImageSource,
    batch_size: int,
    device: torch.device | str,
    precision: str,
    folder: Path | None,
    keep: OnResult,
) -> None:
    """The evaluations that read the encoder's own images."""
    for evaluation in built.values():
        assert isinstance(evaluation.settings, EvaluationSettings)
        check_pool(encoder.vit, evaluation.settings.pool)
        if isinstance(evaluation, EncoderEvaluation):
            evaluation.check_encoder(encoder)
        evaluation.check(train, val)

    by_pool: dict[str, list[tuple[str, Evaluation]]] = {}
    for name, evaluation in built.items():
        if isinstance(evaluation, EncoderEvaluation):
            continue
        # Raw pixels have no tokens to pool.
        pool = str("mean" if encoder.vit is None else evaluation.settings.pool)
        by_pool.setdefault(pool, []).append((name, evaluation))
    for pool, probes in by_pool.items():
        sets = [
            extract_features(encoder, source, pool, batch_size, device, precision).to(device)
            for source in (train, val)
        ]
        for name, probe in probes:
            keep(name, probe.run(*sets))
    # Those that read what the others leave come last; Python's sort is stable.
    for name, evaluation in sorted(built.items(), key=lambda item: _reads_others(item[1])):
        if isinstance(evaluation, EncoderEvaluation):
            # They cut, mix and scale images of one size by themselves.
            square = replace(encoder, data=encoder.data.as_square())
            found = evaluation.run(
                square, train, val, device=device, precision=precision, folder=folder
            )
            keep(name, found)


def _reads_others(evaluation: AnyEvaluation) -> bool:
    return isinstance(evaluation, EncoderEvaluation) and evaluation.reads_others


def evaluate_run(
    run: Path,
    names: Iterable[str],
    settings: Settings | None = None,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    on_result: OnResult | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluates a run's encoder and adds each evaluation to its ``result.json`` as it ends.

    The numbers stand under ``evaluations``, the settings they were measured with under
    ``evaluation_settings``, the encoder's precision under ``evaluation_precision``, what they
    depend on under ``protocols``; everything else in the file stays as it is. Of a run that has
    not ended the file says ``unfinished``.

    Args:
        run: the run folder.
        names: the evaluations.
        settings: what differs from the defaults of these evaluations.
        batch_size: images in the encoder at once.
        device: where encoder and probes run.
        precision: fp32, bf16 or fp16, of the encoder.
        on_result: is given each evaluation's name and numbers once they are written.

    Returns:
        The new numbers.

    Raises:
        UserError: as :func:`evaluate` and :func:`open_encoder`; or for an unreadable
            ``result.json``, or settings of an evaluation that does not run.
    """
    run = Path(run)
    settings = settings or {}
    names = list(names)
    for name in settings:
        if name not in names:
            EVALUATIONS.get(name)
            raise UserError(f"evaluations.{name}: has settings, but only {', '.join(names)} run")
    chosen = {name: settings.get(name) for name in names}
    for name, given in chosen.items():
        build_evaluation(name, given)
    main = int(os.environ.get("RANK", "0")) == 0  # several processes hold the same numbers
    read_result(run)  # refuses a broken file before the work, not after
    encoder = run_encoder(run)
    config = read_config(run)
    weights = encoder_digest(config, run)

    @functools.cache
    def images() -> str:
        return images_digest(config.data)

    def keep(name: str, numbers: dict[str, float]) -> None:
        if main:
            is_task = issubclass(EVALUATIONS.get(name), TaskEvaluation)
            read = "" if is_task else images()
            protocol = protocol_of(name, chosen[name], read, weights, precision)
            record(run, encoder, name, chosen[name], numbers, protocol, precision)
        if on_result is not None:
            on_result(name, numbers)

    return evaluate(
        encoder,
        chosen,
        batch_size=batch_size,
        device=device,
        precision=precision,
        folder=run,
        on_result=keep,
    )


def record(
    run: Path,
    encoder: Encoder,
    name: str,
    settings: Mapping[str, Any] | None,
    numbers: dict[str, float],
    protocol: Protocol,
    precision: str = "fp32",
) -> None:
    """Adds the numbers of an evaluation to a run's ``result.json``, and what they depend on."""
    built = build_evaluation(name, settings, encoder)
    parts: dict[str, Any] = {
        "evaluations": numbers,
        "evaluation_settings": asdict(built.settings),
        "evaluation_precision": built.precision or precision,
        "protocols": protocol,
    }

    def add(result: dict[str, Any]) -> dict[str, Any]:
        start = {} if "steps" in result else {"format": FORMAT, "status": UNFINISHED}
        added = {key: {**result.get(key, {}), name: value} for key, value in parts.items()}
        return {**start, **result, **added}

    update_result(run, add)
