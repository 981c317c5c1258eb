"""A run's config as a sentence: what was pre-trained, on what, and how."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from mim.core.settings import flatten
from mim.report.collect import Comparison, Group, Run, show_value
from mim.report.measures import MISSING
from mim.report.tables import Cell, Column, Row, Table, text_columns

_BACKBONE = {"patch_size": "patch", "embed_dim": "width", "depth": "depth", "num_heads": "heads"}


def recipe_table(comparison: Comparison) -> Table:
    """The recipe of every row in words, its size, and its code."""
    rows, words = [], comparison.rules.get("components", {})
    for group in comparison.groups:
        if not group.config:
            continue
        config = flatten(group.config)
        own = {f"{key} {value}" for key, value in config.items()}
        size = _parameters(group)
        cells = [
            Cell(group.label),
            Cell(recipe(config), " ".join(text for key, text in words.items() if key in own)),
            Cell(MISSING if size is None else f"{size / 1e6:.3g} M", value=size),
            Cell("; ".join(dict.fromkeys(_code(run) for run in group.finished)) or MISSING),
        ]
        rows.append(Row(cells))
    columns = [*text_columns("Encoder", "Recipe"), Column("encoder's parameters")]
    caption = "What each row is, in words, with its components in their own"
    return Table(caption, [*columns, *text_columns("Code")], rows, "recipes")


def _parameters(group: Group) -> int | None:
    """Numbers in the encoder that the first finished run has left, by the head of its file."""
    for run in group.finished[:1]:
        path = run.folder / "encoder.safetensors"
        if path.is_file():
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                head = json.loads(file.read(length))
            shapes = [entry["shape"] for name, entry in head.items() if name != "__metadata__"]
            return sum(math.prod(shape) for shape in shapes)
    return None


def _code(run: Run) -> str:
    """Digests of the code and of each plug-in."""
    names = [name for name in run.environment if name == "code" or name.startswith("plugin ")]
    return ", ".join(f"{name} {run.environment[name]}" for name in names)


def recipe(config: Mapping[str, Any]) -> str:
    """One sentence of dotted settings; what a config does not say is left out."""
    parts = [_encoder(config), _mask(config), _decoder(config), _training(config), _data(config)]
    text = "; ".join(part for part in parts if part)
    return f"{text}." if text else ""


def _encoder(config: Mapping[str, Any]) -> str:
    sizes = {words: config.get(f"model.backbone_args.{key}") for key, words in _BACKBONE.items()}
    size = ", ".join(f"{words} {show_value(n)}" for words, n in sizes.items() if n is not None)
    text = f"{config.get('model.backbone', 'encoder')}{f' ({size})' if size else ''}"
    regime = config.get("model.regime.name")
    return f"{text} under the regime {regime}" if regime else text


def _mask(config: Mapping[str, Any]) -> str:
    ratio, name = config.get("mask.ratio"), config.get("mask.name", "random")
    hidden = f"{100 * ratio:g} % of the patches" if isinstance(ratio, (int, float)) else "patches"
    return f"{name} masks hide {hidden}"


def _decoder(config: Mapping[str, Any]) -> str:
    name, target = config.get("model.decoder.name"), config.get("model.target.name")
    if not target:
        return ""
    what = str(target).replace("_", " ")
    if not name:
        return f"{what} are predicted"
    inner = [
        f"{key} {config[f'model.decoder.{name}.{key}']}"
        for key in ("depth", "width")
        if f"model.decoder.{name}.{key}" in config
    ]
    size = f" ({', '.join(inner)})" if inner else ""
    return f"a {name} decoder{size} predicts {what}"


def _training(config: Mapping[str, Any]) -> str:
    steps, epochs = config.get("train.max_steps"), config.get("train.epochs")
    length = f"{steps} steps" if steps else f"{show_value(epochs)} epochs" if epochs else ""
    parts = [f"trained for {length}"] if length else []
    for key, words in (
        ("data.batch_size", "images a step"),
        ("optim.base_lr", "as base rate"),
        ("optim.weight_decay", "as weight decay"),
    ):
        if config.get(key) is not None:
            parts.append(f"{show_value(config[key])} {words}")
    optimizer = config.get("optim.name")
    return ", ".join([*parts, f"by {optimizer}"] if optimizer else parts)


def _data(config: Mapping[str, Any]) -> str:
    source, size = config.get("data.source"), config.get("data.image_size")
    return f"on {source} at {show_value(size)} pixels" if source and size else ""
