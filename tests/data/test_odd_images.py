"""One reader for every way in: formats, odd orientations, thin pictures, large profiles."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from mim.core.config import DataConfig
from mim.data import eval_transform, read_picture, train_transform
from mim.data.images.decode import UnreadableImage, decode
from mim.data.images.transforms import cover, covering, prepare

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/'
    '22-rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    'tiff:Orientation="{}"/></rdf:RDF></x:xmpmeta>'
)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ramp(height: int, width: int) -> Image.Image:
    values = np.linspace(0, 255, height * width).reshape(height, width)
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: object, **options: object) -> None:
        raise AssertionError(f"a program was started: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(subprocess, "check_call", started)


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize("way", ["decode", "path", "features", "segmentation", "classifier"])
def test_no_image_starts_ghostscript(tmp_path: Path, way: str) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(EPS)
    if way == "decode":
        with pytest.raises(UnreadableImage, match="holds no image"):
            decode(EPS, "x", 100)
    elif way == "path":
        with pytest.raises(UnreadableImage, match="holds no image"):
            read_picture(path, "x", 100)
    elif way == "segmentation":
        from mim.evaluate.dense.segmentation_data import read_mask

        with pytest.raises(Exception, match="cannot be read as an image: the file holds no image"):
            read_mask(path)
    else:
        module = "mim.sklearn" if way == "features" else "mim.evaluate.finetune"
        content = (
            Path(sys.modules[__name__].__file__ or "").parents[2] / f"{module.replace('.', '/')}.py"
        )
        assert "Image.open(" not in content.read_text() and "read_picture(" in content.read_text()


def test_every_image_of_the_users_is_opened_by_the_reader() -> None:
    root = Path(__file__).parents[2] / "mim"
    found = {
        (path.relative_to(root).as_posix(), line.strip())
        for path in root.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "Image.open(" in line and "formats=" not in line
    }
    own = {"data/corruptions.py", "data/sources/embedded.py"}  # a buffer, a package's files
    assert {path for path, _ in found} <= own, found


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("decoder", ["auto", "pil"])
def test_orientation_in_xmp_alone(orientation: int, kind: str, decoder: str) -> None:
    image = ramp(6, 10)
    xmp = XMP.format(orientation)
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp)
        data, plain = saved(image, kind, pnginfo=info), saved(image, kind)
    else:
        data, plain = saved(image, kind, xmp=xmp.encode()), saved(image, kind)
    turns = {1: 0, 3: 2, 6: -1, 8: 1}[orientation]
    expected = np.rot90(np.asarray(prepare(decode(plain, "x", 100, decoder), 3)), turns)
    assert (np.asarray(prepare(decode(data, "x", 100, decoder), 3)) == expected).all()


def test_a_large_colour_profile_is_no_damage() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(3 << 20)
    image = ramp(6, 6)
    data = saved(image, icc_profile=profile)
    assert (np.asarray(decode(data, "x", 100)) == np.asarray(image)).all()


@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1), (2, 65_000), (1, 1)])
@pytest.mark.parametrize("how", ["pil", "torch"])
def test_thin_pictures_are_cut_before_they_are_scaled(shape: tuple[int, int], how: str) -> None:
    box, scaled, _ = covering(shape, (224, 224))
    assert scaled[0] * scaled[1] <= 17 * 224 * 224
    assert abs((box[0] + box[2] / 2) - shape[0] / 2) <= 0 and (box[1] + box[3] / 2) == shape[1] / 2
    values = np.zeros((*shape, 1), np.uint8)
    middle = tuple((side - 1) // 2 for side in shape)
    values[middle[0] : middle[0] + 2, middle[1] : middle[1] + 2] = 200
    result = cover(values, (224, 224), how)
    assert result.shape == (224, 224, 1) and result[112, 112] >= 199  # what the centre shows
    config = DataConfig(image_size=224, channels=1, resize=how)
    assert eval_transform([values], config).shape == (1, 1, 224, 224)
    assert train_transform([values], torch.tensor([3]), config).shape == (1, 1, 224, 224)


@pytest.mark.parametrize("shape", [(40, 60), (10, 150), (300, 31)])
def test_other_pictures_are_covered_as_ever(shape: tuple[int, int]) -> None:
    """The whole is scaled, then the centre is cut out."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    scale = max(32 / shape[0], 32 / shape[1])
    height, width = round(shape[0] * scale), round(shape[1] * scale)
    image = Image.fromarray(pixels)
    if shape[1] != width:
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - 32) // 2, (width - 32) // 2
    expected = np.asarray(image)[top : top + 32, left : left + 32]
    assert (cover(pixels, (32, 32), "pil") == expected).all()


def test_an_array_that_promises_much_is_refused_by_its_header() -> None:
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 14, 1 << 14, 1 << 14)}
    np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(UnreadableImage, match="more pixels"):
        decode(file.getvalue(), "x", 1000)


def test_features_follow_the_rules_of_a_source(
    tmp_path: Path, tiny: Callable[..., Path], mim: Callable[..., Any]
) -> None:
    from mim.sklearn import MIMFeatures

    run = tmp_path / "run"
    outcome = mim("pretrain", "--config", tiny({"train.max_steps": 1}), "--output", run)
    assert outcome.code == 0, outcome.err
    features = MIMFeatures(run, device="cpu").fit()
    for name, data, reason in (
        ("float.tif", saved(Image.new("F", (8, 8), 0.5), "TIFF"), "need a data.range"),
        ("eps.png", EPS, "holds no image"),
        ("empty.png", b"", "is empty"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UnreadableImage, match=rf"X\[0\] .*{name}.*{reason}"):
            features.transform([tmp_path / name])
    values = np.full((8, 8), 40_000, np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    as_eight = Image.new("L", (8, 8), 40_000 >> 8)
    found = features.transform([tmp_path / "deep.png"])  # of all 16 bits
    assert np.allclose(found, features.transform([as_eight]), atol=1e-2)
