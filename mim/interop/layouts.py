"""Names: every layout of a ViT's weights that is read or written, as a table to this package's.

Here a model's keys are ``backbone.*`` (timm's own names), ``regime.mask_token`` and ``decoder.*``.
Sources of the names: facebookresearch/mae ``models_mae.py``, microsoft/SimMIM ``models/``,
facebookresearch/dinov2 ``vision_transformer.py``, facebookresearch/deit, microsoft/unilm ``beit/``,
and what Hugging Face transformers 4 and 5 write.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mim.core.errors import UserError, choice_error
from mim.interop.account import some

CLASSIFIER = "classification head: the encoder alone is taken"
POOLER = "pooling layer behind the encoder"
_COMPUTED = {
    "num_batches_tracked": "a counter, no weight",
    "position_ids": "index of a table, no weight",
    "relative_position_index": "index of a table, no weight",
    "attn_mask": "mask of shifted windows, no weight",
}
"""How keys of buffers end that no model needs -> what they are."""

_ANCHORS = {
    "mim": re.compile(r"backbone\.patch_embed\.proj\.weight"),
    "hf": re.compile(r"(?:[a-z_0-9]+\.)?embeddings\.patch_embeddings\.projection\.weight"),
    "simmim": re.compile(r"encoder\.patch_embed\.proj\.weight"),
    "timm": re.compile(r"patch_embed\.proj\.weight"),
}
FAMILIES = tuple(_ANCHORS)
"""Key styles; ``timm`` is also facebookresearch/mae's, DeiT's and DINOv2's."""

_BLOCK = (
    r"(?:norm[12]|attn\.(?:qkv|proj|q_norm|k_norm|norm)|mlp\.(?:fc1|fc2|norm))\.(?:weight|bias)"
    r"|ls[12]\.gamma"
)
_ENCODER_KEY = re.compile(
    r"cls_token|reg_token|dist_token|pos_embed|patch_embed\.(?:proj|norm)\.(?:weight|bias)"
    rf"|(?:norm|norm_pre|fc_norm)\.(?:weight|bias)|blocks\.\d+\.(?:{_BLOCK})"
)
_BEIT_KEY = re.compile(
    rf"{_ENCODER_KEY.pattern}|rel_pos_bias\.relative_position_bias_table"
    r"|blocks\.\d+\.(?:gamma_[12]|attn\.(?:[qv]_bias|relative_position_bias_table))"
)
_SWIN_KEY = re.compile(
    r"patch_embed\.(?:proj|norm)\.(?:weight|bias)|norm\.(?:weight|bias)"
    r"|layers\.\d+\.downsample\.(?:norm\.(?:weight|bias)|reduction\.weight)"
    rf"|layers\.\d+\.blocks\.\d+\.(?:{_BLOCK}|attn\.relative_position_bias_table)"
)
Kind = Literal["plain", "beit", "swin"]
_KEYS: dict[Kind, re.Pattern[str]] = {
    "plain": _ENCODER_KEY,
    "beit": _BEIT_KEY,
    "swin": _SWIN_KEY,
}
_TABLE = re.compile(r"(?:encoder\.)?(layers\.)?.*relative_position_bias_table")
_PLACE = re.compile(r"backbone\.(?:layers\.(\d+)\.)?blocks\.(\d+)\.")


def kind_of(keys: Iterable[str]) -> Kind:
    """Which of timm's classes has weights of these names, by its relative position biases."""
    for key in keys:
        if match := _TABLE.fullmatch(key):
            return "swin" if match[1] else "beit"
    return "plain"


@dataclass(frozen=True)
class Piece:
    """A tensor under this package's name."""

    target: str
    """That name."""
    sources: tuple[str, ...]
    """The file's keys it was made of."""
    value: Tensor
    note: str = ""
    """What was done to the values; empty where they are unchanged."""


@dataclass
class Converted:
    """A file's tensors under this package's names."""

    family: str
    """Whose layout it was, for a reader."""
    style: str
    """Which table was used, one of ``FAMILIES``."""
    kind: Kind = "plain"
    """Whose weights they are: of timm's VisionTransformer, Beit or SwinTransformer."""
    pieces: dict[str, Piece] = field(default_factory=dict)
    """target -> piece."""
    left_out: dict[str, str] = field(default_factory=dict)
    """The file's key -> why no part of the model takes it."""
    unread: list[str] = field(default_factory=list)
    """Keys that no table knows."""

    def add(self, target: str, source: str, value: Tensor, note: str = "") -> None:
        """Make a key of the model from one of the file."""
        self.join(target, (source,), value, note)

    def join(self, target: str, sources: tuple[str, ...], value: Tensor, note: str = "") -> None:
        """Make a key of the model from several of the file."""
        if target in self.pieces:
            both = ", ".join([*self.pieces[target].sources, *sources])
            raise UserError(f"mixed key styles: {both} are the same weight ({target})")
        self.pieces[target] = Piece(target, sources, value, note)

    @property
    def state(self) -> dict[str, Tensor]:
        """target -> tensor."""
        return {target: piece.value for target, piece in self.pieces.items()}

    @property
    def blocks(self) -> dict[int, set[int]]:
        """Stage -> numbers of its blocks; a ViT is one stage."""
        found: dict[int, set[int]] = defaultdict(set)
        for match in filter(None, map(_PLACE.match, self.pieces)):
            found[int(match[1] or 0)].add(int(match[2]))
        return found


def style_of(keys: Iterable[str]) -> str:
    """The key style of a file, from its patch embedding, which every ViT has.

    Raises:
        UserError: if there is none, or if there are weights of more than one style.
    """
    keys = list(keys)
    found = {
        style: key for style, pattern in _ANCHORS.items() for key in keys if pattern.fullmatch(key)
    }
    if len(found) > 1:
        raise UserError(
            f"mixed key styles: {' and '.join(found.values())} each belong to another layout; a "
            "file must have one"
        )
    if not found:
        raise UserError(
            "no ViT that is read here: the file has no patch embedding under the names of timm, "
            "facebookresearch/mae, DeiT, DINOv2, SimMIM or Hugging Face's ViT; its keys begin "
            f"with {some(keys, 4)}"
        )
    return next(iter(found))


def convert(tensors: Mapping[str, Tensor], style: str | None = None) -> Converted:
    """A file's tensors under this package's names.

    Args:
        tensors: by the file's keys.
        style: one of ``FAMILIES``; by default it is seen from the keys.

    Raises:
        UserError: for keys of no known layout, or of more than one, and for a file that is not
            whole.
    """
    if style is not None and style not in FAMILIES:
        raise choice_error("--from", style, FAMILIES)
    seen = style_of(tensors)
    if style is not None and style != seen:
        raise UserError(f"--from: {style!r} is not what the keys say, {seen!r}")
    found = _CONVERTERS[seen](tensors)
    for key in list(found.unread):
        if reason := _COMPUTED.get(key.rpartition(".")[2]):
            found.unread.remove(key)
            found.left_out[key] = reason
    if found.unread:
        claims = [claim for style, claim in _CLAIMS.items() if style != seen]
        others = [key for key in found.unread if any(claim.match(key) for claim in claims)]
        if others:
            raise UserError(
                f"mixed key styles: {some(others)} beside the {seen} layout; a file must have one"
            )
        raise UserError(
            f"keys that no part of a ViT takes: {some(found.unread)}; it is another architecture "
            "or holds more than one model, and nothing is loaded in part"
        )
    for piece in found.pieces.values():
        if not piece.value.dtype.is_floating_point:
            kind = str(piece.value.dtype).removeprefix("torch.")
            raise UserError(f"{some(piece.sources)}: is {kind}; quantised weights are not read")
    stages = found.blocks
    if not stages or any(part != {*range(len(part))} for part in ({*stages}, *stages.values())):
        places = [
            f"{s}.{n}" if len(stages) > 1 else str(n)
            for s in sorted(stages)
            for n in sorted(stages[s])
        ]
        raise UserError(f"the file is not whole: its blocks are {some(places, 6)}")
    return found


_CLAIMS = {
    "mim": re.compile(r"backbone\."),
    "hf": re.compile(r"(?:[a-z_0-9]+\.)?(?:embeddings|encoder\.layer|layers\.\d+\.attention)\."),
    "simmim": re.compile(r"encoder\.(?:blocks|layers|patch_embed|cls_token|pos_embed|norm)\b"),
    "timm": re.compile(rf"(?:{_BEIT_KEY.pattern}|{_SWIN_KEY.pattern})$|decoder_blocks\."),
}
"""Key style -> how keys begin that belong to it."""


# --- this package's own -------------------------------------------------------------------------


_PARTS = ("backbone.", "regime.", "decoder.", "target.", "teacher.", "mask_network.")


def _from_mim(tensors: Mapping[str, Tensor]) -> Converted:
    found = Converted("mim", "mim")
    for key, value in tensors.items():
        if key.startswith(_PARTS):
            found.add(key, key, value)
        else:
            found.unread.append(key)
    return found


# --- timm, facebookresearch/mae, DeiT, DINOv2, BEiT, Swin -----------------------------------------

_MAE_DECODER = {
    "mask_token": "mask_token",
    "decoder_pos_embed": "pos_embed",
    "decoder_embed.weight": "embed.weight",
    "decoder_embed.bias": "embed.bias",
    "decoder_norm.weight": "norm.weight",
    "decoder_norm.bias": "norm.bias",
    "decoder_pred.weight": "head.weight",
    "decoder_pred.bias": "head.bias",
}
"""facebookresearch/mae -> ``decoder.``; its ``decoder_blocks`` are timm blocks."""


def _from_timm(tensors: Mapping[str, Tensor], prefix: str = "") -> Converted:
    """``prefix`` stands before every encoder key (SimMIM)."""
    has_decoder = "decoder_embed.weight" in tensors
    kind = kind_of(tensors)
    is_plain, own_key = kind == "plain", _KEYS[kind]
    is_dinov2 = is_plain and not prefix and not has_decoder
    is_dinov2 &= bool({"mask_token", "register_tokens"} & {*tensors})
    family = _timm_family(tensors, has_decoder, is_dinov2)
    family = {"beit": "BEiT", "swin": "Swin"}.get(kind, family)
    found = Converted(family, "timm", kind)
    registers = "register_tokens" in tensors
    # Microsoft's Swin merges patches at the end of a stage, timm's at the beginning of the next.
    merges_last = f"{prefix}layers.0.downsample.reduction.weight" in tensors
    biases: dict[str, dict[str, tuple[str, Tensor]]] = defaultdict(dict)
    for full, value in tensors.items():
        if prefix and not full.startswith(prefix):
            continue
        key = full[len(prefix) :]
        # DINOv2's training files number the chunk of blocks, then the block.
        key = re.sub(r"^blocks\.\d+\.(\d+)\.(?=norm|attn|ls|mlp)", r"blocks.\1.", key)
        key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        if is_plain:
            key = re.sub(r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma", key)
        if merges_last and (match := re.fullmatch(r"layers\.(\d+)\.(downsample\..*)", key)):
            key = f"layers.{int(match[1]) + 1}.{match[2]}"
        match = re.fullmatch(r"(blocks\.\d+)\.attn\.([qv])_bias", key)
        if match and is_plain:
            biases[match[1]][match[2]] = (full, value)
        elif key == "register_tokens":
            found.add("backbone.reg_token", full, value)
        elif registers and key == "pos_embed":
            continue  # below
        elif own_key.fullmatch(key):
            found.add(f"backbone.{key}", full, value)
        elif has_decoder and key in _MAE_DECODER:
            found.add(f"decoder.{_MAE_DECODER[key]}", full, value)
        elif has_decoder and re.fullmatch(rf"decoder_blocks\.\d+\.(?:{_BLOCK})", key):
            found.add(f"decoder.{key.removeprefix('decoder_')}", full, value)
        elif key == "mask_token" and (prefix or not is_plain):
            found.add("regime.mask_token", full, value)
        elif key == "mask_token":
            found.left_out[full] = "mask token of DINOv2's own loss"
        elif re.match(r"(?:head|head_dist|lm_head|fc|pre_logits)\.", key):
            found.left_out[full] = CLASSIFIER
        elif key.startswith("attn_pool."):
            found.left_out[full] = POOLER
        else:
            found.unread.append(full)
    if registers:
        _dinov2_registers(found, "pos_embed", tensors.get("pos_embed"))
    for block, pair in biases.items():
        if set(pair) != {"q", "v"}:
            raise UserError(f"the file is not whole: {block} has a bias of {' '.join(pair)} alone")
        (q_key, q), (v_key, v) = pair["q"], pair["v"]
        joined = torch.cat([q, torch.zeros_like(q), v])
        found.join(f"backbone.{block}.attn.qkv.bias", (q_key, v_key), joined)
    return found


def _timm_family(tensors: Mapping[str, Tensor], has_decoder: bool, is_dinov2: bool) -> str:
    has_head = any(key.startswith("head.") for key in tensors)
    if has_decoder:
        return "facebookresearch/mae with decoder"
    if is_dinov2:
        return "DINOv2"
    if any(".attn.q_bias" in key for key in tensors):
        return "SimMIM"
    if "dist_token" in tensors:
        return "DeiT, distilled"
    if "fc_norm.weight" in tensors and has_head:
        return "facebookresearch/mae fine-tuned, or timm with average pooling"
    if has_head:
        return "DeiT or timm"
    return "timm, or facebookresearch/mae's encoder"


def _dinov2_registers(found: Converted, source: str, positions: Tensor | None) -> None:
    """DINOv2 adds positions before it inserts the registers: here their positions are zero."""
    registers = found.pieces["backbone.reg_token"].value
    if positions is None or positions.ndim != 3 or positions.shape[1] < 2:
        raise UserError("the file is not whole: registers without cls_token and pos_embed")
    first, rest = positions[:, :1], positions[:, 1:]
    whole = torch.cat([first, torch.zeros_like(registers), rest], dim=1)
    note = "zeros put in for the registers, which have no position"
    found.add("backbone.pos_embed", source, whole, note)


def _from_simmim(tensors: Mapping[str, Tensor]) -> Converted:
    found = _from_timm(tensors, prefix="encoder.")
    found.family, found.style = "SimMIM", "simmim"
    for key, value in tensors.items():
        if key in ("decoder.0.weight", "decoder.0.bias"):
            _shuffled_head(found, key, value)
        elif not key.startswith("encoder."):
            found.unread.append(key)
    return found


def _shuffled_head(found: Converted, key: str, value: Tensor) -> None:
    """SimMIM's 1 x 1 convolution before a pixel shuffle, as a linear map to a patch.

    The shuffle reads its outputs as (channel, row, column), a patch here is (row, column, channel).
    """
    piece = found.pieces.get("backbone.patch_embed.proj.weight")
    assert piece is not None  # the anchor of both layouts that come here
    channels, height, width = piece.value.shape[1:]
    merged = 2 ** (len(found.blocks) - 1)  # patches that a latent of a Swin stands for, each way
    height, width, count = height * merged, width * merged, value.shape[0]
    if height != width or count != channels * height * width:
        raise UserError(
            f"{key}: predicts {count} values for each patch, and a patch of {height} x {width} "
            f"pixels and {channels} channels has {channels * height * width}; the encoder's "
            "stride must be its patch size"
        )
    rows = value.reshape(channels, height, width, -1).permute(1, 2, 0, 3).reshape(count, -1)
    rows = rows[:, 0] if key.endswith("bias") else rows
    found.add(f"decoder.head.{key.rpartition('.')[2]}", key, rows.contiguous())


# --- Hugging Face -------------------------------------------------------------------------------

_HF_MODEL = re.compile(r"(?:vit|deit|dinov2|dinov2_with_registers)\.")
_HF_STEM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_HF_DECODER = {f"decoder.{theirs}": ours for theirs, ours in _MAE_DECODER.items()}
# In a block, the names of transformers 4 (which are on the hub) and of 5 (in memory).
_HF_BLOCK = {
    "old": {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    },
    "new": {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
}
_HF_DINO = {
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
}
_HF_INNER = {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for table in (*_HF_BLOCK.values(), _HF_DINO)
    for theirs, ours in table.items()
    for kind in ("weight", "bias")
} | {f"layer_scale{n}.lambda1": f"ls{n}.gamma" for n in (1, 2)}
"""Names in a block of the encoder, but those of queries, keys and values."""
_HF_QKV = {
    "old": [f"attention.attention.{name}" for name in ("query", "key", "value")],
    "new": [f"attention.{name}_proj" for name in "qkv"],
}
_HF_LETTER = {
    stem: letter for stems in _HF_QKV.values() for letter, stem in zip("qkv", stems, strict=True)
}
_HF_PLACE = re.compile(
    r"(?P<encoder>(?:encoder\.layer|layers)\.(?P<n>\d+))\.(?P<inner>.+)"
    r"|decoder\.(?:decoder_layers|decoder_encoder\.layer)\.(?P<m>\d+)\.(?P<within>.+)"
)


def _from_hf(tensors: Mapping[str, Tensor]) -> Converted:
    names = {key: _HF_MODEL.sub("", key, count=1) for key in tensors}
    simmim = "decoder.0.weight" in tensors
    has_decoder = any(key.startswith("decoder.decoder_") for key in tensors)
    registers = "embeddings.register_tokens" in names.values()
    family = "Hugging Face ViTMAE" if has_decoder else "Hugging Face ViT"
    if simmim:
        family = "Hugging Face ViTForMaskedImageModeling (SimMIM)"
    elif any("layer_scale1" in key for key in tensors):
        family = "Hugging Face DINOv2"
    found = Converted(family, "hf")
    parts: dict[str, dict[str, tuple[str, Tensor]]] = defaultdict(dict)
    for full, value in tensors.items():
        key = names[full]
        match = _HF_PLACE.fullmatch(key)
        if match:
            block = (
                f"backbone.blocks.{match['n']}" if match["n"] else f"decoder.blocks.{match['m']}"
            )
            within = match["inner"] or match["within"]
            stem, _, kind = within.rpartition(".")
            letter = _HF_LETTER.get(stem)
            if letter is not None and kind in ("weight", "bias"):
                place = parts[f"{block}.attn.qkv.{kind}"]
                if letter in place:
                    raise UserError(
                        f"mixed key styles: {place[letter][0]} and {full} are the same weight"
                    )
                place[letter] = (full, value)
            elif within in _HF_INNER:
                found.add(f"{block}.{_HF_INNER[within]}", full, value)
            else:
                found.unread.append(full)
        elif registers and key == "embeddings.position_embeddings":
            continue
        elif key in _HF_STEM:
            found.add(f"backbone.{_HF_STEM[key]}", full, value)
        elif key == "embeddings.register_tokens":
            found.add("backbone.reg_token", full, value)
        elif full in _HF_DECODER:
            found.add(f"decoder.{_HF_DECODER[full]}", full, value)
        elif key == "embeddings.mask_token" and simmim:
            found.add("regime.mask_token", full, value)
        elif key == "embeddings.mask_token":
            found.left_out[full] = "mask token of another loss"
        elif full in ("decoder.0.weight", "decoder.0.bias"):
            continue
        elif re.match(r"(?:classifier|cls_classifier|distillation_classifier)\.", key):
            found.left_out[full] = CLASSIFIER
        elif key.startswith("pooler."):
            found.left_out[full] = POOLER
        else:
            found.unread.append(full)
    for target, place in parts.items():
        if set(place) != {*"qkv"}:
            lacking = ", ".join(letter for letter in "qkv" if letter not in place)
            raise UserError(f"the file is not whole: {target} lacks its {lacking}")
        sources = tuple(place[letter][0] for letter in "qkv")
        found.join(target, sources, torch.cat([place[letter][1] for letter in "qkv"]))
    if registers:
        source = next((k for k in tensors if names[k] == "embeddings.position_embeddings"), "")
        _dinov2_registers(found, source, tensors.get(source))
    for key in ("decoder.0.weight", "decoder.0.bias"):
        if key in tensors:
            _shuffled_head(found, key, tensors[key])
    if all(any(f".{s}." in key for key in tensors for s in stems) for stems in _HF_QKV.values()):
        raise UserError(
            "mixed key styles: some blocks have the names of transformers 4 and some of 5; a file "
            "must have one"
        )
    return found


_CONVERTERS: dict[str, Callable[[Mapping[str, Tensor]], Converted]] = {
    "mim": _from_mim,
    "hf": _from_hf,
    "simmim": _from_simmim,
    "timm": _from_timm,
}


# --- outwards -----------------------------------------------------------------------------------


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder under timm's keys."""
    return {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}


_PLAIN_BLOCK = re.compile(
    r"blocks\.(\d+)\.(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)"
)
_PLAIN_STEM = {*_HF_STEM.values()} - {"dist_token"}


def _rename(
    state: Mapping[str, Tensor],
    where: str,
    stem: Mapping[str, str],
    decoder: Mapping[str, str],
    block: Callable[[str, str, str, str, Tensor], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Rename the encoder's ``stem``, the ``decoder`` around its blocks, and each ``block`` tensor.

    Raises:
        UserError: if a weight has no new name.
    """
    found: dict[str, Tensor] = {}
    extra = []
    for key, value in state.items():
        part, _, name = key.partition(".")
        plain = _PLAIN_BLOCK.fullmatch(name)
        if plain and part in ("backbone", "decoder"):
            number, layer, kind = plain.groups()
            found |= block(part, number, layer, kind, value)
        elif part == "backbone" and name in stem:
            found[stem[name]] = value
        elif part == "decoder" and name in decoder:
            found[decoder[name]] = value
        else:
            extra.append(key)
    if extra:
        raise UserError(f"{where} has no place for {some(extra)}; export --to timm keeps all")
    return found


def to_mae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under facebookresearch/mae's keys; the decoder too, where ``state`` has MAE's.

    Raises:
        UserError: if a weight has no place there.
    """

    def block(part: str, n: str, layer: str, kind: str, value: Tensor) -> dict[str, Tensor]:
        prefix = "decoder_" if part == "decoder" else ""
        return {f"{prefix}blocks.{n}.{layer}.{kind}": value}

    stem = {name: name for name in _PLAIN_STEM}
    decoder = {ours: theirs for theirs, ours in _MAE_DECODER.items()}
    return _rename(state, "facebookresearch/mae's layout", stem, decoder, block)


def to_hf(state: Mapping[str, Tensor], model: bool) -> dict[str, Tensor]:
    """Under Hugging Face's keys, those of transformers 4, which 5 reads too.

    Args:
        state: the model's.
        model: whether the decoder goes with it (ViTMAEForPreTraining, with ``vit.`` before the
            encoder's names), or the encoder alone (ViTModel).

    Raises:
        UserError: if a weight has no place there.
    """
    inner = {ours: theirs for theirs, ours in _HF_BLOCK["old"].items()}
    prefix = "vit." if model else ""

    def block(part: str, n: str, layer: str, kind: str, value: Tensor) -> dict[str, Tensor]:
        place = f"{prefix}encoder.layer.{n}"
        if part == "decoder":
            place = f"decoder.decoder_layers.{n}"
        if layer != "attn.qkv":
            return {f"{place}.{inner[layer]}.{kind}": value}
        names = [f"{place}.{theirs}.{kind}" for theirs in _HF_QKV["old"]]
        return dict(zip(names, value.chunk(3), strict=True))

    stem = {ours: prefix + theirs for theirs, ours in _HF_STEM.items() if ours in _PLAIN_STEM}
    decoder = {ours: theirs for theirs, ours in _HF_DECODER.items()}
    if not model:
        state = {key: value for key, value in state.items() if not key.startswith("decoder.")}
    return _rename(state, "Hugging Face's ViT", stem, decoder, block)
