"""Train and val by name: folders, members of tars, files, splits of tables and of the hub alike."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mim.core.errors import UserError

_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in _NAMES.items() for name in names}
_WORD = re.compile(r"[a-z]+")


def split_of(name: str) -> str | None:
    """train, val or test where a folder or a split has such a name, in any case; else None."""
    return _SPLIT_OF.get(name.lower())


def split_of_file(name: str) -> str | None:
    """Likewise of the first word that says so, as in ``imagenet-validation-03.tar``."""
    words = _WORD.findall(name.lower())
    return next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), None)


def find_splits(names: Iterable[str]) -> tuple[str | None, str | None]:
    """The names that mean train and val; where nothing means val, test stands in for it.

    Raises:
        UserError: if two names mean the same split, or one means val or test and none means train
            beside others: nothing tells whether those are its training images.
    """
    given = list(names)
    found: dict[str, str] = {}
    for name in given:
        split = split_of(name)
        if split is None:
            continue
        if split in found:
            raise UserError(f"has both {found[split]!r} and {name!r}: which of them is {split}?")
        found[split] = name
    held_out = found.get("val", found.get("test"))
    if held_out is not None and "train" not in found:
        reason = f"has {held_out!r} but no 'train'"
        if len(found) < len(given):
            reason += (
                "; put the training images into 'train', or rename the folder if it is a class"
            )
        raise UserError(reason)
    return found.get("train"), held_out
