"""A user's path: ImageNet MAE weights, a folder of 20 classes, a classifier, predictions, exports.

Each step by the command that the docs give; what others load is loaded by them and compared.
"""

from __future__ import annotations

import csv
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import mim
from mim.core.errors import UserError
from mim.data.images.transforms import eval_transform, normalize
from mim.evaluate import inference
from mim.interop import to_mae
from mim.training.checkpoint import read_checkpoint, read_config

SIDE = 32
SIZES = {"backbone_args": {"patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}}


def _twenty_classes(folder: Path) -> None:
    """Photographs of 20 classes, where there are any, else coloured stripes."""
    archive = Path(os.environ.get("MIM_TEST_DATA", "")) / "tiny-imagenet-100.tar.gz"
    if archive.is_file():
        counts: dict[str, int] = {}
        with tarfile.open(archive) as tar:
            for member in tar:
                split, _, rest = member.name.removeprefix("./").partition("/")
                place = f"{split}/{rest.partition('/')[0]}"
                known = len({p for p in counts if p.startswith(f"{split}/")})
                wanted = place in counts or (known < 20 and split == "train")
                if split == "val":
                    wanted = f"train/{rest.partition('/')[0]}" in counts
                if not member.isfile() or not wanted or counts.get(place, 0) >= 6:
                    continue
                counts[place] = counts.get(place, 0) + 1
                path = folder / place / f"{counts[place]}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                file = tar.extractfile(member)
                assert file is not None
                path.write_bytes(file.read())
        return
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(20):
            for number in range(6):
                stripes = np.sin(np.arange(64) * (label + 1) / 9)[None, :, None]
                noise = rng.normal(0, 0.1, (64, 64, 3))
                pixels = np.clip(128 + 90 * stripes + 60 * noise, 0, 255).astype(np.uint8)
                path = folder / split / f"class{label:02d}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder ``photos``, and ``mae.pth`` as facebookresearch/mae writes it."""
    folder = tmp_path_factory.mktemp("path")
    _twenty_classes(folder / "photos")
    settings = {
        "data.image_size": SIDE,
        **{f"model.backbone_args.{k}": v for k, v in SIZES["backbone_args"].items()},
        "model.position_embedding": "sincos2d",
        "model.decoder.transformer": {"width": 512, "depth": 1, "heads": 16},
        "seed": 7,
    }
    model = mim.build_model(mim.load_config(None, settings))
    torch.save({"model": to_mae(model.state_dict())}, folder / "mae.pth")
    return folder


SHORT = (
    *("--train.max_steps", "3", "--train.epochs", "1", "--data.batch_size", "8"),
    *("--log.tensorboard", "false"),
)


@pytest.fixture(scope="module")
def adapted(place: Path) -> tuple[Path, str]:
    """The run that began with the weights, fine-tuned, and what the terminal said."""
    import contextlib
    import io

    from mim.cli.main import main

    run, said = place / "run", io.StringIO()
    weights = ("--weights", str(place / "mae.pth"))
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        words = ["pretrain", str(place / "photos"), *weights, "--output", str(run), *SHORT]
        assert main(words) == 0, said.getvalue()
        short = ["epochs=1", "batch_size=16", 'rand_augment=""', "layer_decay=1.0", "held_out=0.2"]
        assert main(["evaluate", "finetune", str(run), "--set", *short]) == 0, said.getvalue()
    return run, said.getvalue()


def test_the_run_begins_with_the_weights(adapted: tuple[Path, str], place: Path) -> None:
    run, _ = adapted
    given = torch.load(place / "mae.pth", weights_only=True)["model"]
    began = read_checkpoint(run / "checkpoints" / "step_00000000.pt")["model"]
    assert torch.equal(began["backbone.blocks.1.mlp.fc1.weight"], given["blocks.1.mlp.fc1.weight"])
    assert torch.equal(began["decoder.head.weight"], given["decoder_pred.weight"])
    result = json.loads((run / "result.json").read_text())
    assert result["started_from"]["file"] == "mae.pth" and result["started_from"]["decoder"]
    after = mim.load(run).state_dict()
    assert not torch.equal(after["decoder.head.weight"], given["decoder_pred.weight"])


def test_the_terminal_says_what_was_chosen_and_what_follows(adapted: tuple[Path, str]) -> None:
    run, said = adapted
    assert "data.source: imagefolder" in said and "train.epochs" not in said.split("step")[0]
    assert "optim.base_lr" in said and "M weights" in said and "0 unreadable" in said
    assert f"next: mim visualize reconstruct {run}" in said and "recipe is for" in said
    config = read_config(run)
    assert config.data.image_size == SIDE, "the file's own size"
    assert config.optim.base_lr == pytest.approx(1.5e-4 * (4096 / 8) ** 0.5, rel=0.02)


def test_other_weights_are_refused_on_resume(
    adapted: tuple[Path, str], place: Path, mim: Callable[..., Any]
) -> None:
    run, _ = adapted
    given = torch.load(place / "mae.pth", weights_only=True)["model"]
    torch.save({"model": {**given, "cls_token": given["cls_token"] + 1}}, place / "other.pth")
    outcome = mim("pretrain", "--config", run / "config.yaml", "--resume", "auto")
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["weights"] = str(place / "other.pth")
    (place / "other.yaml").write_text(yaml.safe_dump(config))
    outcome = mim("pretrain", "--config", place / "other.yaml", "--resume", "auto")
    assert outcome.code == 2 and "model.weights" in outcome.err


def test_predictions_are_those_of_the_classifier(
    adapted: tuple[Path, str], place: Path, mim: Callable[..., Any], tmp_path: Path
) -> None:
    run, _ = adapted
    broken = tmp_path / "new"
    (broken / "deep").mkdir(parents=True)
    files = sorted((place / "photos" / "val").rglob("*.*"))[:10]
    for number, file in enumerate(files):
        (broken / "deep" / f"{number}{file.suffix}").write_bytes(file.read_bytes())
    (broken / "bad.jpg").write_bytes(b"no image")
    table = tmp_path / "classes.csv"
    outcome = mim("predict", run, broken, "--output", table, "--top", 2)
    assert outcome.code == 0, outcome.err
    assert "bad.jpg" in outcome.err
    rows = list(csv.DictReader(table.open()))
    names = [str(broken / row["file"]) for row in rows]
    assert len(rows) == 10 and not list(tmp_path.glob("*.parts"))
    from mim.evaluate.encoders import run_encoder
    from mim.evaluate.finetune import load_classifier

    classifier = load_classifier(run / "finetune.safetensors", run_encoder(run), "run")
    assert [row["class"] for row in rows] == classifier.predict(names)
    assert all(float(row["probability"]) >= float(row["probability_2"]) for row in rows)


def test_features_go_on_where_they_stopped(
    adapted: tuple[Path, str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, images = adapted[0], place / "photos" / "val"
    mim.embed(run, images, tmp_path / "whole.npy", device="cpu")
    monkeypatch.setattr(inference, "PART", 50)
    true, calls = inference.extract_features, []

    def counted(encoder: Any, part: Any, *rest: Any) -> Any:
        calls.append(len(part))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return true(encoder, part, *rest)

    monkeypatch.setattr(inference, "extract_features", counted)
    with pytest.raises(KeyboardInterrupt):
        mim.embed(run, images, tmp_path / "parts.npy", device="cpu")
    assert not (tmp_path / "parts.npy").exists()
    mim.embed(run, images, tmp_path / "parts.npy", device="cpu")
    assert calls == [50, 50, 50, 20], "the first part was kept"
    whole, parts = np.load(tmp_path / "whole.npy"), np.load(tmp_path / "parts.npy")
    assert whole.shape == (120, 192)
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    assert (tmp_path / "whole.txt").read_text() == (tmp_path / "parts.txt").read_text()


FEW = "import mim.evaluate.inference as inference\n\ninference.PART = 25\n"
KILLED = """
import os
import signal

true, calls = inference.extract_features, []


def counted(*args):
    calls.append(args)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return true(*args)


inference.extract_features = counted
"""


def test_two_processes_write_what_one_does(
    adapted: tuple[Path, str],
    place: Path,
    tmp_path: Path,
    mim: Callable[..., Any],
    ranks: Callable[..., Any],
) -> None:
    run, images = adapted[0], place / "photos" / "val"
    for verb, ending in (("embed", "npy"), ("predict", "csv")):
        for name in ("one", "two"):
            words = [verb, run, images, "--output", tmp_path / f"{name}.{ending}"]
            if name == "one":
                assert mim(*words).code == 0
            else:
                both = ranks(words, all=FEW)
                assert both.wait() == [0, 0], both.texts()
                assert all("25 of 120 images" in t or "50 of 120" in t for t in both.texts())
    one, two = (np.load(tmp_path / f"{name}.npy") for name in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-5)
    texts = [(tmp_path / f"{name}.txt").read_text() for name in ("one", "two")]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 120
    rows = [list(csv.reader((tmp_path / f"{name}.csv").open())) for name in ("one", "two")]
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]]
    shares = [[float(row[2]) for row in part[1:]] for part in rows]
    assert shares[0] == pytest.approx(shares[1], abs=2e-4)


def test_a_killed_process_loses_no_finished_part(
    adapted: tuple[Path, str],
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: Callable[..., Any],
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra hf is not installed")
    run, images, output = adapted[0], place / "photos" / "val", tmp_path / "features.parquet"
    killed = ranks(["embed", run, images, "--output", output], world=1, all=FEW + KILLED)
    assert killed.wait() == [-9], killed.texts()
    kept = sorted((tmp_path / "features.parquet.parts").glob("*.npz"))
    assert len(kept) == 2 and not output.exists()
    monkeypatch.setattr(inference, "PART", 25)
    true, sizes = inference.extract_features, []

    def counted(encoder: Any, part: Any, *rest: Any) -> Any:
        sizes.append(len(part))
        return true(encoder, part, *rest)

    monkeypatch.setattr(inference, "extract_features", counted)
    mim.embed(run, images, output, device="cpu")
    assert sizes == [25, 25, 20], "two parts were kept"
    mim.embed(run, images, tmp_path / "whole.npy", device="cpu")
    table = parquet.read_table(output)
    found = np.stack(table["features"].to_pylist())
    np.testing.assert_allclose(found, np.load(tmp_path / "whole.npy"), atol=1e-5)
    assert table["file"].to_pylist() == (tmp_path / "whole.txt").read_text().splitlines()
    assert not list(tmp_path.glob("*.parts"))


def test_an_8_bit_run_takes_what_16_bits_mean_from_the_images(
    adapted: tuple[Path, str], place: Path, tmp_path: Path, mim: Callable[..., Any]
) -> None:
    """The same photographs as 16-bit numbers below 256: the largest of their type is not white."""
    run = adapted[0]
    for number, file in enumerate(sorted((place / "photos" / "val").rglob("*.*"))[::20]):
        pixels = np.asarray(Image.open(file).convert("RGB"))
        for name, values in (("bytes", pixels), ("deep", pixels.astype(np.uint16))):
            (tmp_path / name).mkdir(exist_ok=True)
            np.save(tmp_path / name / f"{number}.npy", values)
    found = {}
    for name in ("bytes", "deep"):
        outcome = mim("embed", run, tmp_path / name, "--output", tmp_path / f"{name}.npy")
        assert outcome.code == 0, outcome.err
        found[name] = np.load(tmp_path / f"{name}.npy")
    assert "0 to 255 become 0 to 1" in outcome.err
    gap = np.abs(found["deep"] - found["bytes"]).max()
    assert gap < 0.1 * found["bytes"].std(0).max(), gap


def test_patches_at_another_size_are_what_the_model_encodes(
    adapted: tuple[Path, str], place: Path, tmp_path: Path
) -> None:
    run, image = adapted[0], next((place / "photos" / "val").rglob("*.*"))
    output = mim.embed(run, image, tmp_path / "p.npy", per="patch", image_size=48, device="cpu")
    found = np.load(output)
    assert found.shape == (1, 36, 192)
    model, config = mim.load(run, image_size=48), read_config(run)
    from dataclasses import replace

    data = replace(config.data, image_size=48)
    assert data.mean is not None and data.std is not None
    pixels = normalize(eval_transform([Image.open(image)], data), data.mean, data.std)
    with torch.no_grad():
        tokens = model.encode(pixels)[:, 1:]
    np.testing.assert_allclose(found, tokens.numpy(), atol=1e-4)


def _features(run: Path, place: Path, tmp_path: Path) -> tuple[torch.Tensor, np.ndarray]:
    """Normalised pixels of two images, and their features by this package."""
    folder = tmp_path / "two"
    folder.mkdir()
    files = sorted((place / "photos" / "val").rglob("*.*"))[::60]
    for number, file in enumerate(files):
        (folder / f"{number}{file.suffix}").write_bytes(file.read_bytes())
    mim.embed(run, folder, tmp_path / "two.npy", device="cpu")
    data = read_config(run).data
    assert data.mean is not None and data.std is not None
    pixels = eval_transform([Image.open(path) for path in sorted(folder.iterdir())], data)
    return normalize(pixels, data.mean, data.std), np.load(tmp_path / "two.npy")


def test_plain_timm_loads_the_hub_folder(
    adapted: tuple[Path, str], place: Path, tmp_path: Path
) -> None:
    run = adapted[0]
    pixels, ours = _features(run, place, tmp_path)
    exported = mim.export_run(run, "timm", tmp_path / "hub")
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    with torch.no_grad():
        np.testing.assert_allclose(model(pixels).numpy(), ours, atol=1e-4)
    seen = timm.data.resolve_model_data_config(model)
    data = read_config(run).data
    assert seen["input_size"] == (3, SIDE, SIDE) and tuple(seen["mean"]) == data.mean
    assert tuple(seen["std"]) == data.std
    card = exported.card.read_text()
    assert "library_name: timm" in card and "started from" in card
    with pytest.raises(UserError, match="holds another export"):
        mim.export_run(run, "hf", tmp_path / "hub")


def test_transformers_has_the_plain_encoder(
    adapted: tuple[Path, str], place: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    run = adapted[0]
    pixels, ours = _features(run, place, tmp_path)
    exported = mim.export_run(run, "hf", tmp_path / "hf")
    assert "hides 75%" in exported.usage
    plain = transformers.ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    with torch.no_grad():
        tokens = plain(pixels).last_hidden_state
    np.testing.assert_allclose(tokens[:, 1:].mean(1).numpy(), ours, atol=1e-4)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert tuple(processor.image_mean) == read_config(run).data.mean


def test_onnxruntime_runs_it(adapted: tuple[Path, str], place: Path, tmp_path: Path) -> None:
    for extra in ("onnx", "onnxscript"):
        pytest.importorskip(extra, reason="the extra onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    run = adapted[0]
    pixels, ours = _features(run, place, tmp_path)
    mim.export_run(run, "timm", tmp_path / "e.safetensors")
    exported = mim.export_run(run, "onnx", tmp_path / "e.onnx")
    assert exported.card.name == "e.onnx.md", "the card of e.safetensors stays"
    session = runtime.InferenceSession(str(tmp_path / "e.onnx"))
    _, features = session.run(None, {"images": pixels.numpy()})
    np.testing.assert_allclose(features, ours, atol=1e-4)
