"""The command line: ``mim VERB --config FILE --dotted.key value``.

Exit codes: 0 done; 1 training failed (a loss that is not finite, a run of a comparison); 2 a
mistake in what was asked, or a file that cannot be written, in one line; 75 another process was
lost, call it again (pretrain: with --resume auto); 130, 138 and 143 interrupted by SIGINT, SIGUSR1
and SIGTERM, with everything saved.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from collections.abc import Sequence

from mim import __version__
from mim.cli import (
    bench,
    compare,
    completion,
    data,
    debug,
    doctor,
    evaluate,
    export,
    imports,
    new,
    predict,
    pretrain,
    recipes,
    report,
    runs,
    visualize,
)
from mim.cli.options import Verb, VerbGroup
from mim.core.cpu.process import choose_waiting
from mim.core.errors import UserError
from mim.core.signals import between_imports

if "RANK" in os.environ:  # torch would show C++ stacks of broken connections; mim names the cause
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Large tensors in pages of 2 MB: the first touch of each small page costs more than a write to it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_IN_ORDER: list[Verb | VerbGroup] = [
    *(pretrain.VERB, evaluate.VERB, compare.VERB, report.VERB, predict.PREDICT, predict.EMBED),
    *(visualize.VERB, bench.VERB),
    *(data.VERB, export.VERB, imports.VERB, runs.VERB, runs.DIFF, doctor.VERB, debug.VERB),
    *(recipes.VERB, new.VERB, completion.VERB),
]
VERBS = {verb.name: verb for verb in _IN_ORDER}
# What a disk that is full, read-only or broken answers, and a folder of somebody else.
_UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EFBIG, errno.EIO, errno.ENAMETOOLONG),
)


def _help() -> str:
    lines = [f"  {name:<10} {verb.about}" for name, verb in VERBS.items()]
    return (
        "usage: mim VERB ...\n\n"
        "Pre-train one ViT under interchangeable masking regimes and compare them.\n\n"
        + "\n".join(lines)
        + "\n\n'mim VERB --help' lists the options of a verb.\n"
        "Start with: mim pretrain DIR --output runs/first, or the demo:\n"
        "mim compare --config configs/compare/demo.yaml"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_help(), flush=True)
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"mim {__version__}", flush=True)
        return 0
    if "--trust" in args:  # of every verb: plug-ins of run folders from elsewhere may run
        from mim.core.plugins import trust_all

        args.remove("--trust")
        trust_all()
    try:
        if args[0] not in VERBS:
            from mim.core.errors import choice_error

            raise choice_error("verb", args[0], VERBS)
        choose_waiting()  # before a verb loads torch
        with between_imports():
            code = VERBS[args[0]](args[1:])
            sys.stdout.flush()
            return code
    except KeyboardInterrupt as stop:
        print("mim: interrupted; call it again to go on", file=sys.stderr)
        return getattr(stop, "code", 130)
    except Exception as error:
        ended = _exit_code(error)
        if ended is None:
            raise
        return ended


def _exit_code(error: Exception) -> int | None:
    """Say what is wrong, in a line; return None for an error that is not the user's to mend."""
    code = getattr(error, "code", None)
    # Some of these are of modules that import torch, which most verbs need not wait for.
    kind = type(error).__name__
    if isinstance(error, UserError):
        _tell(error)
        return 2
    if isinstance(error, BrokenPipeError) and _unread():
        # Python flushes at its end, once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        where = f"{str(error.filename)!r}: " if error.filename else "cannot write: "
        _tell(f"{where}{error.strerror}")
        return 2
    if kind == "Interrupted" and isinstance(code, int):
        print(f"mim: {error}", file=sys.stderr)
        return code
    if kind in ("TrainingError", "WorkerError"):
        _tell(error)
        return 1
    if kind == "LostProcess":
        _tell(error)
        sys.stdout.flush()
        sys.stderr.flush()
        # At its end Python would wait, in torch, for what the lost process was to send.
        os._exit(75 if code is None else code)
    if _several():
        _tell(f"{kind}: {error}")
    return None


def _unread() -> bool:
    """Whether the output's reader, such as ``head``, has gone; another pipe may have broken."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _tell(error: Exception | str) -> None:
    """Say what is wrong, and in which process where there are more than one."""
    who = f"rank {os.environ.get('RANK', '0')}: " if _several() else ""
    from mim.core.terminal import printable

    text = "\n".join(map(printable, str(error).split("\n")))
    print(f"mim: error: {who}{text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
