"""``mim completion``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from mim.cli.options import Verb, VerbGroup
from mim.core.errors import UserError

SHELLS = ("bash", "zsh", "tcsh")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="which")


def _run(options: argparse.Namespace) -> int:
    from jsonargparse import ArgumentParser

    from mim.cli.main import VERBS

    try:
        import shtab  # noqa: F401  (jsonargparse needs it)
    except ImportError as error:
        raise UserError("completion needs shtab: pip install shtab") from error
    parser = ArgumentParser(prog="mim")
    _add_verbs(parser, VERBS)
    print(parser.get_completion_script(f"shtab-{options.shell}"))
    return 0


def _add_verbs(parser: Any, verbs: Mapping[str, Verb | VerbGroup]) -> None:
    from jsonargparse import ArgumentParser

    names = parser.add_subcommands()
    for name, verb in verbs.items():
        own = ArgumentParser()
        if isinstance(verb, Verb):
            verb.options(own)
            if verb.config is not None:
                given = {action.dest for action in own._actions}
                if "config" not in given:
                    own.add_argument("--config", action="config")
                own.add_class_arguments(verb.config(), as_group=False, skip=given)
        names.add_subcommand(name, own, help=verb.about)
        if isinstance(verb, VerbGroup):
            _add_verbs(own, verb.verbs)


VERB = Verb("completion", "Print a shell's completion script (needs shtab).", _options, _run)
