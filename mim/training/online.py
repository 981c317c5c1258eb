"""A linear probe that learns during pre-training without changing it.

Each step it reads the batch's full images, unmasked, through the current encoder: without a
gradient, in eval mode, so that it neither changes the run's weights nor draws a random number. Its
layer starts at 0. It ignores weights of images.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from mim.core.config import Config
from mim.core.device import to_device
from mim.core.errors import setting_error
from mim.core.patches import Images
from mim.data import Batch, ImageSource, eval_loader, normalize
from mim.model import MaskedImageModel, encode
from mim.model.backbones import family_of
from mim.model.standardize import Standardize
from mim.training.runtime.precision import autocast
from mim.training.trainer import Hook, Trainer


class OnlineProbe(Hook):
    """Trains a linear layer on standardised features; measures it with the held-out loss.

    Raises:
        UserError: if the images have no labels.
    """

    name = "online"

    def __init__(
        self,
        model: MaskedImageModel,
        train: ImageSource,
        config: Config,
        accelerator: Accelerator,
        val: ImageSource,
    ) -> None:
        if train.labels is None:
            reason = f"needs labels, and data.source {train.name!r} has none; set it to false"
            raise setting_error("online_probe.enabled", True, reason)
        self.model, self.config, self.accelerator, self.val = model, config, accelerator, val
        self.val_accuracy = math.nan
        width = family_of(model.backbone).width
        classes = max(len(train.classes), int(train.labels.max()) + 1)
        with torch.random.fork_rng(devices=[]):  # a linear layer draws when it is made
            linear = nn.Linear(width, classes)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(Standardize(width), linear).to(accelerator.device)
        self.optimizer = torch.optim.AdamW(
            linear.parameters(), lr=config.online_probe.lr, weight_decay=0.0
        )
        # Since the last line of metrics: sum of losses, number of right answers, of images.
        self.sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)

    def _features(self, images: Images) -> Tensor:
        """Encodes (B, C, H, W), normalised, to (B, D)."""
        training = self.model.training
        self.model.eval()
        with autocast(self.config.train.precision, self.accelerator.device):
            features = encode(self.model, images)
        self.model.train(training)
        return features.float()

    def after_step(self, trainer: Trainer, batch: Batch, inputs: Any) -> None:
        assert batch.labels is not None
        labels = to_device(batch.labels, inputs.images.device)
        features = self._features(inputs.images)
        logits = self.head(features)  # (B, K)
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self.head.parameters():
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        self.optimizer.step()
        right = (logits.detach().argmax(1) == labels).sum()
        total = loss.detach().double() * len(labels)
        self.sums += torch.stack([total, right.double(), total.new_full((), len(labels))])

    def due(self, trainer: Trainer) -> bool:
        return trainer.passed(self.config.train.validate_every) or trainer.done

    def run(self, trainer: Trainer) -> None:
        self.val_accuracy = self._accuracy()
        trainer.log(online_val_accuracy=self.val_accuracy)

    def metrics(self, trainer: Trainer) -> dict[str, float]:
        """Returns mean loss and accuracy on training images since the last call."""
        loss, right, count = self.accelerator.reduce(self.sums.clone(), "sum").tolist()
        self.sums.zero_()
        if count == 0:
            return {}
        return {"online_loss": loss / count, "online_accuracy": right / count}

    @torch.no_grad()
    def _accuracy(self) -> float:
        """Measures the accuracy on held-out images."""
        device, source = self.accelerator.device, self.val
        counts = torch.zeros(2, dtype=torch.float64, device=device)  # right answers, images
        self.head.eval()
        for batch in eval_loader(
            source,
            self.config.data,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            patch_size=self.model.patch_size,
        ):
            images = normalize(to_device(batch.images, device), source.mean, source.std)
            assert batch.labels is not None
            right = self.head(self._features(images)).argmax(1) == to_device(batch.labels, device)
            counts += torch.stack([right.sum(), right.new_full((), len(batch), dtype=torch.long)])
        self.head.train()
        right, count = self.accelerator.reduce(counts, "sum").tolist()
        return float(right / count)

    def state_dict(self) -> dict[str, Any]:
        return {
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sums": self.accelerator.reduce(self.sums.clone(), "sum").cpu(),
            "accuracy": self.val_accuracy,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`, for any number of processes."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.val_accuracy = state["accuracy"]
        self.sums = state["sums"].to(self.accelerator.device) / self.accelerator.num_processes
