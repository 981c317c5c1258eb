"""Every command and snippet of the README and the docs: it parses, its settings exist, it runs."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomllib
import yaml
from PIL import Image

import mim
from benchmarks.__main__ import _parser as benchmark_parser
from mim.api import read_compare_config
from mim.cli.main import VERBS
from mim.cli.options import VerbGroup, take_folder
from mim.core.config import Config
from mim.core.settings import checked, read_args

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Programs that stand before ours, and those that are known and not ours.
_LAUNCHERS = ("accelerate", "python", "srun", "torchrun")
_OTHERS = ("source", "pip")
# Its examples are files, and its commands name them.
_OWN = ROOT / "docs" / "howto" / "own-regime.md"


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    kind: str
    text: str


def blocks(kind: str) -> list[Block]:
    return [
        Block(page, found[1], found[2])
        for page in PAGES
        for found in _FENCE.finditer(page.read_text(encoding="utf-8"))
        if found[1] == kind
    ]


def name(block: Block) -> str:
    return f"{block.page.relative_to(ROOT)}: {block.text.strip().splitlines()[0][:40]}"


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command; comments, redirections and pipes are cut off."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            cut = [place for place, word in enumerate(words) if word in (">", "|", "&&")]
            yield words[: cut[0]] if cut else words


def check_verb(verb: str, args: list[str]) -> None:
    """The command's options exist, and its config is one that can run."""
    assert verb in VERBS, verb
    found = VERBS[verb]
    if isinstance(found, VerbGroup):
        what, *args = args
        found = found.verbs[what]
    options = found.parse([arg for arg in args if arg != "--print_config"])
    if verb == "pretrain":
        kept = take_folder(options.settings)[1]
        made = kept[0] == "--config" and kept[1].startswith("runs/")
        if made:  # the config of a run that the page has made before
            kept = kept[2:]
        checked(read_args(Config, kept))
    elif verb == "compare":
        checked(read_compare_config(take_folder(options.settings, "base.")[1]).base)


@pytest.mark.parametrize("block", [b for b in blocks("bash") if b.page != _OWN], ids=name)
def test_commands_exist(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    found, launch = list(commands(block.text)), "scripts/launch/"
    assert found
    for words in found:
        if any(launch in word for word in words):
            check_verb("pretrain", words[words.index("--config") :])
            words = ["bash", next(word for word in words if launch in word)]
        if words[0] in _LAUNCHERS:
            words = words[words.index("-m") + 1 :]
        if words[:2] == ["mim", "--help"]:
            continue
        if words[0] == "mim":
            check_verb(words[1], words[2:])
        elif words[0] == "bash":
            assert (ROOT / words[1]).is_file(), words
        elif words[0] == "benchmarks":
            benchmark_parser().parse_known_args(words[1:])
        elif words[0] == "pip":
            wanted = re.findall(r"\[(\w+)\]", " ".join(words))
            assert set(wanted) <= set(extras["optional-dependencies"])
        else:
            assert words[0] in _OTHERS, f"a program that no test knows: {words}"


@pytest.mark.parametrize("block", blocks("yaml"), ids=name)
def test_settings_exist(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(block.text)
    content = yaml.safe_load(block.text)
    if {"axes", "base"} & set(content):
        checked(read_compare_config(["--config", str(path)]).base)
    else:
        checked(read_args(Config, ["--config", str(path)]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run under the names that the docs use, and photographs."""
    from mim.training.pretrain import pretrain

    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "configs", folder / "configs")
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        for index in range(20):
            path = folder / "photographs" / "train" / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    settings = {
        "output": str(folder / "runs" / "photos"),
        "data.source": "imagefolder",
        "data.path": str(folder / "photographs"),
        "data.image_size": 32,
        "data.batch_size": 8,
        "model.backbone_args": {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
        "model.decoder.transformer": {"width": 16, "depth": 1, "heads": 2},
        "optim.warmup_epochs": 0,
        "train.epochs": 1,
        "log.tensorboard": False,
    }
    pretrain(mim.load_config(None, settings))
    shutil.copytree(folder / "runs" / "photos", folder / "runs" / "mae")
    return folder


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page != _OWN and "```python" in page.read_text(encoding="utf-8")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_snippets_run(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of a page, block after block, in one namespace; fine-tuning with one epoch."""
    own = [block for block in blocks("python") if block.page == page]
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    monkeypatch.chdir(place)
    finetune = mim.finetune

    def short(*args: Any, **options: Any) -> Any:
        inspect.signature(finetune).bind(*args, **options)
        quick = {"epochs": 1, "warmup_epochs": 0, "rand_augment": "", "drop_path": 0}
        return finetune(*args, **{**options, **quick})

    monkeypatch.setattr(mim, "finetune", short, raising=False)
    photographs = sorted(Path("photographs").rglob("*.png"))
    Image.open(photographs[0]).save("new.jpg")
    space: dict[str, Any] = {
        "mim": mim,
        "make_pipeline": make_pipeline,
        "LogisticRegression": LogisticRegression,
        "paths": [str(path) for path in photographs],
        "labels": [path.parent.name for path in photographs],
    }
    for block in own:
        exec(compile(block.text, f"{page.name}: {name(block)}", "exec"), space)


def test_examples_of_own_components_work(tmp_path: Path, ranks: Callable[..., Any]) -> None:
    """The files of the page, by its commands, in a process that has registered nothing else."""
    text = _OWN.read_text(encoding="utf-8")
    files = re.findall(r"^## [^\n]*`(\w+\.py)`\n.*?^```python\n(.*?)^```", text, re.M | re.S)
    assert len(files) == 6 and all(len(content.splitlines()) <= 40 for _, content in files)
    for file, content in files:
        (tmp_path / file).write_text(content)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(40) % 2)
    own = next(b for b in blocks("bash") if b.page == _OWN and "mim compare" in b.text)
    (pretrain, compare) = commands(own.text)
    plugins = json.dumps([file for file, _ in files])
    pretrain += ["--plugins", plugins, "--data.source", "npz", "--data.path", "images.npz"]
    pretrain += ["--data.batch_size=8", "--train.max_steps=2", "--log.tensorboard=false"]
    leak = [block.text for block in blocks("python") if block.page == _OWN][-1]
    check = (
        f"{leak}\n"
        "from mim.compare.runner import read_compare_config\n"
        "from mim.core.settings import checked\n"
        "from mim.evaluate import build_evaluation\n"
        f"compare = read_compare_config({compare[2:]!r})\n"
        "checked(compare.base)\n"
        "for name, given in compare.evaluations.items():\n"
        "    build_evaluation(name, given)\n"
        "raise SystemExit\n"
    )
    wrong = [*pretrain, "--mask.ring.first", "corner", "--output", "runs/wrong"]
    failed = {}
    for what, words in (("pretrain", pretrain), ("wrong", wrong), ("check", [])):
        start = f"os.chdir({str(tmp_path)!r})\n" + (check if what == "check" else "")
        run = ranks(words[1:], world=1, all=start)
        if run.wait() != [0]:
            failed[what] = run.texts()[0]
    assert failed.keys() == {"wrong"}, failed
    assert failed["wrong"].strip() in text


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_that_the_docs_name_exist() -> None:
    pattern = re.compile(r"`((?:benchmarks|configs|docs|notebooks|tests|scripts|mim)/[\w./]+?)`")
    for page in PAGES:
        for target in pattern.findall(page.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_settings_that_the_docs_name_exist() -> None:
    """Words such as `mask.aligned.unit` in the text."""
    from mim.core.settings import flatten, to_dict
    from mim.model import MaskedImageModel

    known = flatten(to_dict(Config()))
    groups = {key.rpartition(".")[0] for key in known} | set(known)
    pattern = re.compile(r"`((?:data|mask|model|optim|train|log)\.[a-z_0-9.]+)")
    for page in PAGES:
        for key in pattern.findall(page.read_text(encoding="utf-8")):
            whole = key.rstrip(".")
            if whole.endswith((".py", "_mask")) or whole.startswith("model.backbone_args."):
                continue
            is_method = hasattr(MaskedImageModel, whole.removeprefix("model."))
            assert whole in groups or is_method, f"{page.name}: {whole}"


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 8000


def test_every_component_has_a_row() -> None:
    """No generator, regime, decoder, target, source, verb or evaluation is missing in the docs."""
    from mim.data import SOURCES
    from mim.evaluate import EVALUATIONS
    from mim.masks.generators import MASKS
    from mim.model.decoders import DECODERS
    from mim.model.regimes import REGIMES
    from mim.model.targets import TARGETS

    docs = ROOT / "docs"
    evaluations = ("probes", "finetune", "dense", "robustness")
    components = [
        name
        for registry in (MASKS, REGIMES, DECODERS, TARGETS)
        for name in registry
        if registry.get(name).__module__.startswith("mim.")  # not those of a page's example
    ]
    sources = [name for name in SOURCES if SOURCES.get(name).__module__.startswith("mim.")]
    tables = {
        "reference/components.md": components,
        "howto/data.md": sources,
        "reference/commands.md": [f"mim {verb}" for verb in VERBS],
    }
    for page, names in tables.items():
        rows = " ".join(re.findall(r"^\|.*\|$", (docs / page).read_text(), re.MULTILINE))
        assert [name for name in names if f"`{name}" not in rows] == [], page
    text = "".join((docs / "howto" / f"{page}.md").read_text() for page in evaluations)
    assert [
        name
        for name in EVALUATIONS
        if f"mim evaluate {name}" not in text and f"| `{name}`" not in text
    ] == []


def test_search_finds_what_newcomers_look_for() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for word in ("unlabelled", "DICOM", "ViT-S", "ImageNet-100", "ut of memory", "openmim"):
        assert word in text, word


def test_the_reference_writes_types_as_a_reader_would() -> None:
    written = runpy.run_path(str(ROOT / "scripts" / "mkdocs_settings.py"))["on_page_markdown"]
    text = written("".join(f"<!-- settings: {name} -->" for name in ("data", "evaluations")))
    assert "**`data.image_size`** (`int` or `tuple[int, int]`; default `224`)" in text
    assert not re.search(r"Bound|typing\.|<class|0x[0-9a-f]{6}", text)


@pytest.mark.slow  # .ci/run builds the site itself
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    config = pytest.importorskip("mkdocs.config", reason="mkdocs is not installed")
    for needed in ("material", "mkdocstrings"):
        pytest.importorskip(needed)
    from mkdocs.commands.build import build

    loaded = config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    build(loaded)
    masks = tmp_path / "reference" / "settings" / "mask" / "index.html"
    reference = masks.read_text(encoding="utf-8")
    assert "Share of the patches that is hidden" in reference
    assert "PatchMask" in (tmp_path / "reference" / "python" / "index.html").read_text()
