"""A comparison of many runs has the same tables as one of few."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

from mim.report import read_comparison, write_report
from mim.report.collect import Comparison, Group
from mim.report.page import notes
from mim.report.statistics import MOST_PAIRED, pairs
from mim.report.tables import MOST_DRAWN, drawn

Fake = Callable[..., Path]


def by_hand(comparison: Comparison) -> list[tuple[str, Group, Group]]:
    """Every two groups, looked at one by one."""
    found = []
    for second, first in combinations(comparison.groups, 2):
        keys = dict.fromkeys([*second.axes, *first.axes])
        differing = [key for key in keys if first.axes.get(key) != second.axes.get(key)]
        if len(differing) == 1:
            found.append((differing[0], first, second))
    order = list(comparison.axes)
    return sorted(found, key=lambda pair: order.index(pair[0]))


def test_pairs_are_those_that_differ_in_one_axis(fake_comparison: Fake) -> None:
    axes = {
        "mask.ratio": [0.5, 0.75, 0.9],
        "model.regime.name": ["drop", "zero"],
        "train.epochs": [10, 20],
        "seed": [0, 1],
    }
    comparison = read_comparison(fake_comparison(axes, metrics=False))
    assert pairs(comparison) == by_hand(comparison) and len(pairs(comparison)) == 6 + 12 + 6


def test_many_values_of_an_axis_are_set_against_the_first(fake_comparison: Fake) -> None:
    ratios = [round(0.3 + 0.01 * place, 2) for place in range(MOST_PAIRED + 1)]
    comparison = read_comparison(
        fake_comparison({"mask.ratio": ratios, "seed": [0, 1]}, metrics=False)
    )
    found = pairs(comparison)
    assert [second.axes["mask.ratio"] for _, _, second in found] == [ratios[0]] * MOST_PAIRED
    assert [first.axes["mask.ratio"] for _, first, _ in found] == ratios[1:]
    assert any("against the first alone" in note for note in notes(comparison, []))


def test_a_page_draws_the_best_and_says_so(fake_comparison: Fake) -> None:
    ratios = [round(0.1 + 0.01 * place, 2) for place in range(MOST_DRAWN + 3)]
    folder = fake_comparison(
        {"mask.ratio": ratios, "seed": [0]},
        metrics=False,
        linear=lambda axes, seed: 0.9 - abs(axes["mask.ratio"] - 0.25),
    )
    comparison = read_comparison(folder)
    shown = [group.axes["mask.ratio"] for group in drawn(comparison).groups]
    assert shown == ratios[:MOST_DRAWN], "0.46 to 0.48 are farthest from 0.25"
    assert any(f"show the {MOST_DRAWN} groups" in note for note in notes(comparison, []))
    page = write_report(folder).read_text()
    assert "mask ratio 0.48" in page, "the tables hold all"
    few = read_comparison(fake_comparison(folder=folder.parent / "few", metrics=False))
    assert drawn(few) is few and not any("groups of" in note for note in notes(few, []))


def test_the_reference_of_each_group(fake_comparison: Fake) -> None:
    comparison = read_comparison(fake_comparison(metrics=False))
    for group in comparison.groups:
        for kind in ("untrained", "pixels"):
            found = comparison.reference(group, kind)
            assert found is not None and found.kind == kind
    own = Group("untrained (depth 2)", "untrained", {"depth": 2}, comparison.references[0].runs)
    other = Group("untrained (depth 3)", "untrained", {"depth": 3}, comparison.references[0].runs)
    each = Comparison(**{**vars_of(comparison), "references": (own, other)})
    assert each.reference(Group("a", "run", {"depth": 3, "x": 1}, ()), "untrained") is other
    assert each.reference(Group("a", "run", {"depth": 4}, ()), "untrained") is None
    assert each.reference(Group("a", "run", {"depth": 3}, ()), "pixels") is None


def vars_of(comparison: Comparison) -> dict[str, Any]:
    return {name: getattr(comparison, name) for name in Comparison.__dataclass_fields__}
