"""Files are whole or not there, and what a killed process was writing is removed later."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mim.core import files
from mim.core.files import write_text_atomic

DIES = """
import os, signal, sys
from pathlib import Path
from mim.core.files import write_atomic

write_atomic(Path(sys.argv[1]), lambda temporary: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_what_a_killed_process_was_writing_goes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", DIES, str(tmp_path / "a.txt")], check=False)
    (orphan,) = tmp_path.iterdir()
    assert orphan.name.endswith(".tmp")
    home, _, token = orphan.name.split("-")
    living = tmp_path / f"{home}-{os.getppid()}-{token}"  # another evaluation that still writes
    elsewhere = tmp_path / f".00000000-1-{token}"
    mine = tmp_path / ".something.tmp"
    for path in (living, elsewhere, mine):
        path.touch()
    files._remove_orphans.cache_clear()
    write_text_atomic(tmp_path / "b.txt", "whole")
    kept = {living.name, elsewhere.name, mine.name, "b.txt"}
    assert {path.name for path in tmp_path.iterdir()} == kept
