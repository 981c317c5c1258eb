"""What segmentation and detection share: settings, model, training, and the evaluation itself.

An encoder, frozen or fine-tuned, is trained with a head on images of the task's own. The best epoch
is chosen on a keyed share of the training images; val is asked once, at the end. Order, views, drop
path and what a head samples follow from (seed, epoch, sample id), so that several processes compute
what one does.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from mim.core.config import FREE, DataConfig
from mim.core.cpu.kernels import tune
from mim.core.device import to_device
from mim.core.errors import UserError, setting_error
from mim.core.fields import (
    BelowOne,
    Between,
    Count,
    Natural,
    NonNegative,
    Positive,
    Share,
    Span,
    is_free,
)
from mim.core.progress import note_once
from mim.data import Batch, BatchLoader, ImageSource, holdout
from mim.data.measuring import measure
from mim.data.sources.base import Split
from mim.evaluate.base import TaskEvaluation
from mim.evaluate.dense.pyramid import SCALES
from mim.evaluate.dense.segmentation_data import DenseFiles
from mim.evaluate.dense.views import DenseBatches
from mim.evaluate.drop_path import draws_of, key_drop_paths
from mim.evaluate.encoders import normalisation
from mim.evaluate.features import check_precision
from mim.evaluate.training import (
    StepSettings,
    SupervisedTask,
    identity_of,
    start_accelerator,
    state_file,
    train_epochs,
    warmup_and_cosine,
)
from mim.model.backbones import (
    build_backbone,
    family_of,
    load_backbone,
    patch_size_of,
    resize_positions,
)
from mim.training.checkpoint import TASK, FileStore, read_safetensors, save_encoder
from mim.training.hooks import BestEpoch
from mim.training.runtime.precision import autocast
from mim.training.trainer import Loss, parts

if TYPE_CHECKING:
    from mim.evaluate.encoders import Encoder

T = TypeVar("T", bound=ImageSource)


@dataclass(frozen=True)
class DenseSettings(StepSettings):
    """Settings that segmentation and detection share."""

    path: str = field(default="", metadata=FREE)
    """Folder of the images; see ``source``."""
    classes: tuple[str, ...] = ()
    """Names of the classes."""
    image_size: tuple[Count, Count] = (512, 512)
    """(height, width) of what the encoder reads; position embeddings are interpolated to it."""
    freeze: bool = False
    """Whether the encoder stays as it is and only the head is trained."""
    epochs: Count = 50
    """Passes over the training images."""
    batch_size: Count = 16
    """Images a step; all where there are fewer training images."""
    lr: Positive = 1e-4
    """Peak learning rate of the head; half a cosine to 0. Not scaled with the batch."""
    warmup_epochs: NonNegative = 1.0
    """Epochs of linear warm-up, at most half of all."""
    weight_decay: NonNegative = 0.05
    """AdamW's; vectors, tokens and position embeddings have none."""
    layer_decay: Share = 0.75
    """Factor of the learning rate from each layer of the encoder to the one before it."""
    drop_path: BelowOne = 0.1
    """Stochastic depth of the last block; it grows linearly from 0 in the first. None if frozen."""
    scale: Span = (0.5, 2.0)
    """From and to of the random scale of a training image."""
    flip: bool = True
    """Whether half of the training images are mirrored left to right."""
    width: Count = 256
    """Channels of the head."""
    scales: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)
    """Sizes of the pyramid's maps over that of the grid of patches, descending."""
    held_out: Between = 0.1
    """Share of the training images on which the best epoch is chosen."""
    measure_every: Count = 1
    """Epochs between two measurements on them; the last epoch is always measured."""
    mean: tuple[float, ...] = ()
    """Mean of each channel by which images are normalised; by default as in pre-training."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel, likewise."""
    weights: str = field(default="", metadata=FREE)
    """File of a trained model of the same settings: it is measured on val, nothing is trained."""
    save: bool = field(default=True, metadata=FREE)
    """Whether the trained model is written into the run folder."""
    pictures: Natural = field(default=4, metadata=FREE)
    """Images of val that are drawn with truth and prediction into the run folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = all(scale in SCALES for scale in self.scales)
        if not self.scales or not known or list(self.scales) != sorted(self.scales, reverse=True):
            raise self.error("scales", f"must be some of {SCALES}, descending")
        if not all(self.classes):
            raise self.error("classes", "must be names")
        if len(set(self.classes)) < len(self.classes):
            raise self.error("classes", "names a class twice")
        if len(self.mean) != len(self.std):
            raise self.error("mean", "must have as many values as std")
        if self.weights and not Path(self.weights).is_file():
            raise self.error("weights", "is no file")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what the encoder reads."""
        return self.image_size[0], self.image_size[1]


def encoder_at_size(encoder: Encoder, settings: DenseSettings) -> Any:
    """The encoder for images of the task's size; the given one is not touched.

    Raises:
        UserError: for raw pixels, a size that the patches do not divide, a backbone that is no
            plain ViT, or an encoder that does not say how it was built.
    """
    if encoder.vit is None or encoder.model is None:
        raise UserError(f"evaluation {settings.name}: how {encoder.name} was built is not known")
    kind = family_of(encoder.vit)
    if not kind.has_one_grid:
        reason = f"needs a ViT with one grid of patches, and {encoder.name} is a {kind.kind}"
        raise UserError(f"evaluation {settings.name} {reason}")
    patch = patch_size_of(encoder.vit)
    if settings.size[0] % patch[0] or settings.size[1] % patch[1]:
        reason = f"is not divisible by the patch, {patch[0]} x {patch[1]}"
        raise settings.error("image_size", reason)
    drop = 0.0 if settings.freeze else settings.drop_path
    model = replace(
        encoder.model, backbone_args={**encoder.model.backbone_args, "drop_path_rate": drop}
    )
    vit = build_backbone(model, settings.size, encoder.data.channels, settings.seed)
    load_backbone(vit, resize_positions(encoder.vit, vit), encoder.name)
    key_drop_paths(vit)
    return vit.requires_grad_(not settings.freeze)


def statistics_of(
    encoder: Encoder, settings: DenseSettings
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which the encoder was used to see images.

    Raises:
        UserError: if its images are gone and nothing else tells; names the settings that would.
    """
    channels = encoder.data.channels
    if settings.mean:
        if len(settings.mean) != channels:
            raise settings.error("mean", f"must have {channels} values, one for each channel")
        return settings.mean, settings.std
    try:
        return normalisation(encoder.data)
    except UserError as error:
        raise UserError(
            f"evaluations.{settings.name}.mean: must be given, with std: what {encoder.name} was "
            f"pre-trained on cannot be read ({error})"
        ) from error


def with_range(data: DataConfig, found: tuple[float, float] | None) -> DataConfig:
    """A config by which images of more than 8 bits are read by the range that was found."""
    return data if found is None else replace(data, measured=replace(data.measured, range=found))


def found_range(data: DataConfig, source: ImageSource) -> tuple[float, float] | None:
    """The range of training images where ``data.range: auto`` has seen none of more than 8 bits."""
    if not isinstance(source, DenseFiles) or data.measured.range is not None:
        return data.measured.range
    found = measure(source.reading(data), replace(data, stats="source"), source.reading).range
    if found is not None:
        where = source.files[0].parent
        note_once(f"data.range=auto: {found[0]:g} to {found[1]:g} become 0 to 1 in {where}")
    return found


def read_as(source: T, data: DataConfig) -> T:
    """The images of a task, read as a config says."""
    if not isinstance(source, DenseFiles):
        return source
    other = source.reading(data)
    other.deep, other.show = data.range != "high_byte" and other.has_deep(), data.show
    return other


def data_of(encoder: Encoder, settings: DenseSettings, images: int) -> DataConfig:
    """How the task's images are read: the encoder's channels and workers, the task's size."""
    return replace(
        encoder.data,
        image_size=settings.size,
        batch_size=min(settings.batch_size, images),
        flip=settings.flip,
    )


def fill_of(mean: Sequence[float]) -> int | tuple[int, ...]:
    """Padding that normalises to about 0."""
    fill = tuple(min(255, round(255 * value)) for value in mean)
    return fill if len(fill) > 1 else fill[0]


class DenseModel(nn.Module):
    """An encoder and a head for one task."""

    task: ClassVar[str]
    encoder: Any
    frozen: bool
    classes: list[str]
    seed: int
    mean: tuple[float, ...]
    """Of each channel, by which images are normalised."""
    range: tuple[float, float] | None = None
    """Values of images of more than 8 bits that become 0 and 1; see ``data.range``."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The training loss of a batch: a mean over what :meth:`counted` counts."""

    def counted(self, batch: Batch) -> int:
        """Over how many things the loss of a batch is a mean."""
        return len(batch)

    def draw_drop_paths(self, batch: Batch) -> None:
        """For every drop path of the encoder, by the images' keys."""
        draws = draws_of(self.encoder)
        if draws is not None:
            values = draws.draw(batch, self.seed)
            draws.values = to_device(values, next(self.parameters()).device)

    def train(self, mode: bool = True) -> DenseModel:
        """A frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def save(self, path: Path, numbers: dict[str, float]) -> None:
        """Writes safetensors; the file says which task and classes it is for."""
        metadata = {
            TASK: self.task,
            "classes": json.dumps(self.classes),
            "numbers": json.dumps(numbers),
            "range": json.dumps(self.range),
        }
        save_encoder(path, self.state_dict(), metadata)

    def load(self, path: Path) -> None:
        """Takes the weights of a file that :meth:`save` wrote.

        Raises:
            UserError: if it is for another task, other classes or another encoder or head.
        """
        setting = f"evaluations.{self.task}.weights"
        try:
            state, metadata = read_safetensors(path)
        except (OSError, SafetensorError) as error:
            raise setting_error(setting, str(path), f"cannot be read: {error}") from error
        task = "finetune" if "classifier" in metadata else metadata.get(TASK)
        if task != self.task:
            reason = f"has the head of {task}" if task else "is an encoder without a head"
            raise setting_error(setting, str(path), f"{reason}; {self.task} needs its own")
        classes = json.loads(metadata["classes"])
        if classes != self.classes:
            reason = f"has {len(classes)} classes ({', '.join(classes)}), the data "
            reason += f"{len(self.classes)} ({', '.join(self.classes)})"
            raise setting_error(setting, str(path), reason)
        own = self.state_dict()
        wrong = [f"lacks {key}" for key in own if key not in state]
        wrong += [f"has the unknown {key}" for key in state if key not in own]
        wrong += [
            f"has {key} of {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ]
        if wrong:
            more = f" and {len(wrong) - 1} more faults" if len(wrong) > 1 else ""
            raise setting_error(setting, str(path), f"does not fit the settings: {wrong[0]}{more}")
        self.load_state_dict(state)
        self.range = range_in(metadata) or self.range


def range_in(metadata: Mapping[str, str]) -> tuple[float, float] | None:
    """What :meth:`DenseModel.save` wrote of the range."""
    found = json.loads(metadata.get("range", "null"))
    return None if found is None else (found[0], found[1])


def parameter_groups(model: DenseModel, settings: DenseSettings) -> list[dict[str, Any]]:
    """AdamW's groups with ``lr_scale`` and ``weight_decay``: the encoder's by layer, the head's.

    With L blocks, ``lr_scale`` is ``layer_decay`` to the power L + 1 for embeddings and L - i for
    block i counted from 0, and 0 for the head; the final norm goes with the last block.
    """
    inside = {id(p) for p in model.encoder.parameters()}
    head = [p for p in model.parameters() if id(p) not in inside]
    groups: list[dict[str, Any]] = []
    if not model.frozen:
        for group in param_groups_layer_decay(
            model.encoder,
            weight_decay=settings.weight_decay,
            no_weight_decay_list=model.encoder.no_weight_decay(),
            layer_decay=settings.layer_decay,
        ):
            # timm's last group is the last block, for it sees no head.
            groups.append({**group, "lr_scale": group["lr_scale"] * settings.layer_decay})
    vectors, matrices = [p for p in head if p.ndim <= 1], [p for p in head if p.ndim > 1]
    groups.append({"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0})
    groups.append({"params": matrices, "weight_decay": settings.weight_decay, "lr_scale": 1.0})
    return groups


class _Learner(nn.Module):
    """Exposes the loss of a model as a module that DistributedDataParallel can wrap."""

    def __init__(self, model: DenseModel) -> None:
        super().__init__()
        self.dense = model

    def forward(self, batch: Batch) -> Tensor:
        return self.dense.loss(batch)


def _cut(batch: Batch, cut: slice) -> Batch:
    """Some images of a batch, with their masks or boxes."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    rows: dict[str, Any] = {
        name: v[cut] for name, v in values.items() if isinstance(v, (Tensor, list))
    }
    return replace(batch, **rows)


class DenseTask(SupervisedTask):
    """Images with masks or boxes, of which each process takes its share.

    Raises:
        UserError: for an unknown precision, or a batch that does not divide among the processes.
    """

    model: DenseModel
    settings: DenseSettings
    rate = "lr"

    def __init__(
        self,
        model: DenseModel,
        settings: DenseSettings,
        batches: DenseBatches,
        accelerator: Accelerator,
        precision: str,
    ) -> None:
        check_precision(precision)
        size, world = batches.config.batch_size, accelerator.num_processes
        if size % world:
            reason = f"does not divide among {world} processes"
            if size < settings.batch_size:
                reason += f"; the training images allow {size}"
            raise settings.error("batch_size", reason)
        super().__init__(model, accelerator, settings, size, batches.per_epoch, settings.epochs)
        tune(model, accelerator.device, precision)
        self.data, self.precision = batches, precision
        share, rank = size // world, accelerator.process_index
        batches.share = slice(rank * share, (rank + 1) * share)

    def batches(self, start: int) -> Iterable[Batch]:
        steps = range(start, max(start, self.steps))
        return BatchLoader(self.data, steps, workers=self.data.config.workers)

    def prepare(self, batch: Batch) -> Batch:
        return batch  # the model knows what it needs on the device

    def parts(self, inputs: Batch, count: int) -> Iterator[tuple[Batch, Tensor | float]]:
        """Normalises the loss by what all processes count."""
        world = self.accelerator.num_processes
        if count == world == 1:
            yield inputs, 1.0
            return
        cuts = [_cut(inputs, cut) for cut in parts(inputs, count)]
        counts = torch.tensor([float(self.model.counted(part)) for part in cuts])
        counts = to_device(counts, self.accelerator.device)
        total = self.accelerator.reduce(counts.sum(), "sum").clamp(min=1)
        yield from zip(cuts, counts * world / total, strict=True)

    def loss(self, learner: nn.Module, part: Batch) -> Loss:
        with autocast(self.precision, self.accelerator.device):
            loss = learner(part)
        return Loss(loss, {"loss": loss.detach().float()})

    def learner(self) -> nn.Module:
        wrapped: nn.Module = self.accelerator.prepare_model(_Learner(self.model))
        return wrapped

    def fit(self, measure: Callable[[], float], label: str, store: FileStore | None) -> BestEpoch:
        """Trains, and leaves the model with the weights of the epoch that measured best.

        Args:
            measure: what is chosen by, on held-out images; more is better. All processes call it.
            label: what the progress is called.
            store: where an interrupted training resumes from; the caller removes its file.

        Raises:
            UserError: for a loss that is not finite.
            Interrupted: after a signal where there is a store, which then has been written.
        """
        s, device = self.settings, self.accelerator.device
        schedule = warmup_and_cosine(self, s.lr, 0.0, s.warmup_epochs)
        groups = parameter_groups(self.model, s)
        optimizer = torch.optim.AdamW(groups, lr=schedule(0), fused=True)
        scaler = torch.amp.GradScaler(device.type) if self.precision == "fp16" else None
        best = BestEpoch(
            lambda _: torch.tensor([measure()], dtype=torch.float64), s.measure_every, "held_out"
        )
        train_epochs(self, optimizer, schedule, best, label, store, scaler)
        return best


class DenseEvaluation(TaskEvaluation):
    """A head trained on images of its own, frozen encoder or not; a subclass says which."""

    settings: DenseSettings

    @abstractmethod
    def measures(self) -> tuple[str, ...]:
        """Names what :meth:`measure` gives; the best epoch is chosen by the first."""

    @abstractmethod
    def open(self, split: Split) -> Any:
        """Opens the images of the settings, and checks them."""

    @abstractmethod
    def build(self, encoder: Encoder) -> Any:
        """The model at the task's size; the given encoder is not touched."""

    @abstractmethod
    def batches(self, model: Any, source: Any, data: DataConfig) -> DenseBatches:
        """The training views of a source."""

    @abstractmethod
    def measure(
        self, model: Any, source: Any, accelerator: Accelerator, precision: str
    ) -> dict[str, float]:
        """Named numbers over all images of a source, of which each process reads its share."""

    @abstractmethod
    def draw(
        self,
        model: Any,
        source: Any,
        indices: list[int],
        device: torch.device,
        precision: str,
        path: Path,
    ) -> None:
        """Writes a picture of some images with truth and prediction."""

    def data_numbers(self) -> dict[str, float]:
        """What is to be said of the images themselves."""
        return {}

    @cached_property
    def sources(self) -> tuple[Any, Any]:
        """The images of train and of val."""
        own, other = self.open("train"), self.open("val")
        if len(own) < 2:
            raise self.settings.error("path", "holds fewer than 2 training images")
        return own, other

    def check(self, train: ImageSource | None = None, val: ImageSource | None = None) -> None:
        """Opens the images of the settings.

        Raises:
            UserError: see :meth:`open`; also for too few images to hold some out.
        """
        _ = self.sources

    def run(
        self,
        encoder: Encoder,
        train: ImageSource | None = None,
        val: ImageSource | None = None,
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        folder: Path | None = None,
    ) -> dict[str, float]:
        """Trains and measures; writes ``NAME.safetensors`` and ``pictures/NAME.png``.

        Returns:
            What :meth:`measure` finds on val, and what was chosen on the held-out images.
        """
        s, accelerator = self.settings, start_accelerator(device)
        own, other = self.sources
        model: DenseModel = self.build(encoder)
        decides, store, chosen = self.measures()[0], None, {}
        model.range = found_range(encoder.data, own)
        if s.weights:
            model.load(Path(s.weights))
        data = with_range(encoder.data, model.range)
        own, other = read_as(own, data), read_as(other, data)
        model.to(accelerator.device).eval()
        if not s.weights:
            held, rest = (
                own.subset(holdout(own.sample_ids, s.held_out, part)) for part in ("val", "train")
            )
            batches = self.batches(model, rest, data_of(encoder, s, len(rest)))
            store = store_of(folder, s, encoder, own, precision)
            best = DenseTask(model, s, batches, accelerator, precision).fit(
                lambda: self.measure(model, held, accelerator, precision)[decides],
                f"{s.name} {encoder.name}",
                store,
            )
            chosen = best.numbers(decides)
        numbers = self.measure(model, other, accelerator, precision)
        numbers.update({**chosen, **self.data_numbers()})
        if folder is not None and accelerator.is_main_process:
            if s.save and not s.weights:
                model.save(folder / f"{s.name}.safetensors", numbers)
            if s.pictures:
                indices = list(range(0, len(other), max(len(other) // s.pictures, 1)))
                picture = folder / "pictures" / f"{s.name}.png"
                shown = indices[: s.pictures]
                self.draw(model, other, shown, accelerator.device, precision, picture)
            if store is not None:
                store.remove()
        return numbers


def store_of(
    folder: Path | None,
    settings: DenseSettings,
    encoder: Encoder,
    source: ImageSource,
    precision: str,
) -> FileStore | None:
    """The file from which an interrupted training resumes; None where none is kept."""
    path = state_file(folder, settings, settings.name)
    if path is None:
        return None
    kind = type(settings)
    recipe = {key: value for key, value in asdict(settings).items() if not is_free(kind, key)}
    parts = [recipe, list(source.classes), source.fingerprint(), identity_of(encoder, precision)]
    return FileStore(path, json.dumps(parts, sort_keys=True))


def share_of(count: int, accelerator: Accelerator) -> range:
    """Which of ``count`` images this process measures; there may be none."""
    rank, world = accelerator.process_index, accelerator.num_processes
    return range(count * rank // world, count * (rank + 1) // world)
