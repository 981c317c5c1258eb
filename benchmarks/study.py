"""Write the study: gather what its comparisons measured, and draw every figure of its page.

``python -m benchmarks.study FOLDER...`` puts the runs of comparison folders into
``docs/study/results.csv``, each in the place of the same run from before, and draws the tables of
``docs/study.md`` and of the README and the frontier from that file alone; without a folder it only
draws them.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from mim.compare.sequential import SeedRule, follow, nominal_level
from mim.compare.statistics import (
    LEVEL,
    Design,
    Difference,
    Family,
    Spread,
    difference,
    is_share,
    pooled_spread,
)
from mim.core.files import write_atomic, write_text_atomic
from mim.report.collect import read_comparison
from mim.report.tables import results_csv

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "study" / "results.csv"
FRONTIER = ROOT / "docs" / "images" / "frontier.png"
PAGES = (ROOT / "docs" / "study.md", ROOT / "README.md")
_HEADER = "# What each run of docs/study.md measured. `python -m benchmarks.study` draws the page"
_TUNE, _STUDY, _SHORT, _LONG = "tune", "cifar10", "short", "long"
_TINY_TUNE, _TINY = "tiny-tune", "tiny"
_SAME_RUN = ("piece", "variant", "optim.base_lr", "seed", "kind")
_RATE = "optim.base_lr"
MARGIN = 0.015
"""Within this two groups are as good as each other; configs/study/cifar10.yaml says the same."""
RULE = SeedRule(least=3, most=5)
"""How many seeds decide; configs/study/cifar10.yaml says the same."""
_MEASURES = {
    "linear.accuracy": "linear probe (%)",
    "knn.accuracy": "k-NN (%)",
    "finetune.accuracy": "fine-tuned on 10 % of labels (%)",
}
PRIMARY = "linear.accuracy"
_SECONDARY = tuple((_STUDY, key) for key in _MEASURES if key != PRIMARY)
_LABELS = {"1 %": "labels-1", "10 %": _LONG, "100 %": "labels-100"}
"""Share of the labels on which encoders of nine epochs are fine-tuned -> its piece."""
_TUNED = "finetune.accuracy"
_REFERENCES = {"untrained": "untrained", "pixels": "raw pixels"}
Row = dict[str, str]


def gather(folders: Iterable[Path], before: Sequence[Row] = ()) -> str:
    """The finished runs of some comparisons in one table, with the folder's name before each.

    Args:
        folders: of the comparisons.
        before: rows that are kept; what a folder has measured of the same run replaces theirs.
    """
    rows = {_same_run(row): row for row in before}
    for folder in folders:
        found = csv.DictReader(io.StringIO(results_csv(read_comparison(folder))))
        known = (row for row in found if row["status"] == "finished")
        # Raw pixels of Tiny-ImageNet have no linear probe.
        measured = (row for row in known if row.get(PRIMARY) or row["kind"] == "pixels")
        for row in ({"piece": folder.name, **row} for row in measured):
            own = {key: value for key, value in row.items() if value}
            rows[_same_run(row)] = rows.get(_same_run(row), {}) | own
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    return f"{_HEADER}\n{table.getvalue()}"


def _same_run(row: Row) -> tuple[str, ...]:
    return tuple(row.get(key) or "" for key in _SAME_RUN)


def read(text: str) -> list[Row]:
    """The rows of ``docs/study/results.csv``."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def _values(
    rows: Iterable[Row], kind: str, measure: str, piece: str = _STUDY
) -> dict[str, dict[int, float]]:
    """Group -> seed -> value of the rows of one kind in one piece of the study."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["piece"] == piece and row["kind"] == kind and row.get(measure):
            group = row.get("variant") or kind
            found.setdefault(group, {})[int(row["seed"] or 0)] = float(row[measure])
    return found


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, marks, *rows])


def rates(rows: Sequence[Row], piece: str = _TUNE) -> str:
    """The probe of each rate on the split of train, the best of each group in bold."""
    curves: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["piece"] == piece and row["kind"] == "run" and row.get(PRIMARY):
            curves.setdefault(row["variant"], {})[float(row[_RATE])] = float(row[PRIMARY])
    tried = sorted({rate for curve in curves.values() for rate in curve})
    return _table(
        ["encoder", *(f"{rate:g}" for rate in tried)],
        [
            [f"`{group}`", *(_best(curve.get(rate), max(curve.values())) for rate in tried)]
            for group, curve in curves.items()
        ],
    )


def _best(value: float | None, best: float) -> str:
    if value is None:
        return "\u2013"
    text = f"{100 * value:.1f}"
    return f"**{text}**" if value == best else text


def chosen_rates(rows: Sequence[Row], piece: str = _TUNE) -> dict[str, float]:
    """Group -> the rate of the best probe on the split of train; of equals the smaller."""
    best: dict[str, tuple[float, float]] = {}
    for row in rows:
        if row["piece"] == piece and row["kind"] == "run" and row.get(PRIMARY):
            found = float(row[PRIMARY]), -float(row[_RATE])
            best[row["variant"]] = max(best.get(row["variant"], found), found)
    return {group: -rate for group, (_, rate) in best.items()}


def results(rows: Sequence[Row], piece: str = _STUDY) -> str:
    """Mean and spread of each group by each measure, and what it costs to train."""
    own = [row for row in rows if row["piece"] == piece]
    measures = {key: head for key, head in _MEASURES.items() if any(row.get(key) for row in own)}
    measured = [kind for kind in _REFERENCES if _values(rows, kind, PRIMARY, piece)]
    groups = [*_values(rows, "run", PRIMARY, piece), *measured]
    lines = []
    for group in groups:
        kind = group if group in _REFERENCES else "run"
        cells = [_summary(_values(own, kind, key, piece).get(group, {}), key) for key in measures]
        lines.append([_REFERENCES.get(group, f"`{group}`"), *cells, *_cost(own, group)])
    cost = ["tokens in the encoder", "GFLOPs an image, forward + backward"]
    return _table(["encoder", *measures.values(), *cost], lines)


def _cost(rows: Iterable[Row], group: str) -> tuple[str, str]:
    for row in rows:
        if row.get("variant") == group and row["kind"] == "run":
            flops = float(row["flops_forward"]) + float(row["flops_backward"])
            return f"{float(row['encoder_tokens']):g}", f"{flops / 1e9:.3f}"
    return "\u2013", "\u2013"


def _summary(values: Mapping[int, float], measure: str) -> str:
    if not values:
        return "\u2013"
    scale = 100.0 if is_share(measure.partition(".")[2]) else 1.0
    each = scale * np.array(list(values.values()))
    mean = f"{each.mean():.1f}"
    return f"{mean} ± {each.std(ddof=1):.1f}" if len(each) > 1 else mean


def _family(values: Mapping[str, Mapping[int, float]], spread: Spread | None) -> Family:
    count = len(values) * (len(values) - 1) // 2
    pooled = spread is not None and spread.pooled
    return Family("pairs" if pooled else "separate", len(values), count)


def differences(rows: Sequence[Row], piece: str = _STUDY) -> str:
    """All pairs by the primary measure, with the intervals and verdicts of all looks."""
    values = _values(rows, "run", PRIMARY, piece)
    found = follow(values, RULE, MARGIN)
    lines = [
        [f"`{one}` \u2212 `{other}`", *_points(each), str(each.n), _verdict(each)]
        for (one, other), each in found.differences.items()
    ]
    return _table(["difference", "points", "95 % interval", "seeds", "verdict"], lines)


def _points(found: Difference) -> tuple[str, str]:
    if found.low is None or found.high is None:
        return f"{100 * found.mean:+.1f}", "\u2013"
    return f"{100 * found.mean:+.1f}", f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"


def _verdict(found: Difference) -> str:
    if found.shown:
        return "a difference"
    return f"as good within {100 * MARGIN:g} points" if found.is_within(MARGIN) else "undecided"


def shown(rows: Sequence[Row], measured: Sequence[tuple[str, str]] = _SECONDARY) -> str:
    """The pairs that differ, in intervals that hold for all pairs by all measures at once.

    Args:
        rows: of the results.
        measured: piece and measure of each family of pairs.
    """
    lines = []
    for piece, measure in measured:
        values = _values(rows, "run", measure, piece)
        spread = pooled_spread(values)
        family, level = _family(values, spread), LEVEL / len(measured)
        for one, other in itertools.combinations(values, 2):
            each = difference(values[one], values[other], family, spread, level=level)
            if each is not None and each.shown:
                pair = f"`{one}` \u2212 `{other}`, {_name(measure)}"
                lines.append([pair, *_points(each), str(each.n)])
    return _table(["difference shown", "points", "95 % interval", "seeds"], lines)


def _name(measure: str) -> str:
    return _MEASURES[measure].removesuffix(" (%)")


def references(rows: Sequence[Row], piece: str = _STUDY) -> str:
    """Each group minus the untrained encoder (which fine-tuned is scratch) and raw pixels."""
    lines, kinds = [], [kind for kind in _REFERENCES if _values(rows, kind, PRIMARY, piece)]
    for measure in _MEASURES:
        values = _values(rows, "run", measure, piece)
        family = Family("separate", count=max(len(values), 1))
        others = {kind: _values(rows, kind, measure, piece).get(kind, {}) for kind in kinds}
        spread = pooled_spread({**values, "untrained": others["untrained"]})
        for group, own in values.items():
            found = [difference(own, others["untrained"], family, spread)]
            if "pixels" in kinds:  # one value, which has no spread
                constant = {seed: value for value in others["pixels"].values() for seed in own}
                found.append(difference(own, constant, family))
            lines.append([f"`{group}`, {_name(measure)}", *map(_interval, found)])
    return _table(["encoder, measure", *(f"minus {_REFERENCES[kind]}" for kind in kinds)], lines)


def _interval(found: Difference | None) -> str:
    return "\u2013" if found is None else "{} ({})".format(*_points(found))


def labels(rows: Sequence[Row]) -> str:
    """Encoders of nine epochs fine-tuned on shares of the labels, and what that is above scratch.

    The intervals hold for all groups and shares at once.
    """
    found = {share: _values(rows, "run", _TUNED, piece) for share, piece in _LABELS.items()}
    scratch = {
        share: _values(rows, "untrained", _TUNED, piece).get("untrained", {})
        for share, piece in _LABELS.items()
    }
    groups = list(dict.fromkeys(group for own in found.values() for group in own))
    family = Family("separate", count=max(len(groups) * len(found), 1))
    spreads = {s: pooled_spread({**own, "scratch": scratch[s]}) for s, own in found.items()}
    lines = []
    for group in groups:
        values = {share: own.get(group, {}) for share, own in found.items()}
        means = [_summary(each, _TUNED) for each in values.values()]
        above = [difference(own, scratch[s], family, spreads[s]) for s, own in values.items()]
        lines.append([f"`{group}`", *means, *map(_interval, above)])
    means = [_summary(each, _TUNED) for each in scratch.values()]
    lines.append(["scratch", *means, *["\u2013"] * len(means)])
    heads = [*(f"{share} (%)" for share in found), *(f"{share}, minus scratch" for share in found)]
    return _table(["encoder", *heads], lines)


def power(rows: Sequence[Row]) -> str:
    """What the design could have shown: the smallest difference with 80 % power."""
    lines, secondary = [], LEVEL / len(_SECONDARY)
    for measure in _MEASURES:
        values = _values(rows, "run", measure)
        spread = pooled_spread(values) if len(values) > 1 else None
        if spread is None:
            continue
        seeds = min(map(len, values.values()))
        family = _family(values, spread)
        level = nominal_level(seeds, RULE, family) if measure == PRIMARY else secondary
        smallest = Design(family, seeds, spread.sd, level).smallest()
        least = "\u2013" if smallest is None else f"{100 * smallest:.1f}"
        lines.append([_name(measure), str(seeds), f"{100 * spread.sd:.2f}", str(spread.df), least])
    heads = ["measure", "seeds", "residual SD", "degrees of freedom", "smallest difference shown"]
    return _table(heads, lines)


def lengths(rows: Sequence[Row]) -> str:
    """Each group at each length that was trained, by what its training cost."""
    lines = []
    for (piece, group), run in _trained(rows).items():
        linear, knn = (_values(rows, "run", key, piece)[group] for key in (PRIMARY, "knn.accuracy"))
        cells = [_summary(linear, PRIMARY), _summary(knn, "knn.accuracy"), str(len(linear))]
        lines.append(
            [f"`{_regime(group)}`", f"{float(run['epochs']):.3g}", f"{_teraflops(run):.1f}", *cells]
        )
    heads = ["encoder", "epochs", "TFLOPs of training", "linear probe (%)", "k-NN (%)", "seeds"]
    return _table(heads, sorted(lines, key=lambda line: float(line[2])))


def _trained(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """(piece, group) -> a run of it, for every group at every length."""
    return {
        (row["piece"], row["variant"]): row
        for row in rows
        if row["piece"] in (_STUDY, _SHORT, _LONG) and row["kind"] == "run"
    }


def _regime(group: str) -> str:
    """The group's regime, whatever its length."""
    return group.partition(", FLOPs")[0]


def _teraflops(run: Row) -> float:
    return float(run["train_flops"]) / 1e12


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "rates": rates,
    "results": results,
    "differences": differences,
    "secondary": shown,
    "lengths": lengths,
    "nine_epochs": partial(shown, measured=[(_LONG, key) for key in _MEASURES]),
    "labels": labels,
    "references": references,
    "power": power,
    "tiny_rates": partial(rates, piece=_TINY_TUNE),
    "tiny_results": partial(results, piece=_TINY),
    "tiny_differences": partial(differences, piece=_TINY),
    "tiny_references": partial(references, piece=_TINY),
}
"""Name between the page's marks -> what draws it."""


def frontier(rows: Sequence[Row], path: Path) -> None:
    """Draws what is reached at which cost, as PNG: mean and range over seeds of each length."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    curves: dict[str, list[tuple[float, list[float]]]] = {}
    for (piece, group), run in _trained(rows).items():
        values = _values(rows, "run", PRIMARY, piece)[group].values()
        points = curves.setdefault(_regime(group), [])
        points.append((_teraflops(run), [100 * value for value in values]))
    for place, (group, points) in enumerate(curves.items()):
        points.sort()
        mean = np.array([np.mean(values) for _, values in points])
        low, high = (np.array([end(values) for _, values in points]) for end in (min, max))
        reach = [mean - low, high - mean]
        axes.errorbar(
            [x for x, _ in points], mean, reach, marker="osD^"[place], capsize=3, label=group
        )
    for (kind, label), style in zip(_REFERENCES.items(), ("--", ":"), strict=True):
        level = np.mean(list(_values(rows, kind, PRIMARY)[kind].values()))
        axes.axhline(100 * float(level), color="0.4", linestyle=style, label=label)
    axes.set(xscale="log", xlabel="TFLOPs of training", ylabel="linear probe (%)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, format="png", dpi=160)


def draw(page: str, rows: Sequence[Row]) -> str:
    """The page with every table drawn again between ``<!-- NAME -->`` and ``<!-- / -->``."""

    def drawn(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{TABLES[match[1]](rows)}\n\n<!-- / -->"

    return re.sub(r"<!-- (\w+) -->.*?<!-- / -->", drawn, page, flags=re.DOTALL)


def main(args: Sequence[str] | None = None) -> None:
    """Gathers, where folders are given, and draws."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="of comparisons")
    folders = parser.parse_args(args).folders
    if folders:
        write_text_atomic(RESULTS, gather(folders, read(RESULTS.read_text())))
    rows = read(RESULTS.read_text())
    write_atomic(FRONTIER, partial(frontier, rows))
    for page in PAGES:
        write_text_atomic(page, draw(page.read_text(), rows))


if __name__ == "__main__":
    main()
