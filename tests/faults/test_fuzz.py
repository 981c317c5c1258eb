"""Files that are nearly right, or not at all: no reader ends but by its documented error.

``MIM_FUZZ_EXAMPLES`` sets how many files each reader gets; ``bash scripts/test.sh faults`` gives
it 2,000. The same files come every time, unless ``MIM_FUZZ_RANDOM`` is set.
"""

from __future__ import annotations

import io
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from mim.core.config import Config, FileMaskConfig, MaskConfig
from mim.core.errors import UserError
from mim.core.files import parse_yaml
from mim.core.settings import load_config, read_args, to_yaml
from mim.data.images.decode import decode
from mim.data.sources.shards import scan
from mim.interop.files import read_weights
from mim.masks.generators import build_mask_generator
from mim.training import checkpoint

Outcomes = list[tuple[str, str, str]]
EXAMPLES = int(os.environ.get("MIM_FUZZ_EXAMPLES", "25"))
bounded = settings(
    max_examples=EXAMPLES,
    derandomize="MIM_FUZZ_RANDOM" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def damaged(draw: st.DrawFn, originals: dict[str, bytes]) -> bytes:
    """A sound file of which bytes were altered, cut out, doubled or put in."""
    data = bytearray(originals[draw(st.sampled_from(sorted(originals)))])
    for _ in range(draw(st.integers(1, 4))):
        # Headers stand at the beginning, and in zips and tars at the end.
        at = draw(st.integers(0, min(len(data), 400)))
        if draw(st.booleans()):
            at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 4)):
            case 0:
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                del data[at:]
            case 2:
                del data[at : at + draw(st.integers(1, 64))]
            case 3:
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
            case _:
                chunk = data[at : at + draw(st.integers(1, 64))]
                data[at:at] = chunk * draw(st.integers(1, 8))
    return bytes(data)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def array(values: np.ndarray[Any, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


@cache
def images() -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = {kind: saved(image, kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "PPM")}
    found["progressive"] = saved(image, "JPEG", progressive=True, exif=Image.Exif().tobytes())
    found["palette"] = saved(image.quantize(8), "PNG")
    found["film"] = saved(image, "GIF", save_all=True, append_images=[image.rotate(90)])
    found["lzw"] = saved(image, "TIFF", compression="tiff_lzw")
    found["npy"] = array(pixels)
    found["npy 16"] = array(pixels[..., 0].astype(np.uint16))
    return found


OPEN = b"\x93NUMPY\x01\x00\x10\x00{'descr': (" + b" " * 7  # found once: its header has no end


def refused(act: Callable[[], object], what: str = "") -> bool:
    """Whether it was refused, in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of what it mends, torch of old files
        try:
            act()
        except UserError as error:
            assert "\n" not in str(error) and what in str(error)
            return True
    return False


def refuses_image(data: bytes) -> bool:
    found: list[Any] = []
    if refused(lambda: found.append(decode(data, "x", 10_000)), "unreadable image x"):
        return True
    size = found[0].size if isinstance(found[0], Image.Image) else found[0].shape[:2]
    assert 0 < size[0] * size[1] <= 10_000
    return False


@given(data=st.one_of(damaged(images()), st.binary(max_size=200)))
@example(data=OPEN)
@bounded
def test_images(data: bytes) -> None:
    refuses_image(data)


@cache
def masks() -> dict[str, bytes]:
    flags = np.zeros((4, 4), dtype=bool)
    flags[:2] = True
    pixels = Image.fromarray(np.repeat(np.repeat(flags * np.uint8(255), 4, 0), 4, 1))
    found = {"bool": array(flags), "float": array(flags.astype(np.float32)), "png": b""}
    found["stack"] = array(np.stack([flags, ~flags]))
    found["png"] = saved(pixels, "PNG")
    found["objects"] = array(np.array([[{}]], dtype=object), allow_pickle=True)
    return found


def refuses_mask(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    config = MaskConfig(name="file", file=FileMaskConfig(path=str(path)))
    return refused(lambda: build_mask_generator(config, (4, 4), (2, 2)), "mask.file.path")


@given(
    data=st.one_of(damaged(masks()), st.binary(max_size=200)),
    ending=st.sampled_from(["npy", "png"]),
)
@example(data=OPEN, ending="npy")
@bounded
def test_mask_files(tmp_path: Path, data: bytes, ending: str) -> None:
    refuses_mask(tmp_path / f"mask.{ending}", data)


@cache
def checkpoints() -> dict[str, bytes]:
    state = {
        "format": checkpoint.FORMAT,
        "step": 3,
        "model": {"backbone.a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
    }
    found = {}
    for name, zipped in (("zip", True), ("legacy", False)):
        file = io.BytesIO()
        torch.save(state, file, _use_new_zipfile_serialization=zipped)
        found[name] = file.getvalue()
    return found


def refuses_checkpoint(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    return refused(lambda: checkpoint.read_checkpoint(path), "checkpoint ")


@given(data=st.one_of(damaged(checkpoints()), st.binary(max_size=200)))
@bounded
def test_checkpoints(tmp_path: Path, data: bytes) -> None:
    """Without the digest that would tell at once."""
    refuses_checkpoint(tmp_path / "step_00000003.pt", data)


@cache
def weights() -> dict[str, bytes]:
    tensors = {"blocks.0.weight": torch.ones(3, 2), "norm.bias": torch.zeros(2)}
    return {"safetensors": save(tensors, {"format": "pt"}), **checkpoints()}


def refuses_weights(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    return refused(lambda: read_weights(path))


@given(
    data=st.one_of(damaged(weights()), st.binary(max_size=200)),
    ending=st.sampled_from(["safetensors", "pth"]),
)
@bounded
def test_weights_of_others(tmp_path: Path, data: bytes, ending: str) -> None:
    refuses_weights(tmp_path / f"weights.{ending}", data)


@cache
def tars() -> dict[str, bytes]:
    found = {}
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
            for name, data in {"train/a/0.png": images()["PNG"], "1.cls": b"3"}.items():
                info = tarfile.TarInfo(
                    name
                    if name[0] == "1"
                    else "long" * (3 if kind == tarfile.USTAR_FORMAT else 40) + name
                )
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        found[str(kind)] = file.getvalue()[: 6 * 1024]
    return found


def refuses_shard(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    return refused(lambda: scan(path), "shard")


@given(data=st.one_of(damaged(tars()), st.binary(max_size=600)))
@bounded
def test_shards(tmp_path: Path, data: bytes) -> None:
    refuses_shard(tmp_path / "x.tar", data)


DEFAULTS = yaml.safe_load(to_yaml(Config()))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["nan", "1e400", "!!python/none", "${x}", "@", "*a", "random", "keep", "0x1"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def trees(draw: st.DrawFn) -> Any:
    """A config in which some settings have values of any kind."""
    tree: dict[str, Any] = {}
    for _ in range(draw(st.integers(1, 4))):
        defaults, node = DEFAULTS, tree
        while True:
            key = draw(st.sampled_from(sorted(defaults)))
            below = defaults[key]
            if isinstance(below, dict) and below and draw(st.integers(0, 4)):
                if not isinstance(node.get(key), dict):
                    node[key] = {}
                node, defaults = node[key], below
                continue
            node[key] = draw(values)
            break
    return tree


@given(tree=trees())
@example(tree={"online_probe": {"lr": None}})
@example(tree={"data": {"crop_scale": None}})
@bounded
def test_configs_of_odd_values(tmp_path: Path, tree: Any) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    read: list[Config] = []
    refused(lambda: read.append(read_args(Config, ["--config", str(path)])))
    for config in read:  # what is accepted can be written and read again
        again = tmp_path / "again.yaml"
        again.write_text(to_yaml(config), encoding="utf-8")
        assert read_args(Config, ["--config", str(again)]) == config


def refuses_yaml(data: bytes) -> bool:
    try:
        parse_yaml(data.decode("utf-8", "replace"))
    except yaml.YAMLError:
        return True
    return False


def refuses_config(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    return refused(lambda: read_args(Config, ["--config", str(path)]))


@given(data=st.one_of(damaged({"all": to_yaml(Config()).encode()}), st.binary(max_size=200)))
@bounded
def test_damaged_configs(tmp_path: Path, data: bytes) -> None:
    refuses_config(tmp_path / "config.yaml", data)


@given(
    key=st.sampled_from(["mask.ratio", "data.mean", "model.backbone_args", "seed", "data.mix"]),
    value=st.one_of(st.text(max_size=30), values.map(str)),
)
@bounded
def test_overrides(key: str, value: str) -> None:
    refused(lambda: load_config(None, [f"{key}={value}"]))


@pytest.fixture(autouse=True)
def _counted(request: pytest.FixtureRequest, outcomes: Outcomes) -> Iterator[None]:
    name = request.node.name.removeprefix("test_").replace("_", " ")
    failed = request.session.testsfailed
    yield
    crashed = request.session.testsfailed > failed
    outcomes.append(("fuzz", f"{EXAMPLES} files: {name}", "crashed" if crashed else "told or read"))
