"""Where frozen features come from: a run, a timm checkpoint, an untrained model, raw pixels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mim.core.config import Config, DataConfig, ModelConfig, SubsetConfig
from mim.core.errors import UserError, setting_error
from mim.data import open_source
from mim.model.backbones import (
    build_backbone,
    family_of,
    load_backbone,
    load_weights,
    resize_positions,
)
from mim.training.checkpoint import encoder_weights, read_config

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Encoder:
    """A frozen encoder and how it reads images.

    Making one puts the ViT into eval mode and switches its gradients off.
    """

    name: str
    """How reports call it."""
    kind: str
    """run, timm, untrained or pixels."""
    data: DataConfig
    """The images it reads: source, size, channels, normalisation."""
    vit: nn.Module | None
    """The model; None for raw pixels, which are their own features."""
    left_out: tuple[str, ...] = ()
    """Entries of the checkpoint that are no part of the encoder and were not loaded."""
    model: ModelConfig | None = None
    """How the ViT was built; what trains it further builds it again with a head."""

    def __post_init__(self) -> None:
        if self.vit is not None:
            self.vit.eval().requires_grad_(False)


def _build(config: Config) -> nn.Module:
    return build_backbone(config.model, config.data.size, config.data.channels, config.seed)


def run_encoder(run: Path, trust: bool = False) -> Encoder:
    """The encoder that a run pre-trained; ``trust`` lets plug-ins of a foreign folder run.

    Raises:
        UserError: if the folder is missing or holds no run, or its weights do not fit its config.
    """
    if not run.is_dir():
        raise UserError(f"run folder {run} does not exist")
    config = read_config(run, trust)
    vit = _build(config)
    load_backbone(vit, encoder_weights(run), f"run {run}")
    return Encoder(run.name, "run", config.data, vit, model=config.model)


def resized(encoder: Encoder, image_size: int | tuple[int, int] | None) -> Encoder:
    """The same encoder for images of another size, its positions interpolated (bicubic).

    Raises:
        UserError: for a size that its patches do not divide, or an encoder of another kind.
    """
    if image_size is None or encoder.vit is None or encoder.model is None:
        return encoder
    if not family_of(encoder.vit).has_one_grid:
        reason = f"cannot differ from that of the run: {encoder.name} is no plain ViT"
        raise setting_error("image_size", image_size, reason)
    data = replace(encoder.data, image_size=image_size)
    vit = build_backbone(encoder.model, data.size, data.channels)
    load_backbone(vit, resize_positions(encoder.vit, vit), encoder.name)
    return replace(encoder, data=data, vit=vit)


def on_images(encoder: Encoder, path: str | Path, source: str = "imagefolder") -> Encoder:
    """The same encoder, to read other images, normalised as those that it was trained on."""
    mean, std = normalisation(encoder.data)
    data = replace(
        encoder.data,
        source=source,
        path=str(path),
        val_path=None,
        mix=(),
        streaming=False,
        cache="none",
    )
    data = replace(data, subset=SubsetConfig(), fingerprint=None, weights=None, mean=mean, std=std)
    return replace(encoder, data=data)


def normalisation(data: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel that normalise the images of a config.

    Raises:
        UserError: if they are the source's own and it cannot be opened.
    """
    mean = data.measured.mean if data.mean is None else data.mean
    std = data.measured.std if data.std is None else data.std
    if mean is not None and std is not None:
        return mean, std
    try:
        source = open_source(data, "train")
    except UserError as error:
        raise UserError(
            f"data.mean, data.std: they are the source's own, which cannot be opened ({error}); "
            "set both in the run's config.yaml"
        ) from error
    return tuple(map(float, source.mean)), tuple(map(float, source.std))


def untrained_encoder(config: Config) -> Encoder:
    """The encoder a run of this config starts from: its initial weights, nothing loaded."""
    return Encoder("untrained", "untrained", config.data, _build(config), model=config.model)


def pixels_encoder(data: DataConfig) -> Encoder:
    """No encoder: the flattened normalised pixels of the image, all brought to one size."""
    return Encoder(name="pixels", kind="pixels", data=data.as_square(), vit=None)


def timm_encoder(
    backbone: str,
    checkpoint: Path,
    data: DataConfig,
    backbone_args: Mapping[str, Any] | None = None,
) -> Encoder:
    """A timm ViT with the weights of a file.

    The file may be safetensors or a torch file with weights only, of timm or of MAE; timm
    converts it and resamples position embeddings to the image size. A classification head, a
    pooling layer and MAE's decoder are left out (``left_out`` names them); all else must match.

    Args:
        backbone: name of a timm model.
        checkpoint: the file.
        data: the images it reads.
        backbone_args: arguments of the timm model; ``global_pool="avg"`` where the checkpoint
            has an ``fc_norm``.

    Raises:
        UserError: if the file is missing or unreadable, or its entries are not the encoder's.
    """
    if not checkpoint.is_file():  # before a model is built for nothing
        raise UserError(f"checkpoint {checkpoint} does not exist")
    model = ModelConfig(backbone=backbone, backbone_args=dict(backbone_args or {}))
    vit = build_backbone(model, data.size, data.channels, 0)
    left_out = load_weights(vit, checkpoint, backbone)
    if left_out:
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        logger.info("%s: left out %s%s", checkpoint, ", ".join(left_out[:5]), more)
    name = f"{backbone}@{checkpoint.name}"
    return Encoder(name, "timm", data, vit, left_out, model)


def open_encoder(spec: str | Path, config: Config | None = None) -> Encoder:
    """An encoder by what a user writes.

    Args:
        spec: one of

            - a run folder;
            - ``untrained`` or ``pixels``, of ``config``, or ``untrained:RUN`` and
              ``pixels:RUN``, of a run's config;
            - ``NAME@FILE``, a timm model and its checkpoint. It reads the images of
              ``config.data``, and takes ``config.model.backbone_args`` where ``NAME`` is the
              config's backbone.
        config: needed by all but those that name a run.

    Raises:
        UserError: if it is none of these, or cannot be opened.
    """
    text = str(spec)
    if Path(spec).is_dir():
        return run_encoder(Path(spec))
    kind, _, run = text.partition(":")
    if kind in ("untrained", "pixels"):
        if run:
            if not Path(run).is_dir():
                raise UserError(f"run folder {run} does not exist")
            config = read_config(Path(run))
        if config is None:
            raise setting_error("encoder", text, f"needs a config, or a run: {kind}:RUN")
        encoder = untrained_encoder(config) if kind == "untrained" else pixels_encoder(config.data)
        return replace(encoder, name=f"{kind}:{Path(run).name}") if run else encoder
    name, separator, file = text.partition("@")
    if separator:
        if config is None:
            raise setting_error("encoder", text, "needs a config, whose data it reads")
        same = config.model.backbone == name
        args = config.model.backbone_args if same else None
        return timm_encoder(name, Path(file), config.data, args)
    valid = "is no run folder; it may also be NAME@FILE (timm), untrained or pixels"
    raise setting_error("encoder", text, valid)
