"""Published methods as configs, ``configs/recipes/NAME.yaml``.

A recipe is the config of a run with one block more, ``evaluations``. ``mim pretrain`` takes the
run, ``mim compare`` the run as its base and the evaluations, ``mim evaluate`` the evaluations.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mim.core.errors import UserError, choice_error

# Of a clone, and of an installation without one.
_FOLDERS = (
    Path(__file__).parents[2] / "configs" / "recipes",
    Path(sys.prefix) / "share" / "mim" / "recipes",
)
_OF_RUN = ("data", "model", "mask", "train", "optim")


def recipe_files() -> dict[str, Path]:
    """Maps the names of the recipes to their files, in the order of the names.

    Raises:
        UserError: if there are none.
    """
    for folder in _FOLDERS:
        if found := {path.stem: path for path in folder.glob("*.yaml")}:
            return dict(sorted(found.items()))
    raise UserError(f"recipes: there are none in {' or '.join(map(str, _FOLDERS))}")


def recipe_file(name: str) -> Path:
    """Returns the file of a recipe; a ``UserError`` lists the names."""
    files = recipe_files()
    if name not in files:
        raise choice_error("recipe", name, files)
    return files[name]


def headline(path: Path) -> str:
    """Returns the first sentence of a recipe's header, which says what it is."""
    first, _, _ = path.read_text(encoding="utf-8").partition("\n#\n")
    header = " ".join(line.removeprefix("#").strip() for line in first.splitlines())
    return header.partition(". ")[0].removesuffix(".")


def part_for(loaded: dict[str, Any], is_comparison: bool) -> dict[str, Any]:
    """Returns what a run or a comparison takes of a file that may be a recipe."""
    is_recipe = "evaluations" in loaded and "base" not in loaded
    if not is_recipe or not any(key in loaded for key in _OF_RUN):
        return loaded
    run = {key: value for key, value in loaded.items() if key != "evaluations"}
    if not is_comparison:
        return run
    base = {key: value for key, value in run.items() if key != "output"}
    return {"base": base, "evaluations": loaded["evaluations"]}


def evaluations_of(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the evaluations of a recipe and their settings."""
    return dict(loaded.get("evaluations") or {})
