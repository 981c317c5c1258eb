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


def block(
    state: State, name: str, x: Tensor, heads: int, bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Pre-norm transformer block; ``gamma_1`` and ``gamma_2`` scale its branches where given.

    ``bias`` (heads, L, L) is added to the scores.
    """
    y = norm(state, f"{name}.norm1", x, eps)
    weight = state[f"{name}.attn.qkv.weight"]
    if f"{name}.attn.q_bias" in state:  # SimMIM: keys have no bias
        q_bias, v_bias = state[f"{name}.attn.q_bias"], state[f"{name}.attn.v_bias"]
        offset = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    else:
        offset = state[f"{name}.attn.qkv.bias"]
    q, k, v = (y @ weight.T + offset).chunk(3, dim=-1)
    size = x.shape[-1] // heads
    outputs = []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / size**0.5
        if bias is not None:
            scores = scores + bias[h]
        outputs.append(scores.softmax(-1) @ v[..., part])
    attended = linear(state, f"{name}.attn.proj", torch.cat(outputs, dim=-1))
    x = x + state.get(f"{name}.gamma_1", 1.0) * attended
    y = linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", x, eps))
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


def beit_bias(table: Tensor, side: int) -> Tensor:
    """(heads, 1 + N, 1 + N) of BEiT's table (offsets + 3, heads), by query and key.

    The last three entries: from the class token, to it, and its own.
    """
    count = 1 + side * side
    bias = torch.zeros(table.shape[1], count, count, dtype=table.dtype)
    for query in range(count):
        for key in range(count):
            (row, column), (other, beside) = (divmod(n - 1, side) for n in (query, key))
            entry = (row - other + side - 1) * (2 * side - 1) + column - beside + side - 1
            if query == 0 or key == 0:
                entry = (
                    len(table)
                    - {(True, False): 3, (False, True): 2, (True, True): 1}[query == 0, key == 0]
                )
            bias[:, query, key] = table[entry]
    return bias


def simmim(state: State, images: Tensor, hidden: Tensor, heads: int) -> dict[str, Tensor]:
    """Xie et al. 2021, section 3: mask tokens in the encoder, a linear layer, l1 on the hidden."""
    inner = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    tokens = embed(inner, images)
    tokens = torch.where(hidden[..., None], inner["mask_token"], tokens)
    x = torch.cat([inner["cls_token"].expand(len(images), -1, -1), tokens], dim=1)
    x = x + inner.get("pos_embed", 0.0)
    side = int(tokens.shape[1] ** 0.5)
    table, bias = "relative_position_bias_table", None
    if f"rel_pos_bias.{table}" in inner:
        bias = beit_bias(inner[f"rel_pos_bias.{table}"], side)
    found: dict[str, Tensor] = {}
    depth = 0
    while f"blocks.{depth}.norm1.weight" in inner:
        own = bias
        if f"blocks.{depth}.attn.{table}" in inner:
            own = beit_bias(inner[f"blocks.{depth}.attn.{table}"], side)
        x = found[f"layer{depth}"] = block(inner, f"blocks.{depth}", x, heads, own)
        depth += 1
    return {**found, **_drawn(state, images, hidden, norm(inner, "norm", x)[:, 1:])}


def _drawn(state: State, images: Tensor, hidden: Tensor, latents: Tensor) -> dict[str, Tensor]:
    side = int(latents.shape[1] ** 0.5)
    maps = latents.transpose(1, 2).unflatten(2, (side, side))
    patch = images.shape[2] // side
    drawn = F.pixel_shuffle(
        F.conv2d(maps, state["decoder.0.weight"], state["decoder.0.bias"]), patch
    )
    flags = hidden.view(-1, 1, side, side).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    distance = ((images - drawn).abs() * flags).sum()
    loss = distance / (flags.sum() * images.shape[1])  # their 1e-5 in the denominator left out
    return {"latents": latents, "image": drawn, "loss": loss}


def swin_shapes(width: int = 8, side: int = 8) -> dict[str, tuple[int, ...]]:
    """microsoft/SimMIM's Swin of two stages on ``side`` x ``side`` patches of 2, windows of 4."""
    shapes: dict[str, tuple[int, ...]] = {
        "mask_token": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, 2, 2),
        "patch_embed.proj.bias": (width,),
        "patch_embed.norm.weight": (width,),
        "patch_embed.norm.bias": (width,),
        "layers.0.downsample.norm.weight": (4 * width,),
        "layers.0.downsample.norm.bias": (4 * width,),
        "layers.0.downsample.reduction.weight": (2 * width, 4 * width),
        "norm.weight": (2 * width,),
        "norm.bias": (2 * width,),
    }
    for stage, heads in enumerate((2, 4)):
        wide = width * 2**stage
        for n in range(2):
            shapes |= block_shapes(f"layers.{stage}.blocks.{n}", wide, 4 * wide)
            table = f"layers.{stage}.blocks.{n}.attn.relative_position_bias_table"
            shapes[table] = (49, heads)
    shapes = {f"encoder.{key}": shape for key, shape in shapes.items()}
    return shapes | {"decoder.0.weight": (48, 2 * width, 1, 1), "decoder.0.bias": (48,)}


def window_bias(table: Tensor, side: int, window: int, shift: int) -> Tensor:
    """(heads, N, N): the table's entry within a window, and minus infinity beyond it.

    The map is moved by ``shift``; places that came round its edge stand in windows with others,
    and do not see them.
    """
    bias = torch.full((table.shape[1], side**2, side**2), -torch.inf, dtype=table.dtype)
    for query in range(side**2):
        for key in range(side**2):
            one, other = (
                [(place, (place - shift) % side) for place in divmod(n, side)] for n in (query, key)
            )
            together = all(
                a // window == b // window and (r < shift) == (s < shift)
                for (r, a), (s, b) in zip(one, other, strict=True)
            )
            if together:
                down, across = (a - b for (_, a), (_, b) in zip(one, other, strict=True))
                entry = (down + window - 1) * (2 * window - 1) + across + window - 1
                bias[:, query, key] = table[entry]
    return bias


def simmim_swin(state: State, images: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    """SimMIM on the Swin of :func:`swin_shapes`; ``hidden`` (B, n) are squares of 4 pixels."""
    inner = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    x = norm(inner, "patch_embed.norm", embed(inner, images), eps=1e-5)
    side = int(x.shape[1] ** 0.5)
    flags = hidden.view(-1, side // 2, side // 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
    x = torch.where(flags.flatten(1)[..., None], inner["mask_token"], x)
    for stage, heads in enumerate((2, 4)):
        for n in range(2):
            name = f"layers.{stage}.blocks.{n}"
            shift = 2 if n and side > 4 else 0
            table = inner[f"{name}.attn.relative_position_bias_table"]
            x = block(inner, name, x, heads, window_bias(table, side, 4, shift), eps=1e-5)
        if stage == 0:
            maps = x.unflatten(1, (side, side))
            corners = [maps[:, i::2, j::2] for j in range(2) for i in range(2)]
            x = norm(inner, "layers.0.downsample.norm", torch.cat(corners, -1), eps=1e-5)
            x = (x @ inner["layers.0.downsample.reduction.weight"].T).flatten(1, 2)
            side //= 2
    return _drawn(state, images, hidden, norm(inner, "norm", x, eps=1e-5))
