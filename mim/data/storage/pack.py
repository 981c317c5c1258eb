"""Packing the images of a config (``mim data pack``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.core.files import prepare_folder, write_json_atomic
from mim.data.opening import open_source
from mim.data.sources.base import Split
from mim.data.storage.packed import FORMAT, MANIFEST, Recipe, pack_split, read_manifest, verify


def pack(config: DataConfig, folder: str | Path, recipe: Recipe, workers: int = 0) -> Path:
    """Write the train and val images of a config as a packed set; returns its manifest.

    A packing that was killed goes on; a finished one of the same images is checked and kept. The
    division into train and val is that of the config and is kept.

    Args:
        config: which images.
        folder: the packed set, ``data.path`` of ``data.source: packed``.
        recipe: what is kept of them.
        workers: processes that read.

    Raises:
        UserError: if the folder holds another set or a damaged one, or cannot be written to.
    """
    folder = Path(folder)
    prepare_folder(folder, "OUT")
    recipe = replace(recipe, channels=config.channels)
    splits: tuple[Split, ...] = ("train", "val")
    sources = {split: open_source(config, split) for split in splits}
    manifest = folder / MANIFEST
    head = {"format": FORMAT, "kind": recipe.kind, "channels": recipe.channels}
    head |= {"size": recipe.size, "square": recipe.square}
    if manifest.is_file():
        found = read_manifest(folder)
        same = all(found[key] == value for key, value in head.items())
        if not same or any(
            found["splits"][s]["source"] != sources[s].fingerprint() for s in splits
        ):
            raise UserError(
                f"OUT: {str(folder)!r} holds a packed set of other images or another kind"
            )
        verify(folder)
        return manifest
    train = sources["train"]
    entries = {s: pack_split(sources[s], folder, s, recipe, workers) for s in splits}
    head |= {"classes": train.classes, "mean": train.mean, "std": train.std, "splits": entries}
    write_json_atomic(manifest, head)
    for split in splits:
        for rest in (*folder.glob(f"{split}-*.json"), *folder.glob(f"{split}-*.rows")):
            rest.unlink()
    return manifest
