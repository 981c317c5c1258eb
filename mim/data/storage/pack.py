"""Packing the images of a config (``mim data pack``)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.core.files import prepare_folder, remove_leftovers, write_json_atomic
from mim.core.fingerprints import same_images
from mim.core.lock import sole_use
from mim.data.opening import open_source
from mim.data.sources.base import ImageSource, Split
from mim.data.storage.packed import (
    FORMAT,
    MANIFEST,
    Recipe,
    content_key,
    pack_split,
    read_manifest,
    read_spans,
    spans_of,
    verify,
)


def pack(config: DataConfig, folder: str | Path, recipe: Recipe, workers: int = 0) -> Path:
    """Write the train and val images of a config as a packed set; returns its manifest.

    A packing that was killed resumes; a finished one of the same images is checked and stays. The
    division into train and val is that of the config. ``workers`` processes read.

    Raises:
        UserError: if the folder holds another set or a damaged one, is in use by another process,
            or cannot be written to.
    """
    folder = Path(folder)
    prepare_folder(folder, "OUT")
    recipe = replace(recipe, channels=config.channels)
    with sole_use(folder, "OUT"):
        remove_leftovers(folder)
        sources: dict[Split, ImageSource] = {
            split: open_source(config, split) for split in ("train", "val")
        }
        keys = {split: content_key(source, recipe, config) for split, source in sources.items()}
        head = {"format": FORMAT, "kind": recipe.kind, "channels": recipe.channels}
        head |= {"size": recipe.size, "square": recipe.square}
        manifest = folder / MANIFEST
        if manifest.is_file():
            found = read_manifest(folder)
            verify(folder)
            if any(found[key] != value for key, value in head.items()) or not all(
                _is_kept(found["splits"][split], source, recipe, workers, keys[split])
                for split, source in sources.items()
            ):
                reason = "holds a packed set of other images or another kind"
                raise UserError(f"OUT: {str(folder)!r} {reason}")
        else:
            train = sources["train"]
            entries = {
                split: pack_split(source, folder, split, recipe, workers, keys[split])
                for split, source in sources.items()
            }
            head |= {"classes": train.classes, "mean": train.mean, "std": train.std}
            write_json_atomic(manifest, head | {"splits": entries})
        _remove_others(folder)
    return manifest


def _is_kept(
    entry: dict[str, Any], source: ImageSource, recipe: Recipe, workers: int, key: str
) -> bool:
    """Whether a packed split holds a source's images as they are now.

    Where files have other times than when they were packed, or the set is of an earlier version,
    the images are read again and compared.
    """
    if not same_images(entry["source"], source.fingerprint()):
        return False
    if entry.get("key") == key:
        return True
    digests = [
        hashlib.blake2b(data, digest_size=16).hexdigest()
        for data, _, _ in read_spans(source, recipe, spans_of(source, recipe), workers)
    ]
    return digests == [part["blake2b"] for part in entry["parts"]]


def _remove_others(folder: Path) -> None:
    """Remove what a packing left behind that was killed, or was of more images."""
    entries = read_manifest(folder)["splits"]
    kept = {part["name"] for entry in entries.values() for part in entry["parts"]}
    for split in entries:
        for path in folder.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9]*.*"):
            if path.suffix in (".json", ".rows", ".bin", ".tar") and path.name not in kept:
                path.unlink()
