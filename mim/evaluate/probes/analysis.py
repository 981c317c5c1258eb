"""What each layer of an encoder holds: probe accuracy, reach of its attention, effective rank.

Numbers of layer k, from 1, are named ``layer_k_...``; figures and files stand in the run folder.
What ``features.npz`` keeps of the held-out images lets reports compare encoders (linear CKA).

Shapes: B images, L tokens, N patches, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from mim.core.device import to_device
from mim.core.errors import UserError
from mim.core.fields import Count
from mim.data import Batch, ImageSource, Subset, eval_loader, normalize
from mim.evaluate.base import (
    EVALUATIONS,
    EncoderEvaluation,
    EvaluationSettings,
    Features,
    keyed_subset,
    low_shot,
)
from mim.evaluate.encoders import Encoder
from mim.evaluate.features import check_finite, check_pool
from mim.evaluate.predictions import write_npz
from mim.evaluate.probes.linear import Linear, LinearSettings
from mim.evaluate.training import check_learnable_classes
from mim.model.backbones import Embedded, Family, attention_maps, block_outputs, family_of
from mim.training.checkpoint import prepare_folder, write_atomic

FILES = "analysis"
"""Name of the folder, in the run folder, that holds ``features.npz`` and ``layers.png``."""


@dataclass(frozen=True)
class AnalysisSettings(EvaluationSettings):
    """Settings of the analysis of layers."""

    pool: Literal["mean", "cls"] = "mean"
    """What stands for an image in each layer: mean (of the patch tokens) or cls."""
    train_images: Count = 2000
    """Training images of which the probe of each layer learns at most, shared among the classes."""
    val_images: Count = 1000
    """Held-out images on which it is measured at most."""
    attention_images: Count = 64
    """Held-out images over which the reach of attention is averaged."""
    compared_images: Count = 256
    """Held-out images whose features are kept to compare encoders by."""


def linear_cka(first: Tensor, second: Tensor) -> float:
    """How alike two sets of features of the same images are, from 0 to 1.

    Linear centred kernel alignment (Kornblith et al. 2019, https://arxiv.org/abs/1905.00414): it
    does not change with rotation, shift or scale of either.

    Args:
        first: (n, D).
        second: (n, E).
    """
    x, y = (f.double() - f.double().mean(0) for f in (first, second))
    cross = (y.T @ x).square().sum()
    own = (x.T @ x).square().sum() * (y.T @ y).square().sum()
    return float(cross / own.sqrt().clamp_min(1e-300))


def effective_rank(features: Tensor) -> float:
    """How many directions (n, D) features spread over, from 1 to D (Roy and Vetterli 2007).

    The exponential of the entropy of the singular values of the centred features.
    """
    centred = features.double() - features.double().mean(0)
    values = torch.linalg.svdvals(centred)
    share = values / values.sum().clamp_min(1e-300)
    return float(torch.exp(-torch.xlogy(share, share).sum()))


def patch_distances(family: Family) -> Tensor:
    """(N, N) float: pixels between the centres of two patches."""
    rows, columns = family.grid
    height, width = family.patch_size
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    centres = torch.stack([y.flatten() * height, x.flatten() * width], 1).double()  # (N, 2)
    return torch.cdist(centres, centres)


def attention_distance(attention: Tensor, distances: Tensor, prefix: int) -> Tensor:
    """How far, in pixels, the patches of an image read from (Dosovitskiy et al. 2021, figure 7).

    Args:
        attention: (B, heads, L, L), rows are queries and sum to 1.
        distances: (N, N) of :func:`patch_distances`.
        prefix: tokens in front, which have no place; what is read of them is left out.

    Returns:
        (B, heads), the mean over the patches.
    """
    patches = attention[..., prefix:, prefix:].double()  # (B, heads, N, N)
    weight = patches / patches.sum(-1, keepdim=True).clamp_min(1e-300)
    return (weight * distances.to(weight.device)).sum(-1).mean(-1)


@torch.no_grad()
def layer_features(
    encoder: Encoder,
    source: ImageSource,
    pool: str,
    device: torch.device | str = "cpu",
    batch_size: int = 128,
) -> Features:
    """Every block's output, pooled, of all readable images of a source, on the CPU.

    Returns:
        values (layers, n, D) float32, labels (n,) and sample_ids (n,).
    """
    vit = encoder.vit
    assert vit is not None
    family = family_of(vit.to(device))
    found, labels, ids = [], [], []
    for batch in eval_loader(source, encoder.data, batch_size=batch_size):
        layers = block_outputs(vit, _embedded(family, batch, source, device))
        pooled = [
            tokens[:, 0] if pool == "cls" else tokens[:, family.num_prefix :].mean(1)
            for tokens in layers
        ]
        found.append(torch.stack(pooled).float().cpu())  # (layers, B, D)
        check_finite(found[-1].transpose(0, 1), "fp32", "layers' outputs")
        labels.append(torch.as_tensor(batch.labels).long())
        ids.append(torch.as_tensor(batch.sample_ids).long())
    return Features(torch.cat(found, 1), torch.cat(labels), torch.cat(ids))


def _embedded(
    family: Family, batch: Batch, source: ImageSource, device: torch.device | str
) -> Embedded:
    images = normalize(to_device(batch.images, device), source.mean, source.std)
    return family.place(family.embed(images))


@torch.no_grad()
def layer_distances(
    encoder: Encoder,
    source: ImageSource,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
) -> Tensor:
    """(layers, heads) float64: :func:`attention_distance`, the mean over all images of a source."""
    vit = encoder.vit
    assert vit is not None
    family = family_of(vit.to(device))
    distances = patch_distances(family)
    found = []
    for batch in eval_loader(source, encoder.data, batch_size=batch_size):
        maps = attention_maps(vit, _embedded(family, batch, source, device))
        each = [attention_distance(m, distances, family.num_prefix) for m in maps]
        found.append(torch.stack(each, 1).cpu())  # (B, layers, heads)
    return torch.cat(found).mean(0)


@EVALUATIONS.register("analysis", AnalysisSettings)
class Analysis(EncoderEvaluation):
    """Each layer's linear probe, reach of attention and effective rank."""

    settings: AnalysisSettings
    precision = "fp32"

    def measures(self) -> tuple[str, ...]:
        return ("effective_rank", "attention_distance")

    def check_encoder(self, encoder: Encoder) -> None:
        """Refuses blocks that differ in width or in their number of tokens, too."""
        super().check_encoder(encoder)
        check_pool(encoder.vit, self.settings.pool)
        assert encoder.vit is not None
        family = family_of(encoder.vit)
        if not family.is_uniform:
            reason = f"a {family.kind} has not; it cannot be compared layer by layer"
            raise UserError(f"evaluation analysis: needs blocks of one width, which {reason}")

    def check(self, train: ImageSource, val: ImageSource) -> None:
        super().check(train, val)
        check_learnable_classes(train, val, self.settings.name)

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
        """Measures in float32, whatever the precision.

        ``attention_distance`` is the mean over layers and heads, ``effective_rank`` that of the
        last layer. Blocks that are not timm's plain ones have no attention to look at.
        """
        s = self.settings
        vit = encoder.vit
        assert vit is not None
        labels = torch.as_tensor(train.labels).long()
        share = min(1.0, s.train_images / len(train))
        part = low_shot(torch.as_tensor(train.sample_ids), labels, share, s.seed)
        sets = [
            layer_features(encoder, source, s.pool, device)
            for source in (Subset(train, part), keyed_subset(val, s.val_images, s.seed, s.name))
        ]
        numbers: dict[str, float] = {}
        settings = LinearSettings(few_shot=(), strengths=(1.0, 0.1, 1e-2, 1e-3, 1e-4), seed=s.seed)
        table: dict[str, list[float]] = {"accuracy": [], "effective_rank": []}
        for layer in range(len(sets[0].values)):
            fitted, measured = (each._replace(values=each.values[layer]) for each in sets)
            table["accuracy"].append(Linear(settings).run(fitted, measured)["accuracy"])
            table["effective_rank"].append(effective_rank(measured.values))
        numbers["effective_rank"] = table["effective_rank"][-1]
        heads = None
        if family_of(vit).splits:
            few = keyed_subset(val, s.attention_images, s.seed, s.name)
            heads = layer_distances(encoder, few, device)  # (layers, heads)
            table["attention_distance"] = heads.mean(1).tolist()
            numbers["attention_distance"] = float(heads.mean())
        for key, values in table.items():
            for layer, value in enumerate(values, start=1):
                numbers[f"layer_{layer}_{key}"] = value
        if folder is not None:
            few = keyed_subset(val, s.compared_images, s.seed, s.name)
            prepare_folder(folder / FILES)
            _save_features(
                folder / FILES / "features.npz", layer_features(encoder, few, s.pool, device)
            )
            _save_figure(folder / FILES / "layers.png", table, heads, encoder.name)
        return numbers


def _save_features(path: Path, features: Features) -> None:
    """With the ids of the images, by which reports see that they are the same."""
    arrays = {"features": features.values.numpy(), "sample_ids": features.sample_ids.numpy()}
    write_npz(path, arrays)


def _save_figure(
    path: Path, table: dict[str, list[float]], heads: Tensor | None, name: str
) -> None:
    """Three panels over the layers."""
    titles = {
        "accuracy": "linear probe (%)",
        "attention_distance": "attention distance (pixels)",
        "effective_rank": "effective rank",
    }
    shown = [key for key in titles if key in table]
    with mpl.rc_context({"text.parse_math": False, "font.size": 10}):
        figure = Figure(figsize=(3.6 * len(shown), 3.0), layout="constrained")
        FigureCanvasAgg(figure)
        for place, key in enumerate(shown, start=1):
            axes = figure.add_subplot(1, len(shown), place)
            values = [100 * v if key == "accuracy" else v for v in table[key]]
            layers = range(1, len(values) + 1)
            if key == "attention_distance" and heads is not None:
                for layer, row in zip(layers, heads.tolist(), strict=True):
                    axes.scatter([layer] * len(row), row, s=10, color="#9A9A9A", label=None)
            axes.plot(layers, values, marker="o", color="#0072B2")
            axes.set(xlabel="layer", ylabel=titles[key], xticks=list(layers))
            axes.grid(True, color="#E3E3E3", linewidth=0.7)
        figure.suptitle(name, fontsize=10)
        write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
