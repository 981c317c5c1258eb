"""Files made to harm: refused or without effect, in one line."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, PngImagePlugin

from mim.core.config import Config, DataConfig
from mim.core.errors import UserError
from mim.core.files import parse_yaml
from mim.core.settings import load_config
from mim.data import open_source
from mim.data.images.decode import UnreadableImage, decode
from mim.training import pretrain as training

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
Outcomes = list[tuple[str, str, str]]


@pytest.fixture(autouse=True)
def _counted(request: pytest.FixtureRequest, outcomes: Outcomes) -> Iterator[None]:
    failed = request.session.testsfailed
    yield
    went = request.session.testsfailed > failed
    name = request.node.name.removeprefix("test_").replace("_", " ")
    outcomes.append(("hostile", name, "not stopped" if went else "no effect"))


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def files_of(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


# Tar files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../escape.png", "a/../../escape.png", "/escape.png"])
def test_a_tar_that_points_outside(name: str, tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    path = tmp_path / "tars" / "evil.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for member in ("train/a/0.png", name):
            info = tarfile.TarInfo(member)
            info.size = len(png(0))
            tar.addfile(info, io.BytesIO(png(0)))
    config = tiny({"data.source": "shards", "data.path": str(path)})
    before = files_of(tmp_path)
    line = mim("pretrain", "--config", config, "--output", tmp_path / "run").line
    assert "evil.tar' has a member" in line and "points out of the folder" in line
    assert files_of(tmp_path) - before <= {"run"}
    pack = ("data", "pack", config, "--output", tmp_path / "packed", "--kind", "shards")
    assert mim(*pack, "--workers", 1).code == 2
    assert not [path for path in tmp_path.rglob("escape*")]


def test_links_and_devices_in_a_tar_are_no_images(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        for number in range(8):
            info = tarfile.TarInfo(f"train/a/{number}.png")
            info.size = len(png(number))
            tar.addfile(info, io.BytesIO(png(number)))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            link = tarfile.TarInfo(f"train/a/link{kind.decode()}.png")
            link.type, link.linkname = kind, str(secret)
            tar.addfile(link)
    config = DataConfig(source="shards", path=str(tmp_path / "links.tar"), image_size=8)
    found = [open_source(config, split) for split in ("train", "val")]
    names = {source.describe(i) for source in found for i in range(len(source))}
    assert names == {f"train/a/{number}.png" for number in range(8)}


# Images ---------------------------------------------------------------------------------------


def bomb(side: int = 20_000) -> bytes:
    """A file of 50 kB that would be 400,000,000 pixels."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


def text_bomb() -> bytes:
    """A small picture with a comment of 100 MB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 100_000_000, zip=True)
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def array_bomb(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        bomb(),
        bomb(10_000),
        array_bomb((1 << 40, 1 << 20)),
        array_bomb((1 << 20, 1 << 20)),
        array_bomb((-1, 4)),
    ],
    ids=["pixels", "within_what_pil_allows", "array", "array_2", "negative"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_bomb_is_unreadable(data: bytes) -> None:
    assert len(data) < 100_000
    began = time.process_time()
    with pytest.raises(UnreadableImage):
        decode(data, "bomb", DataConfig().max_pixels)
    assert time.process_time() - began < 0.5, "it is not decoded first"


def test_a_bomb_in_a_comment_is_not_unpacked() -> None:
    data = text_bomb()
    assert len(data) < 200_000
    began = time.process_time()
    try:
        decode(data, "comment", DataConfig().max_pixels)
    except UnreadableImage as error:
        assert "\n" not in str(error)
    assert time.process_time() - began < 0.5


def folder_of(root: Path, count: int = 40) -> Path:
    for number in range(count):
        path = root / "train" / f"c{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return root


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("allowed", "cache"), [(0.5, "none"), (0.0, "none"), (0.0, "mmap")])
def test_images_that_change_during_a_run(
    allowed: float,
    cache: str,
    tmp_path: Path,
    mim: Mim,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One is deleted, one cut short, one is text, one a bomb, in the middle of an epoch."""
    root = folder_of(tmp_path / "images")
    real = training.image_keys

    def change(seed: int, epoch: int, ids: Any, purpose: str) -> Any:
        if epoch == 1 and purpose == "mask" and (root / "train/c0/00.png").exists():
            (root / "train/c0/00.png").unlink()
            (root / "train/c1/01.png").write_bytes(png(1)[:40])
            (root / "train/c0/02.png").write_text("no image")
            (root / "train/c1/03.png").write_bytes(bomb())
        return real(seed, epoch, ids, purpose)

    monkeypatch.setattr(training, "image_keys", change)
    changes = {
        "data.source": "imagefolder",
        "data.path": str(root),
        "data.channels": 3,
        "data.batch_size": 9,
        "data.max_unreadable": allowed,
        "data.cache": cache,
        "data.cache_path": str(tmp_path / "cache"),
        "train.epochs": 2,
        "train.max_steps": 8,
    }
    run = tmp_path / "run"
    outcome = mim("pretrain", "--config", tiny(changes), "--output", run)
    if cache == "mmap":  # what was decoded before stays
        assert outcome.code == 0 and not (run / "unreadable.txt").exists()
        return
    told = (run / "unreadable.txt").read_text().splitlines()
    if allowed:
        assert outcome.code == 0
        names = {line.split("\t")[1].rpartition("/")[2] for line in told}
        # A tenth is held out, by id.
        assert names <= {"00.png", "01.png", "02.png", "03.png"} and len(names) >= 3
    else:
        assert outcome.code == 2 and "data.max_unreadable: 0.0 allows 0 unreadable" in outcome.line


# Settings -------------------------------------------------------------------------------------


def test_yaml_that_constructs_objects_does_not(tmp_path: Path, mim: Mim) -> None:
    mark = tmp_path / "ran"
    evil = f'!!python/object/apply:os.system ["touch {mark}"]'
    file = tmp_path / "evil.yaml"
    run = tmp_path / "run"
    run.mkdir()
    nested = f"model: {{backbone_args: {{depth: {evil}}}}}"
    for text in (evil, f"seed: {evil}", nested):
        file.write_text(text)
        (run / "config.yaml").write_text(text)
        calls: list[tuple[object, ...]] = [("pretrain", "--config", file)]
        if text == nested:
            calls += [
                ("compare", "--config", file),
                ("evaluate", "knn", run),
                ("evaluate", "knn", "untrained", "--settings", file, "--set", f"k={evil}"),
                ("evaluate", "knn", "untrained", "--set", f"k={evil}"),
                ("pretrain", f"--model.backbone_args={{depth: {evil}}}"),
                ("runs", tmp_path, "--where", f"seed={evil}"),
            ]
        for call in calls:
            outcome = mim(*call)
            assert outcome.code == 2, call
            assert outcome.line.startswith("mim: error: ")
            assert not mark.exists()


def laughs() -> str:
    """Nine lines that stand for 387,420,489 values."""
    lines = ["model:", "  backbone_args:", "    l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"    l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 9)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text", [laughs(), "model: " + "[" * 1200 + "]" * 1200, "model: " + "{a: " * 60 + "}" * 60]
)
def test_yaml_that_swells_is_refused(text: str, tmp_path: Path, mim: Mim) -> None:
    (tmp_path / "swells.yaml").write_text(text)
    began = time.process_time()
    outcome = mim("pretrain", "--config", tmp_path / "swells.yaml")
    assert time.process_time() - began < 5
    assert outcome.code == 2
    assert "cannot be read: it " in outcome.line
    assert len(outcome.line) < 400


def test_plain_yaml_is_what_it_was() -> None:
    text = "a: [1, 2.5, null, {b: *x}]".replace("*x", "yes") + "\nc: &s {d: e}\nf: [*s, *s]\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("2001-99-99") == "2001-99-99"  # dates are text, even impossible ones
    with pytest.raises(yaml.YAMLError):
        parse_yaml("a: [1")
    config = load_config(None, {"model.backbone_args": {"depth": 3}})
    assert isinstance(config, Config)


def test_a_record_from_elsewhere_is_read_as_values(tmp_path: Path) -> None:
    from mim.training.debug import debug_batch

    (tmp_path / "config.yaml").write_text("seed: 0\n")
    for content in ("[]", '{"step": "x", "sample_ids": []}', '{"step": 1}', "\udc80x"):
        (tmp_path / "nonfinite.json").write_text(content, errors="surrogateescape")
        with pytest.raises(UserError, match=r"nonfinite\.json' cannot be read"):
            debug_batch(tmp_path)
