"""Images: sources, transforms, storage and loaders. Never imports the model.

A source lists images and reads one; ``opening.py`` makes a source from a config; ``loader.py``
makes batches of it. Start reading in ``opening.py``.
"""

from mim.data import mixed  # noqa: F401
from mim.data.corruptions import CORRUPTIONS, Corrupted, corrupt
from mim.data.images.decode import UnreadableImage, picture_of, read_picture
from mim.data.images.deep import depth_of
from mim.data.images.transforms import (
    Picture,
    crop_parameters,
    eval_transform,
    normalize,
    prepare,
    train_transform,
)
from mim.data.loader import (
    Batch,
    BatchLoader,
    StepBatches,
    eval_loader,
    steps_per_epoch,
    train_loader,
    worker_deaths,
)
from mim.data.opening import open_source
from mim.data.sources import embedded, folder, huggingface, shards, torchvision_sets  # noqa: F401
from mim.data.sources.base import SOURCES, ImageSource, Split, Subset, holdout
from mim.data.sources.folder import ClassFolders
from mim.data.storage import packed  # noqa: F401  (they register sources)
from mim.data.subset import CLASS_LISTS, match_classes, write_list
from mim.data.weights import WEIGHTS, Weigh, open_weights

__all__ = [
    "CLASS_LISTS",
    "CORRUPTIONS",
    "SOURCES",
    "WEIGHTS",
    "Batch",
    "BatchLoader",
    "ClassFolders",
    "Corrupted",
    "ImageSource",
    "Picture",
    "Split",
    "StepBatches",
    "Subset",
    "UnreadableImage",
    "Weigh",
    "corrupt",
    "crop_parameters",
    "depth_of",
    "eval_loader",
    "eval_transform",
    "holdout",
    "match_classes",
    "normalize",
    "open_source",
    "open_weights",
    "picture_of",
    "prepare",
    "read_picture",
    "steps_per_epoch",
    "train_loader",
    "train_transform",
    "worker_deaths",
    "write_list",
]
