"""What things cost, measured: `mim bench`."""

from mim.compare.cost.growth import bench_growth, format_growth, growth_figure
from mim.compare.cost.step import append_table, bench_step, format_table

__all__ = [
    "append_table",
    "bench_growth",
    "bench_step",
    "format_growth",
    "format_table",
    "growth_figure",
]
