"""Several sources as one, by weight."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from mim.core.config import STREAMED, DataConfig, MeasuredConfig, MixConfig
from mim.core.errors import setting_error
from mim.core.rng import image_keys, permutation
from mim.data.opening import open_source
from mim.data.sources.base import SOURCES, ImageSource, Split, View
from mim.data.unreadable import Fault


@SOURCES.register("mixed")
class Mixed(View):
    """The sources of ``data.mix``, from which an epoch draws in the ratio of their weights.

    Each source is read in keyed orders, one complete pass after the other, and an epoch ends before
    any source would repeat an image. So over epochs all images of a source are seen equally often,
    and no image comes twice in an epoch. Evaluations see all images of all sources once. Classes
    of the same name are one.
    """

    def __init__(self, config: DataConfig, split: Split) -> None:
        if not config.mix:
            raise setting_error("data.mix", [], "is needed by data.source=mixed: a list of sources")
        self.name = "mixed"
        self.parts = [open_source(_part(config, item), split) for item in config.mix]
        total = sum(item.weight for item in config.mix)
        self.shares = [item.weight / total for item in config.mix]
        sizes = [len(part) for part in self.parts]
        self._starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        length = min(size / share for size, share in zip(sizes, self.shares, strict=True))
        self._counts = [max(1, math.floor(length * share + 1e-9)) for share in self.shares]
        ids = torch.cat([part.sample_ids for part in self.parts])
        if len(ids.unique()) < len(ids):  # sets that count their images from 0
            parts = [
                image_keys(place, -1, part.sample_ids, purpose="mix")
                for place, part in enumerate(self.parts)
            ]
            ids = torch.cat(parts)
        self.sample_ids = ids
        self._set_labels()
        self._set_statistics()

    def _set_labels(self) -> None:
        self.labels, self.classes = None, []
        labels = [part.labels for part in self.parts]
        if any(values is None for values in labels):
            return
        self.classes = list(dict.fromkeys(name for part in self.parts for name in part.classes))
        place = {name: position for position, name in enumerate(self.classes)}
        self.labels = torch.cat(
            [
                torch.tensor([place[name] for name in part.classes], dtype=torch.int64)[part.labels]
                for part in self.parts
            ]
        )

    def _set_statistics(self) -> None:
        """Of the mixture: its variance is the mean variance and the variance of the means."""
        shares = torch.tensor(self.shares, dtype=torch.float64)[:, None]
        means = torch.tensor([part.mean for part in self.parts], dtype=torch.float64)
        stds = torch.tensor([part.std for part in self.parts], dtype=torch.float64)
        mean = (shares * means).sum(0)
        std = ((shares * (stds.square() + means.square())).sum(0) - mean.square()).sqrt()
        self.mean, self.std = tuple(mean.tolist()), tuple(std.tolist())

    @property
    def epoch_size(self) -> int:
        return sum(self._counts)

    def order(self, seed: int, epoch: int) -> Tensor:
        chosen = []
        for place, (part, count) in enumerate(zip(self.parts, self._counts, strict=True)):
            chosen.append(self._starts[place] + _stretch(part, seed, place, epoch * count, count))
        everything = torch.cat(chosen)
        order = permutation(seed, epoch, len(everything))
        if all(part.groups is None for part in self.parts):
            return everything[order]
        # Which source comes next is drawn; each keeps its own order, with its groups together.
        turns = torch.arange(len(self.parts)).repeat_interleave(torch.tensor(self._counts))[order]
        for place, positions in enumerate(chosen):
            everything[turns == place] = positions
        return everything

    def ahead(self, indices: Tensor) -> None:
        for part, (start, stop) in zip(self.parts, pairwise(self._starts), strict=True):
            part.ahead(indices[(indices >= start) & (indices < stop)] - start)

    def _find(self, index: int) -> tuple[ImageSource, int]:
        for part, (start, stop) in zip(self.parts, pairwise(self._starts), strict=True):
            if index < stop:
                return part, index - start
        raise IndexError(index)

    def raw(self, index: int) -> None:
        """None: each source has a range of its own."""

    def has_deep(self) -> bool:
        return any(part.has_deep() for part in self.parts)

    def check(self, indices: Tensor | None = None) -> list[Fault]:
        ledgers = [part.ledger for part in self.parts if part.ledger is not None]
        return [fault for ledger in ledgers for fault in ledger.faults()]


def _part(config: DataConfig, item: MixConfig) -> DataConfig:
    """The config of one source; other settings are those of the mixture."""
    return replace(
        config,
        source=item.source,
        path=item.path,
        val_path=item.val_path,
        streaming=config.streaming and item.source in STREAMED,
        cache="none",  # all of the mixture is cached, once
        mix=(),
        fingerprint=None,
        measured=MeasuredConfig(),
    )


def _stretch(part: ImageSource, seed: int, place: int, start: int, count: int) -> Tensor:
    """Positions ``start`` to ``start + count`` of the endless sequence of a source's passes."""
    size, found = len(part), []
    stop = start + count
    for number in range(start // size, -(-stop // size)):
        order = part.order(seed + place, number)
        found.append(order[max(start - number * size, 0) : stop - number * size])
    return torch.cat(found)
