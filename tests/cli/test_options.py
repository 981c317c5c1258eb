"""Options that several verbs have, and what a terminal or a disk may do to any verb."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mim.core.files
from mim.cli.main import VERBS
from mim.cli.options import VerbGroup
from mim.core.terminal import printable
from mim.training.results import read_result

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
QUICK = ("--set", "k=[5]", "few_shot=[]", "temperature=[0.1]")


def parse(*args: str) -> Any:
    verb, *rest = args
    found = VERBS[verb]
    if isinstance(found, VerbGroup):
        what, *rest = rest
        found = found.verbs[what]
    return found.parse(rest)


def test_a_repeated_list_adds_up() -> None:
    step = ("bench", "step", "--config", "c.yaml", "--config", "d.yaml")
    options = parse(*step, "--peer", "hf", "--peer", "lightly,mae", "--regimes", "drop")
    assert options.peer == ["hf", "lightly", "mae"] and options.regimes == ["drop"]
    assert options.config == ["c.yaml", "d.yaml"]
    options = parse("runs", "--where", "seed=0", "--where", "status=failed", "--show", "a", "b")
    assert options.where == ["seed=0", "status=failed"] and options.show == ["a", "b"]
    assert parse("runs").where == [], "a call adds nothing to the next one's"
    options = parse("evaluate", "knn", "run", "--set", "k=[1]", "--set", "seed=1", "draws=2")
    assert options.set == ["k=[1]", "seed=1", "draws=2"]
    options = parse("visualize", "masks", "run", "--ratios", "0.5, 0.75", "--ratios", "0.9")
    assert options.ratios == [0.5, 0.75, 0.9]
    options = parse("compare", "--slurm", "a=1", "--slurm", "b=2", "--base.seed", "1")
    assert options.slurm == ["a=1", "b=2"] and options.settings == ["--base.seed", "1"]


@pytest.mark.parametrize(
    "args",
    [
        ("pretrain", "--data.subset.per", "2"),
        ("compare", "--base.data.subset.per", "2"),
        ("compare", "--job", "2"),
        ("data", "stats", "--data.subset.per", "2"),
        ("runs", "--wher", "seed=0"),
        ("evaluate", "knn", "run", "--prec", "bf16"),
    ],
)
def test_no_option_is_taken_by_its_beginning(args: tuple[str, ...], mim: Mim) -> None:
    outcome = mim(*args)
    assert outcome.code == 2 and "unrecognized arguments" in outcome.line


def test_evaluate_prints_per_cent_and_gives_every_number_as_json(
    tmp_path: Path, mim: Mim, tiny: Tiny
) -> None:
    run = tmp_path / "run"
    assert mim("pretrain", "--config", tiny(), "--output", run).code == 0
    outcome = mim("evaluate", "knn", run, "pixels", "--like", run, *QUICK)
    accuracy = read_result(run)["evaluations"]["knn"]["accuracy"]
    heads, (measure, own, pixels) = (line.split("\t") for line in outcome.out.splitlines())
    assert heads == ["measure", str(run), "pixels"]
    assert measure == "k-NN, accuracy (%)"
    assert own == f"{100 * accuracy:.1f}" and float(pixels) > 50
    found = json.loads(mim("evaluate", "knn", run, *QUICK, "--json", "-").out)
    assert found == {str(run): {"knn": read_result(run)["evaluations"]["knn"]}}


def test_an_evaluation_that_fails_loses_none_before_it(
    tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file, settings = tmp_path / "run", tmp_path / "numbers.json", tmp_path / "settings.yaml"
    assert mim("pretrain", "--config", tiny(), "--output", run).code == 0
    settings.write_text("knn: {k: [5], few_shot: [], temperature: [0.1]}")

    def fail(*args: Any) -> None:
        raise RuntimeError("it fails")

    monkeypatch.setattr("mim.evaluate.probes.linear.Linear.run", fail)
    with pytest.raises(RuntimeError, match="it fails"):
        mim("evaluate", "knn,linear", run, "--settings", settings, "--json", file)
    kept = read_result(run)["evaluations"]
    assert list(kept) == ["knn"]
    assert json.loads(file.read_text()) == {str(run): kept}


def test_files_obey_the_umask(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o027, 0o640), (0o002, 0o664)):
        old = os.umask(mask)
        try:
            mim.core.files.write_text_atomic(tmp_path / "file", "text")
        finally:
            os.umask(old)
        assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_file_name_may_be_as_long_as_the_disk_allows(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    mim.core.files.write_text_atomic(path, "text")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_is_one_line(
    number: int, tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert mim("pretrain", "--config", tiny(), "--output", run).code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    for name in ("write_text", "write_bytes"):  # files are first written under another name
        real = getattr(Path, name)

        def full(path: Path, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            if path.suffix == ".tmp":
                raise OSError(number, os.strerror(number))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(Path, name, full)
    heads = "--model.backbone_args.num_heads=2"
    imported = (run / "encoder.safetensors", heads, "--data.source=digits")
    for args, place in (
        (("evaluate", "knn", run, *QUICK), run / "result.json"),
        (("runs", tmp_path, "--json", tmp_path / "runs.json"), tmp_path / "runs.json"),
        (("data", "stats", "--config", tiny(), "--output", tmp_path / "s"), tmp_path / "s"),
        (("export", run, "--output", tmp_path / "a.safetensors"), tmp_path),
        (("import", *imported, "--output", tmp_path / "in"), tmp_path / "in"),
        (("compare", "--output", tmp_path / "cmp", "--evaluations", "{}"), tmp_path / "cmp"),
    ):
        outcome = mim(*args)
        assert outcome.code == 2, outcome
        assert str(place) in outcome.line and os.strerror(number) in outcome.line
    assert not list(tmp_path.rglob("*.tmp"))
    assert {path: path.read_bytes() for path in before} == before


def test_stdout_on_a_full_disk_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "mim", "recipes"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert ended.returncode == 2
    assert ended.stderr == f"mim: error: cannot write: {os.strerror(errno.ENOSPC)}\n"


def test_lines_on_stderr_cannot_command_a_terminal(
    tmp_path: Path, mim: Mim, tiny: Callable[..., Path]
) -> None:
    name = "a\x1b]0;title\x07.\x1b[31m"
    images = tmp_path / name
    for number in range(12):
        path = images / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 20 * number).save(path)
    (images / "odd\x1b[31m.png").write_bytes(b"none")
    (images / name).write_bytes(b"of no known ending")
    run, changes = tmp_path / "run", {"data.source": "flat", "data.batch_size": 4}
    config = tiny({**changes, "data.path": str(images), "data.max_unreadable": 0.5})
    trained = mim("pretrain", "--config", config, "--output", run)
    assert trained.code == 0, trained.err
    embedded = mim("embed", run, images, "--output", tmp_path / "f.npy")
    refused = mim("embed", run, images / "nowhere", "--output", tmp_path / "f.npy")
    assert "left out" in embedded.err and refused.code == 2
    for outcome in (trained, embedded, refused):
        assert "\x1b" not in outcome.err + outcome.out and "\x07" not in outcome.err


def test_a_name_with_a_line_end_is_one_line_beside_the_features(
    tmp_path: Path, mim: Mim, tiny: Callable[..., Path]
) -> None:
    run, images = tmp_path / "run", tmp_path / "images"
    assert mim("pretrain", "--config", tiny({"train.max_steps": 1}), "--output", run).code == 0
    images.mkdir()
    for name in ("a", "b\nc", "d\re"):
        Image.new("L", (8, 8)).save(images / f"{name}.png")
    assert mim("embed", run, images, "--output", tmp_path / "f.npy").code == 0
    names = (tmp_path / "f.txt").read_text().splitlines()
    assert names == ["a.png", "b\\nc.png", "d\\re.png"]
    assert len(np.load(tmp_path / "f.npy")) == len(names)


@pytest.mark.parametrize("layout", ["flat", "imagefolder"])
def test_nothing_is_written_among_the_images(
    layout: str, tmp_path: Path, mim: Mim, tiny: Callable[..., Path]
) -> None:
    images = tmp_path / "images"
    for number in range(16):
        part = "" if layout == "flat" else f"train/{number % 2}/"
        path = images / f"{part}{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 15 * number).save(path)
    inside = images if layout == "flat" else images / "train"
    config = tiny({"data.source": layout, "data.path": str(images), "data.batch_size": 4})
    run = tmp_path / "run"
    assert mim("pretrain", "--config", config, "--output", run).code == 0
    before = sorted(images.rglob("*"))
    base = ("--base.data.source", layout, "--base.data.path", images)
    for args in (
        ("pretrain", "--config", config, "--output", inside / "run"),
        ("compare", *base, "--output", inside / "cmp"),
        ("data", "inspect", images, "--output", inside / "sheet.png"),
        ("embed", run, images, "--output", inside / "f.npy"),
    ):
        refused = mim(*args)
        assert refused.code == 2 and "lies among the images" in refused.err.splitlines()[-1]
    assert sorted(images.rglob("*")) == before
    assert mim("pretrain", "--config", config, "--output", images / ".runs" / "a").code == 0
    assert mim("embed", run, images, "--output", images / "f.parquet").code == 0
    if layout == "imagefolder":  # beside train/
        assert mim("pretrain", "--config", config, "--output", images / "runs" / "a").code == 0


@pytest.mark.skipif(os.name != "posix", reason="needs pipes")
def test_a_pipe_in_place_of_a_file_keeps_nobody_waiting(
    tmp_path: Path, mim: Mim, tiny: Callable[..., Path]
) -> None:
    pipe, masks = tmp_path / "pipe.txt", tmp_path / "masks"
    os.mkfifo(pipe)
    masks.mkdir()
    os.mkfifo(masks / "1.npy")
    given = ("--config", tiny(), "--output", tmp_path / "run")
    for more in (("--data.subset.files", pipe), ("--mask.name", "file", "--mask.file.path", masks)):
        assert "no regular file" in mim("pretrain", *given, *more).line
    assert mim("pretrain", *given).code == 0
    measure = ("evaluate", "knn", tmp_path / "run", "--settings", pipe)
    assert "is not a file" in mim(*measure).line
    measure = ("evaluate", "robustness", tmp_path / "run", "--set", f"baseline={pipe}")
    assert "is not alexnet, a run folder or a file" in mim(*measure, "classifier=linear").err


def test_names_cannot_command_a_terminal(tmp_path: Path, mim: Mim) -> None:
    name = "a\x1b[31mred\tb\u202ec"
    (tmp_path / name).mkdir()
    (tmp_path / name / "result.json").write_text(json.dumps({"format": 1, "status": "finished"}))
    outcome = mim("runs", tmp_path)
    assert "\x1b" not in outcome.out and "\u202e" not in outcome.out
    heads, row = (line.split("\t") for line in outcome.out.splitlines())
    assert len(heads) == len(row)
    assert printable("é 1\u202f000 ± 4") == "é 1\u202f000 ± 4"
    assert printable("\x1b[1m\n") == "\\x1b[1m\\n"
