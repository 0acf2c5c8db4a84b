"""The modules that rows of a plan become, and the integers that a method puts into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ptq4adm.calibration import Calibration
from ptq4adm.config import QuantConfig, Scheme
from ptq4adm.nn import QuantizedLayer, StepIndex, StorageLayer
from ptq4adm.nn.replace import quantized_layer
from ptq4adm.quant.affine import QuantizedRows
from ptq4adm.quant.plan import PlanRow
from ptq4adm.rounding import LayerTask, ShiftedRows


def planned_layer(
    layer: nn.Module,
    row: PlanRow,
    config: QuantConfig,
    calibration: Calibration | None,
    step: StepIndex | None,
) -> StorageLayer:
    """The module that a row of a plan puts in the place of a float layer.

    Args:
        layer: `nn.Linear` or `nn.Conv2d`; it is not changed.
        row: its row.
        config: observers, groups, backend.
        calibration: needed where the row's activations are static.
        step: which bucket is in use; None for dynamic activations.

    Raises:
        NonFiniteError: if its weight cannot be stored.
    """
    x_scale = None
    if row.activation == "static" and calibration is not None:
        x_scale = calibration.scales(row.name, config.activation_observer, config.percentile)
    replacement = quantized_layer(
        layer,
        Scheme(row.scheme),
        x_scale=x_scale,
        step=step,
        segments=row.segments,
        group_size=config.group_size,
        weight_observer=config.weight_observer,
        backend=config.backend,
    )
    if isinstance(replacement, QuantizedLayer) and calibration is not None:
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        replacement.expect_rows(calibration.rows_per_step(row.name, layer))
    return replacement


def layer_tasks(
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    rows: Sequence[PlanRow],
    replacements: Mapping[str, StorageLayer],
    calibration: Calibration | None,
) -> list[LayerTask]:
    """What a rounding method is given: the layers whose activations are quantized.

    Args:
        layers: float layers by name.
        rows: of the plan.
        replacements: the modules of all rows, rounded plainly.
        calibration: None with dynamic scales.
    """
    tasks = []
    for row in rows:
        packed = replacements[row.name]
        if not isinstance(packed, QuantizedLayer):
            continue
        static = calibration if row.activation == "static" else None
        task = LayerTask(
            name=row.name,
            layer=layers[row.name],
            layout=packed.layout,
            bits=packed.bits,
            start=packed.quantized_rows(),
            x_scale=packed.x_scale,
            buckets=None if static is None else static.buckets,
        )
        tasks.append(task)
    return tasks


def put_rows(replacements: Mapping[str, StorageLayer], found: Mapping[str, QuantizedRows]) -> None:
    """Give the new modules the integers that a method found."""
    for name, rows in found.items():
        packed = replacements[name]
        assert isinstance(packed, QuantizedLayer)
        packed.set_rows(rows)
        if isinstance(rows, ShiftedRows) and rows.bias_shift is not None:
            assert packed.bias is not None
            packed.bias = packed.bias + rows.bias_shift.to(packed.bias.device)
