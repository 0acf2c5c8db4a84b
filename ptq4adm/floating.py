"""`use_float_where_faster` for pipelines: float16 where a table of measured times says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptq4adm.dispatch import DispatchTable
from ptq4adm.models import find_adapter
from ptq4adm.nn import FloatReport, floating


def use_float_where_faster(
    pipe: Any, table: DispatchTable | str | Path | None = None
) -> FloatReport:
    """Let layers of a quantized denoiser run in float16 where a table says that this is faster.

    See `ptq4adm.nn.use_float_where_faster`; `ptq4adm.nn.use_packed_everywhere` undoes it.

    Args:
        pipe: a pipeline, or a bare denoiser, where it will run.
        table: measured times or their file; None for the one that holds for the device.

    Returns:
        What was decided, and why, with the bytes it costs; it is logged, too.

    Raises:
        DispatchTableError: if the table is wrong or of another device.
        ConfigError: if the denoiser is not quantized, or constant work is prepared now.
    """
    return floating.use_float_where_faster(find_adapter(pipe).denoiser(pipe), table)
