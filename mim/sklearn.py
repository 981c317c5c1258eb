"""Frozen features as a scikit-learn transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from mim.core.config import Config, DataConfig
from mim.core.errors import UserError, setting_error
from mim.data import Picture, depth_of, eval_transform, normalize, picture_of, read_picture
from mim.evaluate import check_pool, pool_tokens
from mim.evaluate.encoders import normalisation
from mim.evaluate.features import check_finite
from mim.model.backbones import family_of
from mim.training import checkpoint
from mim.training.loading import load
from mim.training.runtime.machine import pick_device


class MIMFeatures(TransformerMixin, BaseEstimator):
    """Images to the features of a pre-trained encoder, for a scikit-learn pipeline::

        make_pipeline(MIMFeatures("runs/photos"), LogisticRegression()).fit(images, labels)

    Nothing is learned from the images; ``fit`` opens the run. Images are resized and cropped as
    in every evaluation, and normalised as in the run's training.

    Args:
        run: a run folder, of ``mim pretrain`` or ``mim import``.
        pool: mean (over patch tokens), cls, or both side by side.
        batch_size: images in the encoder at once.
        device: cpu or cuda; by default what is there.
        trust: whether plug-ins of a run folder from elsewhere may run.
    """

    def __init__(
        self,
        run: str | Path,
        pool: str = "mean",
        batch_size: int = 64,
        device: str | None = None,
        trust: bool = False,
    ) -> None:
        self.run = run
        self.trust = trust
        self.pool = pool
        self.batch_size = batch_size
        self.device = device

    def fit(self, X: Any = None, y: Any = None) -> MIMFeatures:
        """Open the run; neither images nor labels are looked at.

        Raises:
            UserError: if there is no run, or it has no class token for ``pool``.
        """
        if self.batch_size < 1:
            raise setting_error("batch_size", self.batch_size, "must be at least 1")
        self.config_: Config = checkpoint.read_config(self.run, self.trust)
        self.mean_, self.std_ = normalisation(self.config_.data)
        model = load(self.run, self.trust).requires_grad_(False)
        check_pool(model.backbone, self.pool)
        device = pick_device(self.device, "device")
        self.model_ = model.to(device)
        self.n_features_out_ = family_of(model.backbone).width * (2 if self.pool == "both" else 1)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """``mim0``, ``mim1``, ..."""
        check_is_fitted(self)
        return np.array([f"mim{i}" for i in range(self.n_features_out_)], dtype=object)

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Compute features (n, D), or (n, 2 D) for ``both``.

        Args:
            X: (n, H, W) or (n, H, W, C) uint8, or a sequence of paths, PIL images and (H, W) or
                (H, W, C) uint8 arrays, of any sizes. Where the run was trained on images of more
                than 8 bits, arrays may hold the same values as those: they are read alike.

        Raises:
            UserError: for anything but images, or a file that cannot be read.
        """
        check_is_fitted(self)
        if isinstance(X, (str, Path, Image.Image)):
            raise UserError(f"X: a {type(X).__name__} is one image; give a sequence of images")
        device = next(self.model_.parameters()).device
        vit = self.model_.backbone
        features = [torch.zeros(0, self.n_features_out_)]
        for start in range(0, len(X), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(X)))
            pictures = [_picture(X[row], row, self.config_.data) for row in rows]
            images = eval_transform(pictures, self.config_.data)  # (B, C, H, W) uint8
            with torch.inference_mode():
                tokens = family_of(vit).features(
                    normalize(images.to(device), self.mean_, self.std_)
                )  # (B, P + N, D)
                features.append(pool_tokens(vit, tokens, self.pool).cpu())
        found = torch.cat(features)
        check_finite(found, "fp32")
        return found.numpy()


def _picture(item: Any, row: int, data: DataConfig) -> Picture:
    depth = depth_of(data)
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, (str, Path)):
        name = f"X[{row}] {str(item)!r}"
        return read_picture(item, name, data.max_pixels, data.decode, depth)
    if isinstance(item, np.ndarray) and item.ndim in (2, 3):
        if item.dtype != np.uint8 and (depth is None or depth.range is None):
            raise UserError(
                f"X[{row}]: pixels are {item.dtype}; give uint8 from 0 to 255, not normalised"
            )
        return picture_of(item, f"X[{row}]", depth)
    what = f"shape {item.shape}" if isinstance(item, np.ndarray) else type(item).__name__
    raise UserError(f"X[{row}]: {what} is no image: a path, a PIL image or an (H, W, C) array is")
