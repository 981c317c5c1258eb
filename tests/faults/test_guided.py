"""Readers under atheris; tests/faults/guided.py is the harness.

``MIM_FUZZ_SECONDS`` sets how long each target runs; ``bash scripts/test.sh faults`` gives each a
minute.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = int(os.environ.get("MIM_FUZZ_SECONDS", "1"))
TARGETS = {"yaml", "configs", "masks", "checkpoints", "weights", "images", "shards"}


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed; it has wheels for Linux x86-64 and some versions of Python",
)
@pytest.mark.timeout(300 + len(TARGETS) * 2 * SECONDS)
def test_readers_under_guided_fuzzing(tmp_path: Path, outcomes: list[tuple[str, str, str]]) -> None:
    harness = Path(__file__).with_name("guided.py")
    with (tmp_path / "stderr.txt").open("wb") as stderr:
        done = subprocess.run(
            [sys.executable, harness, tmp_path / "work", str(SECONDS)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            check=False,
        )
    assert done.returncode == 0, (tmp_path / "stderr.txt").read_text()[-2000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    for result in told:
        what = "{executions} files guided by coverage: {target}".format(**result)
        outcomes.append(("fuzz", what, "crashed" if result["code"] else "told or read"))
    for result in told:
        assert result["code"] == 0, (result["target"], result["end"])
        # Its sound files were read, and what came of them reached code of the reader.
        assert result["executions"] > 10 and result["reached"][0] > 0, result
    assert {result["target"] for result in told} == TARGETS
