"""What can be said of an encoder without labels: rank, reach, alignment, and nearest neighbours.

None of these numbers says that an encoder is good. They show when one is not: features that lie in
few directions (collapse), views of one image that are further apart than other images, attention
that reaches no further than the next patch. The page of neighbours shows what it takes for alike.

Shapes: n images, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from mim.core.device import to_device
from mim.core.errors import UserError
from mim.core.fields import Count
from mim.core.rng import image_keys
from mim.data import ImageSource, eval_loader, normalize, train_transform
from mim.data.sources.base import spread_indices
from mim.data.sources.reading import read_images
from mim.evaluate.base import (
    EVALUATIONS,
    EncoderEvaluation,
    EvaluationSettings,
    Features,
    keyed_subset,
)
from mim.evaluate.encoders import Encoder
from mim.evaluate.features import check_pool, extract_features, image_tokens, pool_tokens
from mim.evaluate.probes.analysis import effective_rank, layer_distances
from mim.model.backbones import family_of
from mim.training.checkpoint import prepare_folder, write_atomic
from mim.training.pictures import Pixels, as_rgb, shown_pixels
from mim.training.runtime.precision import autocast

FILE = "neighbours.png"
"""Name of the page in the run folder."""
_AT_ONCE = 64
_TILE = 1.1  # inches


@dataclass(frozen=True)
class LabelFreeSettings(EvaluationSettings):
    """Settings of the measures that need no labels."""

    images: Count = 1000
    """Images of each split that are looked at, at most."""
    attention_images: Count = 64
    """Held-out images over which the reach of attention is averaged, at most."""
    queries: Count = 8
    """Held-out images on the page of neighbours."""
    neighbours: Count = 8
    """Training images beside each of them."""


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of two views (n, D) of each image, features at length 1: 0 to 4.

    Of Wang and Isola 2020 (https://arxiv.org/abs/2005.10242), as is :func:`uniformity`.
    """
    distance = F.normalize(first.double(), dim=1) - F.normalize(second.double(), dim=1)
    return float(distance.square().sum(1).mean())


def uniformity(features: Tensor) -> float:
    """Logarithm of the mean of exp(-2 d^2) over pairs of images: -4 (spread out) to 0 (one point).

    d is the distance of their features (n, D) at length 1; a single image gives 0.
    """
    if len(features) < 2:
        return 0.0
    distances = torch.pdist(F.normalize(features.double(), dim=1))
    return float((-2 * distances.square()).exp().mean().log())


def nearest(queries: Tensor, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity (m, k) and position (m, k) of the k features (n, D) nearest to (m, D)."""
    similarity = F.normalize(queries.float(), dim=1) @ F.normalize(features.float(), dim=1).mT
    found = similarity.topk(min(count, len(features)), dim=1)
    return found.values, found.indices


@torch.inference_mode()
def two_views(
    encoder: Encoder, source: ImageSource, pool: str, device: torch.device | str, precision: str
) -> tuple[Tensor, Tensor]:
    """Features (n, D) of two training augmentations of each readable image."""
    vit, data = encoder.vit, encoder.data
    assert vit is not None
    views: tuple[list[Tensor], list[Tensor]] = ([], [])
    for part in torch.arange(len(source)).split(_AT_ONCE):
        pictures, found, _ = read_images(source, part, replace=False)
        if not pictures:
            continue
        for epoch, view in enumerate(views):
            keys = image_keys(0, epoch, source.sample_ids[found], purpose="augment")
            pixels = to_device(train_transform(pictures, keys, data), device)
            with autocast(precision, torch.device(device)):
                tokens = image_tokens(vit, normalize(pixels, source.mean, source.std))
            view.append(pool_tokens(vit, tokens.float(), pool).cpu())
    return torch.cat(views[0]), torch.cat(views[1])


@EVALUATIONS.register("label_free", LabelFreeSettings)
class LabelFree(EncoderEvaluation):
    """Effective rank, alignment, uniformity, reach of attention, and a page of neighbours."""

    settings: LabelFreeSettings

    def measures(self) -> tuple[str, ...]:
        return ("effective_rank", "uniformity", "alignment", "attention_distance")

    def check_encoder(self, encoder: Encoder) -> None:
        super().check_encoder(encoder)
        check_pool(encoder.vit, self.settings.pool)

    def check(self, train: ImageSource, val: ImageSource) -> None:
        """Needs images, but no labels."""
        for source in (train, val):
            if len(source) == 0:
                raise UserError(
                    f"data.source {source.name!r} has no images; {self.name} needs some"
                )

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
        """Measures on held-out images; neighbours are training images."""
        s = self.settings
        assert encoder.vit is not None
        seen = keyed_subset(val, s.images, s.seed, s.name)
        features = extract_features(encoder, seen, s.pool, device=device, precision=precision)
        numbers = {
            "effective_rank": effective_rank(features.values),
            "uniformity": uniformity(features.values),
        }
        if encoder.data.augment != "none":  # else both views are the same
            views = two_views(encoder, seen, s.pool, device, precision)
            numbers["alignment"] = alignment(*views)
        if family_of(encoder.vit).splits:
            few = keyed_subset(val, s.attention_images, s.seed, s.name)
            numbers["attention_distance"] = float(layer_distances(encoder, few, device).mean())
        if folder is not None:
            bank = keyed_subset(train, s.images, s.seed, s.name)
            known = extract_features(encoder, bank, s.pool, device=device, precision=precision)
            figure = self._page(encoder, seen, bank, features, known)
            prepare_folder(folder)
            write_atomic(folder / FILE, lambda place: figure.savefig(place, format="png", dpi=130))
        return numbers

    def _page(
        self,
        encoder: Encoder,
        queries: ImageSource,
        bank: ImageSource,
        asking: Features,
        known: Features,
    ) -> Figure:
        """Held-out images and the training images nearest to each, with their similarity."""
        rows = spread_indices(len(asking.values), self.settings.queries)
        similar, found = nearest(asking.values[rows], known.values, self.settings.neighbours)
        asked = _pictures(queries, encoder, asking.sample_ids[rows])
        shown = _pictures(bank, encoder, known.sample_ids[found.flatten()])
        columns = found.shape[1]
        size = ((1 + columns) * _TILE, len(rows) * (_TILE + 0.15) + 0.5)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(
            f"Held-out images (left) and the {columns} training images nearest to each, by the "
            f"cosine of {encoder.name}'s features",
            fontsize=8,
            wrap=True,
        )
        axes = figure.subplots(len(rows), 1 + columns, squeeze=False)
        for row, line in enumerate(axes):
            for place, axis in enumerate(line):
                pixels = asked[row] if place == 0 else shown[row * columns + place - 1]
                axis.imshow(pixels, interpolation="nearest")
                label = "" if place == 0 else f"{float(similar[row, place - 1]):.3f}"
                axis.set_xlabel(label, fontsize=6, labelpad=1)
                axis.set(xticks=[], yticks=[])
        return figure


def _pictures(source: ImageSource, encoder: Encoder, ids: Tensor) -> list[Pixels]:
    """Images (H, W, 3) of a source by their sample ids, as the encoder sees them."""
    place = {sample: index for index, sample in enumerate(source.sample_ids.tolist())}
    indices = [place[sample] for sample in ids.tolist()]
    batches = eval_loader(source, encoder.data, indices=indices, batch_size=_AT_ONCE)
    return [image for batch in batches for image in as_rgb(shown_pixels(batch.images, source))]
