"""What a design shows: curves over lengths and sizes, interactions, tuning, classes."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import rankdata

from mim.compare import budget
from mim.report.charts import Chart, Line, Style
from mim.report.collect import read_comparison
from mim.report.curves import LENGTHS, frontier_charts, scaling_charts
from mim.report.disagreement import class_table, image_table
from mim.report.figures import draw
from mim.report.interactions import interaction_maps, interaction_table, interactions
from mim.report.page import Report, report_html, report_markdown
from mim.report.statistics import analyse
from mim.report.tables import comparison_table, cost_table
from mim.report.tuning import tuning_charts, tuning_table

Write = Callable[..., Path]
EPOCHS = [10, 20, 40]


@pytest.fixture
def lengths(fake_comparison: Write) -> Path:
    """Two regimes at three lengths, whose steps are those of their epochs."""
    folder = fake_comparison(
        {"model.regime.name": ["drop", "token"], "train.epochs": EPOCHS, "seed": [0, 1, 2]},
        linear=lambda axes, seed: 0.8 + 0.002 * axes["train.epochs"] + 0.001 * seed,
    )
    for path in folder.glob("regime=*/result.json"):
        result = json.loads(path.read_text())
        result |= {"epochs": result["axes"]["train.epochs"]}
        result |= {"steps": 70 * result["epochs"], "wall_seconds": 3.0 * result["epochs"]}
        path.write_text(json.dumps(result))
    return folder


def test_the_frontier_is_the_first_figure_where_lengths_vary(lengths: Path) -> None:
    report = Report(read_comparison(lengths))
    compute, time = frontier_charts(report.comparison, report.analyses)
    assert [line.label for line in compute.lines] == ["drop", "token"]
    for line in compute.lines:
        ratios = line.x / line.x[0]
        assert ratios.tolist() == pytest.approx([1, 2, 4])
        assert line.mean.tolist() == pytest.approx([100 * (0.801 + 0.002 * e) for e in EPOCHS])
        assert line.spread is not None and line.n == 3
    one = read_comparison(lengths).groups[0].runs[0].measures
    expected = (one["flops_forward"] + one["flops_backward"]) * 64 * 700
    assert compute.lines[0].x[0] * 1e12 == pytest.approx(expected)
    assert time.lines[0].x.tolist() == [30.0, 60.0, 120.0]
    page = report_html(report)
    assert page.index("frontier_train_flops") < page.index('id="forest_')
    assert not report.panels["quality"]
    costs = cost_table(report.comparison, report.analyses)
    assert [cell.text for cell in costs.rows[1].cells][
        costs.heads.index("Training: epochs")
    ] == "20.0"


def test_scaling_is_drawn_over_an_axis_of_numbers(fake_comparison: Write) -> None:
    axes: dict[str, list[Any]] = {
        "model.regime.name": ["drop", "token"], "data.subset": [0.01, 0.1, 1.0], "seed": [0, 1],
    }  # fmt: skip
    comparison = read_comparison(fake_comparison(axes, metrics=False))
    (chart,) = scaling_charts(comparison, analyse(comparison))
    assert chart.x_log and [line.x.tolist() for line in chart.lines] == [[0.01, 0.1, 1.0]] * 2
    assert not frontier_charts(comparison, analyse(comparison))
    few = read_comparison(
        fake_comparison({**axes, "data.subset": [0.1, 1.0]}, folder=comparison.folder / "few")
    )
    assert not scaling_charts(few, analyse(few))
    assert LENGTHS == budget.LENGTHS


def test_interactions_are_differences_of_differences(fake_comparison: Write) -> None:
    means = {("drop", 0.5): 0.80, ("drop", 0.9): 0.84, ("token", 0.5): 0.70, ("token", 0.9): 0.64}
    noise = np.random.default_rng(0).normal(0, 0.002, (2, 2, 3))

    def linear(axes: dict[str, Any], seed: int) -> float:
        regime, ratio = axes["model.regime.name"], axes["mask.ratio"]
        own = noise[int(regime == "token"), int(ratio == 0.9), seed]
        return means[regime, ratio] + 0.01 * seed + float(own)

    axes = {"model.regime.name": ["drop", "token"], "mask.ratio": [0.5, 0.9], "seed": [0, 1, 2]}
    comparison = read_comparison(fake_comparison(axes, linear=linear))
    analyses = analyse(comparison)
    (found,) = interactions(comparison, analyses)
    contrast = found.found[0][0]
    assert found.base == ("drop", "0.5") and contrast is not None
    own = noise[1, 1] - noise[0, 1] - noise[1, 0] + noise[0, 0]
    assert contrast.mean == pytest.approx(-0.10 + own.mean())
    assert contrast.shown and contrast.df == 6  # the residual of four groups and three seeds
    (heat,) = interaction_maps(comparison, analyses)
    assert heat.values[0, 0] == pytest.approx(100 * contrast.mean) and heat.bold == ((True,),)
    assert heat.reach == pytest.approx(100 * abs(contrast.mean))
    (row,) = interaction_table(comparison, analyses).rows
    assert row.cells[1].text == "(token \u2212 drop) at 0.9 \u2212 at 0.5"
    page = report_html(Report(comparison))
    assert 'id="interactions"' in page
    single = read_comparison(
        fake_comparison({"model.regime.name": ["drop", "token"]}, folder=comparison.folder / "one")
    )
    assert not interactions(single, analyse(single))


def test_what_is_not_shown_of_an_interaction_is_pale(fake_comparison: Write) -> None:
    axes = {"model.regime.name": ["drop", "token"], "mask.ratio": [0.5, 0.9], "seed": [0, 1, 2]}
    noise = iter(np.random.default_rng(1).normal(0.8, 0.03, 12))
    folder = fake_comparison(axes, linear=lambda *_: float(next(noise)), metrics=False)
    (heat,) = interaction_maps(comparison := read_comparison(folder), analyse(comparison))
    assert heat.bold == ((False,),) and abs(heat.values[0, 0]) < heat.reach / 2
    without = {**axes, "seed": [0, 1]}
    two = read_comparison(fake_comparison(without, metrics=False, folder=folder / "two"))
    (heat,) = interaction_maps(two, analyse(two))
    assert np.isnan(heat.values).all() and heat.reach == 1.0, "the margin, in points"


def test_interactions_are_not_shown_where_seeds_are_added_until_decided(
    fake_comparison: Write,
) -> None:
    axes = {"model.regime.name": ["drop", "token"], "mask.ratio": [0.5, 0.9], "seed": [0, 1, 2]}
    folder = fake_comparison(axes, metrics=False)
    assert "Interactions are not shown" not in report_markdown(Report(read_comparison(folder)))
    path = folder / "comparison.json"
    rule = {"seeds": {"least": 3, "most": 4, "until": "decided"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | rule))
    report = Report(read_comparison(folder))
    assert not report.heat_maps and "Interactions are not shown" in report_markdown(report)


@pytest.mark.parametrize(
    ("tried", "ticks"),
    [
        ([0.002, 0.008, 0.032], ["0.002", "0.008", "0.032"]),
        ([3.2213847, 3.4, 31.7], ["5", "10", "20"]),  # what was reached, and not chosen
        ([1e-3, 1.1e-3, 1.0], ["0.001", "0.01", "0.1", "1"]),  # too near to stand side by side
    ],
)
def test_a_logarithmic_axis_is_written_in_plain_numbers(
    tried: list[float], ticks: list[str]
) -> None:
    style = Style("#000000", "-", "o")
    x = np.array(tried)
    line = Line("drop", style, x, x, None, 1)
    label = "knn.accuracy on held-out training images"
    chart = Chart("key", "title", "base lr", label, "words", lines=(line,), x_log=True)
    svg = draw(chart, ("svg",))["svg"].decode()
    assert "$" not in svg
    written = re.findall("<!-- (.*?) -->", svg.partition('id="matplotlib.axis_2"')[0])
    assert written == [*ticks, "base lr"]
    assert "<!-- knn.accuracy on held-out -->" in svg, "a long label is two lines"


def test_a_legend_has_room() -> None:
    """Its columns are as many as fit, and one that is wider still widens the figure."""
    style, x = Style("#000000", "-", "o"), np.arange(2.0)

    def size(*labels: str) -> tuple[float, ...]:
        lines = tuple(Line(label, style, x, x, None, 1) for label in labels)
        chart = Chart("key", "title", "x", "y", "words", lines=lines)
        png = draw(chart, ("png",))["png"]
        return tuple(round(side / 200, 1) for side in Image.open(io.BytesIO(png)).size)

    assert size("drop", "zero", "token") == (4.6, 3.3)
    long = [f"{name} \u00b7 mask ratio 0.75" for name in ("drop", "zero", "token")]
    assert size(*long) == (4.6, 3.5), "two columns"
    assert size("drop \u00b7 mask ratio 0.75 \u00b7 " * 3)[0] > 5


def test_tuning_shows_the_curve_and_what_was_chosen(fake_comparison: Write) -> None:
    folder = fake_comparison({"model.regime.name": ["drop", "token"], "seed": [0, 1, 2]})
    comparison = read_comparison(folder)
    assert not tuning_table(comparison).rows and not tuning_charts(comparison)
    rates = [1e-3, 2e-3, 4e-3]

    def group(regime: str, chosen: float) -> dict[str, Any]:
        tried = [{"settings": {"optim.base_lr": r}, "values": [0.5 + r]} for r in rates]
        last = [{"settings": {"optim.base_lr": r}, "values": [0.6 + r]} for r in rates[:2]]
        last[0]["values"] = [None]
        rungs = [
            {"length": 0.5, "seeds": 1, "tried": tried}, {"length": 1.0, "seeds": 1, "tried": last},
        ]  # fmt: skip
        axes = {"model.regime.name": regime}
        ends = ["optim.base_lr"] if chosen == min(rates) else []
        return {"axes": axes, "rungs": rungs, "chosen": {"optim.base_lr": chosen}, "ends": ends}

    groups = [group("drop", 2e-3), group("token", 1e-3)]
    content = {"by": "linear.accuracy", "holdout": 0.2, "groups": groups}
    (folder / "tune.json").write_text(json.dumps(content))
    table = tuning_table(comparison)
    assert len(table.rows) == 2 * 5
    chosen = [row for row in table.rows if row.cells[1].note]
    assert [row.cells[1].text for row in chosen] == ["optim.base_lr 0.002", "optim.base_lr 0.001"]
    assert [row.cells[1].note for row in chosen] == [
        "chosen", "chosen; the end of what was tried: optim.base_lr",
    ]  # fmt: skip
    (chart,) = tuning_charts(comparison)
    assert [line.label for line in chart.lines] == ["drop: 0.002", "token: 0.001"]
    assert chart.lines[0].x.tolist() == rates and chart.x_log
    assert "## Tuning" in report_markdown(Report(comparison))


def test_classes_carry_intervals_and_holm(fake_comparison: Write) -> None:
    folder = fake_comparison({"model.regime.name": ["drop", "token"], "seed": [0, 1, 2]})
    labels = np.repeat(np.arange(3), 400)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for regime, low in (("drop", 0.9), ("token", 0.4)):
            right = rng.random(1200) < np.where(labels == 1, low, 0.8)
            arrays = {"linear/accuracy": right, "linear/labels": labels}
            path = folder / f"regime={regime},seed={seed}" / "predictions.npz"
            np.savez(path, **arrays, **{"linear/sample_ids": np.arange(1200)})
    comparison = read_comparison(folder)
    table = class_table(comparison, analyse(comparison))
    first, *others = table.rows
    assert first.cells[0].text == "class 1" and first.cells[-1].strong
    assert not any(row.cells[-1].strong for row in others)
    shares = [
        np.load(folder / f"regime={regime},seed={seed}" / "predictions.npz")["linear/accuracy"]
        for regime in ("drop", "token") for seed in range(3)
    ]  # fmt: skip
    means = np.array([share[labels == 1].mean() for share in shares]).reshape(2, 3)
    assert first.cells[-1].value == pytest.approx((means[0] - means[1]).mean())


def test_what_images_look_like_is_ranked_beside_the_difference(fake_comparison: Write) -> None:
    """``drop`` is right on bright images alone; nothing else about an image tells anything."""
    folder = fake_comparison({"model.regime.name": ["drop", "token"], "seed": [0, 1, 2]})
    looks = np.random.default_rng(0).random((300, 2))
    right = {"drop": looks[:, 0] > 0.5, "token": np.ones(300, bool)}
    for seed in range(3):
        for regime, own in right.items():
            arrays = {"linear/accuracy": own, "linear/sample_ids": np.arange(300)}
            np.savez(folder / f"regime={regime},seed={seed}" / "predictions.npz", **arrays)
    order = np.random.default_rng(1).permutation(300)[:200]  # of some images, in any order
    np.savez(
        folder / "disagreement.npz", statistic=np.array(["brightness", "detail", "colour"]),
        measured_ids=order, statistics=np.hstack([looks, np.zeros((300, 1))])[order],
    )  # fmt: skip
    comparison = read_comparison(folder)
    (row,) = image_table(comparison, analyse(comparison)).rows
    ranks = looks[order, 0].argsort().argsort()
    expected = np.corrcoef(ranks, rankdata(right["drop"][order]))[0, 1]
    assert row.cells[1].value == pytest.approx(expected) and row.cells[1].strong
    assert not row.cells[2].strong and len(row.cells) == 3, "what does not vary is left out"


def test_without_evaluations_no_reference_row_is_printed(fake_comparison: Write) -> None:
    comparison = read_comparison(fake_comparison(labelled=False, references=False))
    table = comparison_table(comparison, analyse(comparison))
    assert {row.kind for row in table.rows} == {"run"}
    assert "untrained encoder |" not in report_markdown(Report(comparison))
