"""``python -m benchmarks.recipes``: what each recipe computes, and how long that should take."""

from __future__ import annotations

import argparse

import torch

from mim.core.recipes import recipe_files
from mim.model import build_model
from mim.training.runtime.cost import count_flops
from mim.training.settings import Config, read_tree

IMAGENET = 1_281_167
IMAGES = {"mae-vit-s-imagenet100": 126_689, "mae-small-data": 10_000}
GPUS = {"mae-vit-s-imagenet100": 1, "mae-small-data": 1}
PEAK, USE = 312e12, 0.4  # an A100 in bf16, and the share of it that is assumed to be reached


def cost(name: str) -> tuple[float, float, float]:
    """Returns FLOP an image (forward and backward), FLOP in all, and hours by the assumption."""
    config = read_tree(Config, [recipe_files()[name]])
    images = torch.zeros(1, config.data.channels, *config.data.size)
    model = build_model(config)
    each = sum(count_flops(model, images, torch.arange(1)))
    total = each * IMAGES.get(name, IMAGENET) * config.train.epochs
    return each, total, total / (PEAK * USE * GPUS.get(name, 8)) / 3600


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.recipes", description=__doc__)
    parser.add_argument("names", nargs="*", help="by default all")
    for name in parser.parse_args(argv).names or recipe_files():
        each, total, hours = cost(name)
        gpus = GPUS.get(name, 8)
        print(
            f"{name}: {each / 1e9:.1f} GFLOP an image, {total:.2g} in all, {hours:.3g} h on {gpus}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
