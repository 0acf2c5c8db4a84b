"""Benchmarks: real shapes, other libraries' kernels, timing, rows that say what was measured."""

from ptq4adm.bench.rows import append_rows, environment, read_rows, write_rows

__all__ = ["append_rows", "environment", "read_rows", "write_rows"]
