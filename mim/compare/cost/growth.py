"""How time and memory of a training step grow with one setting: `mim bench grow`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from scipy import stats

from mim.compare.cost.step import bench_step, describe, with_regime
from mim.core.config import Config
from mim.core.errors import setting_error

_LINES = {"drop": "-", "zero": "--", "token": "-."}
_MARKERS = {"drop": "o", "zero": "s", "token": "^"}
_LOGARITHMIC = 4.0  # the span of values, as a factor, from which an axis is logarithmic


class Fit(NamedTuple):
    """``y = intercept + slope * x`` and ``y ~ x ** exponent`` by least squares, with their R2."""

    intercept: float
    slope: float
    linear_r2: float
    exponent: float
    power_r2: float


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """How y grows with x; both positive, at least two different x."""
    line = stats.linregress(x, y)
    power = stats.linregress(np.log(x), np.log(y))
    r2 = [1.0 if len(set(y)) == 1 else float(found.rvalue**2) for found in (line, power)]
    return Fit(float(line.intercept), float(line.slope), r2[0], float(power.slope), r2[1])


def bench_growth(
    key: str, configs: Mapping[str, Config], regimes: Sequence[str], rounds: int = 3, steps: int = 1
) -> dict[str, Any]:
    """Time and weigh training steps of configs that differ in one setting, under several regimes.

    Args:
        key: the setting's dotted name.
        configs: its values, as written, and the config with each.
        regimes: names of regimes.
        rounds, steps: as for :func:`bench_step`; all values of all regimes are interleaved.

    Returns:
        What :func:`bench_step` returns, with ``over`` (the setting), ``values``, and under
        ``curves`` for each regime its rows in the order of the values, and under ``fits``, where
        the values are numbers above 0, :class:`Fit` of ``seconds_per_step`` and of
        ``step_memory``, the bytes that a step adds at its peak to weights, moments and images.

    Raises:
        UserError: for a mistake in the arguments or the configs.
    """
    if key == "model.regime.name":
        raise setting_error("--over", key, "is what --regimes gives; name another setting")
    if len(configs) < 2:
        raise setting_error("--over", ",".join(configs), f"must give two values of {key} or more")
    variants = {
        f"{regime} {value}": with_regime(config, regime)
        for regime in regimes
        for value, config in configs.items()
    }
    first = next(iter(configs.values()))
    figures = bench_step(first, [], rounds, steps, variants=variants)
    rows = figures.pop("regimes")
    for row in rows.values():
        row["step_memory"] = row["peak_memory"] - row["kept_memory"]
    curves = {regime: [rows[f"{regime} {value}"] for value in configs] for regime in regimes}
    x = _numbers(list(configs))
    fits = {}
    if x is not None and min(x) > 0 and len(set(x)) > 1:
        fits = {
            regime: {
                measure: fit(x, [row[measure] for row in curve])._asdict()
                for measure in ("seconds_per_step", "step_memory")
            }
            for regime, curve in curves.items()
        }
    return {**figures, "over": key, "values": list(configs), "curves": curves, "fits": fits}


def _numbers(values: Sequence[str]) -> list[float] | None:
    """The values as numbers, where all are."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return None


def format_growth(figures: dict[str, Any]) -> str:
    """The figures as Markdown tables, with the machine in front."""
    key = figures["over"].rpartition(".")[2]
    rows = [
        f"| regime | {key} | ms a step (median) | least to most | images/s | encoder tokens "
        "| GFLOPs an image | peak memory, GiB | of it a step's own, GiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for regime, curve in figures["curves"].items():
        for value, row in zip(figures["values"], curve, strict=True):
            flops = (row["flops_forward"] + row["flops_backward"]) / 1e9
            images = row["seconds_per_step"] * row["images_per_second"]
            rows.append(
                f"| {regime} | {value} | {1e3 * row['seconds_per_step']:,.0f} "
                f"| {1e3 * images / row['fastest']:,.0f} to {1e3 * images / row['slowest']:,.0f} "
                f"| {row['images_per_second']:,.1f} | {row['encoder_tokens']:.0f} | {flops:.3g} "
                f"| {row['peak_memory'] / 2**30:.3g} | {row['step_memory'] / 2**30:.3g} |"
            )
    if figures["fits"]:
        rows += [
            "",
            f"| regime | time of a step, ms, x = {key} | R² | as a power | R² "
            "| memory of a step, MiB | R² | as a power | R² |",
            "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
        ]
    for regime, found in figures["fits"].items():
        parts = [regime]
        for measure, unit in (("seconds_per_step", 1e-3), ("step_memory", 2**20)):
            law = Fit(**found[measure])
            line = f"{law.intercept / unit:,.3g} + {law.slope / unit:,.3g} x"
            parts += [line, f"{law.linear_r2:.3f}", f"x^{law.exponent:.2f}", f"{law.power_r2:.3f}"]
        rows.append(f"| {' | '.join(parts)} |")
    return "\n".join([describe(figures), "", *rows])


def growth_figure(figures: dict[str, Any], colours: Mapping[str, str] | None = None) -> Figure:
    """Draw time of a step and peak memory over the setting, a line a regime.

    Args:
        figures: what :func:`bench_growth` returns.
        colours: by regime; by default matplotlib's own.
    """
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    panels = figure.subplots(1, 2)
    values = figures["values"]
    numbers = _numbers(values)
    x = list(range(len(values))) if numbers is None else numbers
    logarithmic = numbers is not None and min(x) > 0 and max(x) >= _LOGARITHMIC * min(x)
    measures = {
        "seconds_per_step": ("time of a step (s)", 1.0),
        "peak_memory": ("peak memory (GiB)", 2.0**30),
    }
    for axis, (measure, (label, unit)) in zip(panels, measures.items(), strict=True):
        for regime, curve in figures["curves"].items():
            axis.plot(
                x,
                [row[measure] / unit for row in curve],
                color=(colours or {}).get(regime),
                linestyle=_LINES.get(regime, ":"),
                marker=_MARKERS.get(regime, "D"),
                markersize=4,
                label=regime,
            )
        axis.set_xlabel(figures["over"])
        axis.set_ylabel(label)
        if logarithmic:
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(FuncFormatter(_of_few(axis)))
        else:
            axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(FixedLocator(x))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(x, values)
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
    panels[0].legend(frameon=False)
    machine = figures["environment"]
    figure.suptitle(
        f"{machine['device']}, {figures['threads']} threads, {figures['precision']}, "
        f"torch {machine['torch']}, {figures['date']}",
        fontsize=8,
    )
    return figure


def _of_few(axis: Axes) -> Any:
    """Label 2 and 5 of a decade, where the axis spans less than two."""

    def label(value: float, _: Any) -> str:
        low, high = axis.get_ylim()
        lead = f"{value:.6e}".partition("e")[0]
        return f"{value:g}" if high < 100 * low and float(lead) in (2.0, 5.0) else ""

    return label
