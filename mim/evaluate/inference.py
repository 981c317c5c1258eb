"""Applies what was trained to a folder of images: features, classes, label maps, boxes.

The images are taken in parts. Each process computes its share of them and writes each as it ends: a
call that was interrupted goes on at the first part that is missing. Unreadable images are left out
and named.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import choice_error, setting_error
from mim.core.files import prepare_folder, write_atomic, write_json_atomic, write_text_atomic
from mim.core.lock import sole_use
from mim.core.progress import note
from mim.core.terminal import printable
from mim.data import ImageSource, Picture, Subset, UnreadableImage, prepare
from mim.data.detection import keep_outside
from mim.data.images.transforms import size_of
from mim.data.measuring import measure
from mim.data.sources.folder import FlatFolder
from mim.data.unreadable import Ledger
from mim.evaluate.base import build_evaluation
from mim.evaluate.dense.detect import Detect, Detector
from mim.evaluate.dense.pictures import class_colours
from mim.evaluate.dense.segment import Segment, Segmenter
from mim.evaluate.dense.training import encoder_at_size, range_in, statistics_of, with_range
from mim.evaluate.encoders import Encoder, on_images, resized, run_encoder
from mim.evaluate.features import PATCHES, check_pool, each_batch, extract_features
from mim.evaluate.finetune import FILE, load_classifier
from mim.evaluate.predictions import write_npz
from mim.evaluate.training import several, start_accelerator
from mim.training.checkpoint import file_digest, read_result, read_safetensors
from mim.training.runtime.precision import autocast

PART = 512
"""Images of a part."""
TASKS = {"finetune": ".csv", "segment": "", "detect": ".json"}
"""What predicts -> how its output ends; nothing is a folder."""

Arrays = dict[str, NDArray[Any]]
Compute = Callable[[ImageSource, torch.device], Arrays]


class EveryImage(FlatFolder):
    """All images at any depth below a folder, whatever its parts are called."""

    has_val = True

    def _splits(self) -> tuple[None, None]:
        return None, None


def open_images(path: str | Path, data: DataConfig) -> ImageSource:
    """The images below a folder, or the one in a file, with the statistics of the config.

    Those whose header says that they cannot be read are left out, and named.

    Raises:
        UserError: if none is left.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    data = replace(data, source="flat", path=str(folder), fingerprint=None)
    every = EveryImage(data, "train")
    found = measure(every, replace(data, stats="source"), lambda _: every).range
    if found != data.measured.range and found is not None:
        said = f"{found[0]:g} to {found[1]:g} become 0 to 1 in {path}"
        note(f"data.range=auto: {said}; the run has seen no images of more than 8 bits")
        every = EveryImage(with_range(data, found), "train")
    wanted = list(range(len(every)))
    if path.is_file():
        wanted = [i for i in wanted if every.describe(i) == path.name]
    faults = {fault.name: fault.reason for fault in every.check(torch.tensor(wanted).long())}
    source = Subset(every, [i for i in wanted if every.describe(i) not in faults])
    _tell_left_out([f"{name} ({reason})" for name, reason in faults.items()])
    if not len(source):
        raise setting_error("images", str(path), "holds no image that can be read")
    source.ledger = Ledger("val", len(source), 1.0)
    assert data.mean is not None and data.std is not None  # see on_images
    source.mean, source.std = data.mean, data.std
    return source


def _tell_left_out(names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        note(f"left out, since they cannot be read: {', '.join(names[:5])}{more}")


def in_parts(
    output: Path,
    source: ImageSource,
    identity: Any,
    compute: Compute,
    join: Callable[[Iterator[Arrays]], None],
    device: str,
) -> Path:
    """Computes the parts that are missing, over all processes, and joins them on the first.

    Args:
        output: what ``join`` writes; the parts wait beside it until then.
        source: the images.
        identity: what the parts depend on besides the images; those of another are not used.
        compute: makes arrays of some images, among them their ``sample_ids``.
        join: writes the output.
        device: where ``compute`` runs.

    Returns:
        The output.
    """
    folder = output.with_name(f"{output.name}.parts")
    state = folder / "parts.json"
    mine = json.loads(json.dumps([identity, source.fingerprint(), PART], default=str))
    count = math.ceil(len(source) / PART)
    paths = [folder / f"{number:06d}.npz" for number in range(count)]
    names = {int(key): source.describe(place) for place, key in enumerate(source.sample_ids)}
    with several(device), ExitStack() as stack:
        accelerator = start_accelerator(device)
        if accelerator.is_main_process:
            prepare_folder(output.parent, "--output")
            stack.enter_context(sole_use(output.parent, "--output", f".{output.name}.lock"))
            if state.is_file() and json.loads(state.read_text(encoding="utf-8")) != mine:
                shutil.rmtree(folder)
            prepare_folder(folder, "--output")
            write_json_atomic(state, mine)
        accelerator.wait_for_everyone()
        for number in range(accelerator.process_index, count, accelerator.num_processes):
            if not paths[number].is_file():
                chosen = range(number * PART, min((number + 1) * PART, len(source)))
                write_npz(paths[number], compute(Subset(source, chosen), accelerator.device))
                if count > 1:
                    note(f"{output.name}: {chosen.stop:,} of {len(source):,} images")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for part in _read(paths):
                for key in part["sample_ids"].tolist():
                    names.pop(key, None)
            _tell_left_out(list(names.values()))
            join(_read(paths))
            shutil.rmtree(folder)
    return output


def _read(paths: Sequence[Path]) -> Iterator[Arrays]:
    for path in paths:
        with np.load(path, allow_pickle=False) as file:
            yield dict(file)


# --- Features -----------------------------------------------------------------------------------


def embed(
    run: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    per: str = "image",
    pool: str = "mean",
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    precision: str = "fp32",
) -> Path:
    """Writes the features of all images below a folder.

    Args:
        run: the run folder.
        images: the folder, or one file.
        output: ``.npy``, (n, D), or (n, N, D) for patches, with the names of the files in a
            ``.txt`` beside it; or ``.parquet`` with the columns ``file`` and ``features``.
        per: image or patch.
        pool: what stands for an image: mean, cls or both.
        image_size: side in pixels, or (height, width); by default the run's own.
        batch_size: images in the encoder at once.
        device: where it runs.
        precision: fp32, bf16 or fp16, of the encoder.

    Raises:
        UserError: for a mistake in any of these.
    """
    output = Path(output)
    if output.suffix not in (".npy", ".parquet"):
        raise setting_error("--output", str(output), "must end in .npy or .parquet")
    if per not in ("image", "patch"):
        raise choice_error("--per", per, ("image", "patch"))
    keep_outside("--output", output, str(images), divided=False)
    encoder = on_images(resized(run_encoder(Path(run)), image_size), images, "flat")
    check_pool(encoder.vit, pool)
    if per == "patch":  # of each image equally many
        encoder = replace(encoder, data=encoder.data.as_square())
    source = open_images(images, encoder.data)

    def compute(part: ImageSource, device: torch.device) -> Arrays:
        wanted = PATCHES if per == "patch" else pool
        found = extract_features(encoder, part, wanted, batch_size, device, precision)
        return {"sample_ids": found.sample_ids.numpy(), "values": found.values.numpy()}

    def join(parts: Iterator[Arrays]) -> None:
        names = _names(source)
        write = _write_npy if output.suffix == ".npy" else _write_parquet
        write(output, parts, names)

    identity = [_digest_of(Path(run)), per, pool, encoder.data.size, precision]
    return in_parts(output, source, identity, compute, join, device)


def _digest_of(run: Path, name: str = "encoder.safetensors") -> str:
    return file_digest(run / name) if (run / name).is_file() else ""


def _names(source: ImageSource) -> dict[int, str]:
    return {int(key): source.describe(place) for place, key in enumerate(source.sample_ids)}


def _write_npy(output: Path, parts: Iterator[Arrays], names: Mapping[int, str]) -> None:
    """Row by row into a file on disk, which may exceed the memory."""
    files: list[str] = []

    def write(temporary: Path) -> None:
        for part in parts:
            values = part["values"]
            if not files:
                shape = (len(names), *values.shape[1:])
                rows = open_memmap(temporary, "w+", values.dtype, shape)
            rows[len(files) : len(files) + len(values)] = values
            files.extend(names[key] for key in part["sample_ids"].tolist())
        if len(files) < len(names):  # some could not be read
            kept = np.array(rows[: len(files)])
            with temporary.open("wb") as file:
                np.save(file, kept)

    write_atomic(output, write)
    # One line each, also of a name that holds a line end.
    lines = "".join(f"{printable(name)}\n" for name in files)
    write_text_atomic(output.with_suffix(".txt"), lines)


def _write_parquet(output: Path, parts: Iterator[Arrays], names: Mapping[int, str]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        reason = "needs pip install -e '.[hf]'; or choose .npy"
        raise setting_error("--output", str(output), reason) from error

    def write(temporary: Path) -> None:
        with ExitStack() as stack:
            writer = None
            for part in parts:
                flat = part["values"].reshape(len(part["values"]), -1)
                column = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
                files = pa.array([names[key] for key in part["sample_ids"].tolist()])
                table = pa.table({"file": files, "features": column})
                if writer is None:
                    writer = stack.enter_context(pq.ParquetWriter(temporary, table.schema))
                writer.write_table(table)

    write_atomic(output, write)


# --- Predictions --------------------------------------------------------------------------------


def predict(
    run: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    task: str | None = None,
    top: int = 1,
    batch_size: int = 64,
    device: str = "cpu",
    precision: str = "fp32",
) -> Path:
    """Writes what a fine-tuned run predicts for all images below a folder.

    Args:
        run: a run folder with the head of ``mim evaluate finetune``, ``segment`` or ``detect``.
        images: the folder, or one file.
        output: a ``.csv`` of classes, a folder for label maps (PNG), or a ``.json`` of boxes in
            COCO's form, in the pixels of each image.
        task: finetune, segment or detect; by default the one whose head is there.
        top: classes named for each image.
        batch_size: images at once, of a classifier and a detector.
        device: where it runs.
        precision: fp32, bf16 or fp16.

    Raises:
        UserError: for a mistake in any of these, or a run without a head.
    """
    run, output = Path(run), Path(output)
    task = _task_of(run, task)
    ending = TASKS[task]
    if output.suffix != ending:
        what = f"must end in {ending}" if ending else "must be a folder"
        raise setting_error("--output", str(output), f"{what} for {task}")
    keep_outside("--output", output, str(images), divided=False)
    encoder = on_images(run_encoder(run), images, "flat")
    found = range_in(read_safetensors(run / f"{task}.safetensors")[1])
    encoder = replace(encoder, data=with_range(encoder.data, found))
    make = {"finetune": _classes, "segment": _label_maps, "detect": _boxes}[task]
    source = open_images(images, encoder.data)
    compute, join = make(_Job(run, output, encoder, source, top, batch_size, precision))
    identity = [_digest_of(run, f"{task}.safetensors"), top, precision]
    return in_parts(output, source, identity, compute, join, device)


def _task_of(run: Path, task: str | None) -> str:
    if task is not None and task not in TASKS:
        raise choice_error("--task", task, TASKS)
    if not run.is_dir():
        raise setting_error("run", str(run), "does not exist")
    found = [name for name in TASKS if (run / f"{name}.safetensors").is_file()]
    if task in found:
        return str(task)
    if not found or task is not None:
        wanted = task or "finetune, segment or detect"
        reason = f"has no head of {wanted}; mim evaluate {task or 'finetune'} {run} trains one"
        raise setting_error("run", str(run), reason)
    if len(found) > 1:
        raise setting_error("--task", task, f"must be given: {run} has {' and '.join(found)}")
    return found[0]


@dataclass(frozen=True)
class _Job:
    run: Path
    output: Path
    encoder: Encoder
    source: ImageSource
    top: int
    batch_size: int
    precision: str


Made = tuple[Compute, Callable[[Iterator[Arrays]], None]]


def _classes(job: _Job) -> Made:
    source, data = job.source, job.encoder.data.as_square()
    classifier = load_classifier(job.run / FILE, replace(job.encoder, data=data), "run")
    source.mean, source.std = classifier.mean, classifier.std

    def compute(part: ImageSource, device: torch.device) -> Arrays:
        model, best, ids = classifier.model.to(device), [], []

        def shares(images: Any) -> torch.Tensor:
            with autocast(job.precision, device):
                logits = model(images)
            return logits.float().softmax(1)

        for batch, found in each_batch(shares, part, data, job.batch_size, device):
            best.append(torch.stack(found.topk(min(job.top, found.shape[1])), 1).cpu())
            ids.append(torch.as_tensor(batch.sample_ids))
        return {"sample_ids": torch.cat(ids).numpy(), "best": torch.cat(best).numpy()}

    def join(parts: Iterator[Arrays]) -> None:
        names, text = _names(source), io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        numbers = ["", *(f"_{place}" for place in range(2, job.top + 1))]
        heads = [f"{head}{n}" for n in numbers for head in ("class", "probability")]
        writer.writerow(["file", *heads[: 2 * len(classifier.classes)]])
        for part in parts:
            for key, (shares, labels) in zip(
                part["sample_ids"].tolist(), part["best"], strict=True
            ):
                pairs = zip(labels.astype(int), shares, strict=True)
                cells = [c for label, p in pairs for c in (classifier.classes[label], f"{p:.4f}")]
                writer.writerow([names[key], *cells])
        write_text_atomic(job.output, text.getvalue())

    return compute, join


def _head_of(job: _Job, name: str) -> tuple[Any, dict[str, str], Path]:
    """The evaluation with the settings of a run's head, what its file says, and the file."""
    path = job.run / f"{name}.safetensors"
    settings = read_result(job.run).get("evaluation_settings", {}).get(name, {})
    return build_evaluation(name, settings, job.encoder), read_safetensors(path)[1], path


def _picture(source: ImageSource, index: int, channels: int) -> Picture | None:
    try:
        return prepare(source.image(index), channels)
    except UnreadableImage:
        return None


def _label_maps(job: _Job) -> Made:
    evaluation, metadata, path = _head_of(job, "segment")
    assert isinstance(evaluation, Segment)
    s, classes = evaluation.settings, json.loads(metadata["classes"])
    model = Segmenter(encoder_at_size(job.encoder, s), s, classes, *statistics_of(job.encoder, s))
    model.load(path)
    colours = (class_colours(len(classes)) * 255).round().astype(np.uint8)
    names = [Path(job.source.describe(index)) for index in range(len(job.source))]
    stems = Counter(name.with_suffix("") for name in names)

    def compute(part: ImageSource, device: torch.device) -> Arrays:
        model.to(device).eval()
        ids = []
        for index in range(len(part)):
            image = _picture(part, index, len(model.mean))
            if image is None:
                continue
            labels = evaluation.labels_of(model, image, device, job.precision).numpy()
            name = Path(part.describe(index))
            alone = stems[name.with_suffix("")] == 1  # else 1.jpg.png beside 1.tif.png
            file = job.output / (name.with_suffix(".png") if alone else f"{name}.png")
            drawn = Image.fromarray(labels.astype(np.uint8))
            drawn.putpalette(colours.tobytes())
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, functools.partial(drawn.save, format="png"))
            ids.append(int(part.sample_ids[index]))
        return {"sample_ids": np.array(ids, dtype=np.int64)}

    def join(parts: Iterator[Arrays]) -> None:
        named = {
            str(label): {"class": name, "colour": colour}
            for label, (name, colour) in enumerate(zip(classes, colours.tolist(), strict=True))
        }
        write_json_atomic(job.output / "classes.json", named)

    return compute, join


def _boxes(job: _Job) -> Made:
    evaluation, metadata, path = _head_of(job, "detect")
    assert isinstance(evaluation, Detect)
    s, classes = evaluation.settings, json.loads(metadata["classes"])
    masks = any("mask" in key for key in read_safetensors(path)[0])
    model = Detector(
        encoder_at_size(job.encoder, s), s, classes, *statistics_of(job.encoder, s), masks
    )
    model.load(path)

    def compute(part: ImageSource, device: torch.device) -> Arrays:
        model.to(device).eval()
        ids, rows = [], []
        for start in range(0, len(part), s.batch_size):
            places = range(start, min(start + s.batch_size, len(part)))
            read = [(i, _picture(part, i, len(model.mean))) for i in places]
            shown = [(int(part.sample_ids[i]), image) for i, image in read if image is not None]
            images: Any = _Pictures([image for _, image in shown])
            found = evaluation.predict(
                model, images, list(range(len(shown))), device, job.precision
            )
            for (key, _), boxes in zip(shown, found, strict=True):
                columns = [boxes["boxes"], boxes["labels"][:, None], boxes["scores"][:, None]]
                rows.append(torch.cat([column.double() for column in columns], 1).numpy())
                ids.append(np.full(len(rows[-1]), key))
        keys = part.sample_ids.numpy()
        empty = np.zeros((0, 6))
        return {
            "sample_ids": keys,
            "keys": np.concatenate([*ids, keys[:0]]),
            "rows": np.concatenate([*rows, empty]),
        }

    def join(parts: Iterator[Arrays]) -> None:
        names, found = _names(job.source), []
        for part in parts:
            for key, row in zip(part["keys"].tolist(), part["rows"].tolist(), strict=True):
                left, top, right, bottom, label, score = row
                box = [round(v, 2) for v in (left, top, right - left, bottom - top)]
                kind = classes[int(label)]
                found.append({"file": names[key], "class": kind, "bbox": box, "score": score})
        write_json_atomic(job.output, found)

    return compute, join


class _Pictures:
    """Images without boxes, for what reads those of a detection source."""

    def __init__(self, images: Sequence[Picture]) -> None:
        self.images = images
        self.objects = [SimpleNamespace(size=size_of(image)) for image in images]

    def image(self, index: int) -> Picture:
        return self.images[index]

    def describe(self, index: int) -> str:
        return f"image {index}"
