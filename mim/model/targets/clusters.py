"""Clusters that are learnt along with the encoder as target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from mim.core.fields import Count, Positive, Settings
from mim.core.patches import Images
from mim.core.rng import seed_of
from mim.masks import PatchMask
from mim.model.targets.base import TARGETS, Classes, TargetContext
from mim.model.teacher import Teacher
from mim.model.terms import Forward


@torch.no_grad()
def sinkhorn(scores: Tensor, iterations: int, together: bool = False) -> Tensor:
    """Balance assignments, so that clusters are used alike (CAPI, arXiv:2502.08769).

    Each cluster's largest score over the images is brought to 50, which keeps exp in range. Then
    columns (a cluster, over images) and rows (an image, over clusters) are divided by their sums,
    in turn; the last division is that of rows.

    Args:
        scores: (..., images, clusters), each matrix by itself.
        iterations: divisions of each kind.
        together: whether the images of all processes form one matrix.
    """
    largest = scores.amax(dim=-2, keepdim=True)
    if together:
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    shares = (scores + (50 - largest)).exp()
    for _ in range(iterations):
        columns = shares.sum(dim=-2, keepdim=True)
        if together:
            distributed.all_reduce(columns)
        shares = shares / (columns + 1e-8)
        shares = shares / (shares.sum(dim=-1, keepdim=True) + 1e-8)
    return shares


def participation_ratio(vectors: Tensor) -> Tensor:
    """How many directions (n, D) vectors spread over, from 1 to D, 0-d.

    The squared sum of the eigenvalues of their covariance over the sum of their squares, which
    takes no decomposition. It is at most the effective rank of Roy and Vetterli.
    """
    centred = vectors - vectors.mean(dim=0)
    covariance = centred.T @ centred  # (D, D)
    squares = covariance.square().sum().clamp(min=torch.finfo(covariance.dtype).tiny)
    return covariance.diagonal().sum().square() / squares


class NormalizedLinear(nn.Module):
    """A linear map of unit vectors, each row of it a direction and a length."""

    def __init__(self, width: int, output: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(nn.init.trunc_normal_(torch.empty(output, width), std=0.02))
        self.length = nn.Parameter(torch.ones(output, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., output)."""
        scale = self.length / (self.direction.norm(dim=1, keepdim=True) + 1e-8)
        return F.linear(F.normalize(x, dim=-1), self.direction * scale)


@dataclass(frozen=True)
class ClustersSettings(Settings):
    """CAPI's online clusters."""

    clusters: Count = 1024
    """Number of clusters; CAPI's is 16384. Balanced place by place it should not be much above the
    images of a batch, over all processes."""
    temperature: Positive = 0.12
    """Divides the logits of the prediction, and those that the clustering learns by."""
    target_temperature: Positive = 0.06
    """Divides the logits of the teacher before they are balanced."""
    iterations: Count = 3
    """Iterations of Sinkhorn's algorithm."""
    balance: Literal["position", "batch"] = "position"
    """What uses the clusters alike: the patches at one position, over the images of the batch, or
    all patches of the batch together."""


@TARGETS.register("clusters", ClustersSettings)
class Clusters(Classes):
    """Assignments of the teacher's patches to clusters (CAPI, arXiv:2502.08769).

    The teacher's tokens after the final norm are brought to length 1; a linear map gives logits,
    and Sinkhorn's algorithm the assignments, position by position, over the images of all
    processes. The map learns from its own term, ``clustering``: the cross-entropy of its softmax
    against those assignments at all positions, which trains nothing else; nor does the prediction
    train the map. Its weights are the ``target.layer.*`` of ``optim.scales``, and take no part in
    ``optim.clip_grad``. The loss is the cross-entropy of the prediction, whose last map is
    normalised (:class:`NormalizedLinear`).

    Where the model does not train, an assignment is the softmax at ``target_temperature``, which
    needs no other image; so the held-out loss does not compare with the training loss. Images that
    ``data.weights`` leaves out take part in the balance.

    It measures, over the patches of each batch: ``effective_rank``, the participation ratio of the
    teacher's tokens; ``clusters_used``, the clusters to which one is nearest;
    ``cluster_perplexity``, the exponential of the entropy of that use; ``assignment_entropy``, the
    mean entropy of an assignment, in nats.
    """

    needs_teacher = True
    reads_batch = True
    settings: ClustersSettings

    def __init__(self, settings: ClustersSettings, context: TargetContext) -> None:
        super().__init__(settings, context)
        self.dim = settings.clusters
        self.layer = nn.Linear(context.width, self.dim)
        nn.init.normal_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    def build_head(self, width: int) -> nn.Module:
        return NormalizedLinear(width, self.dim)

    def forward(self, images: Tensor, teacher: Teacher | None = None) -> Tensor:
        """Return the assignments (B, N, K); in training, of the batch of all processes."""
        if teacher is None:
            raise ValueError("the target clusters must be given a teacher")
        tokens = teacher.tokens(images)  # (B, N, D)
        with torch.autocast(images.device.type, enabled=False):
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            units = F.normalize(tokens, dim=-1, eps=1e-7)
            logits = self._logits(units)  # (B, N, K)
            scores = logits.detach() / self.settings.target_temperature
            if not self.training:
                return scores.softmax(dim=-1)
            assigned = self._balanced(scores)
        self._kept = tokens, logits, assigned
        return assigned

    def _logits(self, units: Tensor) -> Tensor:
        weight, bias = self.layer.weight.to(units.dtype), self.layer.bias.to(units.dtype)
        return F.linear(units, weight, bias)

    def _balanced(self, scores: Tensor) -> Tensor:
        together = distributed.is_initialized() and distributed.get_world_size() > 1
        count = self.settings.iterations
        if self.settings.balance == "batch":
            flat = sinkhorn(scores.flatten(0, 1), count, together)
            return flat.view_as(scores)
        return sinkhorn(scores.transpose(0, 1), count, together).transpose(0, 1)

    def distance(
        self,
        prediction: Tensor,
        target: Tensor,
        *,
        images: Images | None = None,
        ids: Tensor | None = None,
        mask: PatchMask | None = None,
    ) -> Tensor:
        """Compute the cross-entropy (...) of logits and assignments (..., K), at least float32."""
        log_shares = self.log_shares(prediction, self.settings.temperature)
        return -(target.to(log_shares.dtype) * log_shares).sum(dim=-1)

    def terms(self, forward: Forward) -> dict[str, Tensor]:
        """Return the loss of the clustering, (B,), the mean over positions."""
        assert self._kept is not None
        _, logits, assigned = self._kept
        return {"clustering": self.distance(logits, assigned).mean(dim=1)}

    @torch.no_grad()
    def metrics(self, forward: Forward) -> dict[str, Tensor]:
        assert self._kept is not None
        tokens, logits, assigned = self._kept
        self._kept = None
        nearest = logits.argmax(dim=-1).flatten()  # (B * N,)
        counts = logits.new_zeros(self.dim).scatter_add_(
            0, nearest, torch.ones_like(nearest, dtype=logits.dtype)
        )
        shares = counts / counts.sum()
        return {
            "effective_rank": participation_ratio(tokens.flatten(0, 1)),
            "clusters_used": (counts > 0).sum(),
            "cluster_perplexity": (-torch.xlogy(shares, shares).sum()).exp(),
            "assignment_entropy": -torch.xlogy(assigned, assigned).sum(dim=-1).mean(),
        }

    def to_pixels(self, prediction: Tensor, images: Tensor, target: Tensor | None = None) -> Tensor:
        """Show each cluster as a colour, drawn once, and a patch as their mean by its shares.

        A target is shown if the prediction is not of logits, that is, if it is the target.
        """
        generator = torch.Generator().manual_seed(seed_of(0, "colours"))
        channels, (height, width) = self.context.channels, self.context.patch_size
        colours = torch.randn(self.dim, channels, generator=generator).to(images)
        is_target = prediction is target
        logits = prediction / self.settings.temperature
        shares = prediction if is_target else logits.softmax(dim=-1)
        return (shares.to(images.dtype) @ colours).repeat(1, 1, height * width)
