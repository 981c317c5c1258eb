"""Generators that look at the image: guided by attention, or by a network that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.core.fields import Count, NonNegative, Settings
from mim.core.rng import seed_of, uniforms
from mim.masks.generators import MASKS, MaskRequest, RankedMask, rank_by


def gumbel(keys: Tensor, count: int, stream: int) -> Tensor:
    """Draw standard Gumbel noise (B, count), float64, from the keys.

    The highest ``log p + noise`` are a sample without replacement in proportion to p (Vieira
    2014; Kool et al. 2019, arXiv:1903.06059).
    """
    drawn = uniforms(keys, count, stream).clamp(min=2.0**-53)  # no log(0)
    return -torch.log(-torch.log(drawn))


@dataclass(frozen=True)
class AttentionSettings(Settings):
    """Masks guided by the EMA teacher's attention (AttMask)."""

    hide: Literal["most", "least"] = "most"
    """Which patches are hidden: the most or the least attended."""
    randomness: NonNegative = 0.5
    """Scale of keyed Gumbel noise on the log-attention: 0 is strict, 1 samples in proportion."""


@MASKS.register("attention", AttentionSettings)
class AttentionMask(RankedMask):
    """Hides the most, or the least, attended patches (AttMask, Kakogeorgiou et al. 2022).

    The attention is that of the EMA teacher's class token in its last block; without a class
    token, of all its queries. ``randomness`` scales keyed Gumbel noise on the log-attention: 0
    takes the highest, 1 samples without replacement in proportion to the attention.
    """

    settings: AttentionSettings

    needs_images = True
    needs_attention = True

    def ranks(self, request: MaskRequest) -> Tensor:
        assert request.attention is not None  # the base class asks for it
        settings = self.settings
        score = request.attention.double().clamp(min=1e-30).log()  # (B, N)
        if settings.hide == "least":
            score = -score
        noise = gumbel(request.keys, request.num_patches, stream=2)
        return rank_by(-(score + settings.randomness * noise), request.keys)


class PatchScorer(nn.Module):
    """A small network that scores each patch from the image.

    A patch embedding, a depth-wise 3x3 convolution for the surroundings, one linear map.
    """

    def __init__(self, channels: int, patch_size: tuple[int, int], width: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.around = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.head = nn.Linear(width, 1, bias=False)  # only differences choose patches

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, N) logits; a patch's score is their sigmoid."""
        x = F.gelu(self.embed(images))  # (B, width, rows, columns)
        x = F.gelu(x + self.around(x)).flatten(2).transpose(1, 2)  # (B, N, width)
        logits = self.head(x)[..., 0]  # (B, N)
        return logits - logits.mean(dim=1, keepdim=True)


@dataclass(frozen=True)
class LearnedSettings(Settings):
    """Masks from a small network that is trained against the reconstruction."""

    objective: Literal["adamae", "adversarial"] = "adamae"
    """adamae (show what is hard to guess) or adversarial (hide it)."""
    sampling: Literal["gumbel", "topk"] = "gumbel"
    """gumbel (sample without replacement by score, keyed for each image) or topk (strict)."""
    width: Count = 64
    """Width of the network."""


@MASKS.register("learned", LearnedSettings)
class LearnedMask(RankedMask):
    """A small network scores the patches and is trained against the reconstruction.

    ``objective: adamae`` keeps patches of high score visible and raises the score where the
    reconstruction fails, so that the encoder sees what is hard to guess (Bandara et al. 2023,
    arXiv:2211.09120). ``objective: adversarial`` hides patches of high score and raises the score
    of hidden patches that are harder than the image's mean, so that the task becomes harder (in
    the spirit of ADIOS, arXiv:2201.13100, by the score function instead of soft masks).
    """

    settings: LearnedSettings

    needs_images = True
    is_trained = True

    def network(self, channels: int, seed: int) -> nn.Module:
        assert self.patch_size is not None  # the model gives it
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "mask_network"))
            return PatchScorer(channels, self.patch_size, self.settings.width)

    def ranks(self, request: MaskRequest) -> Tensor:
        assert request.logits is not None  # the base class asks for it
        score = F.logsigmoid(request.logits.double())  # (B, N)
        if self.settings.sampling == "gumbel":
            score = score + gumbel(request.keys, request.num_patches, stream=2)
        # Low ranks are hidden first.
        hide_low = self.settings.objective == "adamae"
        return rank_by(score if hide_low else -score, request.keys)

    def objective(self, logits: Tensor, ids: Tensor, error: Tensor, valid: Tensor | None) -> Tensor:
        error = error.detach().float()  # no gradient flows into it
        valid = torch.ones_like(error, dtype=torch.bool) if valid is None else valid
        count = valid.sum(dim=1).clamp(min=1)
        log_score = F.logsigmoid(logits.float())  # (B, N)
        if self.settings.objective == "adamae":
            log_share = log_score - log_score.logsumexp(dim=1, keepdim=True)
            gain = error * log_share.gather(1, ids)
        else:
            mean = error.masked_fill(~valid, 0.0).sum(dim=1) / count
            gain = (error - mean[:, None]) * log_score.gather(1, ids)
        return -gain.masked_fill(~valid, 0.0).sum(dim=1) / count
