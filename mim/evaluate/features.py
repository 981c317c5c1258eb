"""Features of full images: the same tokens and the same pooling for every regime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mim.core.cpu.kernels import tune
from mim.core.device import to_device
from mim.core.errors import UserError, choice_error, setting_error
from mim.core.patches import Grid, Images, Patches
from mim.data import Batch, eval_loader, normalize
from mim.evaluate.base import POOLS, Features
from mim.model.attention import key_bias
from mim.model.backbones import family_of
from mim.training.runtime.precision import autocast

if TYPE_CHECKING:
    from mim.core.config import DataConfig
    from mim.data import ImageSource
    from mim.evaluate.encoders import Encoder

PATCHES = "patches"
"""A pooling that pools nothing: every patch keeps its vector."""
PRECISIONS = ("fp32", "bf16", "fp16")


def check_precision(precision: str) -> None:
    """Refuses a precision that evaluations do not compute in.

    Raises:
        UserError: naming those that they do.
    """
    if precision not in PRECISIONS:
        raise choice_error("precision", precision, PRECISIONS)


def check_finite(values: Tensor, precision: str, what: str = "features") -> None:
    """Refuses what an encoder made of images where it is not finite; no number follows from it.

    Raises:
        UserError: naming the precision, and in 16 bits the way out.
    """
    odd = int((~values.isfinite()).flatten(1).any(1).sum()) if values.numel() else 0
    if odd:
        advice = "its weights or the images hold such values"
        if precision != "fp32":
            wider = "bf16 or fp32" if precision == "fp16" else "fp32"
            advice = f"choose {wider} if they overflow in this precision"
        those = f"the encoder's {what} of {odd} of {len(values)} images"
        reason = f"gives no number: {those} are not finite; {advice}"
        raise setting_error("precision", precision, reason)


def check_pool(vit: nn.Module | None, pool: str) -> None:
    """Refuses a pooling the encoder has no tokens for; raw pixels have none and take any.

    Raises:
        UserError: for an unknown pooling, or ``cls`` and ``both`` without a class token.
    """
    if pool not in POOLS:
        raise choice_error("pool", pool, POOLS)
    if vit is not None and pool != "mean" and not family_of(vit).has_class_token:
        raise UserError(f"pool: {pool!r} needs a class token, which the encoder has not; use mean")


def image_tokens(vit: nn.Module, images: Images) -> Tensor:
    """The encoder's tokens of full images: (B, prefix + N, D), those of padding without meaning.

    Args:
        vit: the encoder.
        images: (B, C, H, W), normalised, or patches of several sizes, of which none reads padding.
    """
    family = family_of(vit)
    if not isinstance(images, Patches):
        return family.features(images)
    embedded = family.place_patches(family.embed_patches(images), images)
    bias = key_bias(images.valid, embedded.tokens.dtype, family.num_prefix)
    return family.run(replace(embedded, bias=bias))


def pool_tokens(vit: nn.Module, tokens: Tensor, pool: str, valid: Tensor | None = None) -> Tensor:
    """One vector for an image.

    Args:
        vit: the encoder; its norm behind the pooling, where it has one, follows, as in timm.
        tokens: (B, prefix + N, D), what ``vit.forward_features`` returned, row by row.
        pool: mean (over the patch tokens, never the prefix), cls, or both side by side.
        valid: (B, N) bool, False for padding, which is left out; None where there is none.

    Returns:
        (B, D), or (B, 2 D) for ``both``, class token last.

    Raises:
        UserError: for a pooling the encoder has no tokens for.
    """
    family = family_of(vit)
    if pool == PATCHES:
        return family.pool_norm(tokens[:, family.num_prefix :])
    check_pool(vit, pool)
    parts = []
    if pool in ("mean", "both"):
        patches = tokens[:, family.num_prefix :]
        if valid is None:
            mean = patches.mean(1)
        else:
            kept = patches.masked_fill(~valid[..., None], 0.0)
            mean = kept.sum(1) / valid.sum(1, keepdim=True)
        parts.append(family.pool_norm(mean))
    if pool in ("cls", "both"):
        parts.append(family.pool_norm(tokens[:, 0]))
    return torch.cat(parts, 1)


def each_batch(
    compute: Callable[[Images], Tensor],
    source: ImageSource,
    data: DataConfig,
    batch_size: int,
    device: torch.device,
    patch_size: Grid | None = None,
) -> Iterator[tuple[Batch, Tensor]]:
    """What is computed of every readable image, batch by batch, none masked, none augmented."""
    for batch in eval_loader(source, data, batch_size=batch_size, patch_size=patch_size):
        with torch.inference_mode():
            images = normalize(to_device(batch.images, device), source.mean, source.std)
            yield batch, compute(images)


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
        pool: of :func:`pool_tokens`; raw pixels have none. :data:`PATCHES` gives (n, N, D).
        batch_size: images at once.
        device: where the encoder runs.
        precision: fp32, bf16 or fp16 (autocast).

    Returns:
        values (n, D) float32, labels (n,) int64 or None, sample_ids (n,), on the CPU and in the
        source's order.

    Raises:
        UserError: for a pooling the encoder has no tokens for, an unknown precision, or features
            that are not finite.
    """
    if pool != PATCHES:
        check_pool(encoder.vit, pool)
    check_precision(precision)
    device = torch.device(device)
    values, labels, ids, patch_size = [], [], [], None
    if encoder.vit is not None:
        tune(encoder.vit.to(device), device, precision)
    if encoder.data.keeps_aspect and encoder.vit is not None:
        family = family_of(encoder.vit)
        patch_size = family.patch_size
        if not family.takes_sizes:
            reason = f"and {encoder.name} takes images of one size only; choose square"
            raise setting_error("data.aspect", encoder.data.aspect, reason)

    def compute(images: Images) -> Tensor:
        if encoder.vit is None:
            assert isinstance(images, Tensor)  # see pixels_encoder
            return images.flatten(1)
        with autocast(precision, device):
            tokens = image_tokens(encoder.vit, images)
        valid = images.valid if isinstance(images, Patches) else None
        return pool_tokens(encoder.vit, tokens.float(), pool, valid)

    for batch, pooled in each_batch(compute, source, encoder.data, batch_size, device, patch_size):
        values.append(pooled.float().cpu())
        check_finite(values[-1], precision)
        ids.append(torch.as_tensor(batch.sample_ids, dtype=torch.int64))
        if source.labels is not None:
            labels.append(torch.as_tensor(batch.labels, dtype=torch.int64))
    return Features(torch.cat(values), torch.cat(labels) if labels else None, torch.cat(ids))
