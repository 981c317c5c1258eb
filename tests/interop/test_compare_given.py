"""Encoders from elsewhere as rows of a comparison."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from layouts_by_hand import encoder_shapes, fill

from mim.compare.runner import CompareConfig, plan
from mim.core.errors import UserError
from mim.core.settings import load_config
from mim.interop import import_run

PROBES = {"knn": {"k": [5], "few_shot": [], "temperature": [0.1]}}


def test_given_encoders_stand_in_the_tables(
    tmp_path: Path, store: Callable[..., Path], tiny_tree: Callable[..., dict[str, Any]], mim: Any
) -> None:
    """Measured on the comparison's images, at their own size, as ``mim evaluate`` measures them."""
    path = store(fill(encoder_shapes(channels=1, grid=4)))
    given = tmp_path / "borrowed"
    heads = {"model.backbone_args.num_heads": 3, "data.source": "digits"}
    import_run(path, given, heads)
    knn = ("--set", "k=[5]", "few_shot=[]", "temperature=[0.1]")
    assert mim("evaluate", "knn", given, *knn).code == 0
    alone = json.loads((given / "result.json").read_text())["evaluations"]["knn"]
    (given / "config.yaml").write_text(
        (given / "config.yaml").read_text().replace("source: digits", "source: mnist5k")
    )

    config, folder = tmp_path / "compare.yaml", tmp_path / "cmp"
    content = {
        "output": str(folder),
        "axes": {"model.regime.name": ["drop"], "seed": [0]},
        "evaluations": PROBES,
        "references": [str(given)],
        "base": tiny_tree({"train.max_steps": 2}),
    }
    config.write_text(yaml.safe_dump(content))
    outcome = mim("compare", "--config", config)
    assert outcome.code == 0, outcome.err
    result = json.loads((folder / "given,borrowed" / "result.json").read_text())
    assert result["kind"] == "given" and result["given"] == str(given)
    # Digits' own mean and deviation, as the import names none for one channel.
    assert result["evaluations"]["knn"] == alone
    rows = list(csv.DictReader((folder / "results.csv").open()))
    (row,) = [row for row in rows if row["kind"] == "given"]
    assert row["run"] == "given,borrowed" and row["seed"] == ""
    report = (folder / "report.md").read_text()
    assert "borrowed" in report
    assert 'class="given"' in (folder / "report.html").read_text()
    # A second call keeps it.
    before = (folder / "given,borrowed" / "result.json").stat().st_mtime_ns
    assert mim("compare", "--config", config).code == 0
    assert (folder / "given,borrowed" / "result.json").stat().st_mtime_ns == before


def test_references_are_checked_before_any_training(tmp_path: Path) -> None:
    base = load_config(None, {"data.image_size": 32})
    output = str(tmp_path / "cmp")
    with pytest.raises(UserError, match="no run folder"):
        plan(CompareConfig(output=output, references=[str(tmp_path)], base=base))
    with pytest.raises(UserError, match="two folders of one name"):
        plan(CompareConfig(output=output, references=["a/x", "b/x"], base=base))
    with pytest.raises(UserError, match="no evaluations"):
        plan(CompareConfig(output=output, references=["x"], evaluations={}, base=base))
