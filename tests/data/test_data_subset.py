"""Subsets: built-in lists, keyed draws that nest, lists of files; noticed when they change."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from mim.core.config import DataConfig, SubsetConfig
from mim.core.errors import UserError
from mim.core.settings import load_config
from mim.data import CLASS_LISTS, ImageSource, open_source

SHA = "5ee5db69d488bb799a286d8e181801c3d02798776c1ce9203e5450f64e086e07"
SIZES = {"n01558993": 20, "n01692333": 10, "n02085620": 5, "n03000684": 5, "tench": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of five classes, of which three are in imagenet-100 and one in imagenette."""
    root = tmp_path_factory.mktemp("images")
    for name, count in SIZES.items():
        for split, number in (("train", count), ("val", 2)):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                Image.new("L", (2, 2), i).save(root / split / name / f"{name}_{i}.JPEG")
    return root


def opened(root: Path, split: str = "train", **subset: object) -> ImageSource:
    config = DataConfig(source="imagefolder", path=str(root), subset=SubsetConfig(**subset))  # type: ignore[arg-type]
    return open_source(config, split)  # type: ignore[arg-type]


def counts(source: ImageSource) -> dict[str, int]:
    assert source.labels is not None
    numbers = torch.bincount(source.labels, minlength=len(source.classes)).tolist()
    return dict(zip(source.classes, numbers, strict=True))


def names(source: ImageSource) -> list[str]:
    return [source.describe(i) for i in range(len(source))]


def test_the_built_in_lists() -> None:
    text = "".join(f"{name}\n" for name in sorted(CLASS_LISTS["imagenet-100"]))
    assert hashlib.sha256(text.encode()).hexdigest() == SHA
    assert {name: len(set(ids)) for name, ids in CLASS_LISTS.items()} == {
        "imagenet-100": 100,
        "imagenette": 10,
        "imagewoof": 10,
    }
    from timm.data import ImageNetInfo

    known = set(ImageNetInfo("imagenet-1k").label_names())
    assert all(set(ids) <= known for ids in CLASS_LISTS.values())


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_list_of_classes_keeps_them_in_both_splits(
    folder: Path, tmp_path: Path, split: str
) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("# two\nn03000684\n\nn01440764\n")  # the second is called tench here
    part = opened(folder, split, list=str(path))
    expected = {"n03000684": 5, "tench": 4} if split == "train" else {"n03000684": 2, "tench": 2}
    assert counts(part) == expected
    for position, name in enumerate(names(part)):
        assert part.labels is not None and part.classes[part.labels[position]] in name


def test_words_find_wordnet_ids(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("Chihuahua\n")
    assert counts(opened(folder, list=str(path))) == {"n02085620": 5}


@pytest.mark.parametrize("split", ["train", "val"])
def test_drawn_classes_nest(folder: Path, split: str) -> None:
    kept = [opened(folder, split, classes=n).classes for n in (1, 2, 3, 4, 5)]
    for fewer, more in itertools.pairwise(kept):
        assert set(fewer) < set(more) and more == sorted(more)
    assert opened(folder, "train", classes=2).classes == opened(folder, "val", classes=2).classes


def test_fractions_and_numbers_are_of_each_class_and_nest(folder: Path) -> None:
    tenth = opened(folder, fraction=0.1)
    assert counts(tenth) == {name: max(1, round(n / 10)) for name, n in SIZES.items()}
    half = opened(folder, fraction=0.5)
    two = opened(folder, per_class=2)
    assert set(counts(two).values()) == {2}
    assert set(names(tenth)) < set(names(half)) and set(names(two)) < set(names(half))
    assert names(half) == sorted(names(half))  # in the source's order
    assert len(opened(folder, "val", fraction=0.1)) == 10  # val stays whole
    # Not the first ones of each class, but the same ones everywhere: written down.
    assert names(two)[-2:] == DRAWN


DRAWN = ["train/tench/tench_0.JPEG", "train/tench/tench_3.JPEG"]


def test_unlabelled_images_are_drawn_from_all(folder: Path) -> None:
    config = DataConfig(source="flat", path=str(folder), subset=SubsetConfig(fraction=0.25))
    assert len(open_source(config, "train")) == 11
    assert len(open_source(config, "val")) == 10


def test_a_list_of_files(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "1percent.txt"
    path.write_text("n01692333_3.JPEG\nn01558993/n01558993_12.JPEG\ntrain/tench/tench_0.JPEG\n")
    assert names(opened(folder, files=str(path))) == [
        "train/n01558993/n01558993_12.JPEG",
        "train/n01692333/n01692333_3.JPEG",
        "train/tench/tench_0.JPEG",
    ]
    path.write_text("n01692333_3.JPEG\nn01692333_33.JPEG\n")
    with pytest.raises(UserError, match=r"data\.subset\.files: .*names no image .*_33\.JPEG"):
        opened(folder, files=str(path))


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ({"list": "imagenet100"}, r"list: 'imagenet100' is not one of .*mean 'imagenet-100'"),
        ({"list": "imagewoof"}, r"list: 'imagewoof' names 10 classes .* have not.*n02086240"),
        ({"classes": 6}, r"classes: 6 is more than the 5 classes"),
        ({"per_class": 5}, r"per_class: 5 is more than the 4 images of 'tench'"),
        ({"files": "absent.txt"}, r"files: 'absent.txt' cannot be read"),
        ({"fraction": 1.5}, r"fraction: 1.5 must be above 0"),
        ({"fraction": 0.5, "per_class": 2}, r"fraction: 0.5 cannot be combined with .*per_class"),
    ],
)
def test_refusals(folder: Path, subset: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=r"^data\.subset\." + message) as caught:
        opened(folder, **subset)
    assert "\n" not in str(caught.value)


def test_classes_need_labels(folder: Path) -> None:
    config = DataConfig(source="flat", path=str(folder), subset=SubsetConfig(classes=2))
    with pytest.raises(UserError, match=r"data\.subset\.classes: 2 needs labels, which flat"):
        open_source(config, "train")


def test_a_run_keeps_its_subset_and_refuses_another(
    tmp_path: Path, tiny: Callable[..., Path], mim: Callable[..., object], folder: Path
) -> None:
    changes = {"data.subset.classes": 3, "data.subset.fraction": 0.5, "train.max_steps": 2}
    run = tmp_path / "run"
    assert mim("pretrain", "--config", tiny(changes), "--output", run).code == 0  # type: ignore[attr-defined]
    config = load_config(run / "config.yaml")
    train, val = (open_source(config.data, split) for split in ("train", "val"))
    assert (run / "subset_train.txt").read_text().splitlines() == names(train)
    assert (run / "subset_val.txt").read_text().splitlines() == names(val)
    assert config.data.fingerprint == f"{train.fingerprint()}-{val.fingerprint()}"
    again = ("pretrain", "--config", run / "config.yaml", "--output", tmp_path / "again")
    assert mim(*again).code == 0  # type: ignore[attr-defined]
    other = mim(*again[:-1], tmp_path / "other", "--data.subset.fraction", 0.4)
    assert other.code == 2  # type: ignore[attr-defined]
    assert "data.fingerprint: " in other.line and "other images" in other.line  # type: ignore[attr-defined]
    free = mim(*again[:-1], tmp_path / "o", "--data.subset.fraction=0.4", "--data.fingerprint=null")
    assert free.code == 0, free.err  # type: ignore[attr-defined]


def test_a_resume_over_changed_images_is_refused(
    tmp_path: Path, tiny: Callable[..., Path], mim: Callable[..., object]
) -> None:
    root = tmp_path / "images"
    for split, count in (("train", 12), ("val", 2)):
        (root / split / "a").mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), i).save(root / split / "a" / f"{i}.png")
    changes = {"data.source": "imagefolder", "data.path": str(root), "data.batch_size": 4}
    config, run = (
        tiny(changes | {"train.max_steps": 2, "train.checkpoint_every": 0.3}),
        tmp_path / "r",
    )
    assert mim("pretrain", "--config", config, "--output", run).code == 0  # type: ignore[attr-defined]
    (run / "result.json").unlink()  # as if it had been killed before its end
    (root / "train" / "a" / "0.png").rename(root / "train" / "a" / "new.png")
    outcome = mim("pretrain", "--config", config, "--output", run, "--resume", "auto")
    assert outcome.code == 2 and "over other images" in outcome.line  # type: ignore[attr-defined]
