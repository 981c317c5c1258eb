"""Features of full images: the same tokens and the same pooling for every regime."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mim.backbone import family_of
from mim.data import eval_loader, normalize
from mim.errors import UserError, choice_error
from mim.evaluate.base import POOLS, Features

if TYPE_CHECKING:
    from mim.data import ImageSource
    from mim.evaluate.encoders import Encoder

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_pool(vit: nn.Module | None, pool: str) -> None:
    """Refuses a pooling the encoder has no tokens for; raw pixels have none and take any.

    Raises:
        UserError: for an unknown pooling, or ``cls`` and ``both`` without a class token.
    """
    if pool not in POOLS:
        raise choice_error("pool", pool, POOLS)
    if vit is not None and pool != "mean" and not family_of(vit).has_class_token:
        raise UserError(f"pool: {pool!r} needs a class token, which the encoder has not; use mean")


def pool_tokens(vit: nn.Module, tokens: Tensor, pool: str) -> Tensor:
    """One vector for an image.

    Args:
        vit: the encoder; its norm behind the pooling, where it has one, follows, as in timm.
        tokens: (B, prefix + N, D), what ``vit.forward_features`` returned, row by row.
        pool: mean (over the patch tokens, never the prefix), cls, or both side by side.

    Returns:
        (B, D), or (B, 2 D) for ``both``, class token last.

    Raises:
        UserError: see :func:`check_pool`.
    """
    check_pool(vit, pool)
    family = family_of(vit)
    parts = []
    if pool in ("mean", "both"):
        parts.append(family.pool_norm(tokens[:, family.num_prefix :].mean(1)))
    if pool in ("cls", "both"):
        parts.append(family.pool_norm(tokens[:, 0]))
    return torch.cat(parts, 1)


def extract_features(
    encoder: Encoder,
    source: ImageSource,
    pool: str = "mean",
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> Features:
    """The features of every image of a source, none masked, none augmented.

    Args:
        encoder: what computes them; it stays on ``device``.
        source: the images.
        pool: see :func:`pool_tokens`; without meaning for raw pixels.
        batch_size: images at once.
        device: where the encoder runs.
        precision: fp32, bf16 or fp16 (autocast).

    Returns:
        values (n, D) float32, labels (n,) int64 or None, sample_ids (n,), on the CPU and in the
        source's order.

    Raises:
        UserError: see :func:`check_pool`; or an unknown precision.
    """
    check_pool(encoder.vit, pool)
    if precision not in AUTOCAST:
        raise choice_error("precision", precision, AUTOCAST)
    device = torch.device(device)
    dtype = AUTOCAST[precision]
    if encoder.vit is not None:
        encoder.vit.to(device)
    values, labels, ids = [], [], []
    for batch in eval_loader(source, encoder.data, batch_size=batch_size):
        with torch.inference_mode():
            images = normalize(batch.images.to(device), source.mean, source.std)
            if encoder.vit is None:
                pooled = images.flatten(1)
            else:
                autocast: AbstractContextManager[object] = (
                    nullcontext() if dtype is None else torch.autocast(device.type, dtype)
                )
                with autocast:
                    tokens = family_of(encoder.vit).features(images)
                pooled = pool_tokens(encoder.vit, tokens.float(), pool)
            values.append(pooled.float().cpu())
        ids.append(torch.as_tensor(batch.sample_ids, dtype=torch.int64))
        if source.labels is not None:
            labels.append(torch.as_tensor(batch.labels, dtype=torch.int64))
    return Features(torch.cat(values), torch.cat(labels) if labels else None, torch.cat(ids))
