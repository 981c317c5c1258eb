"""The encoder: a timm VisionTransformer, used through timm's own modules.

Its state dict stays timm's; nothing is renamed, added or converted.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm import create_model, is_model, is_model_pretrained, list_models
from timm.layers import PatchEmbed, build_sincos2d_pos_embed
from timm.layers.attention import Attention
from timm.models import load_state_dict as read_state_dict
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mim.config import ModelConfig
from mim.errors import UserError, choice_error, setting_error
from mim.keys import seed_of

# What the project sets itself; the value says where.
_RESERVED = {
    "img_size": "data.image_size",
    "in_chans": "data.channels",
    "num_classes": "the evaluation",
    "pretrained": "mim evaluate",
    "checkpoint_path": "mim evaluate",
    "patch_drop_rate": "mask.ratio",
    "dynamic_img_size": "data.image_size",
}
# Entries of a checkpoint that are no part of the encoder.
_HEADS = ("head.", "attn_pool.")
_MAE = ("decoder_", "mask_token")


def sincos_position_embedding(grid: tuple[int, int], dim: int, prefix: int = 0) -> Tensor:
    """Fixed 2-D sine and cosine position embedding, zeros for prefix tokens (MAE, MoCo v3).

    Args:
        grid: (rows, columns) of patches.
        dim: width of a token, divisible by 4.
        prefix: tokens in front that have no place in the image.

    Returns:
        (1, prefix + N, dim).
    """
    patches = build_sincos2d_pos_embed(list(grid), dim=dim)  # (N, D)
    return torch.cat([patches.new_zeros(prefix, dim), patches])[None]


def build_backbone(
    model: ModelConfig,
    size: tuple[int, int],
    channels: int,
    seed: int = 0,
    *,
    setting: str = "model",
    pretrained: bool = False,
) -> VisionTransformer:
    """The timm ViT that ``model`` names, without a head.

    Args:
        model: the settings under ``model``.
        size: (height, width) of the images in pixels.
        channels: of the images.
        seed: its weights follow from it, whatever was drawn before.
        setting: the block of settings that names the model, for messages.
        pretrained: whether timm downloads the weights it has under that name.

    Raises:
        UserError: for an unknown name, arguments that timm refuses, a patch size that does not
            divide the image, a model whose patches overlap, or weights that cannot be had.
    """
    setting_name, setting_args = f"{setting}.backbone", f"{setting}.backbone_args"
    args = dict(model.backbone_args)
    for name, place in _RESERVED.items():
        if name in args:
            raise setting_error(setting_args, args, f"must not set {name}: that is {place}")
    patch = args.get("patch_size")
    if patch is not None:
        sides = tuple(patch) if isinstance(patch, (list, tuple)) else (patch, patch)
        _check_patch(sides, size, setting_args)
        args["patch_size"] = sides
    known = is_model(model.backbone) if pretrained else model.backbone in list_models()
    if not known:
        near = list_models(f"{model.backbone.split('_')[0]}_*patch*") or list_models("vit_*")
        if len(near) > 40:
            near = [name for name in near if "_patch16_224" in name]
        raise choice_error(setting_name, model.backbone, near)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "backbone"))
        try:
            vit = create_model(
                model.backbone,
                # A check of a config builds on the meta device, and downloads nothing.
                pretrained=pretrained and torch.get_default_device().type != "meta",
                img_size=size,
                in_chans=channels,
                num_classes=0,
                **args,
            )
        except OSError as error:
            reason = f"weights of {model.backbone} cannot be had: {error}"
            raise setting_error(f"{setting}.pretrained", True, reason) from error
        except (TypeError, AssertionError, ValueError, RuntimeError, ArithmeticError) as error:
            given = {"backbone": model.backbone, **args}
            raise setting_error(setting_args, given, f"is refused by timm: {error}") from error
    if pretrained and not is_model_pretrained(model.backbone):
        reason = f"is refused by timm: it has no weights of {model.backbone}"
        raise setting_error(f"{setting}.pretrained", True, reason)
    if not isinstance(vit, VisionTransformer):
        reason = f"is a {type(vit).__name__}; the regimes need a timm VisionTransformer"
        raise setting_error(setting_name, model.backbone, reason)
    if not isinstance(vit.patch_embed, PatchEmbed):
        reason = f"embeds patches by {type(vit.patch_embed).__name__}, which may mix patches"
        raise setting_error(setting_name, model.backbone, reason)
    _check_patch(vit.patch_embed.patch_size, size, setting_args)
    if vit.attn_pool is not None:
        vit.reset_classifier(0, "token" if vit.has_class_token else "avg")
    if model.position_embedding == "sincos2d":
        if vit.pos_embed is None or vit.embed_dim % 4:
            reason = "needs a backbone with a position embedding and a width divisible by 4, "
            reason += f"not {vit.embed_dim}"
            raise setting_error("model.position_embedding", "sincos2d", reason)
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        fixed = sincos_position_embedding(vit.patch_embed.grid_size, vit.embed_dim, prefix)
        vit.pos_embed = nn.Parameter(fixed, requires_grad=False)
    set_norm_eps(vit, model.norm_eps)
    return vit


def set_norm_eps(module: nn.Module, eps: float | None) -> None:
    """Give every layer norm in a module this epsilon; None leaves them as they are."""
    for part in module.modules():
        if eps is not None and isinstance(part, nn.LayerNorm):
            part.eps = eps


def _check_patch(patch: tuple[int, ...], size: tuple[int, int], setting: str) -> None:
    if len(patch) != 2 or any(not isinstance(side, int) or side < 1 for side in patch):
        reason = "must be 1 or 2 whole numbers above 0"
        raise setting_error(f"{setting}.patch_size", patch, reason)
    if size[0] % patch[0] or size[1] % patch[1]:
        reason = f"does not divide data.image_size {size[0]} x {size[1]}"
        raise setting_error(f"{setting}.patch_size", patch, reason)


def grid_of(vit: VisionTransformer) -> tuple[int, int]:
    """(rows, columns) of patches."""
    rows, columns = vit.patch_embed.grid_size
    return int(rows), int(columns)


def patch_size_of(vit: VisionTransformer) -> tuple[int, int]:
    """(height, width) of a patch in pixels."""
    height, width = vit.patch_embed.patch_size
    return int(height), int(width)


def add_positions(vit: VisionTransformer, patches: Tensor) -> Tensor:
    """Prefix tokens in front, position embeddings added, by timm's own rule.

    Args:
        vit: the encoder.
        patches: (B, N, D), or (B, rows, columns, D), embedded patches in order.

    Returns:
        (B, prefix + N, D).
    """
    return vit.patch_drop(vit._pos_embed(patches))


def _attend_few_keys(attn: Attention, x: Tensor, num_keys: int, bias: Tensor | None) -> Tensor:
    """timm's ``Attention.forward`` with keys and values of the first ``num_keys`` tokens only."""
    batch, length, _ = x.shape
    width, heads = attn.attn_dim, attn.num_heads
    weight, offset = attn.qkv.weight, attn.qkv.bias
    q = F.linear(x, weight[:width], None if offset is None else offset[:width])
    kv = F.linear(x[:, :num_keys], weight[width:], None if offset is None else offset[width:])
    q = q.view(batch, length, heads, -1).transpose(1, 2)  # (B, heads, L, d)
    k, v = kv.view(batch, num_keys, 2, heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, keys, d)
    out = F.scaled_dot_product_attention(
        attn.q_norm(q),
        attn.k_norm(k),
        v,
        attn_mask=bias,
        dropout_p=attn.attn_drop.p if attn.training else 0.0,
    )
    out = attn.norm(out.transpose(1, 2).reshape(batch, length, width))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def _block_with_few_keys(block: Block, x: Tensor, num_keys: int, bias: Tensor | None) -> Tensor:
    assert isinstance(block.attn, Attention)  # see supports_split
    attended = _attend_few_keys(block.attn, block.norm1(x), num_keys, bias)
    x = x + block.drop_path1(block.ls1(attended))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def supports_split(vit: VisionTransformer) -> bool:
    """Whether every block is of the plain kind whose keys and queries can be projected apart."""
    return all(type(b) is Block and type(b.attn) is Attention for b in vit.blocks)


def run_blocks(
    vit: VisionTransformer,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    num_keys: int | None = None,
    checkpointing: bool = False,
    layers: list[Tensor] | None = None,
) -> Tensor:
    """The transformer blocks and the final norm.

    Args:
        vit: the encoder.
        tokens: (B, L, D).
        bias: added to the attention scores of every layer; None where all may read all.
        num_keys: only the first so many tokens are read (keys and values); None reads all.
        checkpointing: compute each block again in the backward pass instead of storing it. timm's
            own switch is not used because it is off whenever an attention mask is given.
        layers: receives the output of every block, (B, L, D), before the final norm.

    Returns:
        (B, L, D).
    """

    def run(block: nn.Module, x: Tensor) -> Tensor:
        if num_keys is not None:
            assert isinstance(block, Block)
            return _block_with_few_keys(block, x, num_keys, bias)
        return block(x, attn_mask=bias) if bias is not None else block(x)

    tokens = vit.norm_pre(tokens)
    for block in vit.blocks:
        if checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(run, block, tokens, use_reentrant=False)
        else:
            tokens = run(block, tokens)
        if layers is not None:
            layers.append(tokens)
    return vit.norm(tokens)


def block_outputs(
    vit: VisionTransformer, tokens: Tensor, bias: Tensor | None = None
) -> list[Tensor]:
    """(B, L, D) embedded tokens -> the output of every block, each (B, L, D)."""
    layers: list[Tensor] = []
    run_blocks(vit, tokens, bias=bias, layers=layers)
    return layers


def attention_maps(
    vit: VisionTransformer, tokens: Tensor, bias: Tensor | None = None
) -> list[Tensor]:
    """What each token reads in each block.

    Args:
        vit: the encoder, of plain timm blocks (:func:`supports_split`).
        tokens: (B, L, D), embedded.
        bias: added to the scores of every layer; None where all may read all.

    Returns:
        For each block (B, heads, L, L); rows are queries and sum to 1.
    """
    inputs = [vit.norm_pre(tokens), *block_outputs(vit, tokens, bias)[:-1]]
    return [_attention(block, x, bias) for block, x in zip(vit.blocks, inputs, strict=True)]


def _attention(block: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The attention weights of a block on its input: (B, L, D) -> (B, heads, L, L)."""
    assert isinstance(block, Block) and isinstance(block.attn, Attention)  # see supports_split
    attn = block.attn
    qkv = attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, attn.num_heads, -1)  # (B, L, 3, h, d)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # (B, h, L, d)
    scores = attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale
    return (scores if bias is None else scores + bias).softmax(dim=-1)


def patch_attention(vit: VisionTransformer, tokens: Tensor) -> Tensor:
    """How much the last block attends to each patch, the mean over its heads.

    Args:
        vit: the encoder, of plain timm blocks.
        tokens: (B, P + N, D), embedded.

    Returns:
        (B, N): of the class token's query where there is one, else the mean over all queries.
    """
    x = vit.norm_pre(tokens)
    *earlier, final = vit.blocks
    for block in earlier:
        x = block(x)
    last = _attention(final, x).mean(dim=1)  # (B, L, L)
    rows = last[:, 0] if vit.cls_token is not None else last.mean(dim=1)
    return rows[:, vit.num_prefix_tokens :]


def load_weights(vit: VisionTransformer, checkpoint: Path, backbone: str) -> tuple[str, ...]:
    """Load a file of weights into a timm ViT.

    It may be safetensors or a torch file with weights only, of timm or of MAE; timm converts it
    and resamples position embeddings to the image size. A classification head, a pooling layer
    and MAE's decoder are left out; all else must match.

    Args:
        vit: the model.
        checkpoint: the file.
        backbone: the model's name, for messages.

    Returns:
        Names of the entries that were left out.

    Raises:
        UserError: if the file is missing or unreadable, or its entries are not the encoder's.
    """
    if not checkpoint.is_file():
        raise UserError(f"checkpoint {checkpoint} does not exist")
    try:
        state = read_state_dict(str(checkpoint), weights_only=True)
    except (
        pickle.UnpicklingError,
        SafetensorError,
        RuntimeError,
        EOFError,
        KeyError,
        AttributeError,  # a tensor or a list in the place of names and tensors
        TypeError,
    ) as error:
        reason = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
        message = f"checkpoint {checkpoint} cannot be read as weights: {reason}"
        raise UserError(message) from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"checkpoint {checkpoint} holds other things than named tensors")
    # A mask token alone is DINOv2's mark, by which timm knows how to convert the rest.
    is_mae = any(name.startswith("decoder_") for name in state)
    dropped = _HEADS + _MAE if is_mae else _HEADS
    left_out = tuple(sorted(name for name in state if name.startswith(dropped)))
    state = {name: value for name, value in state.items() if name not in left_out}
    try:
        converted = checkpoint_filter_fn(state, vit)
    except (RuntimeError, KeyError, AssertionError) as error:
        raise UserError(f"checkpoint {checkpoint} does not fit {backbone}: {error}") from error
    load_backbone(vit, converted, f"checkpoint {checkpoint}")
    return left_out


def load_backbone(vit: VisionTransformer, state: dict[str, Tensor], source: str) -> None:
    """Strict load of timm keys; a classification head in ``state`` is left out.

    Raises:
        UserError: naming the first keys that are missing, unexpected or of another shape.
    """
    own = vit.state_dict()
    state = {k: v for k, v in state.items() if not k.startswith("head.")}
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    for what, keys in (("lacks", missing), ("has unknown", unexpected), ("has other", shapes)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(f"{source} does not fit the model: {what} {', '.join(keys[:3])}{more}")
    if not next(vit.parameters()).is_meta:  # there is nothing to copy into where all fits
        vit.load_state_dict(state)
