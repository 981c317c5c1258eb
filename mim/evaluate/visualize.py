"""Figures of masks over real images, of what a run reconstructs, and of what its tokens read.

Each ``*_figure`` returns a matplotlib ``Figure``, which a notebook shows; ``save_figure`` writes
it as PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from mim.core.config import Config
from mim.core.errors import UserError, setting_error
from mim.core.rng import image_keys
from mim.data import Batch, ImageSource, Split, eval_loader, normalize, open_source
from mim.data.sources.base import spread_indices
from mim.masks import MASKS, PatchMask, build_mask_generator
from mim.masks.statistics import MaskStatistics, mask_statistics
from mim.model import MaskedImageModel, build_model
from mim.model.attention import (
    both,
    causal,
    readable_keys,
    shifted_windows,
    sliding_window,
    visible_keys,
)
from mim.model.backbones import attention_maps, family_of
from mim.model.teacher import Teacher
from mim.training import checkpoint
from mim.training.checkpoint import write_atomic
from mim.training.loading import load
from mim.training.pictures import (
    as_rgb,
    fixed_masks,
    read_images,
    reconstruct,
    shown_pixels,
)

_GRAY = np.uint8(127)
_TILE = 1.15  # inches
RATIOS = (0.5, 0.75, 0.9)
_MASKS_EXPLAINED = (
    "hidden: how often each patch is, from never (black) to always (white). Mean share of "
    "hidden patches (least to largest). Size of the block\nof connected patches in which the "
    "median hidden patch lies (10th to 90th percentile)."
)


def save_figure(figure: Figure, output: Path, dpi: int = 130) -> Path:
    """Write a figure as PNG, atomically."""
    write_atomic(output, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))
    return output


def _read(
    config: Config, split: Split, images: int, indices: Sequence[int] | None = None
) -> tuple[ImageSource, list[int], Batch, Tensor]:
    """Images of one size, not augmented: ``images`` spread over the split, or ``indices`` of it.

    Returns:
        The source, positions in it, and the images as uint8 and normalised (B, C, H, W).

    Raises:
        UserError: if there is no such position.
    """
    source = open_source(config.data, split)
    chosen = _chosen(source, images, indices)
    square = config.data.as_square()
    (batch,) = eval_loader(source, square, batch_size=len(chosen), indices=chosen)
    return source, chosen, batch, normalize(batch.images, source.mean, source.std)


def _chosen(source: ImageSource, images: int, indices: Sequence[int] | None) -> list[int]:
    """Positions of ``images`` images spread over the split, or the ``indices`` if they exist."""
    chosen = spread_indices(len(source), images) if indices is None else list(indices)
    for index in chosen:
        if not 0 <= index < len(source):
            raise setting_error("--indices", index, f"is not one of 0 to {len(source) - 1}")
    return chosen


def _grid_of_axes(
    rows: int, columns: int, left: float, top: float, bottom: float = 0.1
) -> tuple[Figure, Any]:
    """A figure of square tiles, with inches of room at the left, on top and below."""
    width, height = left + columns * _TILE + 0.1, top + rows * _TILE + bottom
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw={
            "left": left / width,
            "right": 1 - 0.1 / width,
            "top": 1 - top / height,
            "bottom": bottom / height,
            "wspace": 0.06,
            "hspace": 0.06,
        },
    )
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def _show(axis: Axes, pixels: NDArray[Any], **options: Any) -> None:
    axis.imshow(pixels, interpolation="nearest", **options)


def _title(axis: Axes, text: str, **options: Any) -> None:
    axis.set_title(text, **{"fontsize": 8, "pad": 3, **options})


def _row_label(axis: Axes, text: str) -> None:
    axis.text(-0.08, 0.5, text, transform=axis.transAxes, ha="right", va="center", fontsize=8)


def _mask_model(config: Config, model: MaskedImageModel | None) -> MaskedImageModel:
    """A model that can draw ``config``'s masks, with the weights of ``model`` where they fit."""
    built = build_model(config).eval()
    if model is None:
        return built
    built.backbone.load_state_dict(model.backbone.state_dict())
    if built.teacher is not None:
        same = model.teacher.encoder if model.teacher is not None else model.backbone
        built.teacher = Teacher(same, config.model.teacher_decay)
    if built.mask_network is not None and model.mask_network is not None:
        built.mask_network.load_state_dict(model.mask_network.state_dict())
    return built


def _masked_config(config: Config, name: str, ratio: float | None) -> Config:
    hidden = config.mask.ratio if ratio is None else ratio
    return replace(config, mask=replace(config.mask, name=name, ratio=hidden))


@dataclass(frozen=True, eq=False)
class DrawnMasks:
    """Masks of one generator at one ratio over real images."""

    generator: str
    ratio: float
    images: Tensor  # (B, C, H, W), as batches hold them
    pixels: NDArray[np.uint8]  # (B, H, W, 3), as they are shown
    mask: PatchMask | None  # None where the generator refuses
    refusal: str = ""
    statistics: MaskStatistics | None = None

    def as_row(self) -> dict[str, Any]:
        """The statistics, or the refusal, as JSON can hold them."""
        row: dict[str, Any] = {"generator": self.generator, "ratio": self.ratio}
        if self.statistics is None:
            return {**row, "refused": self.refusal}
        share = self.statistics["hidden_share"].tolist()
        return {**row, **self.statistics, "hidden_share": share}


def draw_masks(
    config: Config,
    generators: Sequence[str] | None = None,
    ratios: Sequence[float] = RATIOS,
    images: int = 256,
    model: MaskedImageModel | None = None,
) -> list[DrawnMasks]:
    """Draws the masks of several generators over training images, with statistics.

    Args:
        config: of a run; the settings of each generator stand under ``mask``.
        generators: names; None takes all that are registered.
        ratios: shares of hidden patches.
        images: how many images, spread over the data set.
        model: a trained one, for generators that look at the image; else they are untrained.

    Raises:
        UserError: for an unknown generator. One that does not fit the config is kept, with the
            reason.
    """
    shared = build_model(config) if model is None else model
    names = list(MASKS) if generators is None else list(generators)
    for name in names:
        MASKS.get(name)
    source, _, batch, normalized = _read(config, "train", images)
    pixels = as_rgb(shown_pixels(batch.images, source))
    keys = image_keys(config.seed, 0, batch.sample_ids, purpose="mask")
    drawn = []
    for name in names:
        for ratio in ratios:
            try:
                changed = _masked_config(config, name, ratio)
                generator = build_mask_generator(changed.mask, shared.grid, shared.patch_size)
                if generator.sees_images:
                    drawer = _mask_model(changed, model)
                    mask = drawer.draw_mask(normalized, keys, epoch=0, sample_ids=batch.sample_ids)
                else:
                    mask = generator(shared.grid, keys, epoch=0, sample_ids=batch.sample_ids)
                statistics = mask_statistics(mask, shared.grid)
            except UserError as error:
                drawn.append(DrawnMasks(name, ratio, batch.images, pixels, None, str(error)))
            else:
                drawn.append(DrawnMasks(name, ratio, batch.images, pixels, mask, "", statistics))
    return drawn


def _hide(pixels: NDArray[np.uint8], mask: PatchMask, grid: tuple[int, int]) -> NDArray[np.uint8]:
    """(B, H, W, 3) with gray in the place of hidden patches."""
    flags = mask.is_masked.cpu().view(-1, *grid).numpy()
    height, width = pixels.shape[1] // grid[0], pixels.shape[2] // grid[1]
    flags = flags.repeat(height, axis=1).repeat(width, axis=2)[..., None]
    return np.where(flags, _GRAY, pixels)


def _block_quantiles(statistics: MaskStatistics) -> tuple[int, int, int]:
    """Sizes of the blocks in which a tenth, half and nine tenths of the hidden patches lie."""
    sizes = sorted(statistics["block_sizes"].items())
    total = sum(size * count for size, count in sizes)
    found = []
    for share in (0.1, 0.5, 0.9):
        seen = 0
        for size, count in sizes:
            seen += size * count
            if seen >= share * total:
                break
        found.append(size)
    return found[0], found[1], found[2]


def mask_figure(
    config: Config,
    generators: Sequence[str] | None = None,
    ratios: Sequence[float] = RATIOS,
    images: int = 2,
    model: MaskedImageModel | None = None,
    drawn: list[DrawnMasks] | None = None,
) -> Figure:
    """Every generator over real images: a row a generator, ``images`` columns a ratio.

    The last columns show how often each patch is hidden at each ratio, and the statistics, which a
    line below the figure explains; another names generators that fit the config at no ratio.

    Args:
        config: of a run.
        generators: names; None takes all.
        ratios: shares of hidden patches.
        images: shown at each ratio.
        model: a trained one, for generators that look at the image.
        drawn: of :func:`draw_masks`, where it has been called before.
    """
    drawn = draw_masks(config, generators, ratios, model=model) if drawn is None else drawn
    every = dict.fromkeys(item.generator for item in drawn)
    names = list(dict.fromkeys(item.generator for item in drawn if item.mask is not None))
    left_out = [name for name in every if name not in names]
    ratios = list(dict.fromkeys(item.ratio for item in drawn))
    pixels = drawn[0].pixels
    shown = spread_indices(len(pixels), images)
    images = len(shown)
    # Two more columns hold the words.
    columns = len(ratios) * (images + 1) + 2
    figure, axes = _grid_of_axes(len(names), columns, left=1.0, top=0.35, bottom=0.5)
    said = _MASKS_EXPLAINED
    if left_out:
        said += f"\nLeft out, since they do not fit this config: {', '.join(left_out)}"
    corner = 0.1 / figure.get_figwidth(), 0.4 / figure.get_figheight()
    figure.text(*corner, said, fontsize=8, va="top")
    for axis in axes[:, :-2].flat:  # those that stay blank, too: titles stand at one height
        axis.set_box_aspect(pixels.shape[1] / pixels.shape[2])
    for item in drawn:
        if item.generator not in names:
            continue
        row, place = names.index(item.generator), ratios.index(item.ratio)
        line = axes[row]
        first = place * images
        heat = line[len(ratios) * images + place]
        if place == 0:
            _row_label(line[0], item.generator)
        if row == 0:
            _title(line[first], f"ratio {item.ratio:g}")
            _title(heat, f"hidden, {item.ratio:g}")
        if item.mask is None or item.statistics is None:
            line[first].text(0, 0.5, "does not fit", fontsize=8, va="center")
            continue
        hidden = item.statistics["hidden_share"].numpy()
        for column, index in enumerate(shown):
            one = slice(index, index + 1)
            _show(line[first + column], _hide(pixels[one], item.mask[one], hidden.shape)[0])
        _show(heat, hidden, cmap="gray", vmin=0, vmax=1)
        heat.set_axis_on()
        heat.set(xticks=(), yticks=())  # a frame, since white is the paper's colour
        s = item.statistics
        low, middle, high = _block_quantiles(s)
        words = f"{item.ratio:g}: hides {s['ratio_mean']:.3f} ({s['ratio_min']:.2f} to "
        words += f"{s['ratio_max']:.2f})\n      blocks of {middle} patches ({low} to {high})"
        line[-2].text(0.05, 0.95 - 0.3 * place, words, fontsize=7, va="top")
    return figure


def reconstruction_figure(
    run: str | Path,
    images: int = 4,
    indices: Sequence[int] | None = None,
    generators: Sequence[str] | None = None,
    ratios: Sequence[float] | None = None,
) -> Figure:
    """Held-out images: the original, then masked, predicted and composed under each mask.

    Args:
        run: a run folder.
        images: how many, spread over the held-out ones.
        indices: which, instead.
        generators: names, seen in training or not; None takes the run's own.
        ratios: shares of hidden patches; None takes the run's own.

    Raises:
        UserError: for an unknown generator, a ratio it cannot draw or an index out of range, or
            a run that was imported without a decoder.
    """
    config = checkpoint.read_config(run)
    if not checkpoint.read_result(run).get("imported", {}).get("decoder", True):
        raise UserError(
            f"visualize reconstruct: {str(run)!r} was imported from a file without a decoder, so "
            "it predicts nothing yet; go on training it, or draw masks"
        )
    model = load(run)
    source = open_source(config.data, "val")
    chosen = _chosen(source, images, indices)
    normalized, ids = read_images(model, config, source, chosen)  # at their own sizes, if kept
    names = [config.mask.name] if generators is None else list(generators)
    conditions: list[tuple[str, dict[str, NDArray[Any]]]] = []
    for name in names:
        for ratio in [None] if ratios is None else list(ratios):
            changed = _masked_config(config, name, ratio)
            mask = fixed_masks(_mask_model(changed, model), normalized, ids)
            hidden = int(mask.is_masked.sum())
            share = hidden / (hidden + int(mask.is_visible.sum()))  # padding is neither
            arrays = reconstruct(model, config, source, chosen, mask)
            conditions.append((f"{name}, {share:.2f} hidden", arrays))
    parts = ("masked", "prediction", "composite")
    columns = 1 + len(parts) * len(conditions)
    figure, axes = _grid_of_axes(len(chosen), columns, left=0.5, top=0.55)
    for row, index in enumerate(chosen):
        _row_label(axes[row][0], f"{index}")
        _show(axes[row][0], as_rgb(conditions[0][1]["original"][row]))
        for place, (_, arrays) in enumerate(conditions):
            for offset, part in enumerate(parts):
                _show(axes[row][1 + place * len(parts) + offset], as_rgb(arrays[part][row]))
    _title(axes[0][0], "original")
    for place, (label, _) in enumerate(conditions):
        for offset, part in enumerate(parts):
            head = f"{label}\n" if offset == 0 else "\n"
            _title(axes[0][1 + place * len(parts) + offset], head + part, loc="left")
    return figure


def batch_figure(
    original: Sequence[NDArray[np.uint8]],
    masked: Sequence[NDArray[np.uint8]],
    titles: Sequence[str],
) -> Figure:
    """Images of a step, (H, W, C) each, and under them the same with their masks."""
    figure, axes = _grid_of_axes(2, len(titles), left=0.1, top=0.5)
    for column, title in enumerate(titles):
        _show(axes[0][column], as_rgb(original[column]))
        _show(axes[1][column], as_rgb(masked[column]))
        _title(axes[0][column], title, fontsize=5)
    return figure


@torch.no_grad()
def attention_figure(
    run: str | Path, images: int = 4, indices: Sequence[int] | None = None
) -> Figure:
    """What tokens read in a run's encoder, on held-out images.

    Columns: the image; the class token's attention (without one, the mean over all queries) in
    the first, middle and last block on the full image; the image under its fixed mask, with one
    hidden patch framed; and what that patch's query reads in the first and last block. Under
    ``zero`` it reads visible patches alone, under ``token`` all; under ``drop`` hidden patches
    have no query, and the class token's reading of the visible patches is shown.

    Args:
        run: a run folder.
        images: how many, spread over the held-out ones.
        indices: which, instead.

    Raises:
        UserError: if the backbone's blocks are not timm's plain ones.
    """
    config = checkpoint.read_config(run)
    model = load(run)
    vit = model.backbone
    family = family_of(vit)
    if not family.splits:
        reason = f"is a {family.kind} whose blocks do not show their attention; a ViT's do"
        raise setting_error("model.backbone", config.model.backbone, reason)
    source, chosen, batch, normalized = _read(config, "val", images, indices)
    mask = fixed_masks(model, normalized, batch.sample_ids)
    empty = PatchMask.empty(len(chosen), mask.num_patches)
    full_tokens, _ = model.regime.inputs(vit, normalized, empty)
    full = attention_maps(vit, full_tokens)
    tokens, bias = model.regime.inputs(vit, normalized, mask)
    under = attention_maps(vit, replace(tokens, bias=bias))
    prefix, grid, depth = family.num_prefix, model.grid, len(family.blocks)
    blocks = list(dict.fromkeys((0, depth // 2, depth - 1)))
    ends = list(dict.fromkeys((0, depth - 1)))
    pixels = as_rgb(shown_pixels(batch.images, source))
    hidden = _hide(pixels, mask, grid)
    figure, axes = _grid_of_axes(len(chosen), 2 + len(blocks) + len(ends), left=0.5, top=0.55)
    keeps_all = model.regime.keeps_all_tokens
    reader = "class token" if family.has_class_token else "mean query"
    for row, (index, line) in enumerate(zip(chosen, axes, strict=True)):
        _row_label(line[0], f"{index}")
        _show(line[0], pixels[row])
        for place, block in enumerate(blocks):
            weights = _attended(full[block][row], prefix, None, family.has_class_token)
            _show(line[1 + place], weights.view(grid).numpy(), cmap="magma", vmin=0)
        masked = line[1 + len(blocks)]
        _show(masked, hidden[row])
        query = _central(mask.is_masked[row], grid) if keeps_all else None
        if query is not None:
            _frame(masked, query, grid, pixels.shape[1:3])
        for place, block in enumerate(ends):
            weights = _attended(under[block][row], prefix, query, family.has_class_token)
            if not keeps_all:  # put the visible patches in their places
                count = int((~mask.is_masked[row]).sum())
                placed = torch.full((mask.num_patches,), float("nan"))
                placed[mask.visible_ids[row, :count]] = weights[:count]
                weights = placed
            axis = line[2 + len(blocks) + place]
            axis.set_facecolor("#BBBBBB")
            _show(axis, weights.view(grid).numpy(), cmap="magma", vmin=0)
    _title(axes[0][0], "image")
    for place, block in enumerate(blocks):
        _title(axes[0][1 + place], f"{reader}\nblock {block + 1}")
    _title(axes[0][1 + len(blocks)], f"masked\n({model.regime.name})")
    who = "framed query" if keeps_all else reader
    for place, block in enumerate(ends):
        _title(axes[0][2 + len(blocks) + place], f"{who}\nmasked, block {block + 1}")
    return figure


def algebra_figure(config: Config, index: int = 0) -> Figure:
    """Each attention mask of the algebra as a matrix, for one training image under its mask.

    A row is a query, a column a key; dark means that the query reads the key.
    """
    model = build_model(config).eval()
    _, _, batch, normalized = _read(config, "train", 1, [index])
    keys = image_keys(config.seed, 0, batch.sample_ids, purpose="mask")
    mask = model.draw_mask(normalized, keys, epoch=0, sample_ids=batch.sample_ids)
    grid, prefix = model.grid, family_of(model.backbone).num_prefix
    count, length = mask.num_patches, prefix + mask.num_patches
    columns = torch.arange(length)
    padded = columns[None] < length - length // 4
    hidden = visible_keys(mask, prefix)
    window = (_divisor(grid[0]), _divisor(grid[1]))
    shift = (window[0] // 2, window[1] // 2)
    size = f"{window[0]} x {window[1]}"
    shown = {
        "readable keys\n(a quarter is padding)": readable_keys(padded),
        "visible keys\n(zero)": hidden,
        "causal": causal(length),
        f"prefix-causal\n(the first {length // 4})": causal(length, length // 4),
        "visible and causal": both(hidden, causal(length)),
        "sliding window\n(radius 1)": sliding_window(grid, 1),
        f"windows\n({size})": shifted_windows(grid, window),
        f"shifted windows\n({size} by {shift[0]} x {shift[1]})": shifted_windows(
            grid, window, shift
        ),
    }
    figure = Figure(figsize=(4 * 2.3, 2 * 2.9), layout="constrained")
    figure.get_layout_engine().set(hspace=0.08)  # type: ignore[union-attr,call-arg]
    figure.suptitle(
        f"Who may attend to whom: {prefix} prefix token{'s' * (prefix != 1)}, "
        f"{count} patches, {mask.num_masked} hidden",
        fontsize=10,
    )
    for axis, (name, allowed) in zip(figure.subplots(2, 4).flat, shown.items(), strict=True):
        side = allowed.shape[-1]
        matrix = allowed[0, 0].expand(side, side).numpy()
        axis.imshow(matrix, cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("key", fontsize=7)
        axis.set_ylabel("query", fontsize=7)
    return figure


def _divisor(side: int) -> int:
    """The largest proper divisor, so that there are windows to see; 1 for a prime."""
    return max(part for part in range(1, side) if side % part == 0) if side > 1 else 1


def _attended(weights: Tensor, prefix: int, query: int | None, has_class_token: bool) -> Tensor:
    """Heads' mean of (heads, L, L): the row of a patch, of the class token, or of all queries."""
    mean = weights.mean(dim=0)  # (L, L)
    if query is not None:
        row = mean[prefix + query]
    else:
        row = mean[0] if has_class_token else mean.mean(dim=0)
    return row[prefix:]


def _central(is_masked: Tensor, grid: tuple[int, int]) -> int | None:
    """The hidden patch nearest the middle."""
    ids = is_masked.nonzero()[:, 0]
    if not len(ids):
        return None
    rows, columns = ids // grid[1], ids % grid[1]
    distance = (rows - (grid[0] - 1) / 2).square() + (columns - (grid[1] - 1) / 2).square()
    return int(ids[distance.argmin()])


def _frame(axis: Axes, patch: int, grid: tuple[int, int], size: Sequence[int]) -> None:
    height, width = size[0] / grid[0], size[1] / grid[1]
    corner = (patch % grid[1] * width - 0.5, patch // grid[1] * height - 0.5)
    axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="#D55E00", linewidth=2))
