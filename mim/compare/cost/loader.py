"""Timing the way of images to the device, beside the same pipeline built plainly from torchvision.

The plain pipeline is what MAE's own code does: ``ImageFolder``, PIL, ``RandomResizedCrop``
(bicubic), flip, ``ToTensor``, ``Normalize`` and a ``DataLoader`` with as many workers. Both end in
normalised float32 batches on the device, and both are timed in turn, so that a busy machine is
unfair to neither.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from mim.core.config import Config, DataConfig
from mim.core.cpu.process import tune_process
from mim.core.errors import setting_error
from mim.core.rng import image_keys, permutation
from mim.data import (
    Batch,
    ImageSource,
    Picture,
    normalize,
    open_source,
    train_loader,
    train_transform,
)
from mim.data.images.decode import decode
from mim.training.runtime.cost import environment, wait_for


def bench_data(
    config: Config, rounds: int = 5, images: int = 512, plain: str | Path | None = None
) -> dict[str, Any]:
    """Time the loader of a config, stage by stage and whole.

    Args:
        config: its data block is what is timed.
        rounds: every round times each stage and each pipeline once, in turn.
        images: images of a round, rounded to whole batches.
        plain: image folder of the plain pipeline; by default ``data.path`` of an imagefolder.

    Returns:
        ``environment``; under ``stages`` (in one process), ``loader``, ``plain``: images a second
        of every round, and their median; under ``ratio_to_plain`` the median over rounds of the
        loader's rate over the plain one's of the same round, or None without a folder.

    Raises:
        UserError: for a mistake in the config or the data.
    """
    data = config.data
    for name, value in (("--rounds", rounds), ("--images", images)):
        if value < 1:
            raise setting_error(name, value, "must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tune_process(device)  # as a training process does
    source = open_source(data, "train")
    count = max(images // data.batch_size, 1)
    folder = _plain_folder(data) if plain is None else Path(plain)
    loader = train_loader(source, data, config.seed, start_step=0, total_steps=count)
    pipelines: dict[str, Callable[[], int]] = {
        "loader": lambda: _drain(
            normalize(batch.images.to(device, non_blocking=True), source.mean, source.std)
            for batch in loader
        )
    }
    if folder is not None:
        reference = plain_loader(data, folder, count * data.batch_size, source)
        pipelines["plain"] = lambda: _drain(
            images.to(device, non_blocking=True) for images, _ in reference
        )
    stages = _stages(source, data, config.seed, device)
    rates: dict[str, list[float]] = {name: [] for name in (*stages, *pipelines)}
    for run in pipelines.values():
        run()  # starts workers, fills the system's cache of files
    for _ in range(rounds):
        for name, run in (*pipelines.items(), *stages.items()):
            wait_for(device)
            began = time.perf_counter()
            done = run()
            wait_for(device)
            rates[name].append(done / (time.perf_counter() - began))

    def figures(name: str) -> dict[str, Any]:
        found = rates[name]
        return {"images_per_second": statistics.median(found), "rounds": found}

    ratios = [a / b for a, b in zip(rates["loader"], rates.get("plain", []), strict=False)]
    whole = figures("loader")
    whole["per_worker"] = whole["images_per_second"] / max(data.workers, 1)
    return {
        "environment": environment(device),
        "batch_size": data.batch_size,
        "image_size": list(data.size),
        "workers": data.workers,
        "source": data.source,
        "cache": data.cache,
        "images": count * data.batch_size,
        "stages": {name: figures(name) for name in stages},
        "loader": whole,
        "plain": figures("plain") if folder is not None else None,
        "ratios": ratios,
        "ratio_to_plain": statistics.median(ratios) if ratios else None,
    }


def _drain(batches: Iterable[Tensor]) -> int:
    return sum(len(images) for images in batches)


def _plain_folder(data: DataConfig) -> Path | None:
    if data.source != "imagefolder" or data.path is None:
        return None
    train = Path(data.path) / "train"
    return train if train.is_dir() else Path(data.path)


def plain_loader(
    data: DataConfig, folder: Path, images: int, source: ImageSource
) -> DataLoader[Any]:
    """The same pipeline as anyone would build it from torchvision.

    Args:
        data: sizes, crops, workers and batch size.
        folder: one folder a class.
        images: how many an iteration gives.
        source: its statistics are used.

    Raises:
        UserError: if the folder holds no classes with images.
    """
    from torchvision import datasets, transforms

    steps: list[Any] = [
        transforms.RandomResizedCrop(
            data.size,
            scale=data.crop_scale,
            ratio=data.crop_ratio,
            interpolation=transforms.InterpolationMode.BICUBIC,
        ),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(source.mean, source.std),
    ]
    try:
        dataset = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    except (OSError, RuntimeError) as error:
        raise setting_error("--plain", str(folder), " ".join(str(error).split())) from error
    return DataLoader(
        dataset,
        batch_size=data.batch_size,
        sampler=RandomSampler(dataset, replacement=True, num_samples=images),
        num_workers=data.workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=data.workers > 0,
        drop_last=True,
    )


def _stages(
    source: ImageSource, data: DataConfig, seed: int, device: torch.device
) -> dict[str, Callable[[], int]]:
    """One batch's way, each part alone, in this process."""
    indices = permutation(seed, 0, len(source))[: data.batch_size]
    keys = image_keys(seed, 0, source.sample_ids[indices], purpose="augment")
    pictures: list[Picture] = [source.image(index) for index in indices.tolist()]
    cut = train_transform(pictures, keys, data)
    rows = list(cut)
    batch = Batch(cut, None, source.sample_ids[indices], epoch=0, step=0)
    stages: dict[str, Callable[[], int]] = {}
    files = list(_contents(source, indices))
    if files:
        stages["read"] = lambda: len(list(_contents(source, indices)))
        stages["decode"] = lambda: len(
            [decode(content, "", data.max_pixels, data.decode) for content in files]
        )
    else:
        stages["read and decode"] = lambda: len([source.image(i) for i in indices.tolist()])
    stages["augment"] = lambda: len(train_transform(pictures, keys, data))
    stages["collate"] = lambda: len(torch.stack(rows))
    stages["to device"] = lambda: len(
        normalize(batch.to(device, non_blocking=True).images, source.mean, source.std)
    )
    return stages


def _contents(source: ImageSource, indices: Tensor) -> Iterator[bytes]:
    """The files of the images, where the source reads files."""
    for index in indices.tolist():
        if (content := source.encoded(index)) is not None:
            yield content


def format_data_table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = ["| what | images/s (median) | slowest to fastest |", "| --- | ---: | ---: |"]
    entries = {f"{name} (one process)": found for name, found in figures["stages"].items()}
    entries["**whole loader**"] = figures["loader"]
    if figures["plain"] is not None:
        entries["plain torchvision"] = figures["plain"]
    for name, found in entries.items():
        low, high = min(found["rounds"]), max(found["rounds"])
        rows.append(f"| {name} | {found['images_per_second']:,.0f} | {low:,.0f} to {high:,.0f} |")
    machine = figures["environment"]
    height, width = figures["image_size"]
    head = (
        f"{machine['device']}, {machine['cpu']}, {machine['cores']} cores, torch "
        f"{machine['torch']}; {figures['source']}, cache {figures['cache']}, {height} x {width}, "
        f"batch {figures['batch_size']}, {figures['workers']} workers, "
        f"{len(figures['loader']['rounds'])} rounds of {figures['images']} images; a worker gives "
        f"{figures['loader']['per_worker']:,.0f} images/s"
    )
    lines = [head, "", *rows]
    if figures["ratio_to_plain"] is not None:
        low, high = min(figures["ratios"]), max(figures["ratios"])
        told = f"{figures['ratio_to_plain']:.2f} ({low:.2f} to {high:.2f})"
        lines += ["", f"Whole loader over plain, median of rounds: {told}"]
    return "\n".join(lines)
