"""Benchmark rows: what was measured, where, with which versions."""

from ptq4adm.bench.rows import append_rows, environment, read_rows

__all__ = ["append_rows", "environment", "read_rows"]
