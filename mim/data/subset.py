"""Choose some of a source's images by class, number, fraction or a list of files.

What is drawn is drawn by key from names and ids alone, never from a run's seed: the same images on
every machine, and a smaller subset inside a larger one.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mim.core.config import DataConfig, SubsetConfig
from mim.core.errors import choice_error, setting_error
from mim.core.files import decode_text, write_text_atomic
from mim.core.rng import image_keys, name_to_int
from mim.data.images.decode import read_file
from mim.data.labels import one_spelling
from mim.data.sources.base import ImageSource, Split, Subset

_LISTS = {
    "imagenet-100": """
    n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455
    n01980166 n01983481 n02009229 n02018207 n02085620 n02086240 n02086910 n02087046 n02089867
    n02089973 n02090622 n02091831 n02093428 n02099849 n02100583 n02104029 n02105505 n02106550
    n02107142 n02108089 n02109047 n02113799 n02113978 n02114855 n02116738 n02119022 n02123045
    n02138441 n02172182 n02231487 n02259212 n02326432 n02396427 n02483362 n02488291 n02701002
    n02788148 n02804414 n02859443 n02869837 n02877765 n02974003 n03017168 n03032252 n03062245
    n03085013 n03259280 n03379051 n03424325 n03492542 n03494278 n03530642 n03584829 n03594734
    n03637318 n03642806 n03764736 n03775546 n03777754 n03785016 n03787032 n03794056 n03837869
    n03891251 n03903868 n03930630 n03947888 n04026417 n04067472 n04099969 n04111531 n04127249
    n04136333 n04229816 n04238763 n04336792 n04418357 n04429376 n04435653 n04485082 n04493381
    n04517823 n04589890 n04592741 n07714571 n07715103 n07753275 n07831146 n07836838 n13037406
    n13040303
    """,
    "imagenette": """
    n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777
    n03888257
    """,
    "imagewoof": """
    n02086240 n02087394 n02088364 n02089973 n02093754 n02096294 n02099601 n02105641 n02111889
    n02115641
    """,
}
CLASS_LISTS = {name: tuple(words.split()) for name, words in _LISTS.items()}
"""Built-in lists of classes by WordNet id: Tian et al.'s ImageNet-100
(https://arxiv.org/abs/1906.05849), Imagenette and Imagewoof
(https://github.com/fastai/imagenette)."""


def read_lines(setting: str, path: str) -> list[str]:
    """The lines of a text file that are neither empty nor begin with #.

    Raises:
        UserError: if it cannot be read or holds none.
    """
    try:
        text = one_spelling(decode_text(read_file(Path(path))))
    except (OSError, ValueError) as error:
        raise setting_error(setting, path, f"cannot be read: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise setting_error(setting, path, "names nothing")
    return lines


def class_list(given: str) -> list[str]:
    """The names of ``data.subset.list``: of a built-in list, or of a file, one a line.

    Raises:
        UserError: for what is neither.
    """
    if given in CLASS_LISTS:
        return list(CLASS_LISTS[given])
    if not Path(given).is_file():
        raise choice_error("data.subset.list", given, [*CLASS_LISTS, "a text file"])
    return list(dict.fromkeys(read_lines("data.subset.list", given)))


def _imagenet_names() -> dict[str, tuple[str, ...]]:
    """WordNet id -> what sets with ImageNet's images may call the class."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names: dict[str, tuple[str, ...]] = {}
    for wnid in info.label_names():
        words = info.label_name_to_description(wnid)
        names[wnid] = (words, words.split(",")[0].strip())
    return names


def match_classes(names: Sequence[str], classes: Sequence[str]) -> list[int | None]:
    """The position of each name in ``classes``, None where it is none of them.

    A WordNet id may stand for its words, and the words for it.
    """
    place = {name: position for position, name in enumerate(classes)}
    words: dict[str, tuple[str, ...]] = {}
    if any(name not in place for name in names):
        words = _imagenet_names()
        words |= {spelling: (wnid,) for wnid, spellings in words.items() for spelling in spellings}
    return [
        next((place[n] for n in (name, *words.get(name, ())) if n in place), None) for name in names
    ]


def _positions(names: Sequence[str], classes: Sequence[str], setting: str, given: str) -> list[int]:
    """Positions of names in ``classes``, ascending.

    Raises:
        UserError: if a name is none of the classes.
    """
    positions = match_classes(names, classes)
    missing = [name for name, position in zip(names, positions, strict=True) if position is None]
    if missing:
        place = list(classes)
        near = difflib.get_close_matches(missing[0], place, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        reason = (
            f"names {len(missing)} classes that the images have not, the first of them "
            f"{missing[0]!r}{hint}; they have {len(classes)}, such as {', '.join(classes[:3])}"
        )
        raise setting_error(setting, given, reason)
    return sorted({position for position in positions if position is not None})


def _keys(ids: Tensor, purpose: str) -> Tensor:
    return image_keys(0, -1, ids, purpose=purpose)


def _drawn_classes(source: ImageSource, count: int) -> list[int]:
    """The ``count`` classes with the smallest keys, ascending."""
    if count > len(source.classes):
        reason = f"is more than the {len(source.classes)} classes of {source.name}"
        raise setting_error("data.subset.classes", count, reason)
    ids = torch.tensor([name_to_int(name) for name in source.classes])
    return sorted(torch.argsort(_keys(ids, "subset classes"), stable=True)[:count].tolist())


def _labels(source: ImageSource, setting: str, value: object) -> Tensor:
    if source.labels is None or not source.classes:
        raise setting_error(setting, value, f"needs labels, which {source.name} has not")
    return source.labels


def _keep_classes(source: ImageSource, kept: list[int]) -> ImageSource:
    """The images of some classes, which are counted from 0 in their order."""
    assert source.labels is not None
    place = torch.full((len(source.classes),), -1)
    place[kept] = torch.arange(len(kept))
    labels = place[source.labels]
    chosen = torch.nonzero(labels >= 0)[:, 0]
    part = Subset(source, chosen)
    part.labels = labels[chosen]
    part.classes = [source.classes[position] for position in kept]
    return part


def _first_of_each(source: ImageSource, counts: Tensor) -> Tensor:
    """Positions, ascending, of the ``counts`` (K,) images of each class with the smallest keys."""
    labels = torch.zeros(len(source), dtype=torch.int64) if source.labels is None else source.labels
    order = torch.argsort(_keys(source.sample_ids, "subset"), stable=True)
    order = order[torch.argsort(labels[order], stable=True)]  # by class, then by key
    sizes = torch.bincount(labels, minlength=len(counts))
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(order)) - starts[labels[order]]
    return order[rank < counts[labels[order]]].sort().values


def _by_count(source: ImageSource, subset: SubsetConfig) -> Tensor:
    if subset.per_class is not None:
        labels = _labels(source, "data.subset.per_class", subset.per_class)
        sizes = torch.bincount(labels, minlength=len(source.classes))
        present = sizes > 0
        if int(sizes[present].min()) < subset.per_class:
            worst = int(torch.where(present, sizes, sizes.max() + 1).argmin())
            reason = f"is more than the {int(sizes[worst])} images of {source.classes[worst]!r}"
            raise setting_error("data.subset.per_class", subset.per_class, reason)
        return _first_of_each(source, torch.full((len(sizes),), subset.per_class))
    assert subset.fraction is not None
    labels = torch.zeros(len(source)).long() if source.labels is None else source.labels
    sizes = torch.bincount(labels)
    return _first_of_each(source, (sizes * subset.fraction).round().long().clamp(min=1))


def _by_files(source: ImageSource, given: str) -> Tensor:
    """Positions, ascending, of the images that a file names.

    Raises:
        UserError: if a line names no image, or several.
    """
    setting = "data.subset.files"
    paths = {line: line.strip("/").removeprefix("./") for line in read_lines(setting, given)}
    by_path = {path: line for line, path in paths.items()}
    found: dict[str, list[int]] = {line: [] for line in paths}
    for position in range(len(source)):
        path = one_spelling(source.describe(position))
        # The full path, or any end of it that begins after a slash.
        while True:
            if path in by_path:
                found[by_path[path]].append(position)
            _, slash, path = path.partition("/")
            if not slash:
                break
    for fault, ill in (
        ("names no image", [line for line, places in found.items() if not places]),
        ("names several images", [line for line, places in found.items() if len(places) > 1]),
    ):
        if ill:
            reason = f"has {len(ill)} lines of which each {fault} of {source.name}: {ill[0]!r}"
            raise setting_error(setting, given, reason)
    return torch.tensor(sorted({places[0] for places in found.values()}))


def choose(source: ImageSource, config: DataConfig, split: Split) -> ImageSource:
    """The images of a source that ``data.subset`` keeps.

    Classes are chosen in both splits, images in train alone. Labels count from 0 over the remaining
    classes, in the source's order.

    Raises:
        UserError: for classes or files that the source has not, or more than it has.
    """
    subset = config.subset
    if subset.list is not None:
        _labels(source, "data.subset.list", subset.list)
        names = class_list(subset.list)
        kept = _positions(names, source.classes, "data.subset.list", subset.list)
        source = _keep_classes(source, kept)
    if subset.classes is not None:
        _labels(source, "data.subset.classes", subset.classes)
        source = _keep_classes(source, _drawn_classes(source, subset.classes))
    if split == "val":
        return source
    if subset.files is not None:
        return Subset(source, _by_files(source, subset.files))
    if subset.per_class is not None or subset.fraction is not None:
        return Subset(source, _by_count(source, subset))
    return source


def write_list(path: Path, source: ImageSource) -> None:
    """Write the names of a source's images to a text file, one a line."""
    names = (source.describe(place) for place in range(len(source)))
    write_text_atomic(path, "".join(f"{name}\n" for name in names))
