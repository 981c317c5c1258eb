"""Reading files of weights: tensors and plain values only, never code."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg
from torch import Tensor

from mim.core.errors import UserError, choice_error, setting_error
from mim.core.files import decode_text
from mim.interop.account import some
from mim.training.checkpoint import read_safetensors

# Where training scripts put the weights; the average of them first, as it is what is evaluated.
_WRAPPERS = ("model_ema", "state_dict_ema", "ema", "model", "state_dict", "teacher", "module")
# What other tools wrap a model in, and so put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")
# What training keeps among the weights: counters, losses and their parameters, queues, metrics.
_OF_TRAINING = re.compile(
    r"(module\.)?(n_averaged|(global_)?step|epoch|queue(_ptr)?"
    r"|(criterion|loss(_fn|_fun|_func)?|(train|val|valid|test)_\w+|metrics?)\..+)"
)
# Globals that a pickle of plain numbers may name: arguments of a script, of which a node of yacs
# (SimMIM, Swin) is read as a mapping, and NumPy's scalars.
_SCALAR = np.float64(0).__reduce__()[0]  # NumPy 1 and 2 keep it in different places
_PLAIN: list[Any] = [
    argparse.Namespace,
    (OrderedDict, "yacs.config.CfgNode"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BESIDE = ("model.safetensors", "pytorch_model.bin", "encoder.safetensors")
_ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """Named tensors and what the file says of them."""

    path: Path
    tensors: dict[str, Tensor]
    """In float32, by the file's own keys without the wrappers' prefixes."""
    config: dict[str, Any]
    """A ``config.json`` beside the file (Hugging Face, timm); empty without one."""
    processor: dict[str, Any]
    """A ``preprocessor_config.json`` beside it; empty without one."""
    metadata: dict[str, str]
    """Of a safetensors file; ``mim_config`` is the config of this package's own files."""
    arguments: dict[str, Any]
    """Of the training script, where the file holds them (facebookresearch/mae, SimMIM)."""
    left_out: dict[str, str]
    """Entries besides the weights -> why they were left out."""
    notes: tuple[str, ...]
    """Which part was taken, and which precision it had."""


def _beside(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(decode_text(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return read_safetensors(path)
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{str(path)!r} cannot be read as safetensors (cut short, or another format): {reason}"
        ) from error


def _unsafe_names(path: Path) -> list[str]:
    try:
        with torch.serialization.safe_globals(_PLAIN):
            return torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # an old or broken file; the refusal stands without the names
        return []


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = _unsafe_names(path) if zipfile.is_zipfile(path) else []
        what = f"asks for {some(names)}" if names else "is no file of weights alone"
        # torch's own message says how to load it all the same, which would run what it holds.
        raise UserError(
            f"{str(path)!r} was not loaded: it {what}, and what is no tensor may run code. Save "
            "its state dict alone, best as safetensors"
        ) from error
    except Exception as error:  # torch raises many kinds for a broken file
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0][:160]
        raise UserError(
            f"{str(path)!r} cannot be read (cut short, or no torch file): {reason}"
        ) from error


def find_weights(name: str | Path) -> Path:
    """The file of weights that a name means; those of a hub are fetched.

    Args:
        name: a path, a timm name (``vit_base_patch16_224.mae``), or ``USER/NAME`` on the hub.

    Raises:
        UserError: if there is no such file, and nothing of this name on the hub can be had.
    """
    if Path(name).exists():
        return _find_weights(Path(name))
    text = str(name).removeprefix("hf-hub:").removeprefix("hf_hub:")
    known = get_pretrained_cfg(text, allow_unregistered=True) if "/" not in text else None
    repo = (known.hf_hub_id if known is not None else text) or ""
    repo += text if repo.endswith("/") else ""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or Path(text).suffix in _ENDINGS:
        reason = "is neither a file, nor a timm name with weights, nor USER/NAME on the hub"
        raise setting_error("model.weights", str(name), reason)
    try:
        folder = snapshot_download(repo, allow_patterns=["*.json", *_BESIDE])
    except (OSError, ValueError) as error:  # its own errors are of these kinds
        reason = f"cannot be had from the hub ({' '.join(str(error).split())[:160]})"
        raise setting_error("model.weights", str(name), reason) from error
    return _find_weights(Path(folder))


def _find_weights(path: Path) -> Path:
    """The file of weights that a path leads to, which may be a folder."""
    if path.is_dir():
        if (path / "config.yaml").is_file():
            raise UserError(f"{str(path)!r} is a run folder already; every verb takes it")
        for name in (_INDEX, *_BESIDE):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{str(path)!r} holds none of {', '.join(_BESIDE)}")
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist")
    return path


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = _beside(index.parent, index.name).get("weight_map")
    if not isinstance(places, Mapping):
        raise UserError(f"{index} has no weight_map")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():
            raise UserError(f"{index}: part {name!r} is not in its folder")
        tensors |= _read_safetensors(shard)[0]
    if missing := [key for key in places if key not in tensors]:
        raise UserError(f"{index}: its parts lack {some(missing)}")
    return tensors


def _unwrap(
    content: Any, path: Path, key: str | None
) -> tuple[Mapping[str, Any], dict[str, str], str]:
    """The state dict in what a training script stored, the rest, and under which name it stood."""
    if not isinstance(content, Mapping):
        raise UserError(f"{str(path)!r} holds a {type(content).__name__}, not named tensors")
    if key is not None and not isinstance(content.get(key), Mapping):
        names = [name for name, value in content.items() if isinstance(value, Mapping)]
        raise choice_error("--key", key, names)
    if key is None:  # in a state dict itself no value is a mapping
        wrapped = [n for n in _WRAPPERS if isinstance(content.get(n), Mapping) and content[n]]
        if not wrapped:
            return content, {}, ""
        key = wrapped[0]
    reason = f"stands beside the weights, which are under {key!r}"
    return content[key], {str(name): reason for name in content if name != key}, key


def _strip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DDP, torch.compile or Lightning put before each of them."""
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _strip({name[len(prefix) :]: value for name, value in tensors.items()})
    return tensors


def _dino_teacher(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """DINO's and DINOv2's training files hold ``backbone.*`` beside ``dino_head.*``."""
    heads = [name for name in tensors if name.startswith(("dino_head.", "ibot_head.", "head."))]
    rest = [name for name in tensors if name not in heads]
    if not heads or not rest or not all(name.startswith("backbone.") for name in rest):
        return tensors, {}
    left_out = dict.fromkeys(heads, "projection head of DINO's loss")
    return {name.removeprefix("backbone."): tensors[name] for name in rest}, left_out


def read_weights(path: str | Path, key: str | None = None) -> Weights:
    """Read a file of weights without running anything that is in it.

    Args:
        path: ``.safetensors``, a torch file, or a folder as Hugging Face writes it.
        key: under which name a torch file holds the weights; by default ``model_ema``, ``model``,
            ``state_dict``, ``teacher`` and the like are looked for.

    Raises:
        UserError: if it is missing, cut short, would run code, or holds other things than finite
            floating-point tensors.
    """
    path = _find_weights(Path(path))
    state: Mapping[str, Any]
    metadata: dict[str, str] = {}
    arguments: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    notes: list[str] = []
    if path.name == _INDEX:
        state = _read_shards(path)
    elif path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
    else:
        content = _read_torch(path)
        state, left_out, chosen = _unwrap(content, path, key)
        if chosen:
            notes.append(f"the weights stood under {chosen!r}")
            script = content.get("args", content.get("config"))
            if isinstance(script, argparse.Namespace):
                arguments = dict(vars(script))
            elif isinstance(script, Mapping):
                arguments = dict(script)
            if isinstance(content.get("fingerprint"), str):  # a checkpoint of this package's
                metadata = {"mim_config": content["fingerprint"]}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    left_out |= {
        str(name): f"is a {type(value).__name__}, no tensor"
        for name, value in state.items()
        if not isinstance(value, Tensor)
    }
    for name in [name for name in tensors if _OF_TRAINING.fullmatch(name)]:
        del tensors[name]
        left_out[name] = "belongs to the training, not to the model"
    if not tensors:
        raise UserError(f"{str(path)!r} holds no tensors")
    tensors, heads = _dino_teacher(_strip(tensors))
    left_out |= heads
    tensors = _as_floats(tensors, path, notes)
    return Weights(
        path=path,
        tensors=tensors,
        config=_beside(path.parent, "config.json"),
        processor=_beside(path.parent, "preprocessor_config.json"),
        metadata=metadata,
        arguments=arguments,
        left_out=left_out,
        notes=tuple(notes),
    )


def _as_floats(tensors: dict[str, Tensor], path: Path, notes: list[str]) -> dict[str, Tensor]:
    """The values in float32, but integers (an index) unchanged; adds notes on their precision."""
    kinds: Counter[torch.dtype] = Counter()
    found = {}
    for name, value in tensors.items():
        found[name] = value
        if not value.dtype.is_floating_point:
            continue
        if value.dtype not in _FLOATS:
            raise UserError(
                f"{str(path)!r}: {name} is {str(value.dtype).removeprefix('torch.')}; only "
                "float32, float64, float16 and bfloat16 are read"
            )
        kinds[value.dtype] += 1
        found[name] = value.float()
        if not bool(found[name].isfinite().all()):
            raise UserError(f"{str(path)!r}: {name} has values that are not finite")
    for kind in (torch.float16, torch.bfloat16):
        if kind in kinds:
            word = str(kind).removeprefix("torch.")
            notes.append(
                f"{kinds[kind]} entries were {word} and are float32 now: each value is unchanged, "
                "and no more precise than it was"
            )
    if torch.float64 in kinds:
        notes.append(f"{kinds[torch.float64]} entries were float64 and are rounded to float32")
    return found
