"""The model card beside an export: what it is, on which images, with which results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mim.core.config import Config
from mim.core.public import public
from mim.core.settings import to_dict
from mim.training import checkpoint


def _table(rows: Mapping[str, Any]) -> str:
    lines = ["| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_OF_THE_MACHINE = ("path", "val_path", "cache_path", "download", "workers")


def public_config(config: Config) -> dict[str, Any]:
    """The config without what only concerns the machine it ran on; no path or URL is left."""
    tree = to_dict(config)
    for key in ("output", "resume", "plugins", "log"):
        del tree[key]
    for part in (tree["data"], *tree["data"]["mix"]):
        for key in _OF_THE_MACHINE:
            part.pop(key, None)
    found: dict[str, Any] = public(tree)
    return found


def library_line(to: str) -> str:
    """The line of a card by which a hub knows the library that loads it."""
    return f"library_name: {({'timm': 'timm', 'hf': 'transformers'}).get(to, 'mim')}"


def card_text(run: Path, config: Config, usage: str, to: str) -> str:
    """Markdown with the header that model hubs read; ``usage`` is Python that loads the file."""
    result = checkpoint.read_result(run)
    model, data, imported = config.model, config.data, result.get("imported")
    seen = result.get("data", {})
    what = {
        "encoder": f"`{model.backbone}`",
        "image": f"{data.size[0]} x {data.size[1]} pixels, {data.channels} channels",
        "regime": model.regime.name,
        "mask": f"{config.mask.name}, ratio {config.mask.ratio}",
        "decoder": model.decoder.name,
        "target": f"{model.target.name}, {model.target.loss}",
        "seed": config.seed,
    }
    if began := result.get("started_from"):
        what["started from"] = f"{began['file']} ({began['family']})"
    if imported:
        what["imported from"] = f"{public(imported['file'])} ({imported['family']})"
        what["its SHA-256"] = f"`{imported['sha256']}`"
    images = {
        "source": seen.get("source", data.source),
        "training images": seen.get("train_images"),
        "held-out images": seen.get("val_images"),
        "fingerprint": f"`{seen['fingerprint']}`" if "fingerprint" in seen else None,
        "mean": data.mean if data.mean is not None else "the source's own",
        "deviation": data.std if data.std is not None else "the source's own",
    }
    numbers = {
        name: _number(result[key])
        for key, name in (
            ("steps", "steps"),
            ("epochs", "epochs"),
            ("train_loss", "training loss"),
            ("val_loss", "held-out loss"),
        )
        if key in result
    }
    for evaluation, values in result.get("evaluations", {}).items():
        numbers |= {f"{evaluation} {key}": _number(value) for key, value in values.items()}
    origin = "whose weights were imported" if imported else "pre-trained by masked image modelling"
    parts = [
        f"---\n{library_line(to)}\ntags:\n- masked-image-modeling\n"
        "- image-feature-extraction\n- mim\n---",
        f"# {run.name or run.resolve().name}",
        f"A ViT {origin}.\n\n{_table(what)}",
        f"## Use\n\n```python\n{usage}\n```\n\nImages are scaled to 0 to 1, then normalised by the "
        "mean and deviation below.",
        f"## Images\n\n{_table(images)}",
        f"## Results\n\n{_table(numbers)}" if numbers else "## Results\n\nNone were measured.",
        f"## Config\n\n```yaml\n{yaml.safe_dump(public_config(config), sort_keys=False)}```",
    ]
    return "\n\n".join(parts) + "\n"
