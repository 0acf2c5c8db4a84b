"""Which backend is faster where: tables of measured times, and the choice that follows from one.

Owns the table's format, its strict reader, where tables lie and the rule of the choice. It measures
nothing (`ptq4adm.bench` does, and makes tables of its rows) and asks no device: `ptq4adm.ops` says
what can run, `ptq4adm.nn` which layer asks.
"""

from ptq4adm.dispatch.choice import Choice, choose_backend, compare_float
from ptq4adm.dispatch.files import VARIABLE, describe_table, find_table, table_path
from ptq4adm.dispatch.table import (
    GPU_BACKENDS,
    KINDS,
    DispatchTable,
    LayerKey,
    Times,
    load_table,
    save_table,
)

__all__ = [
    "GPU_BACKENDS",
    "KINDS",
    "VARIABLE",
    "Choice",
    "DispatchTable",
    "LayerKey",
    "Times",
    "choose_backend",
    "compare_float",
    "describe_table",
    "find_table",
    "load_table",
    "save_table",
    "table_path",
]
