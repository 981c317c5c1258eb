"""What a measured number depends on, as digests that stand beside it in ``result.json``.

Whoever repeats an evaluation, or puts numbers into one column, compares these first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mim.core.config import Config, DataConfig
from mim.core.files import content_digest, file_digest
from mim.core.settings import flatten
from mim.data import open_source
from mim.evaluate.base import EVALUATIONS, EncoderEvaluation, TaskEvaluation, build_evaluation
from mim.training.checkpoint import checkpoints, fingerprint

Protocol = dict[str, str]
"""``protocol`` is the digest of ``settings`` and ``images``: equal where numbers of several
encoders can be compared. ``encoder`` is of the weights and of how they read an image."""

_WORDS = {"settings": "other settings", "images": "other images", "encoder": "other weights"}
_FILES = ("path", "weights", "files", "classes", "checkpoint", "classifier", "baseline")
# What says where images are, or where things go; images have a digest of their own.
_PLACES = ("data.path", "data.val_path", "data.cache_path", "output")


def protocol_of(
    name: str,
    settings: Mapping[str, Any] | None,
    images: str,
    encoder: str,
    precision: str = "fp32",
) -> Protocol:
    """What the numbers of an evaluation depend on.

    Args:
        name: of the evaluation.
        settings: what differs from its defaults; values that follow from the encoder are left out.
        images: of :func:`images_digest`; unused where the evaluation has images of its own.
        encoder: of :func:`encoder_digest`.
        precision: of the encoder.
    """
    built = build_evaluation(name, settings)
    given = asdict(built.settings)
    for field in fields(built.settings):  # a later setting that is as it was before it changes none
        if "before" in field.metadata and given[field.name] == field.metadata["before"]:
            del given[field.name]
    parts = {
        "settings": _digest([name, given, precision, files_of(given)]),
        "images": "" if isinstance(built, TaskEvaluation) else images,
    }
    return {"protocol": _digest(parts), **parts, "encoder": encoder}


def outdated(
    result: Mapping[str, Any], protocols: Mapping[str, Protocol], legacy: bool = False
) -> dict[str, str]:
    """The evaluations that are to be measured, and why: empty for one that never was.

    ``legacy`` accepts numbers without a protocol, which older versions wrote.
    """
    left: dict[str, str] = {}
    for name, wanted in protocols.items():
        known = result.get("protocols", {}).get(name)
        if name not in result.get("evaluations", {}) or (known is None and not legacy):
            left[name] = ""
        elif known is not None and known != wanted:
            differing = [words for key, words in _WORDS.items() if known.get(key) != wanted[key]]
            left[name] = " and ".join(differing)
    kinds = {name: EVALUATIONS.get(name) for name in protocols}
    writers = [name for name in left if issubclass(kinds[name], EncoderEvaluation)]
    for name, kind in kinds.items():  # what reads files that others leave follows them
        if writers and issubclass(kind, EncoderEvaluation) and kind.reads_others:
            left.setdefault(name, f"{', '.join(writers)} measured again")
    return left


def images_digest(data: DataConfig) -> str:
    """The fingerprints of both splits: names, labels and contents."""
    train, val = open_source(data, "train"), open_source(data, "val")
    return f"{train.fingerprint()}-{val.fingerprint()}"


def encoder_digest(config: Config, run: Path | None = None, kind: str = "run") -> str:
    """Digest of an encoder's weights, of how it is built, and of how it reads an image.

    The kinds ``untrained`` and ``pixels`` have no weights; ``run`` is the folder of those of a run.
    """
    reading = {k: v for k, v in fingerprint(config).items() if k.startswith("data.")}
    standard = fingerprint(Config())
    del reading["data.eval_crop"]
    if config.data.eval_share != 1:
        reading["data.eval_share"] = config.data.eval_share
    parts: list[Any] = [kind, {k: v for k, v in reading.items() if standard.get(k) != v}]
    if kind != "pixels":
        model = config.model
        parts += [model.backbone, model.backbone_args, model.position_embedding]
    if kind == "untrained":
        parts.append(config.seed)
    if run is not None:
        parts.append(weights_digest(run))
    return _digest(parts)


def weights_digest(run: Path) -> str:
    """SHA-256 of the file that holds a run's encoder; empty where there is none."""
    files = [run / "encoder.safetensors", *reversed(checkpoints(run))]
    return next((file_digest(file) for file in files if file.is_file()), "")


def files_of(settings: Mapping[str, Any], known: dict[str, str] | None = None) -> dict[str, str]:
    """The settings that name a file or folder that is there, and the digest of its content.

    Args:
        settings: nested ones.
        known: path -> digest, of files that were looked at before; what is found is added.
    """
    found, known = {}, {} if known is None else known
    for key, value in flatten(settings).items():
        if not isinstance(value, str) or not value or key in _PLACES:
            continue
        named = key.rpartition(".")[2] in _FILES or os.sep in value
        if named and (path := Path(value)).exists():
            if value not in known:
                is_run = (path / "config.yaml").is_file()
                known[value] = weights_digest(path) if is_run else content_digest(path)
            found[key] = known[value]
    return found


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
