"""MIMFeatures in scikit-learn's hands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts_by_hand import encoder_shapes, fill
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import mim
from mim import MIMFeatures, UserError
from mim.data import eval_loader, normalize, open_source
from mim.evaluate import extract_features, run_encoder
from mim.interop import import_run

Store = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path, store: Store) -> Path:
    path = tmp_path / "run"
    given = {"model.backbone_args.num_heads": 3, "data.source": "photos"}
    import_run(store(fill(encoder_shapes())), path, given)
    return path


def test_the_features_are_those_of_an_evaluation(run: Path) -> None:
    """In whatever form the images come, and in whatever batches."""
    config = mim.load_config(run / "config.yaml")
    source = open_source(config.data, "val")
    pictures = [source.image(i) for i in range(7)]
    for pool in ("mean", "cls", "both"):
        wanted = extract_features(run_encoder(run), source, pool).values[:7].numpy()
        features = MIMFeatures(run, pool=pool, batch_size=3).fit()
        found = features.transform(pictures)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        assert found.dtype == np.float32
        assert found.shape == (7, features.n_features_out_)
        assert features.get_feature_names_out().shape == (features.n_features_out_,)
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    np.testing.assert_array_equal(features.transform(arrays), found)
    (batch,) = eval_loader(source, config.data, batch_size=7, indices=range(7))
    ready = batch.images.permute(0, 2, 3, 1).numpy()  # (n, H, W, C)
    np.testing.assert_allclose(features.transform(ready), found, rtol=1e-5, atol=1e-5)
    images = normalize(batch.images, source.mean, source.std)
    mean = MIMFeatures(run).fit_transform(ready)
    np.testing.assert_allclose(mean, mim.encode(mim.load(run), images), rtol=1e-5, atol=1e-5)


def test_files_and_gray_images(run: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    features = MIMFeatures(run).fit()
    found = features.transform([path, str(path), pixels, Image.open(path), pixels[..., None]])
    assert np.ptp(found, axis=0).max() < 1e-6
    assert features.transform([]).shape == (0, 24)


def test_pipeline_and_clone(run: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = (
        rng.integers(0, 80, (40, 16, 16, 3), dtype=np.uint8)
        + (labels * 150).astype(np.uint8)[:, None, None, None]
    )
    features = MIMFeatures(str(run), batch_size=8)
    assert features.get_params() == {
        "run": str(run), "pool": "mean", "batch_size": 8, "device": None, "trust": False,
    }  # fmt: skip
    pipeline = make_pipeline(clone(features), LogisticRegression()).fit(images[:30], labels[:30])
    assert pipeline.score(images[30:], labels[30:]) == 1.0
    assert pipeline.set_params(mimfeatures__pool="cls").fit(images, labels).score(images, labels)
    assert not any(p.requires_grad for p in pipeline[0].model_.parameters())


def test_mistakes(run: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFittedError):
        MIMFeatures(run).transform([])
    with pytest.raises(UserError, match="no run folder"):
        MIMFeatures(tmp_path / "none").fit()
    with pytest.raises(UserError, match="pool"):
        MIMFeatures(run, pool="max").fit()
    with pytest.raises(UserError, match="batch_size"):
        MIMFeatures(run, batch_size=0).fit()
    features = MIMFeatures(run).fit()
    with pytest.raises(UserError, match="one image"):
        features.transform("image.png")
    with pytest.raises(UserError, match=r"X\[1\]: pixels are float64"):
        features.transform([np.zeros((4, 4), np.uint8), np.zeros((4, 4))])
    with pytest.raises(UserError, match=r"X\[0\].*none\.png"):
        features.transform([tmp_path / "none.png"])
    with pytest.raises(UserError, match=r"X\[0\]: shape \(4,\)"):
        features.transform([np.zeros(4, np.uint8)])
    features.model_.backbone.norm.weight.data.fill_(torch.inf)
    with pytest.raises(UserError, match="not finite"):
        features.transform([np.zeros((4, 4), np.uint8)])
    assert torch.is_grad_enabled()
