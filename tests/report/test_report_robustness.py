"""Robustness in a report: the table by hand, the chart from clean to the last severity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mim.report import read_comparison, write_report
from mim.report.interactive import plotly_figure
from mim.report.robustness import robustness_charts, robustness_table
from mim.report.tables import evaluation_measures


@pytest.fixture
def folder(fake_comparison: Callable[..., Path]) -> Path:
    """Two seeds of drop and zero; fog is worse by 0.1 a severity, snow by 0.2."""
    axes = {"model.regime.name": ["drop", "zero"], "seed": [0, 1]}
    folder = fake_comparison(axes=axes)
    for path in folder.glob("*/result.json"):
        result = json.loads(path.read_text())
        if result["kind"] == "pixels":
            continue
        start = 0.3 if result["kind"] == "untrained" else 0.1
        start += 0.02 * int(result.get("seed") or 0)
        numbers = {"mce": 0.8 + start, "mean_error": start + 0.225, "clean_accuracy": 1 - start}
        for name, step in (("fog", 0.1), ("snow", 0.2)):
            each = {f"error_{name}_severity_{s}": start + step * s for s in (1, 2)}
            mean = sum(each.values()) / 2
            numbers |= {f"error_{name}": mean, f"ce_{name}": mean / 0.5, **each}
        result["evaluations"]["robustness"] = numbers
        path.write_text(json.dumps(result))
    return folder


def test_table_and_measures(folder: Path) -> None:
    comparison = read_comparison(folder)
    table = robustness_table(comparison)
    assert [c.label for c in table.columns][2:] == ["1", "2", "mean error (%)", "CE (%)"]
    rows = {(row.cells[0].text, row.cells[1].text): row.cells[2:] for row in table.rows}
    # 0.11 is the mean start of the two seeds.
    assert [c.text for c in rows["fog", "drop"]] == ["21.0", "31.0", "26.0", "52.0"]
    assert [c.text for c in rows["snow", "zero"]] == ["31.0", "51.0", "41.0", "82.0"]
    assert not any("pixels" in encoder for _, encoder in rows)
    measures = {m.key: m for m in evaluation_measures(comparison) if m.section == "Robustness"}
    assert list(measures) == [f"robustness.{k}" for k in ("mce", "mean_error", "clean_accuracy")]
    heads = [m.head for m in measures.values()]
    assert heads == ["mCE (%)", "mean error (%)", "clean accuracy (%)"]
    assert [m.higher for m in measures.values()] == [False, False, True]


def test_chart_and_page(folder: Path) -> None:
    (chart,) = robustness_charts(read_comparison(folder))
    line = next(line for line in chart.lines if line.label == "drop")
    assert line.x.tolist() == [0, 1, 2] and line.n == 2
    assert line.mean.tolist() == pytest.approx([11, 26, 41])
    assert line.spread is not None and line.spread[0] == pytest.approx(2**0.5)
    assert {line.label for line in chart.lines} >= {"drop", "zero", "untrained encoder"}
    hover = str(plotly_figure(chart))
    assert "at severity %{x:.3g}" in hover and "epoch" not in hover
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert 'id="robustness"' in page and "not normalised" in page
    assert "## Robustness" in (folder / "report.md").read_text()
    assert (folder / "figures" / "robustness.svg").is_file()
    assert (folder / "tables" / "robustness.csv").is_file()


def test_without_the_evaluation_nothing_is_said(fake_comparison: Callable[..., Path]) -> None:
    comparison = read_comparison(fake_comparison(axes={"seed": [0]}))
    assert not robustness_table(comparison).rows and robustness_charts(comparison) == []
