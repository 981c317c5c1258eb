"""``python -m benchmarks.recipes``: what each recipe computes, and how long that should take.

With ``--beside-mae`` the table of docs/howto/recipes.md: methods at ViT-B, counted and predicted.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.roofline import KEPT, PARTS, Card, Watch, whole_step
from mim.core.config import Config
from mim.core.recipes import recipe_file, recipe_files
from mim.core.settings import read_mapping
from mim.model import build_model
from mim.training.runtime.cost import count_flops
from mim.training.settings import read_tree

IMAGENET = 1_281_167
IMAGES = {"mae-vit-s-imagenet100": 126_689, "mae-small-data": 10_000}
GPUS = {"mae-vit-s-imagenet100": 1, "mae-small-data": 1}
PEAK, USE = 312e12, 0.4  # an A100 in bf16, and the share of it that is assumed to be reached

BATCH = 64  # images of a GPU in the table
AT_B: dict[str, dict[str, Any]] = {
    "capi-vit-l": {
        "model.backbone_args.embed_dim": 768,
        "model.backbone_args.depth": 12,
        "model.backbone_args.num_heads": 12,
        "model.decoder.rotary.width": 768,
        "model.decoder.rotary.heads": 12,
        "model.decoder.rotary.drop_path": 0.0,
        "train.gradient_checkpointing": False,
    },
    "i-jepa-vit-h": {"model.backbone": "vit_base_patch16_224"},
}
"""What makes a recipe of another size one at ViT-B."""


@contextmanager
def _codebook(name: str) -> Any:
    """Settings of a codebook of 8,192 entries, as BEiT's, where a recipe asks for a file."""
    target = read_mapping(recipe_file(name))["model"]["target"]
    if target["name"] != "codes":
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "codebook.safetensors")
        save_file({"codebook": torch.randn(8192, 768)}, file)
        yield {"model.target.codes.codebook": file}


def cost(name: str) -> tuple[float, float, float]:
    """Returns FLOP an image (forward and backward), FLOP in all, and hours by the assumption."""
    with _codebook(name) as settings, torch.device("meta"):
        config = read_tree(Config, [recipe_file(name)], settings)
        model = build_model(config).to_empty(device="cpu")
    for value in (*model.parameters(), *model.buffers()):
        value.data.zero_()  # what is counted depends on shapes alone
    images = torch.zeros(1, config.data.channels, *config.data.size)
    with Watch():
        each = sum(count_flops(model, images, torch.arange(1), repeats=config.mask.repeats))
    total = each * IMAGES.get(name, IMAGENET) * config.train.epochs
    return each, total, total / (PEAK * USE * GPUS.get(name, 8)) / 3600


def at_vit_b(names: Iterable[str], card: Card) -> dict[str, dict[str, float]]:
    """Counts and predicts a step of BATCH images of each recipe, at ViT-B, without drop path.

    Returns:
        ``gflop`` an image, ``gib``: weights, gradients, moments, a teacher, and what the forward
        pass keeps; ``ms``: the lower bound of a step at the rates of ``card``.
    """
    rows = {}
    for name in names:
        given = {"data.batch_size": BATCH, "model.backbone_args.drop_path_rate": 0.0}
        with _codebook(name) as file:
            config = read_tree(Config, [recipe_file(name)], {**given, **AT_B.get(name, {}), **file})
            total = whole_step(config, card)
            with torch.device("meta"):
                model = build_model(config)
        learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
        others = sum(p.numel() for p in model.parameters()) - learnt
        rows[name] = {
            "gflop": total["arithmetic"] * card.tflops * 1e3 / BATCH,
            "gib": (16 * learnt + 4 * others + total[KEPT]) / 2**30,
            "ms": 1e3 * sum(total.get(part, 0.0) for part in PARTS),
        }
    return rows


def format_beside_mae(rows: Mapping[str, Mapping[str, float]], card: Card) -> list[str]:
    """Returns the lines of a Markdown table, each figure beside that of mae-vit-b."""
    mae = rows["mae-vit-b"]
    lines = [
        f"| at ViT-B, {BATCH} images | GFLOP an image | to MAE | GiB | to MAE | "
        f"step at {card.tflops:g} TFLOP/s, {card.terabytes:g} TB/s: at least, ms | to MAE |",
        "| --- |" + " ---: |" * 6,
    ]
    for name, row in rows.items():
        cells = [f"{row[key]:.3g} | {row[key] / mae[key]:.2f}" for key in ("gflop", "gib", "ms")]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.recipes", description=__doc__)
    parser.add_argument("names", nargs="*", help="by default all")
    about = "count and predict these recipes, or all of that size, at ViT-B beside plain MAE"
    parser.add_argument("--beside-mae", action="store_true", help=about)
    options = parser.parse_args(argv)
    if options.beside_mae:
        names = options.names or [n for n in recipe_files() if n.endswith("-b") or n in AT_B]
        rows = at_vit_b(dict.fromkeys(["mae-vit-b", *names]), Card())
        print("\n".join(format_beside_mae(rows, Card())))
        return 0
    for name in options.names or recipe_files():
        each, total, hours = cost(name)
        gpus = GPUS.get(name, 8)
        print(
            f"{name}: {each / 1e9:.1f} GFLOP an image, {total:.2g} in all, {hours:.3g} h on {gpus}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
