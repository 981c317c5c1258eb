"""``mim completion``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from mim.cli.options import Verb, VerbGroup
from mim.core.errors import UserError


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which")


def _run(options: argparse.Namespace) -> int:
    from mim.cli.main import VERBS

    try:
        import shtab
    except ImportError as error:
        raise UserError("completion needs shtab: pip install shtab") from error
    parser = argparse.ArgumentParser(prog="mim")
    _add_verbs(parser, VERBS)
    print(shtab.complete(parser, options.shell))
    return 0


def _add_verbs(parser: argparse.ArgumentParser, verbs: Mapping[str, Verb | VerbGroup]) -> None:
    """The parsers that the verbs themselves use, and the settings that may follow."""
    from mim.core.settings import config_parser

    commands = parser.add_subparsers()
    for name, verb in verbs.items():
        kind = verb.config() if isinstance(verb, Verb) and verb.config is not None else None
        settings = [] if kind is None else [config_parser(kind, add_help=False)]
        own = commands.add_parser(
            name, help=verb.about, parents=settings, conflict_handler="resolve"
        )
        if isinstance(verb, Verb):
            verb.options(own)
        else:
            _add_verbs(own, verb.verbs)


VERB = Verb("completion", "Print a shell's completion script (needs shtab).", _options, _run)
