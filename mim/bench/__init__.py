"""What things cost, measured: `mim bench`."""

from mim.bench.step import append_table, bench_step, format_table

__all__ = ["append_table", "bench_step", "format_table"]
