"""``mim new``."""

from __future__ import annotations

import argparse
from importlib.resources import files

from mim.cli.options import Verb, say
from mim.core.errors import setting_error

KINDS = {
    "mask": ("mask.name", "hides patches"),
    "regime": ("model.regime.name", "says how hidden patches meet the encoder"),
    "target": ("model.target.name", "is what must be predicted"),
    "decoder": ("model.decoder.name", "predicts the hidden patches"),
    "evaluation": ("evaluations", "measures an encoder"),
    "source": ("data.source", "gives images"),
}

_TRY = """pretrain DIR --plugins '["{path}"]' --{setting} {name}"""
_TRIES = {
    "decoder": f"{_TRY} --model.regime.name token",  # it reads a token at every patch
    "evaluation": "evaluate {name} RUN --plugins {path}",
    "source": f"{_TRY.replace(' DIR', '')} --data.path FILE.npz",
}


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=tuple(KINDS), help="what to write")
    parser.add_argument("name", metavar="NAME", help="its name in configs; the file is NAME.py")
    parser.add_argument("--output", metavar="FILE", help="another file")


def _run(options: argparse.Namespace) -> int:
    from pathlib import Path

    name, kind = options.name, options.kind
    if not name.isidentifier() or not name.islower():
        raise setting_error("NAME", name, "must be a lower-case word, such as rings")
    path = Path(options.output or f"{name}.py")
    if path.exists():
        raise setting_error("--output", str(path), "exists already")
    template = files("mim.cli").joinpath("templates", f"{kind}.txt").read_text(encoding="utf-8")
    title = name.title().replace("_", "")
    from mim.core.files import prepare_folder, write_text_atomic

    prepare_folder(path.parent, "--output")
    write_text_atomic(path, template.replace("NAME", name).replace("Title", title))
    say(f"{path}: {'an' if kind == 'evaluation' else 'a'} {kind} that works as it is; edit it")
    told = _TRIES.get(kind, _TRY).format(path=path, name=name, setting=KINDS[kind][0])
    say(f"try it: mim {told}")
    return 0


VERB = Verb(
    "new",
    "Write a plug-in file: mask, regime, target, decoder, evaluation or source.",
    _options,
    _run,
    "Write a file with a component of your own, with settings, that works as it is.\n\n"
    + "\n".join(f"{kind:<11} {about}" for kind, (_, about) in KINDS.items()),
)
