"""Where a step of pre-training would lose its time on a GPU, from what it computes and moves.

Every operation of a real step is seen on the CPU, at two batch sizes and with few blocks; its
floating-point operations and bytes are continued to the batch and the depth that were asked for.
An operation takes as long as the slower of the two: the arithmetic at the machine's rate of matrix
products, or the traffic at the rate of its memory (Williams, Waterman and Patterson 2009,
"Roofline"). Launches, communication and the loader are left out: the times are lower bounds.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from mim.compare.cost.step import with_regime
from mim.core.config import Config
from mim.core.rng import image_keys
from mim.core.settings import flatten, read_tree, to_dict
from mim.model import build_model
from mim.model.backbones import family_of
from mim.model.decoders import DECODERS
from mim.model.targets import TARGETS
from mim.training.runtime.precision import autocast, model_on

SEEN = (2, 3)  # images of the steps that are watched
OPTIMISER = "optimiser"
KEPT = "kept"  # no operation: the bytes that the forward pass keeps for the backward pass
PARTS = ("products", "attention", "norms", "moves of tokens", "casts", "pointwise", OPTIMISER)
FUSED = ("casts", "pointwise")  # a compiler lets them ride along with what makes their input
_KINDS = {
    "attention": ("scaled_dot_product",),
    "norms": ("layer_norm", "native_layer_norm_backward"),
    "moves of tokens": ("gather", "scatter", "index", "cat", "constant_pad", "select_backward"),
    "casts": ("_to_copy", "clone", "copy_"),
}
_MEMORY, _ARITHMETIC = "waits for memory", "arithmetic"
_ADAMW_BYTES = 28  # a weight: reads it, its gradient and two moments, writes three of them


@dataclass(frozen=True)
class Card:
    """The rates of a GPU; by default the nominal ones of an H200 in bfloat16."""

    tflops: float = 989.0
    """Matrix products, 10^12 operations a second."""
    terabytes: float = 4.8
    """Memory, 10^12 bytes a second."""


@dataclass(frozen=True)
class Operation:
    """What one operation computes and moves."""

    part: str
    flops: float
    bytes: float

    def seconds(self, card: Card) -> float:
        return max(self.flops / card.tflops, self.bytes / card.terabytes) / 1e12

    def waits_for_memory(self, card: Card) -> bool:
        return self.bytes / card.terabytes > self.flops / card.tflops


class Watch(TorchDispatchMode):
    """Notes each operation that computes or copies; views are free, products are not computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Operation] = []

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = flop_registry.get(func.overloadpacket)
        # Nobody reads the numbers, and products in bfloat16 take a CPU long.
        found = (func if count is None else partial(_shapes, func))(*args, **(kwargs or {}))
        aliases = [item.alias_info for item in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            if count is not None:
                flops = count(*args, **(kwargs or {}), out_val=found)
            else:
                flops = _attention_flops(func._schema.name, args)
            tensors = [*tree_leaves((args, kwargs or {})), *tree_leaves(found)]
            self.seen.append(Operation(_part(func, flops), flops, _bytes(tensors)))
        return found


def _shapes(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What an operation would return, without its numbers."""
    args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
    return tree_map_only(Tensor, lambda x: torch.zeros_like(x, device="cpu"), func(*args, **kwargs))


def _attention_flops(name: str, args: tuple[Any, ...]) -> int:
    """Counts the CPU's fused attention, which torch's counter does not know; 0 for the rest."""
    if not name.startswith("aten::_scaled_dot_product"):
        return 0
    shapes = [value.shape for value in args if isinstance(value, Tensor)]
    is_backward = name.endswith("backward")
    return int(
        sdpa_backward_flop_count(*shapes[:4]) if is_backward else sdpa_flop_count(*shapes[:3])
    )


def _part(func: Any, flops: float) -> str:
    name = func._schema.name.split("::")[-1]
    for part, words in _KINDS.items():
        if any(word in name for word in words):
            return part
    return "products" if flops else "pointwise"


def _bytes(values: Iterable[Any]) -> int:
    """Returns the bytes of different tensors; one that is read and written counts once."""
    tensors = {id(value): value for value in values if isinstance(value, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def operations(config: Config, images: int) -> list[Operation]:
    """Returns the operations of one step, those of AdamW as one, and what is kept as another.

    Args:
        config: of pre-training, with its regime and precision.
        images: in the batch; all have one mask, so that figures grow by straight lines.
    """
    device = torch.device("cpu")
    config = replace(config, train=replace(config.train, attention="fused", linear="torch"))
    model = model_on(config, device).train()
    noise = torch.randn(images, config.data.channels, *config.data.size)
    ids = torch.zeros(images, dtype=torch.int64)
    keys, times = image_keys(0, 0, ids), config.mask.repeats
    draw = partial(model.draw_mask, noise, keys, epoch=0, sample_ids=ids, repeats=times)
    mask = draw()
    owned = {value.untyped_storage().data_ptr() for value in (*model.parameters(), noise)}
    kept: dict[int, UntypedStorage] = {}

    def keep(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in owned:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage()
        return value

    # The CPU has no fused form of a bias that learns.
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels, set_priority=True), Watch() as watch:
        if model.mask_generator.sees_images:  # else it is drawn on the host
            draw()
        with autocast(config.train.precision, device), saved_tensors_hooks(keep, lambda x: x):
            loss = model(noise, mask).loss
        held = sum(storage.nbytes() for storage in kept.values())
        loss.backward()
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rest = [Operation(OPTIMISER, 0, _ADAMW_BYTES * weights), Operation(KEPT, 0, held)]
    return [*watch.seen, *rest]


def at_batch(few: list[Operation], more: list[Operation], batch: int) -> list[Operation]:
    """Continues the figures of two batch sizes, which grow by straight lines, to a third.

    Raises:
        ValueError: if the two steps do not take the same operations.
    """
    if [item.part for item in few] != [item.part for item in more]:
        raise ValueError("the steps of the two batch sizes take different operations")
    times = (batch - SEEN[0]) / (SEEN[1] - SEEN[0])
    return [
        replace(a, flops=a.flops + times * (b.flops - a.flops),
                bytes=a.bytes + times * (b.bytes - a.bytes))
        for a, b in zip(few, more, strict=True)
    ]  # fmt: skip


def roofline(configs: dict[str, Config], regimes: Iterable[str], card: Card) -> dict[str, Any]:
    """Predicts the parts of a step of each config under each regime.

    Returns:
        ``card``, and ``rows`` with ``name``, ``batch``, ``seconds`` by part, ``memory`` (the share
        of the time in operations that wait for memory), ``mfu`` (arithmetic over the whole step at
        the card's rate), and ``fused``: the same of a step whose casts and pointwise operations
        cost nothing.
    """
    rows = []
    for name, base in configs.items():
        for regime in regimes:
            config = with_regime(base, regime)
            about = {"name": name, "regime": regime, "batch": config.data.batch_size}
            rows.append({**about, **_row(whole_step(config, card))})
    return {"card": {"tflops": card.tflops, "terabytes": card.terabytes}, "rows": rows}


def whole_step(config: Config, card: Card) -> dict[str, float]:
    """Continues steps of few blocks to the depths of a config: all blocks are alike."""
    depths = _depths(config)
    total: dict[str, float] = defaultdict(float)
    for more in itertools.product((0, 1), repeat=len(depths)):
        places = dict(zip(depths, more, strict=True))
        few = {key: least + places[key] for key, (least, _) in depths.items()}
        times = {key: depth - least for key, (least, depth) in depths.items()}
        # A line in each depth by itself: maps of all blocks of the encoder into each decoder's.
        weight = math.prod(n if places[key] else 1 - n for key, n in times.items())
        for name, value in _totals(_with(config, few), card).items():
            total[name] += weight * value
    return total


def _depths(config: Config) -> dict[str, tuple[int, int]]:
    """Returns the settings of depth: how few blocks there may be, and how many there are."""
    with torch.device("meta"):
        family = family_of(build_model(config).backbone)
    found = {}
    if family.is_uniform:
        target = TARGETS.chosen(config.model.target, config.model.target.name)
        least = max(2, getattr(target, "top", 2))  # blocks of the teacher that it reads
        found["model.backbone_args.depth"] = (least, len(family.blocks))
    name = config.model.decoder.name
    decoder = DECODERS.chosen(config.model.decoder, name)
    if hasattr(decoder, "depth"):
        found[f"model.decoder.{name}.depth"] = (2, decoder.depth)
    return found


def _with(config: Config, settings: dict[str, int]) -> Config:
    return read_tree(Config, [], {**flatten(to_dict(config)), **settings})


def _totals(config: Config, card: Card) -> dict[str, float]:
    """Seconds by part, those that wait for memory, and those of the arithmetic alone."""
    few, more = (operations(config, images) for images in SEEN)
    total: dict[str, float] = defaultdict(float)
    for item in at_batch(few, more, config.data.batch_size):
        if item.part == KEPT:
            total[KEPT] = item.bytes
            continue
        total[item.part] += item.seconds(card)
        total[_MEMORY] += item.seconds(card) * item.waits_for_memory(card)
        total[_ARITHMETIC] += item.flops / card.tflops / 1e12
    return total


def _row(total: dict[str, float]) -> dict[str, Any]:
    seconds = {part: total[part] for part in PARTS}
    whole = sum(seconds.values())
    fused = whole - sum(seconds[part] for part in FUSED)
    return {
        "seconds": seconds,
        "memory": total[_MEMORY] / whole,
        "mfu": total[_ARITHMETIC] / whole,
        "fused": {"seconds": fused, "mfu": total[_ARITHMETIC] / fused},
    }


def format_roofline(figures: dict[str, Any]) -> str:
    """Returns a Markdown table: milliseconds by part, and what a compiler can take away."""
    card = figures["card"]
    lines = [
        f"Lower bounds at {card['tflops']:g} TFLOP/s and {card['terabytes']:g} TB/s, in ms a step.",
        "",
        "| model | regime | batch | " + " | ".join(PARTS) + " | step | bound by memory | MFU "
        "| step, fused | MFU, fused |",
        "| --- | --- |" + " ---: |" * (len(PARTS) + 6),
    ]
    for row in figures["rows"]:
        parts = [f"{1e3 * row['seconds'].get(part, 0.0):.1f}" for part in PARTS]
        cells = [row["name"], row["regime"], str(row["batch"]), *parts]
        cells += [f"{1e3 * sum(row['seconds'].values()):.1f}", f"{row['memory']:.0%}"]
        cells += [f"{row['mfu']:.0%}", f"{1e3 * row['fused']['seconds']:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{row['fused']['mfu']:.0%}"]) + " |")
    return "\n".join(lines)


def roofline_figure(figures: dict[str, Any]) -> Figure:
    """Draws one bar a model and regime, of milliseconds an image by part."""
    rows = figures["rows"]
    figure = Figure(figsize=(8, 0.45 * len(rows) + 1.4), layout="constrained")
    axis = figure.subplots()
    places, left = np.arange(len(rows))[::-1], np.zeros(len(rows))
    for part in PARTS:
        widths = [1e6 * row["seconds"].get(part, 0.0) / row["batch"] for row in rows]
        axis.barh(places, widths, left=left, label=part, height=0.7)
        left += np.asarray(widths)
    axis.set_yticks(places, [f"{row['name']}, {row['regime']}" for row in rows])
    axis.set_xlabel("microseconds an image, forward, backward and AdamW (lower bound)")
    figure.legend(frameon=False, fontsize="small", loc="outside upper center", ncols=len(PARTS))
    axis.spines[["top", "right"]].set_visible(False)
    return figure
