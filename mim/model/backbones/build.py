"""Making a timm model for the regimes, and loading its weights."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm import create_model, is_model, is_model_pretrained, list_models
from timm.layers import build_sincos2d_pos_embed
from timm.models import load_state_dict as read_state_dict
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from mim.core.config import ModelConfig
from mim.core.errors import UserError, choice_error, setting_error
from mim.core.fields import plain
from mim.core.rng import seed_of
from mim.model.backbones.family import FAMILIES, family_of, resample_positions

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
# What tells timm where to load weights from, or how to call a builder of its own.
_LOADING = {
    *("cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "model_cfg"),
    *("pretrained_filter_fn", "kwargs_filter", "features_only", "scriptable", "exportable"),
}
# Entries of a checkpoint that are no part of the encoder.
_HEADS = ("head.", "attn_pool.")
_MAE = ("decoder_", "mask_token")
_SAME = 1e-5  # between positions that are equal: rounding, to 16 bits too, keeps equal ones equal


def sincos_position_embedding(grid: tuple[int, int], dim: int, prefix: int = 0) -> Tensor:
    """Build a fixed 2-D sine and cosine position embedding (1, prefix + N, dim) (MAE, MoCo v3).

    ``dim`` must be divisible by 4; prefix tokens have zeros.
    """
    patches = build_sincos2d_pos_embed(list(grid), dim=dim)  # (N, D)
    return torch.cat([patches.new_zeros(prefix, dim), patches])[None]


def fixed_grid(table: Tensor) -> tuple[int, int] | None:
    """The grid (rows, columns) that a fixed sine and cosine table (N, D) was built for.

    Each of its numbers depends on the row or on the column alone, whatever their order; None for
    a learned table.
    """
    count = len(table)
    found = []
    for rows in (rows for rows in range(1, count + 1) if count % rows == 0):
        cells = table.detach().float().unflatten(0, (rows, count // rows))
        off_row = (cells - cells[:, :1]).abs().amax((0, 1))  # (D,), 0 where the row alone counts
        off_column = (cells - cells[:1]).abs().amax((0, 1))
        of_row, of_column = off_row < _SAME, off_column < _SAME
        half = table.shape[1] // 2
        if bool((of_row | of_column).all()) and min(of_row.sum(), of_column.sum()) >= half:
            found.append((rows, count // rows))
    return found[0] if len(found) == 1 else None


def build_backbone(
    model: ModelConfig,
    size: tuple[int, int],
    channels: int,
    seed: int = 0,
    *,
    setting: str = "model",
    pretrained: bool = False,
) -> nn.Module:
    """Build the timm model that ``model`` names, without a head.

    Args:
        model: the settings under ``model``.
        size: (height, width) of the images in pixels.
        channels: of the images.
        seed: its weights follow from it alone.
        setting: the block of settings that names the model, for messages.
        pretrained: whether timm downloads the weights it has under that name.

    Raises:
        UserError: for an unknown name, arguments that timm refuses, a patch size that does not
            divide the image, a model whose patches overlap, or weights that cannot be had.
    """
    setting_name, setting_args = f"{setting}.backbone", f"{setting}.backbone_args"
    args = check_arguments(model.backbone_args, setting_args)
    patch = args.get("patch_size")
    if patch is not None:
        sides = tuple(patch) if isinstance(patch, (list, tuple)) else (patch, patch)
        _check_patch(sides, size, setting_args)
        args["patch_size"] = sides
    tagged = "." in model.backbone  # one of several sets of weights
    if not is_model(model.backbone) or (tagged and not pretrained):
        stem = model.backbone.split("_")[0]
        near = list_models(f"{stem}_*patch*") or list_models(f"{stem}_*") or list_models("vit_*")
        if len(near) > 40:
            near = [name for name in near if "_patch16_224" in name]
        raise choice_error(setting_name, model.backbone, near)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "backbone"))
        vit = _created(model.backbone, args, size, channels, setting, pretrained)
    kinds: Any = tuple(FAMILIES)
    if not isinstance(vit, kinds):
        names = ", ".join(kind.__name__ for kind in FAMILIES)
        reason = f"is a {type(vit).__name__}; the regimes need one of timm's {names}"
        raise setting_error(setting_name, model.backbone, reason)
    if isinstance(vit, NaFlexVit):
        vit.__dict__["image_size"] = size  # it keeps none itself, since it takes any
    family = family_of(vit)
    refusal = family.refusal()
    if refusal is not None:
        raise setting_error(setting_name, model.backbone, refusal)
    height, width = family.patch_size
    if family.is_uniform:
        _check_patch((height, width), size, setting_args)
    elif size[0] % height or size[1] % width:
        reason = f"is no multiple of {height} x {width} pixels, for which a token of "
        reason += f"{model.backbone} stands in the end: change it, or the patches or stages"
        raise setting_error("data.image_size", f"{size[0]} x {size[1]}", reason)
    if getattr(vit, "attn_pool", None) is not None:
        vit.reset_classifier(0, "token" if family.has_class_token else "avg")
    if model.init == "mae" and not pretrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "backbone.init"))
            init_as_mae(vit)
    if model.position_embedding == "sincos2d":
        if not family.takes_fixed_positions or vit.pos_embed is None or family.width % 4:
            reason = "needs a ViT with a position embedding and a width divisible by 4, "
            reason += f"not {model.backbone} of width {family.width}"
            raise setting_error("model.position_embedding", "sincos2d", reason)
        prefix = 0 if vit.no_embed_class else family.num_prefix
        fixed = sincos_position_embedding(family.grid, family.width, prefix)
        vit.pos_embed = nn.Parameter(fixed, requires_grad=False)
    set_norm_eps(vit, model.norm_eps)
    return vit


def _created(
    name: str,
    args: dict[str, Any],
    size: tuple[int, int],
    channels: int,
    setting: str,
    pretrained: bool,
) -> Any:
    """The model as timm makes it, or what timm says against it in the words of our settings."""
    try:
        windows = args.get("window_size")
        for side in windows if isinstance(windows, (list, tuple)) else [windows]:
            if isinstance(side, int) and side < 1:  # which timm 1.0.28 takes
                raise ValueError(f"window_size {side} must be positive")
        vit = create_model(
            name,
            # A check of a config builds on the meta device, and downloads nothing.
            pretrained=pretrained and torch.get_default_device().type != "meta",
            img_size=size,
            in_chans=channels,
            num_classes=0,
            **args,
        )
    except OSError as error:
        reason = f"weights of {name} cannot be had: {error}"
        raise setting_error(f"{setting}.pretrained", True, reason) from error
    except (TypeError, AssertionError, ValueError, RuntimeError, ArithmeticError) as error:
        if "unexpected keyword argument 'img_size'" in str(error):
            names = ", ".join(kind.__name__ for kind in FAMILIES)
            reason = "takes images of any size and, like every CNN, has no patches to hide; "
            reason += f"the regimes need one of timm's {names}"
            raise setting_error(f"{setting}.backbone", name, reason) from error
        given = {"backbone": name, **args}
        reason = f"is refused by timm: {error}"
        raise setting_error(f"{setting}.backbone_args", given, reason) from error
    if pretrained and not is_model_pretrained(name):
        reason = f"is refused by timm: it has no weights of {name}"
        raise setting_error(f"{setting}.pretrained", True, reason)
    return vit


def init_as_mae(vit: nn.Module) -> None:
    """Initialise an encoder as MAE does (He et al. 2021, arXiv:2111.06377, appendix A).

    The bias of a convolution that embeds patches stays as torch makes it, as in MAE.
    """
    for part in vit.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            part.reset_parameters()
        elif isinstance(part, nn.Conv2d) and part.groups == 1:
            nn.init.xavier_uniform_(part.weight.data.view(len(part.weight), -1))
    for name, token in vit.named_parameters():
        if name.endswith(("cls_token", "reg_token")):
            nn.init.normal_(token, std=0.02)


def check_arguments(args: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """Refuse arguments for timm that load a file, or are settings elsewhere (``UserError``)."""
    for name in plain(setting, args):
        if place := _RESERVED.get(name):
            raise setting_error(setting, dict(args), f"must not set {name}: that is {place}")
        if name in _LOADING:
            reason = f"must not set {name}: weights are read by mim import and mim evaluate"
            raise setting_error(setting, dict(args), reason)
    return dict(args)


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


def grid_of(vit: nn.Module) -> tuple[int, int]:
    """(rows, columns) of patches."""
    return family_of(vit).grid


def patch_size_of(vit: nn.Module) -> tuple[int, int]:
    """(height, width) of a patch in pixels."""
    return family_of(vit).patch_size


def supports_split(vit: nn.Module) -> bool:
    """Whether every block's queries and keys can be projected apart, and its attention shown."""
    return family_of(vit).splits


def load_weights(vit: nn.Module, checkpoint: Path, backbone: str) -> tuple[str, ...]:
    """Load a file of weights into a timm model, which messages call ``backbone``.

    It may be safetensors or a torch file with weights only, of timm or of MAE; timm converts it
    and resamples position embeddings to the image size. A classification head, a pooling layer
    and MAE's decoder are left out; all else must match.

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
    own = vit.state_dict()
    left_out = tuple(sorted(k for k in state if k.startswith(dropped) and k not in own))
    state = {name: value for name, value in state.items() if name not in left_out}
    _resize_fixed(state, vit)
    try:
        converted = sys.modules[type(vit).__module__].checkpoint_filter_fn(state, vit)
    except (RuntimeError, KeyError, AssertionError) as error:
        raise UserError(f"checkpoint {checkpoint} does not fit {backbone}: {error}") from error
    load_backbone(vit, converted, f"checkpoint {checkpoint}")
    return left_out


def _resize_fixed(state: dict[str, Tensor], vit: Any) -> None:
    """Resample fixed positions of a grid that is not square, for which timm would take it."""
    table, own = state.get("pos_embed"), getattr(vit, "pos_embed", None)
    if table is None or own is None or table.ndim != 3 or table.shape[2:] != own.shape[2:]:
        return
    prefix = own.shape[1] - math.prod(grid_of(vit))
    grid = fixed_grid(table[0, prefix:])
    if grid is not None and grid != grid_of(vit):
        state["pos_embed"] = resample_positions(table, grid_of(vit), grid, prefix)


def resize_positions(source: Any, target: Any) -> dict[str, Tensor]:
    """Return weights of ``source`` as a state dict for ``target``, for images of another size.

    Position embeddings are resampled (bicubic) where the grid of patches differs.
    """
    state: dict[str, Tensor] = dict(source.state_dict())
    if source.pos_embed is not None and grid_of(source) != grid_of(target):
        prefix = 0 if source.no_embed_class else source.num_prefix_tokens
        state["pos_embed"] = resample_positions(
            source.pos_embed.detach(), grid_of(target), grid_of(source), prefix
        )
    return state


def misfit_of(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Name the first keys of ``state`` that are missing, unknown or of another shape than ``own``.

    Empty where the weights fit.
    """
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    for what, keys in (("lacks", missing), ("has unknown", unknown), ("has", shapes)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            return f"{what} {', '.join(keys[:3])}{more}"
    return ""


def load_backbone(vit: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load timm keys strictly, but for a classification head (``UserError`` where they misfit)."""
    own = vit.state_dict()
    state = {k: v for k, v in state.items() if k in own or not k.startswith("head.")}
    misfit = misfit_of(state, own)
    if misfit:
        raise UserError(f"{source} does not fit the model: {misfit}")
    if not next(vit.parameters()).is_meta:  # there is nothing to copy into where all fits
        vit.load_state_dict(state)
