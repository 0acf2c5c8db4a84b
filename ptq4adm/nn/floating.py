"""Layers that run in float16 where a table says that this is faster: opt-in, reported, undoable.

What is decided together is a *unit*: the layers of one fused part (a query without its keys would
break the part), or one layer that runs unfused. A unit runs in float16 if its layers take less time
so, summed over the table; blocks are fused anew afterwards. Nothing here is called unless someone
asks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ptq4adm.dispatch import DispatchTable, compare_float, find_table, load_table
from ptq4adm.dispatch.files import check_device
from ptq4adm.errors import ConfigError, RangeError
from ptq4adm.nn.base import QuantizedLayer
from ptq4adm.nn.forwards import is_hoisted
from ptq4adm.nn.fuse import fuse_blocks
from ptq4adm.nn.fusing import FusedBlock
from ptq4adm.nn.storage import resident_bytes
from ptq4adm.ops import device_name

__all__ = ["FloatReport", "FloatUnit", "use_float_where_faster", "use_packed_everywhere"]

logger = logging.getLogger(__name__)

_MB = 1e6
# layers of fused parts that quantize their input in a pass of its own
_OWN_QUANTIZER = ("to_out.0", "proj_out")


@dataclass(frozen=True)
class FloatUnit:
    """Layers that were decided together.

    Attributes:
        name: of the fused part, or of the layer.
        layers: names of the layers.
        is_float: whether they run in float16 now.
        reason: times, or why there are none.
    """

    name: str
    layers: tuple[str, ...]
    is_float: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {'float16' if self.is_float else 'packed'} ({self.reason})"


@dataclass(frozen=True)
class FloatReport:
    """What runs in float16 and why; `str()` has a line each.

    Attributes:
        units: in module order.
        bytes_before: resident with every layer packed.
        bytes_after: resident now.
    """

    units: tuple[FloatUnit, ...]
    bytes_before: int
    bytes_after: int

    def summary(self) -> str:
        """One line."""
        chosen = sum(len(unit.layers) for unit in self.units if unit.is_float)
        total = sum(len(unit.layers) for unit in self.units)
        return (
            f"{chosen} of {total} packed layers run in float16: {self.bytes_before / _MB:.2f} MB "
            f"resident before, {self.bytes_after / _MB:.2f} MB now"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe content."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.units), self.summary()])


@dataclass(frozen=True)
class _Unit:
    """Layers of one decision, by name; those whose input comes quantized from a fused pass."""

    name: str
    layers: dict[str, QuantizedLayer]
    fused: frozenset[str] = frozenset()


def use_float_where_faster(
    denoiser: nn.Module, table: DispatchTable | str | Path | None = None
) -> FloatReport:
    """Let layers of a quantized model run in float16 where its device's table says it is faster.

    Such a layer keeps its weight in float16, decoded from the packed one, which it replaces: four
    (W4) or two (W8) times the memory, counted by `resident_bytes`. Its activations are not
    quantized. `state_dict` gives the packed weight, bit for bit. A model that is moved to another
    device is packed there; CUDA graphs that were captured before are not touched.

    Args:
        denoiser: a quantized model, where it will run.
        table: measured times or their file; None for the one that holds for the device.

    Returns:
        What was decided, and why; it is logged, too.

    Raises:
        DispatchTableError: if the table is wrong or of another device.
        ConfigError: if no layer is packed, or constant work is prepared now.
    """
    layers = _layers(denoiser)
    called = device_name(next(iter(layers.values())).w_scale.device)
    if isinstance(table, (str, Path)):
        table = load_table(Path(table))
    if table is not None:
        check_device(table, called)
    elif called is not None:
        table = find_table(called)
    _pack(denoiser, layers)
    before = resident_bytes(denoiser)
    units = tuple(_decide(unit, table) for unit in _units(denoiser, layers))
    if any(unit.is_float for unit in units):
        fuse_blocks(denoiser)
    report = FloatReport(units, before, resident_bytes(denoiser))
    logger.info("float16 where faster: %s", report.summary())
    return report


def float_units(
    denoiser: nn.Module,
    table: DispatchTable | None,
    backend_of: Callable[[QuantizedLayer], str] = lambda layer: layer.backend,
) -> tuple[FloatUnit, ...]:
    """What `use_float_where_faster` would decide; changes nothing.

    Args:
        denoiser: a quantized model.
        table: measured times; None decides for packed.
        backend_of: what a packed layer runs on.

    Raises:
        ConfigError: if no layer is packed, or constant work is prepared now.
    """
    return tuple(
        FloatUnit(unit.name, tuple(unit.layers), *_compare(unit, table, backend_of))
        for unit in _units(denoiser, _layers(denoiser))
    )


def use_packed_everywhere(denoiser: nn.Module) -> None:
    """Undo `use_float_where_faster`.

    Raises:
        ConfigError: if no layer is packed, or constant work is prepared now.
    """
    _pack(denoiser, _layers(denoiser))


def _layers(denoiser: nn.Module) -> dict[str, QuantizedLayer]:
    found = {n: m for n, m in denoiser.named_modules() if isinstance(m, QuantizedLayer)}
    if not found:
        raise ConfigError(
            f"{type(denoiser).__name__} has no packed layer; quantize it first, or load a "
            "quantized model"
        )
    if any(map(is_hoisted, denoiser.modules())):
        raise ConfigError(
            f"{type(denoiser).__name__}: what is prepared now depends on its layers; leave the "
            "`prepared` block first"
        )
    return found


def _pack(denoiser: nn.Module, layers: dict[str, QuantizedLayer]) -> None:
    floats = [layer for layer in layers.values() if layer.is_float]
    for layer in floats:
        layer.use_packed()
    if floats:
        fuse_blocks(denoiser)


def _units(denoiser: nn.Module, layers: dict[str, QuantizedLayer]) -> Iterator[_Unit]:
    """The fused parts, in module order, then what is left."""
    left = dict(layers)
    for name, block in denoiser.named_modules():
        if not isinstance(block, FusedBlock) or block.fusion.find_change() is not None:
            continue
        for part in block.fusion.fused:
            path = f"{name}.{part}" if name else part
            inside = {n: left.pop(n) for n in list(left) if n == path or n.startswith(path + ".")}
            # a convolution that enlarges quantizes the small tensor first
            is_upsampler = part == "conv"
            fused = {n for n in inside if not n.endswith(_OWN_QUANTIZER) and not is_upsampler}
            if inside:
                yield _Unit(path, inside, frozenset(fused))
    for name, layer in left.items():
        yield _Unit(name, {name: layer})


def _decide(unit: _Unit, table: DispatchTable | None) -> FloatUnit:
    names = tuple(unit.layers)
    is_float, reason = _compare(unit, table, lambda layer: layer.backend)
    if is_float:
        changed: list[QuantizedLayer] = []
        try:
            for layer in unit.layers.values():
                layer.use_float(reason)
                changed.append(layer)
        except RangeError as error:
            for layer in changed:
                layer.use_packed()
            is_float, reason = False, str(error)
    return FloatUnit(unit.name, names, is_float, reason)


def _compare(
    unit: _Unit, table: DispatchTable | None, backend_of: Callable[[QuantizedLayer], str]
) -> tuple[bool, str]:
    """Whether a unit is faster in float16, and the times."""
    if table is None:
        return False, "no table for this device"
    half = packed = 0.0
    places: dict[str, None] = {}
    names: dict[str, None] = {}
    for name, layer in unit.layers.items():
        if layer.key is None:
            return False, f"{name}: layers of this kind are not in tables"
        backend, is_fused = backend_of(layer), name in unit.fused
        found = compare_float(table, layer.key, rows=layer.rows, backend=backend, is_fused=is_fused)
        if found is None:
            near = "" if layer.rows is None else f" near M {layer.rows}"
            return False, f"{name}: no times of {layer.key} in float16 and {backend}{near}"
        names[backend] = None
        half += found.float16_us
        packed += found.packed_us
        places[found.where] = None
    reason = f"float16 {half:.4g} us, {'/'.join(names)} {packed:.4g} us at {', '.join(places)}"
    return half < packed, reason
