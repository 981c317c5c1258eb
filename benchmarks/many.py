"""What many runs and many images cost: `python -m benchmarks report`, `index`.

Both make their own material in a temporary folder: run folders as ``mim compare`` leaves them, and
empty files that stand for images, of which only names are read.
"""

from __future__ import annotations

import datetime
import io
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mim.compare.cost.growth import fit
from mim.core.config import Config, DataConfig, MaskConfig, SubsetConfig
from mim.core.errors import setting_error
from mim.core.settings import to_dict
from mim.data import open_source
from mim.data.sources.folder import HEADERS_CHECKED
from mim.masks import sample_masks
from mim.report import read_comparison, write_report
from mim.training.runtime.cost import environment, resident_bytes

_REGIMES = ("drop", "zero", "token")
_SEEDS = (0, 1, 2)
_CLASSES = 1000
_SHARE = 0.5
_MASKS_AT_ONCE = 4096
_GRID = (14, 14)


def write_runs(folder: Path, runs: int) -> Path:
    """A comparison folder of so many finished runs: regimes, mask ratios and three seeds.

    Every run has a whole config, losses of 150 logged steps and reconstructions; files of the same
    content share their place on the disk.
    """
    ratios = math.ceil(runs / len(_REGIMES) / len(_SEEDS))
    axes: dict[str, list[Any]] = {
        "model.regime.name": list(_REGIMES),
        "mask.ratio": [round(0.5 + 0.4 * place / ratios, 6) for place in range(ratios)],
        "seed": list(_SEEDS),
    }
    folder.mkdir(parents=True)
    metrics, pictures = folder / "metrics", folder / "pictures"
    rows = [{"step": s, "epoch": s / 75, "loss": 0.4 + 1 / s, "lr": 1e-3} for s in range(1, 151)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    images = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3)).astype(np.uint8)
    kinds: dict[str, Any] = dict.fromkeys(("original", "masked", "prediction", "composite"), images)
    with pictures.open("wb") as file:
        np.savez(file, **kinds, is_masked=np.arange(256).reshape(4, 8, 8) % 4 > 0)
    base, names = to_dict(Config()), []
    for values in itertools.islice(itertools.product(*axes.values()), runs):
        own = dict(zip(axes, values, strict=True))
        names.append(",".join(f"{key.split('.')[-2]}={own[key]}" for key in list(own)[:2]))
        names[-1] += f",seed={own['seed']}"
        _write_run(folder / names[-1], own, base, metrics, pictures)
    content = {"format": 1, "name": f"{runs} runs", "axes": axes, "base": base, "runs": names}
    (folder / "comparison.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _write_run(
    place: Path, axes: dict[str, Any], base: dict[str, Any], metrics: Path, pictures: Path
) -> None:
    regime, ratio, seed = axes.values()
    config: dict[str, Any] = dict(base, seed=seed, output=str(place))
    config["mask"] = dict(base["mask"], ratio=ratio)
    config["model"] = dict(base["model"], regime=dict(base["model"]["regime"], name=regime))
    cost = {"drop": 0.4, "zero": 0.8, "token": 1.0}[regime]
    accuracy = 0.8 + 0.01 * math.sin(97 * ratio + seed) + 0.05 * cost
    result = {
        "format": 1, "name": place.name, "kind": "run", "status": "finished", "axes": axes,
        "seed": seed, "config": config, "steps": 150, "epochs": 2.0, "train_loss": 0.4 + ratio,
        "val_loss": 0.41 + ratio, "encoder_tokens": 65.0, "flops_forward": int(1e8 * cost),
        "flops_backward": int(2e8 * cost), "images_per_second": 2000.0 / cost,
        "peak_memory_bytes": 10**8, "wall_seconds": 60.0 * cost + seed,
        "environment": {"device": "cpu", "torch": torch.__version__},
        "data": {"source": "photos", "train_images": 8000, "fingerprint": "00"},
        "evaluations": {"linear": {"accuracy": accuracy}, "knn": {"accuracy": accuracy - 0.1}},
    }  # fmt: skip
    place.mkdir()
    (place / "result.json").write_text(json.dumps(result), encoding="utf-8")
    os.link(metrics, place / "metrics.jsonl")
    os.link(pictures, place / "reconstructions.npz")


def bench_report(counts: Sequence[int]) -> dict[str, Any]:
    """Seconds to read a comparison and to write its report, and its bytes, for numbers of runs.

    Raises:
        UserError: for a number below 1.
    """
    _check("--runs", counts)
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as place:
            folder = write_runs(Path(place) / "runs", count)
            before = {path.name for path in folder.iterdir()}
            row: dict[str, Any] = {"runs": count}
            row["read_seconds"] = _seconds(partial(read_comparison, folder))
            row["report_seconds"] = _seconds(partial(write_report, folder))
            made = [path for path in folder.iterdir() if path.name not in before]
            sizes = {
                path.name: sum(f.stat().st_size for f in [path, *path.rglob("*")] if f.is_file())
                for path in made
            }
            row["report_html_bytes"] = sizes["report.html"]
            row["written_bytes"] = sum(sizes.values())
        rows.append(row)
    return _told("runs", rows)


def bench_index(counts: Sequence[int]) -> dict[str, Any]:
    """Seconds that numbers of images take before and beside decoding.

    Listing, half of them, the order of an epoch, the batch of the last step as a resumed run asks
    for it, and the masks of all images, 4,096 at a time. Of 20,000 images and fewer, each
    file's header is read, too.

    Raises:
        UserError: for a number below 1.
    """
    _check("--images", counts)
    rows = []
    before = os.environ.get("MIM_CACHE")
    for count in counts:
        with tempfile.TemporaryDirectory() as place:
            os.environ["MIM_CACHE"] = str(Path(place) / "cache")
            try:
                rows.append(_index_row(Path(place) / "images", count))
            finally:
                if before is None:
                    del os.environ["MIM_CACHE"]
                else:
                    os.environ["MIM_CACHE"] = before
    return _told("images", rows)


def _index_row(root: Path, count: int) -> dict[str, Any]:
    classes = min(_CLASSES, count)
    for number in range(classes):
        (root / "train" / f"class{number:04d}").mkdir(parents=True)
    row: dict[str, Any] = {"images": count}

    with io.BytesIO() as file:
        Image.new("L", (8, 8)).save(file, format="JPEG")
        # Where headers are read there must be some; a million of them would take 4 GB of disk.
        content = file.getvalue() if 0.8 * _SHARE * count <= HEADERS_CHECKED else b""

    def fill() -> None:
        for number in range(count):
            name = f"class{number % classes:04d}/image{number:08d}.jpg"
            (root / "train" / name).write_bytes(content)

    row["made_seconds"] = _seconds(fill)
    time.sleep(2.5)  # a list is kept only of folders that have settled
    plain = DataConfig(source="imagefolder", path=str(root))
    row["list_seconds"] = _seconds(lambda: open_source(plain, "train"))
    row["list_again_seconds"] = _seconds(lambda: open_source(plain, "train"))
    source = open_source(plain, "train")
    some = replace(plain, subset=SubsetConfig(fraction=_SHARE))
    row["subset_seconds"] = _seconds(lambda: open_source(some, "train"))
    row["fingerprint_seconds"] = _seconds(source.fingerprint)
    row["order_seconds"] = _seconds(lambda: source.order(0, 1))

    def last_step() -> None:
        indices = source.order(0, 7)[-256:]
        for index in indices.tolist():
            source.describe(index)

    row["resume_seconds"] = _seconds(last_step)

    def masks() -> None:
        for part in source.sample_ids.split(_MASKS_AT_ONCE):
            sample_masks(MaskConfig(), _GRID, seed=0, epoch=1, sample_ids=part)

    row["masks_seconds"] = _seconds(masks)
    row["resident_bytes"] = resident_bytes()
    return row


def _check(option: str, counts: Sequence[int]) -> None:
    for count in counts:
        if count < 1:
            raise setting_error(option, count, "must be at least 1")


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _told(key: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows, and with two numbers or more the exponent of each measure over the last two."""
    exponents = {}
    if len(rows) > 1:
        last = rows[-2:]
        exponents = {
            name: fit([row[key] for row in last], [row[name] for row in last]).exponent
            for name in rows[0]
            if name != key
        }
    return {
        "date": datetime.date.today().isoformat(),
        "environment": environment(torch.device("cpu")),
        "over": key,
        "rows": rows,
        "exponents": exponents,
    }


def format_many(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table, a row a measure."""
    rows, key = figures["rows"], figures["over"]
    machine = figures["environment"]
    lines = [
        f"{figures['date']}: {machine['cpu']}, {machine['cores']} cores, Python "
        f"{machine['python']}, torch {machine['torch']}",
        "",
        f"| {key} | {' | '.join(f'{row[key]:,}' for row in rows)} | grows as |",
        f"| --- | {' | '.join('---:' for _ in rows)} | ---: |",
    ]
    for name in rows[0]:
        if name == key:
            continue
        what, _, unit = name.rpartition("_")
        cells = [
            f"{row[name]:.3g}" if unit == "seconds" else f"{row[name] / 2**20:,.3g}" for row in rows
        ]
        unit = "s" if unit == "seconds" else "MiB"
        power = f"{key}^{figures['exponents'][name]:.2f}" if figures["exponents"] else ""
        lines.append(f"| {what.replace('_', ' ')} ({unit}) | {' | '.join(cells)} | {power} |")
    return "\n".join(lines)
