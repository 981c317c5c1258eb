"""Layouts and formulas of others, written from their papers and key names, to test against.

A model is here a dict of arrays and a few functions: nothing of the package under test, and no
module of timm's, takes part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def fill(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Random float32 values; norms near 1, all else near 0, nothing exactly so."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        values = 0.2 * torch.randn(shape, generator=generator)
        state[name] = values + 1 if name.endswith(("norm.weight", "norm1.weight")) else values
    return state


def block_shapes(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """A plain timm block."""
    return {
        f"{prefix}.norm1.weight": (width,),
        f"{prefix}.norm1.bias": (width,),
        f"{prefix}.attn.qkv.weight": (3 * width, width),
        f"{prefix}.attn.qkv.bias": (3 * width,),
        f"{prefix}.attn.proj.weight": (width, width),
        f"{prefix}.attn.proj.bias": (width,),
        f"{prefix}.norm2.weight": (width,),
        f"{prefix}.norm2.bias": (width,),
        f"{prefix}.mlp.fc1.weight": (hidden, width),
        f"{prefix}.mlp.fc1.bias": (hidden,),
        f"{prefix}.mlp.fc2.weight": (width, hidden),
        f"{prefix}.mlp.fc2.bias": (width,),
    }


def encoder_shapes(
    width: int = 24, depth: int = 2, grid: int = 4, patch: int = 4, channels: int = 3
) -> dict[str, tuple[int, ...]]:
    """facebookresearch/mae's encoder, which is also timm's plain ViT."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "patch_embed.proj.weight": (width, channels, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        shapes |= block_shapes(f"blocks.{i}", width, 4 * width)
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def mae_shapes(
    width: int = 24, decoder: int = 16, grid: int = 4, patch: int = 4, channels: int = 3
) -> dict[str, tuple[int, ...]]:
    """``MaskedAutoencoderViT`` of facebookresearch/mae."""
    shapes = encoder_shapes(width, grid=grid, patch=patch, channels=channels)
    shapes |= {
        "mask_token": (1, 1, decoder),
        "decoder_pos_embed": (1, 1 + grid * grid, decoder),
        "decoder_embed.weight": (decoder, width),
        "decoder_embed.bias": (decoder,),
    }
    for i in range(2):
        shapes |= block_shapes(f"decoder_blocks.{i}", decoder, 4 * decoder)
    return shapes | {
        "decoder_norm.weight": (decoder,),
        "decoder_norm.bias": (decoder,),
        "decoder_pred.weight": (patch * patch * channels, decoder),
        "decoder_pred.bias": (patch * patch * channels,),
    }


def norm(state: State, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm by its formula."""
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """x W^T + b."""
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def block(state: State, name: str, x: Tensor, heads: int) -> Tensor:
    """Pre-norm transformer block; ``gamma_1`` and ``gamma_2`` scale its branches where given."""
    y = norm(state, f"{name}.norm1", x)
    weight = state[f"{name}.attn.qkv.weight"]
    if f"{name}.attn.q_bias" in state:  # SimMIM: keys have no bias
        q_bias, v_bias = state[f"{name}.attn.q_bias"], state[f"{name}.attn.v_bias"]
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    else:
        bias = state[f"{name}.attn.qkv.bias"]
    q, k, v = (y @ weight.T + bias).chunk(3, dim=-1)
    size = x.shape[-1] // heads
    outputs = []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / size**0.5
        outputs.append(scores.softmax(-1) @ v[..., part])
    attended = linear(state, f"{name}.attn.proj", torch.cat(outputs, dim=-1))
    x = x + state.get(f"{name}.gamma_1", 1.0) * attended
    y = linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", x))
    y = linear(state, f"{name}.mlp.fc2", F.gelu(y))
    return x + state.get(f"{name}.gamma_2", 1.0) * y


def patches_of(images: Tensor, patch: int) -> Tensor:
    """(B, N, patch * patch * C), each patch as (row, column, channel)."""
    rows = []
    for top in range(0, images.shape[2], patch):
        for left in range(0, images.shape[3], patch):
            cut = images[:, :, top : top + patch, left : left + patch]
            rows.append(cut.permute(0, 2, 3, 1).flatten(1))
    return torch.stack(rows, dim=1)


def embed(state: State, images: Tensor) -> Tensor:
    """Patch embedding: the same linear map of each patch."""
    weight = state["patch_embed.proj.weight"]  # (D, C, p, p)
    flat = weight.permute(0, 2, 3, 1).flatten(1)
    return patches_of(images, weight.shape[2]) @ flat.T + state["patch_embed.proj.bias"]


def mae(
    state: State,
    images: Tensor,
    hidden: Tensor,
    heads: int,
    decoder_heads: int,
    normalized: bool,
) -> dict[str, Tensor]:
    """He et al. 2021, section 3: encode the visible patches, decode all, loss on the hidden.

    ``hidden`` is (B, N) bool with as many True in each row. Returns loss, prediction, and each
    encoder block's output as ``layer0``, ``layer1``, ...
    """
    count, (batch, number) = int(hidden[0].sum()), hidden.shape
    tokens = embed(state, images) + state["pos_embed"][:, 1:]
    visible = tokens[~hidden].view(batch, number - count, -1)  # in ascending order
    first = (state["cls_token"] + state["pos_embed"][:, :1]).expand(batch, -1, -1)
    x = torch.cat([first, visible], dim=1)
    found: dict[str, Tensor] = {}
    depth = 0
    while f"blocks.{depth}.norm1.weight" in state:
        x = found[f"layer{depth}"] = block(state, f"blocks.{depth}", x, heads)
        depth += 1
    x = linear(state, "decoder_embed", norm(state, "norm", x))
    whole = state["mask_token"].expand(batch, number, -1).clone()
    whole[~hidden] = x[:, 1:].reshape(-1, x.shape[-1])
    x = torch.cat([x[:, :1], whole], dim=1) + state["decoder_pos_embed"]
    depth = 0
    while f"decoder_blocks.{depth}.norm1.weight" in state:
        x = block(state, f"decoder_blocks.{depth}", x, decoder_heads)
        depth += 1
    prediction = linear(state, "decoder_pred", norm(state, "decoder_norm", x))[:, 1:]
    target = patches_of(images, state["patch_embed.proj.weight"].shape[2])
    if normalized:
        spread = (target.var(-1, keepdim=True) + 1e-6).sqrt()
        target = (target - target.mean(-1, keepdim=True)) / spread
    per_patch = ((prediction - target) ** 2).mean(-1)
    return {**found, "prediction": prediction, "loss": per_patch[hidden].mean()}


def simmim(state: State, images: Tensor, hidden: Tensor, heads: int) -> dict[str, Tensor]:
    """Xie et al. 2021, section 3: mask tokens in the encoder, a linear layer, l1 on the hidden."""
    inner = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    tokens = embed(inner, images)
    tokens = torch.where(hidden[..., None], inner["mask_token"], tokens)
    x = torch.cat([inner["cls_token"].expand(len(images), -1, -1), tokens], dim=1)
    x = x + inner["pos_embed"]
    found: dict[str, Tensor] = {}
    depth = 0
    while f"blocks.{depth}.norm1.weight" in inner:
        x = found[f"layer{depth}"] = block(inner, f"blocks.{depth}", x, heads)
        depth += 1
    x = norm(inner, "norm", x)[:, 1:]
    side = int(x.shape[1] ** 0.5)
    maps = x.transpose(1, 2).unflatten(2, (side, side))
    patch = inner["patch_embed.proj.weight"].shape[2]
    drawn = F.pixel_shuffle(
        F.conv2d(maps, state["decoder.0.weight"], state["decoder.0.bias"]), patch
    )
    flags = hidden.view(-1, 1, side, side).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    distance = ((images - drawn).abs() * flags).sum()
    loss = distance / (flags.sum() * images.shape[1])  # their 1e-5 in the denominator left out
    return {**found, "image": drawn, "loss": loss}
