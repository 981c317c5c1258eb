"""What is meant to be given away names no folder, server or signature of this machine."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mim.core.config import Config
from mim.core.errors import UserError
from mim.core.fields import fit, hints
from mim.core.public import public
from mim.core.settings import leaves
from mim.report import write_report
from mim.report.figures import FORMATS
from mim.training.settings import load_config

PLACES = [
    "/mnt/SECRET/of/masks.npz",
    "../SECRET/masks.npz",
    "data/SECRET/masks.npz",
    "~/SECRET dir/masks.npz",
    "~SECRET/masks.npz",
    "C:\\SECRET\\masks.npz",
    "file:///SECRET/masks.npz",
    "s3://SECRET/masks.npz",
    "https://user:SECRET@SECRET.org/SECRET/masks.npz?X-Amz-Signature=SECRET&b=2#SECRET",
    "https://SECRET.org?SECRET",
]


@pytest.mark.parametrize("place", PLACES)
def test_only_the_last_part_of_a_place_is_left(place: str) -> None:
    assert "SECRET" not in public(place)
    assert public(place) == "URL" or public(place) == "masks.npz"
    texts = [f"data.path: {place!r} cannot be read", f"'{place}'"]
    if " " not in place and not place.startswith("data"):  # a command's relative path is as it was
        texts.append(f"mim compare --a={place}")
    for text in texts:
        assert "SECRET" not in public(text), text
    nested = public({"a": [{f"plugin {place}": place}], "b": (place, 3, None)})
    assert "SECRET" not in json.dumps(nested)


@pytest.mark.parametrize("text", ["", "torchvision", "vit_tiny_patch16_224", "9f2c41d0", "a: b"])
def test_what_is_no_place_stays(text: str) -> None:
    assert public(text) == text
    assert public("12: images/s and 3/4") == "12: images/s and 3/4"
    assert public({"error": "[red]it[/] is odd"}) == {"error": "[red]it[/] is odd"}
    for kept in ({"source": "torchvision/CIFAR10"}, {"model.backbone": ["hf-hub:a/b"]}):
        assert public(kept) == kept


def settings_of_text() -> dict[str, Any]:
    """Dotted key -> a value with a place in it, for each setting that takes a text."""
    found: dict[str, Any] = {}
    for key, (owner, name) in leaves(Config).items():
        for value in (PLACES[8], [PLACES[8]], {"some_file": PLACES[8]}):
            try:
                fit(key, value, hints(owner)[name])
            except UserError:
                continue
            found[key] = value
            break
    found["data.mix"] = [{"source": "shards", "path": PLACES[8], "val_path": PLACES[0]}]
    return found


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_report_over_every_setting(
    fake_comparison: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mim.report.figures.FORMATS", FORMATS)
    axes = {"mask.file.path": ["/mnt/SECRET/a/m.npz", "/mnt/SECRET/b/m.npz"], "seed": [0, 1]}
    command = "mim compare --config /mnt/SECRET/c.yaml --base.data.path=https://SECRET/a/b?SECRET"
    settings = settings_of_text()
    assert {"data.path", "data.val_path", "mask.file.path", "plugins", "output"} <= set(settings)
    names = [f"run={n}" for n in range(4)]
    folder = fake_comparison(command=command)
    whole = json.loads((folder / "comparison.json").read_text())
    for name in whole["runs"][len(names) :]:
        for path in sorted((folder / name).rglob("*")):
            path.unlink()
        (folder / name).rmdir()
    for number, (name, run) in enumerate(zip(names, whole["runs"], strict=False)):
        (folder / run).rename(folder / name)
        result = json.loads((folder / name / "result.json").read_text())
        own = {"mask.file.path": axes["mask.file.path"][number // 2], "seed": number % 2}
        result |= {"kind": "run", "axes": own, "seed": number % 2, "name": name}
        result["config"] = nested(settings)
        result["environment"] |= {"plugin /mnt/SECRET/p.py": "abc"}
        if number == 3:
            error = "data.path: '/mnt/SECRET/my images' does not exist; see https://SECRET/q?SECRET"
            result |= {"status": "failed", "error": error}
        (folder / name / "result.json").write_text(json.dumps(result))
    whole |= {"runs": names, "axes": axes, "base": nested(settings)}
    (folder / "comparison.json").write_text(json.dumps(whole))
    before = contents(folder)
    write_report(folder)
    written = {path: content for path, content in contents(folder).items() if path not in before}
    assert {"report.html", "summary.md", "results.csv"} & {path.name for path in written}
    for path, content in written.items():
        assert b"SECRET" not in content, path
    page = (folder / "report.html").read_text()
    assert page.count("m.npz#") > 1, "two files of one name are told apart"


def test_exports_over_every_setting(tmp_path: Path, mim: Any, tiny: Callable[..., Path]) -> None:
    run = tmp_path / "run"
    assert mim("pretrain", "--config", tiny({"train.max_steps": 1}), "--output", run).code == 0
    file = run / "config.yaml"
    taken = yaml.safe_load(file.read_text())
    kept = []
    for key, value in settings_of_text().items():
        tree = json.loads(json.dumps(taken))
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
        try:
            load_config(None, tree)
        except UserError:  # the name of a component, a size, ...
            continue
        if last not in ("plugins", "hooks", "backbone", "backbone_args"):  # which are read
            taken, kept = tree, [*kept, key]
    assert {"data.path", "data.val_path", "data.weights", "mask.file.path", "log.project"} < set(
        kept
    )
    taken["data"] |= {"mean": [0.5], "std": [0.2]}
    file.write_text(yaml.safe_dump(taken))
    (run / "result.json").write_text(
        json.dumps(
            json.loads((run / "result.json").read_text())
            | {"imported": {"file": PLACES[8], "sha256": "ab", "family": "timm"}}
        )
    )
    formats = {"timm": "e.safetensors", "safetensors": "s.safetensors", "mae": "m.pth", "hf": "hf"}
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript"):
        formats["onnx"] = "o.onnx"
    for to, name in formats.items():
        outcome = mim("export", run, "--to", to, "--output", tmp_path / "SECRET" / to / name)
        assert outcome.code == 0, outcome.err
    for path, content in contents(tmp_path / "SECRET").items():
        assert b"SECRET" not in content, path
    again = tmp_path / "again"
    outcome = mim("import", tmp_path / "SECRET" / "timm" / "e.safetensors", "--output", again)
    assert outcome.code == 0, outcome.err
