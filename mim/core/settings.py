"""Reading and writing configs: YAML files, dotted settings, the command line.

What the values may be is checked in ``mim.core.fields``.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import difflib
import inspect
import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_origin

from mim import moved
from mim.core.errors import UserError
from mim.core.fields import build, came_later, fit, hints
from mim.core.files import dump_yaml, load_yaml
from mim.core.plugins import beside, check_trust, import_plugin
from mim.core.recipes import part_for, recipe_file

T = TypeVar("T")


def __getattr__(name: str) -> Any:
    return moved.attribute(__name__, name)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of settings; raise a ``UserError`` if it is none."""
    if not Path(path).is_file():
        raise UserError(f"config: {str(path)!r} is not a file")
    try:
        loaded = load_yaml(path)
    except ValueError as error:
        raise UserError(f"config: {path} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"config: {path} holds no mapping of settings")
    return loaded


def dotted(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``["mask.ratio=0.6", ...]`` into a mapping; a mapping stays as it is."""
    if isinstance(overrides, Mapping):
        return dict(overrides)
    found: dict[str, Any] = {}
    for item in overrides:
        key, equals, value = item.removeprefix("--").partition("=")
        if not equals:
            raise UserError(f"override {item!r} has not the form key=value")
        found[key] = value
    return found


def read_tree(
    kind: type[T],
    files: Sequence[str | Path],
    settings: Mapping[str, Any] | None = None,
    trust: bool | None = None,
) -> T:
    """Read a config from YAML files and dotted settings, which override them; so do later files.

    The plug-ins that they name are imported first, since they bring settings of their own.

    Args:
        kind: of the config.
        files: YAML files.
        settings: dotted key to value.
        trust: whether plug-ins of a run folder from elsewhere may run; None checks only where a
            file lies in a run folder, and otherwise trusts the user's choice.

    Raises:
        UserError: for an unknown key, a value that is refused, or plug-ins that may not run.
    """
    tree: dict[str, Any] = {}
    for file in files:
        loaded = part_for(read_mapping(file), "base" in hints(kind))
        _check_kind(loaded, file, kind)
        _find_plugins(loaded, Path(file), trust)
        if _is_of_run(Path(file), trust):
            _keep_meaning(loaded, kind, loaded)
        _merge(tree, loaded, kind)
    settings = settings or {}
    for key in [key for key in settings if key in ("plugins", "base.plugins")]:
        _assign(tree, key, settings[key], kind)
    for block in _with_plugins(tree):
        for plugin in fit("plugins", block["plugins"], tuple[str, ...]):
            import_plugin(plugin)
    for key, value in settings.items():
        if not _is_setting(kind, key):
            raise _unknown(kind, key)
        _assign(tree, key, value, kind)
    if (begun := _begun(kind, tree)) is not None:
        _keep_meaning(tree, kind, read_mapping(begun))
    return build(kind, tree)


def _is_of_run(file: Path, trust: bool | None) -> bool:
    made = ("result.json", "metrics.jsonl", "checkpoints", "comparison.json")
    return trust is not None or any((file.parent / name).exists() for name in made)


def _begun(kind: Any, tree: Mapping[str, Any]) -> Path | None:
    """Returns the config of the run or comparison that a config goes on with, if there is one."""
    output = tree.get("output") or getattr(kind, "output", None)
    is_comparison = "base" in hints(kind)
    if not isinstance(output, str) or not (is_comparison or tree.get("resume") == "auto"):
        return None
    file = Path(output) / ("compare.yaml" if is_comparison else "config.yaml")
    return file if file.is_file() else None


def _keep_meaning(tree: dict[str, Any], kind: Any, old: Mapping[str, Any]) -> None:
    """Sets what neither a tree nor an old run's config names to what it was in the run's time."""
    stated = flatten(tree)
    for key, value in came_later(kind, flatten(old)):
        if key not in stated:
            _assign(tree, key, copy.deepcopy(value), kind)


def _with_plugins(tree: Mapping[str, Any]) -> list[Any]:
    """Return the mappings in a tree of settings that name plug-ins."""
    blocks = [block for block in (tree, tree.get("base")) if isinstance(block, dict)]
    return [block for block in blocks if block.get("plugins") is not None]


def _find_plugins(loaded: dict[str, Any], file: Path, trust: bool | None) -> None:
    """Turn the plug-ins that a file names into paths; those of a run folder must be trusted."""
    for block in _with_plugins(loaded):
        named = fit("plugins", block["plugins"], tuple[str, ...])
        block["plugins"] = [beside(plugin, file) for plugin in named]
        if _is_of_run(file, trust):
            check_trust(block["plugins"], file.parent, bool(trust))


def _check_kind(loaded: Mapping[str, Any], path: str | Path, kind: type) -> None:
    """Refuse a comparison's file where a run's is needed, and the reverse."""
    has = "base" in hints(kind)
    if not has and "base" in loaded:
        raise UserError(f"config: {path} is of a comparison (base, axes): give it to mim compare")
    alone = {"data", "model", "mask", "train", "optim"} & set(map(str, loaded))
    if has and alone and "base" not in loaded:
        raise UserError(
            f"config: {path} is of one run; a comparison has {', '.join(sorted(alone))} under "
            "base, next to axes (see configs/compare/demo.yaml)"
        )


def _field(kind: Any, name: str) -> Any:
    """Return the type of a field; None where there is none."""
    return hints(kind).get(name) if dataclasses.is_dataclass(kind) else None


def _merge(tree: dict[str, Any], more: Mapping[Any, Any], kind: Any) -> None:
    """Override settings; a mapping that is a value replaces the old one."""
    for key, value in more.items():
        inner = _field(kind, key)
        if dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
            node = tree.setdefault(key, {})
            if isinstance(node, dict):
                _merge(node, value, inner)
                continue
        tree[key] = copy.deepcopy(value)


def _assign(tree: dict[str, Any], key: str, value: Any, kind: Any) -> None:
    """Set one dotted key in a tree of settings."""
    *parents, last = key.split(".")
    for parent in parents:
        kind = _field(kind, parent)
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    if not dataclasses.is_dataclass(kind):  # inside a mapping that is a value
        value = fit(key, value, Any)
    tree[last] = value


def _is_setting(kind: Any, key: str) -> bool:
    head, _, rest = key.partition(".")
    inner = _field(kind, head)
    if inner is None or not rest:
        return inner is not None
    return get_origin(inner) is dict or _is_setting(inner, rest)


def _unknown(kind: Any, key: str) -> UserError:
    """Build the error for an unknown dotted key; it names what may have been meant."""
    known = list(leaves(kind))
    near = [f"base.{key}"] if f"base.{key}" in known else []
    near += [name for name in known if name.endswith(f".{key}") and name not in near]
    near = near or difflib.get_close_matches(key, known, n=2)
    hint = f" (did you mean --{' or --'.join(near[:3])}?)" if near else ""
    return UserError(f"unrecognized arguments: --{key}{hint}")


def leaves(kind: Any, prefix: str = "") -> dict[str, tuple[type, str]]:
    """Map the dotted key of every single setting to the class that has it and its name there."""
    found: dict[str, tuple[type, str]] = {}
    for name, hint in hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= leaves(hint, f"{prefix}{name}.")
        else:
            found[prefix + name] = (kind, name)
    return found


def read_args(
    kind: type[T],
    args: Sequence[str],
    prog: str = "mim",
    description: str | None = None,
    complete: Callable[[list[str], dict[str, Any]], dict[str, Any]] | None = None,
) -> T:
    """Parse command-line arguments: ``--config FILE`` and ``--recipe NAME`` (repeatable), and
    ``--dotted.key VALUE``.

    ``complete`` makes the settings that are used of the files and the settings that are given.

    Raises:
        UserError: for an unknown key, a value of the wrong type or one that is refused.
    """
    files: list[str] = []
    settings: dict[str, Any] = {}
    shown, rest = set(), list(args)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if option in ("--help", "-h", "--print_config"):
            shown.add(option.strip("-")[0])
            continue
        if not option.startswith("--"):
            is_file = Path(option).is_file()
            hint = f"; a config file is given by --config {option}" if is_file else ""
            raise UserError(f"unrecognized arguments: {option + equals + value}{hint}")
        if not equals and not rest:
            raise UserError(f"{option}: expected one argument")
        value = value if equals else rest.pop(0)
        if option == "--config":
            files.append(value)
        elif option == "--recipe":
            files.append(str(recipe_file(value)))
        else:
            settings[option[2:]] = value
    if complete is not None and "h" not in shown:
        settings = complete(files, settings)
    config = read_tree(kind, files, settings)
    if "h" in shown:
        config_parser(kind, prog=prog, description=description).print_help()
    elif "p" in shown:
        print(to_yaml(config), end="")
    if shown:
        raise SystemExit(0)
    return config


def config_parser(kind: type, **parser_args: Any) -> argparse.ArgumentParser:
    """Make a parser with all options of a config, for its help and for completion."""
    parser = argparse.ArgumentParser(**parser_args)
    parser.add_argument("--config", metavar="FILE", help="YAML file; later ones override")
    parser.add_argument("--recipe", metavar="NAME", help="a published method: see mim recipes")
    parser.add_argument("--print_config", action="store_true", help="print all settings as YAML")
    groups: dict[str, Any] = {"": parser}
    for key, (owner, name) in leaves(kind).items():
        block = key.rpartition(".")[0]
        if block not in groups:
            about = (owner.__doc__ or "").partition("\n\n")[0]
            groups[block] = parser.add_argument_group(block, " ".join(about.split()))
        text = f"{explanations(owner).get(name, '')} (default: {getattr(owner(), name)})"
        groups[block].add_argument(f"--{key}", metavar="VALUE", help=text.replace("%", "%%"))
    return parser


@cache
def explanations(kind: type) -> Mapping[str, str]:
    """Map each field of a dataclass to the text below it in the source."""
    found: dict[str, str] = {}
    for owner in [owner for owner in reversed(kind.__mro__) if dataclasses.is_dataclass(owner)]:
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except (OSError, TypeError, SyntaxError):  # of a class that has no file
            continue
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                value = below.value if isinstance(below, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found[field.target.id] = " ".join(value.value.split())
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a config into plain mappings, lists and scalars.

    Unused settings of plug-ins are left out, so that others can read it without those plug-ins.
    """
    used = (getattr(config, "name", None), getattr(config, "source", None))
    tree = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_own = not dataclasses.is_dataclass(value) or type(value).__module__.startswith("mim.")
        if is_own or field.name in used or value != type(value)():
            tree[field.name] = _plain(value)
    return tree


def to_yaml(config: Any) -> str:
    """Write a config as YAML, enough to run it again."""
    return dump_yaml(to_dict(config))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
