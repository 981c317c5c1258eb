"""From a folder of images, and perhaps public weights, to the config of a run and its beginning."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mim.core.config import Config, ModelConfig
from mim.core.errors import UserError, setting_error
from mim.core.files import file_digest
from mim.core.progress import note
from mim.core.settings import flatten, read_mapping, read_tree, to_dict
from mim.interop.files import find_weights
from mim.interop.imports import import_run, settings_of
from mim.model.backbones import build_backbone, family_of
from mim.training import checkpoint
from mim.training.choices import choose, decoder_size, is_given
from mim.training.pretrain import pretrain

WEIGHTS = "model.weights"


def complete(
    data: str | Path | None,
    files: Sequence[str | Path],
    settings: Mapping[str, Any],
    block: str = "",
    output: Path | None = None,
) -> dict[str, Any]:
    """Adds to the settings what the weights say, and what is chosen where ``data`` is given.

    Each choice is told in a line on stderr.

    Args:
        data: folder of images, or what else ``data.path`` may be; None chooses nothing.
        files: YAML files of the config.
        settings: dotted ones, above the files.
        block: before the keys of a run's config: ``base.`` in a comparison.
        output: a run folder that keeps what was chosen when it began; by default that of the
            settings, where they resume it.

    Raises:
        UserError: for weights or images that cannot be read.
    """
    if output is None and str(settings.get("resume")) == "auto":
        output = Path(str(settings.get("output", Config().output)))
    tree: dict[str, Any] = {}
    for file in files:
        loaded: Any = read_mapping(file)
        if block:  # a recipe is of one run
            loaded = loaded.get(block[:-1], {} if "axes" in loaded else loaded)
        known = flatten(loaded) if isinstance(loaded, Mapping) else {}  # else refused as it is read
        tree |= {key: value for key, value in known.items() if value is not None}
    own = {k.removeprefix(block): v for k, v in settings.items() if k.startswith(block)}
    tree |= own
    added: dict[str, Any] = {}
    weights = tree.get(WEIGHTS)
    if weights not in (None, "null"):
        file = find_weights(str(weights))
        described = settings_of(file, {k: v for k, v in tree.items() if k != WEIGHTS})
        added = {k: v for k, v in described.items() if v is not None and not is_given(k, tree)}
        if not is_given("model.decoder", {**tree, **added}):
            added |= _decoder_for({**tree, **added})
        _tell(f"{weights}: {added.get('model.backbone', '')}")
    if data is not None:
        for choice in choose(data, {**tree, **added}, () if block else files, output):
            added[choice.key] = choice.value
            if choice.key != "data.path":
                _tell(str(choice))
    return {**{block + key: value for key, value in added.items()}, **settings}


def _decoder_for(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes a decoder to an encoder whose file has none."""
    place = "model.backbone_args."
    args = {k.removeprefix(place): v for k, v in tree.items() if k.startswith(place)}
    model = ModelConfig(str(tree["model.backbone"]), args)
    data = read_tree(Config, [], {"data.image_size": tree["data.image_size"]}).data
    with torch.device("meta"):
        built = build_backbone(model, data.size, 3)
    width, depth = decoder_size(family_of(built))
    place = "model.decoder.transformer"
    return {f"{place}.width": width, f"{place}.depth": depth, f"{place}.heads": width // 32}


def _tell(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        note(line)


def begin(config: Config, with_decoder: bool = True) -> Config:
    """Makes the folder of a run that starts from weights, unless it has begun.

    Args:
        config: of the run.
        with_decoder: whether a decoder in the file is taken, where it is of this size.

    Returns:
        The config with which to train.

    Raises:
        UserError: for weights that cannot be read or do not fit, or other ones than it began with.
    """
    if config.model.weights is None:
        return config
    run, file = Path(config.output), find_weights(config.model.weights)
    has_run = checkpoint.checkpoints(run) or (run / "result.json").is_file()
    if has_run:
        origin = run / "import.json"
        digest = read_mapping(origin).get("sha256") if origin.is_file() else None
        if digest != file_digest(file):
            reason = f"are not the weights with which {str(run)!r} began; choose another output"
            raise setting_error(WEIGHTS, config.model.weights, reason)
        return config
    if os.environ.get("RANK", "0") == "0":
        settings = {k: v for k, v in flatten(to_dict(config)).items() if v is not None}
        del settings["output"]
        how = {"backbone": config.model.backbone}
        try:
            import_run(file, run, settings, part="model" if with_decoder else "encoder", **how)
        except UserError as error:
            if not with_decoder or "decoder" not in str(error):
                raise
            note(f"{file.name}: its decoder does not fit, and another begins anew ({error})")
            import_run(file, run, settings, part="encoder", **how)
    return replace(config, resume="auto")  # from the checkpoint at step 0


def pretrain_from(config: Config, alone: bool = False, with_decoder: bool = True) -> dict[str, Any]:
    """Pre-trains, from ``model.weights`` where there are any; see :func:`pretrain`."""
    return pretrain(begin(config, with_decoder), alone)
