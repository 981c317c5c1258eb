"""Step time and memory on many GPUs, predicted from counts of the model.

The step of one GPU is its operations over the rate that its matrix products reach; the optimizer is
bound by memory; what processes exchange is bytes over the links between them, less what the
backward pass hides. `benchmarks/scaling.md` says what is assumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mim.core.config import Config
from mim.core.cpu.kernels import tune
from mim.core.errors import setting_error
from mim.core.rng import image_keys
from mim.model import MaskedImageModel, build_model
from mim.training.runtime.precision import autocast, blocks_of, narrow_weights

_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20  # bytes; DistributedDataParallel's defaults
# Of a step of AdamW: bytes that are kept beside the weights, and bytes read or written, each by the
# bytes of the weights. In float32 two moments are kept, and all but the gradient is written back.
# In bfloat16 (CompensatedAdamW) there are two remainders too, and all passes through float32.
_ADAMW = {"fp32": (2.0, 7.0), "bf16": (4.0, 53.0)}


@dataclass(frozen=True)
class Machine:
    """What a prediction takes for given; the defaults are an H200's in nodes of eight."""

    matrix_rate: float = 989e12
    """FLOP/s of dense products in the config's precision: the vendor's for bf16."""
    utilisation: float = 0.45
    """Share of it that a step's products reach: assumed, until mim bench step measures it."""
    memory: float = 141e9
    """Bytes of memory of a GPU: the vendor's."""
    memory_rate: float = 4.8e12
    """Bytes/s of that memory: the vendor's."""
    node: int = 8
    """GPUs of a node."""
    node_rate: float = 450e9
    """Bytes/s from a GPU to the others of its node, one way: the vendor's for NVLink."""
    network_rate: float = 50e9
    """Bytes/s from a GPU to other nodes, one way: 400 Gbit/s for each GPU."""
    link_share: float = 0.7
    """Share of these two rates that a collective operation reaches: assumed."""
    latency: float = 2e-5
    """Seconds that a collective operation takes however little it sends: assumed."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not value > 0 and not (item.name == "latency" and value == 0):
                raise setting_error(f"--{item.name}", value, "must be above 0")
        for name in ("utilisation", "link_share"):
            if getattr(self, name) > 1:
                raise setting_error(f"--{name}", getattr(self, name), "is a share, 1 at most")


@dataclass(frozen=True)
class Work:
    """What a step of a model is made of, counted on the model itself.

    Attributes:
        encoder: bytes of each encoder weight, in the order in which their gradients come: the
            reverse of the model's.
        decoder: likewise of what stands behind the encoder; these come first.
        flops_forward: operations an image, by torch's counter.
        flops_backward: likewise.
        decoder_share: of the operations, what stands behind the encoder.
        saved_per_image: bytes that the forward pass leaves for the backward pass, an image.
        saved_per_step: likewise, whatever the number of images: weights cast to bfloat16.
        input_bytes: of an image.
        encoder_blocks: bytes of the weights of each encoder block, in order.
        decoder_blocks: likewise of the decoder.
        kept: bytes that the optimizer keeps, by the bytes of the weights.
        touched: bytes that its step reads or writes, likewise.
    """

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    flops_forward: int
    flops_backward: int
    decoder_share: float
    saved_per_image: float
    saved_per_step: float
    input_bytes: int
    encoder_blocks: tuple[int, ...] = ()
    decoder_blocks: tuple[int, ...] = ()
    kept: float = _ADAMW["fp32"][0]
    touched: float = _ADAMW["fp32"][1]

    @property
    def weight_bytes(self) -> int:
        """Of all trained weights."""
        return sum(self.encoder) + sum(self.decoder)


def count_work(config: Config, device: torch.device | None = None) -> Work:
    """Build the model and count a step of it, on the CPU unless told otherwise.

    Attention is the fused kind, as on a GPU, unless ``train.attention`` asks for another.
    """
    device = torch.device("cpu") if device is None else device
    model = build_model(config).to(device).train()
    kind = "fused" if config.train.attention == "auto" else config.train.attention
    tune(model, device, config.train.precision, attention=kind, linear="torch")
    forward, backward, behind_encoder = _flops(model, config, device)
    narrow_weights(model, config.train)
    saved = [_saved_bytes(model, config, count, device) for count in (1, 2, 3)]
    # The first two may differ in kernels; the last two tell the slope.
    slope = float(saved[2] - saved[1])
    trained = [(n, p.nbytes) for n, p in model.named_parameters() if p.requires_grad]
    inside = [size for name, size in reversed(trained) if name.startswith("backbone.")]
    behind = [size for name, size in reversed(trained) if not name.startswith("backbone.")]
    (encoder, decoder), (kept, touched) = blocks_of(model), _ADAMW[config.train.weights]
    return Work(
        tuple(inside),
        tuple(behind),
        forward,
        backward,
        behind_encoder / forward,
        slope,
        max(saved[1] - 2 * slope, 0.0),
        config.data.channels * config.data.size[0] * config.data.size[1] * 4,
        _sizes(encoder),
        _sizes(decoder),
        kept,
        touched,
    )


def _sizes(blocks: Iterable[nn.Module]) -> tuple[int, ...]:
    """Bytes of the weights of each; all are gathered, trained or not."""
    return tuple(sum(p.nbytes for p in block.parameters()) for block in blocks)


def _loss(model: MaskedImageModel, config: Config, count: int, device: torch.device) -> Tensor:
    shape = (count, config.data.channels, *config.data.size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    ids = torch.arange(count)
    mask = model.draw_mask(images, image_keys(0, 0, ids), epoch=0, sample_ids=ids)
    with autocast(config.train.precision, device):
        return model(images, mask).loss


def _saved_bytes(model: MaskedImageModel, config: Config, count: int, device: torch.device) -> int:
    """Bytes that the forward pass keeps for the backward pass, weights themselves left out."""
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:  # all are alive till the loss is gone: no place twice
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        loss = _loss(model, config, count, device)
    del loss
    return sum(kept.values())


def _flops(model: MaskedImageModel, config: Config, device: torch.device) -> tuple[int, int, int]:
    """(forward, backward, forward of what stands behind the encoder) operations an image."""
    forward, backward = (FlopCounterMode(display=False, depth=4) for _ in range(2))
    with forward:
        loss = _loss(model, config, 2, device)
    with backward:
        loss.backward()
    model.zero_grad(set_to_none=True)
    told = forward.get_flop_counts()
    behind = sum(sum(ops.values()) for name, ops in told.items() if name.endswith(".decoder"))
    return forward.get_total_flops() // 2, backward.get_total_flops() // 2, behind // 2


def buckets_of(work: Work) -> list[tuple[int, float]]:
    """DistributedDataParallel's buckets: bytes, and when the last gradient of each is there.

    The time is a share of the backward pass; within decoder and encoder it passes evenly over the
    bytes of their weights.
    """
    found: list[tuple[int, float]] = []
    held, passed, limit = 0, 0.0, _FIRST_BUCKET
    parts = ((work.decoder, work.decoder_share), (work.encoder, 1 - work.decoder_share))
    for sizes, share in parts:
        total = sum(sizes)
        for size in sizes:
            held += size
            passed += share * size / total
            if held >= limit:
                found.append((held, min(passed, 1.0)))
                held, limit = 0, _BUCKET
    if held:
        found.append((held, 1.0))
    return found


def exchange_seconds(size: float, gpus: int, machine: Machine, *, both_ways: bool) -> float:
    """Seconds of one all-reduce (``both_ways``), all-gather or reduce-scatter of ``size`` bytes.

    Rings: a GPU sends (n - 1) / n of the bytes, twice in an all-reduce. Over several nodes it
    exchanges within its node first; then each GPU takes its own part to the other nodes.
    """
    if gpus == 1:
        return 0.0
    inside, nodes = min(gpus, machine.node), max(1, gpus // machine.node)
    seconds = size * (inside - 1) / inside / (machine.node_rate * machine.link_share)
    seconds += size / inside * (nodes - 1) / nodes / (machine.network_rate * machine.link_share)
    return (2 if both_ways else 1) * seconds + machine.latency


def exposed_seconds(exchanges: Sequence[tuple[float, float]], backward: float) -> float:
    """How long the last of a row of exchanges outlasts the backward pass.

    Args:
        exchanges: seconds of each, and the share of the backward pass after which it may begin; one
            runs at a time, in this order.
        backward: seconds of the backward pass.
    """
    now = 0.0
    for seconds, ready in exchanges:
        now = max(now, ready * backward) + seconds
    return max(0.0, now - backward)


def sharded_seconds(
    work: Work, machine: Machine, gpus: int, forward: float, backward: float
) -> tuple[float, float]:
    """All exchanges of a step whose blocks are gathered one by one, and what it waits for.

    The blocks share the passes by the bytes of their weights. The next block's weights are sent for
    when one begins, its gradients are sent when it ends, one exchange runs at a time, and what
    stands in no block is gathered first and reduced last.

    Args:
        work: of the model.
        machine: what it runs on.
        gpus: how many.
        forward: seconds of the forward pass.
        backward: of the backward pass.

    Returns:
        (seconds of all exchanges, seconds by which the step outlasts the two passes).
    """

    def seconds(size: float) -> float:
        return exchange_seconds(size, gpus, machine, both_ways=False)

    parts = (
        (work.encoder_blocks, 1 - work.decoder_share),
        (work.decoder_blocks, work.decoder_share),
    )
    blocks = [(seconds(b), share * b / sum(own)) for own, share in parts for b in own]
    rest = seconds(work.weight_bytes - sum(work.encoder_blocks) - sum(work.decoder_blocks))
    now = link = rest  # when the last work and the last exchange so far end
    left = forward * (1 - sum(share for _, share in blocks))  # of a decoder without blocks
    for ordered, whole, reduces in ((blocks, forward, False), (blocks[::-1], backward, True)):
        link = max(link, now)
        ready = [link := link + ordered[0][0]] if ordered else []
        now += left * whole / forward if reduces else 0.0
        for number, (send, share) in enumerate(ordered):
            now = max(now, ready[number])
            if number + 1 < len(ordered):
                ready.append(link := max(link, now) + ordered[number + 1][0])
            now += whole * share
            if reduces:
                link = max(link, now) + send
        now += 0.0 if reduces else left
    total = max(link, now) + rest
    exchange = 2 * rest + 3 * sum(send for send, _ in blocks)
    return exchange, total - forward - backward


def predict(work: Work, machine: Machine, gpus: int, images: int, how: str) -> dict[str, Any]:
    """Step time and memory.

    Args:
        work: of the model.
        machine: what it runs on.
        gpus: how many; more than a node's must be whole nodes.
        images: on each GPU, at once.
        how: ``ddp``, or ``fsdp`` as :mod:`mim.training.runtime.sharding` does it: block by block.

    Returns:
        Seconds: ``forward``, ``backward``, ``optimizer``, ``exchange`` (all communication),
        ``exposed`` (what of it the step waits for), ``step``, and ``step_exposed``, were nothing
        hidden. ``images_per_second`` of all GPUs, ``efficiency`` (a GPU's rate over one GPU's
        alone). Bytes of a GPU: ``state`` (weights, moments, buckets), ``activations``, ``memory``
        at the peak; ``fits``.

    Raises:
        UserError: for a number of GPUs that are no whole nodes.
    """
    if gpus < 1 or (gpus > machine.node and gpus % machine.node):
        raise setting_error("--gpus", gpus, f"must be below {machine.node}, or whole nodes of it")
    rate = machine.matrix_rate * machine.utilisation
    forward, backward = (f * images / rate for f in (work.flops_forward, work.flops_backward))
    weights = float(work.weight_bytes)
    activations = work.saved_per_image * images + work.saved_per_step
    inputs = float(work.input_bytes * images)
    if how == "ddp" or gpus == 1:
        rows = [
            (exchange_seconds(size, gpus, machine, both_ways=True), ready)
            for size, ready in buckets_of(work)
        ]
        exchange, exposed = sum(seconds for seconds, _ in rows), exposed_seconds(rows, backward)
        optimizer = work.touched * weights / machine.memory_rate
        # The reducer has a copy of the gradients.
        state = weights * (1 + work.kept + (gpus > 1))
        peak = state + inputs + max(activations, weights)
    else:
        exchange, exposed = sharded_seconds(work, machine, gpus, forward, backward)
        optimizer = work.touched * weights / gpus / machine.memory_rate
        state = weights * (1 + work.kept) / gpus
        blocks = (*work.encoder_blocks, *work.decoder_blocks)
        rest, two = weights - sum(blocks), 2 * max(blocks, default=0)
        # The backward pass begins with two blocks' weights, the gradients of one and their copy
        # to send; at its end the parts of all gradients have taken the place of activations.
        peak = state + inputs + rest + max(activations + 2 * two, 2 * rest + weights / gpus)
    step = forward + backward + optimizer + exposed
    alone = forward + backward + work.touched * weights / machine.memory_rate
    return {
        "gpus": gpus,
        "how": how,
        "images_per_gpu": images,
        "forward": forward,
        "backward": backward,
        "optimizer": optimizer,
        "exchange": exchange,
        "exposed": exposed,
        "step": step,
        "step_exposed": step - exposed + exchange,
        "images_per_second": gpus * images / step,
        "efficiency": alone / step,
        "state": state,
        "activations": activations,
        "memory": peak,
        "fits": peak < machine.memory,
    }


def bench_scale(
    config: Config, machine: Machine, gpus: Sequence[int], images: int | None = None
) -> dict[str, Any]:
    """Predictions for numbers of GPUs, with DDP and FSDP2.

    Args:
        config: a pre-training config; its model, sizes, mask and precision count.
        machine: what it runs on.
        gpus: how many.
        images: on each GPU; by default ``data.batch_size``.

    Raises:
        UserError: for numbers that no machine has.
    """
    images = config.data.batch_size if images is None else images
    if images < 1:
        raise setting_error("--images", images, "must be at least 1")
    for count in gpus:
        predict(_NOTHING, machine, count, images, "ddp")  # refused before the model is built
    work = count_work(config)
    rows = [
        predict(work, machine, count, images, how)
        for count, how in itertools.product(gpus, ("ddp", "fsdp"))
        if count > 1 or how == "ddp"
    ]
    return {
        "machine": {item.name: getattr(machine, item.name) for item in fields(machine)},
        "backbone": config.model.backbone,
        "regime": config.model.regime.name,
        "precision": config.train.precision,
        "weights": work.weight_bytes // (2 if config.train.weights == "bf16" else 4),
        "flops_forward": work.flops_forward,
        "flops_backward": work.flops_backward,
        "decoder_share": work.decoder_share,
        "saved_per_image": work.saved_per_image,
        "saved_per_step": work.saved_per_step,
        "rows": rows,
    }


_NOTHING = Work((4,), (4,), 1, 1, 0.5, 0.0, 0.0, 0)


def format_scale(figures: dict[str, Any]) -> str:
    """The predictions as a Markdown table, with what they rest on in front."""
    flops = (figures["flops_forward"] + figures["flops_backward"]) / 1e9
    told = ", ".join(f"{name} {value:g}" for name, value in figures["machine"].items())
    lines = [
        f"Predicted, not measured. {figures['backbone']}, {figures['regime']}, "
        f"{figures['precision']}: {figures['weights'] / 1e6:.1f} M weights, {flops:.1f} GFLOPs an "
        f"image ({100 * figures['decoder_share']:.0f} % behind the encoder), "
        f"{figures['saved_per_image'] / 2**20:.1f} MiB of activations an image. {told}",
        "",
        "| GPUs | | images on each | compute, ms | optimizer, ms | exchange, ms | not hidden, ms "
        "| step, ms | images/s | of one GPU's rate | weights and moments, GiB | activations, GiB "
        "| peak, GiB |",
        f"|{' ---: | --- |' + ' ---: |' * 11}",
    ]
    for row in figures["rows"]:
        how = "" if row["gpus"] == 1 else {"ddp": "DDP", "fsdp": "FSDP2"}[row["how"]]
        times = (row["forward"] + row["backward"], *(row[k] for k in _TIMES))
        sizes = (row[k] / 2**30 for k in ("state", "activations", "memory"))
        full = "" if row["fits"] else ", too much"
        lines.append(
            f"| {row['gpus']} | {how} | {row['images_per_gpu']} "
            f"| {' | '.join(f'{1e3 * value:,.1f}' for value in times)} "
            f"| {row['images_per_second']:,.0f} | {100 * row['efficiency']:.0f} % "
            f"| {' | '.join(f'{value:.1f}' for value in sizes)}{full} |"
        )
    return "\n".join(lines)


_TIMES = ("optimizer", "exchange", "exposed", "step")
