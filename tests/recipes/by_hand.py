"""Three steps of a recipe in float64: by the trainer, and beside it by formulas of a test's own.

A test says what its method computes (:class:`Method`). The blocks of timm, and the start of all
weights, are shared; masks are handed on from the trainer's side. AdamW, clipping and the moving
average are written out here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mim.core.recipes import recipe_file
from mim.core.settings import read_mapping
from mim.data import Batch, open_source
from mim.masks import PatchMask
from mim.model import build_model
from mim.training import checkpoint
from mim.training import pretrain as pretraining
from mim.training.settings import load_config

IMAGES = 4


@dataclass(frozen=True)
class Step:
    """What the other side is given of a step."""

    net: Any
    """A copy of the model: a bag of modules and weights, of which no ``forward`` is called."""
    teacher: Any
    """The encoder that follows ``net.backbone``; None without one."""
    images: Tensor
    """(B, C, H, W), normalised."""
    mask: PatchMask
    number: int


@dataclass(frozen=True)
class Method:
    """A recipe at reduced size, and its paper's arithmetic."""

    recipe: str
    sizes: Mapping[str, Any]
    steps: tuple[int, int, int]
    loss: Callable[[Step], tuple[Tensor, Tensor]]
    """What is reported as the loss, and what is minimised."""
    rate: Callable[[int], float]
    betas: tuple[float, float]
    decay: Callable[[str, Tensor, int], float]
    """Of a parameter, by its name, in a step."""
    clip: float | None = None
    average: Callable[[int], float] | None = None
    """The teacher's decay in a step."""
    rate_of: Callable[[str], float] = field(default=lambda name: 1.0)
    """Multiplies the rate of a parameter."""
    per_epoch: int = 1
    """Steps of an epoch."""


class AdamW:
    """Loshchilov and Hutter's, for parameters by name."""

    def __init__(self, weights: Mapping[str, nn.Parameter], betas: tuple[float, float]) -> None:
        self.weights, self.betas, self.count = weights, betas, 0
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}

    @torch.no_grad()
    def step(
        self,
        gradients: Mapping[str, Tensor],
        rates: Mapping[str, float],
        decays: Mapping[str, float],
    ) -> None:
        self.count += 1
        one, two = self.betas
        for name, gradient in gradients.items():
            first = self.first[name] = one * self.first[name] + (1 - one) * gradient
            second = self.second[name] = two * self.second[name] + (1 - two) * gradient**2
            root = (second / (1 - two**self.count)).sqrt() + 1e-8
            weight, rate = self.weights[name], rates[name]
            weight.sub_(rate * (decays[name] * weight + first / (1 - one**self.count) / root))


class Watched(pretraining.PretrainTask):
    """Keeps what a step was given."""

    given: pretraining.Inputs

    def prepare(self, batch: Batch) -> pretraining.Inputs:
        self.given = super().prepare(batch)
        return self.given


def in_float64(images: Tensor, mean: Any, std: Any) -> Tensor:
    """Normalise images of 0 to 255, as ``normalize`` does in float32.

    They are no bytes: a gradient of exactly 0 has no direction that rounding would leave alone.
    """
    middle, spread = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (mean, std))
    return (images / 255 - middle) / spread


def by_trainer(method: Method, folder: Path) -> Any:
    """Build the run's own trainer for a recipe at reduced size, with weights in float64."""
    given = {"output": str(folder), "data.source": "photos", "data.workers": 0}
    args = read_mapping(recipe_file(method.recipe))["model"].get("backbone_args", {})
    sizes = dict(method.sizes)
    sizes["model.backbone_args"] = {**args, **sizes.get("model.backbone_args", {})}
    off = {"train.precision": "fp32", "train.device": "cpu", "log.tensorboard": False}
    config = load_config(recipe_file(method.recipe), {**given, **off, **sizes})
    model = build_model(config).double()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():  # no norm at 1, no bias at 0, no teacher alike
        if not name.endswith("pos_embed"):
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.data += 0.05 * noise
    checkpoint.prepare_folder(folder)
    source = open_source(config.data, "train", folder)
    steps = pretraining.total_steps(config, method.per_epoch)
    images = pretraining.RunImages(source, source, "", None, method.per_epoch, steps)
    task = Watched(model, images, config, pretraining._accelerator(config))
    return pretraining._build_trainer(task, [], None, 0)


def three_steps(method: Method, folder: Path) -> float:
    """Take the steps on both sides.

    Returns:
        The greatest difference of losses, rates, weights and the teacher's weights.
    """
    trainer = by_trainer(method, folder)
    model, source = trainer.task.model, trainer.task.images.train
    net, begun = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    teacher: Any = None if net.teacher is None else net.teacher.encoder
    trained = {name: w for name, w in net.named_parameters() if w.requires_grad}
    optimizer, generator = AdamW(trained, method.betas), torch.Generator().manual_seed(2)
    height, width = trainer.task.config.data.size
    shape, differences = (IMAGES, 3, height, width), []
    trainer.learner.train()
    for number in method.steps:
        pixels = 255 * torch.rand(shape, generator=generator, dtype=torch.float64)
        batch = Batch(pixels, None, torch.arange(IMAGES), number // method.per_epoch, number)
        trainer.train_step(batch)
        record, reported = trainer.state.unread[-1]

        images = in_float64(pixels, source.mean, source.std)
        step = Step(net, teacher, images, trainer.task.given.mask, number)
        loss, objective = method.loss(step)
        found = torch.autograd.grad(objective, list(trained.values()), allow_unused=True)
        gradients = {n: g for n, g in zip(trained, found, strict=True) if g is not None}
        if method.clip is not None:
            norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
            scale = min(1.0, method.clip / (norm.item() + 1e-6))
            gradients = {name: scale * g for name, g in gradients.items()}
        rate = method.rate(number)
        rates = {name: rate * method.rate_of(name) for name in trained}
        decays = {name: method.decay(name, weight, number) for name, weight in trained.items()}
        optimizer.step(gradients, rates, decays)
        if method.average is not None:
            keep = method.average(number)
            for mine, new in zip(teacher.parameters(), net.backbone.parameters(), strict=True):
                mine.data = keep * mine + (1 - keep) * new.detach()
        differences += [abs(record.lr - rate), abs(reported[0].item() - loss.item())]
    moved = set(gradients)
    for name, value in model.named_parameters():
        is_moved = name.replace("teacher.encoder", "backbone") in moved
        assert torch.equal(value, begun[name]) != is_moved, name
        differences.append((value - net.get_parameter(name)).abs().max().item())
    return torch.tensor(differences, dtype=torch.float64).max().item()  # not a number, if any is
