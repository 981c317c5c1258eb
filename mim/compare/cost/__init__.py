"""What things cost, measured: `mim bench`."""

from mim.compare.cost.growth import bench_growth, format_growth, growth_figure
from mim.compare.cost.many import bench_index, bench_report, format_many
from mim.compare.cost.ranks import check_scale, format_check
from mim.compare.cost.scaling import Machine, bench_scale, format_scale
from mim.compare.cost.step import append_table, bench_step, format_table

__all__ = [
    "Machine",
    "append_table",
    "bench_growth",
    "bench_index",
    "bench_report",
    "bench_scale",
    "bench_step",
    "check_scale",
    "format_check",
    "format_growth",
    "format_many",
    "format_scale",
    "format_table",
    "growth_figure",
]
