"""One device's table of measured times: its types, its JSON, its strict reader.

    {"format": "ptq4adm-dispatch", "version": 1, "device": "<as the driver calls it>",
     "runs": [{"date": ..., "commit": ..., "torch": ..., ...}],
     "layers": [{"kind": "conv3x3", "bits": 4, "N": 320, "K": 2880,
                 "rows": [{"M": 8192, "run": 0, "float16_us": 50.1,
                           "product_us": {"cuda": 31.2, "triton": 35.0},
                           "layer_us": {"cuda": 36.0, "triton": 39.8},
                           "failed": {}}]}]}

Whatever is missing, unknown, of another type or stands twice is an error that names the place: a
table that is half understood would choose kernels silently.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ptq4adm.errors import DispatchTableError, OutputError

FORMAT, VERSION = "ptq4adm-dispatch", 1
# as the benchmarks call them (`ptq4adm.bench.shapes`)
LINEAR, CONV1X1, CONV3X3, CONV3X3_DOWN, CONV3X3_UP = KINDS = (
    "linear",
    "conv1x1",
    "conv3x3",
    "conv3x3-stride2",
    "conv3x3-upsample",
)
BACKENDS = ("cuda", "triton", "cpu")
GPU_BACKENDS = ("triton", "cuda")  # between which auto chooses; the usual one first
RUN_COLUMNS = ("date", "commit", "torch", "triton", "cuda", "driver")
_AGAIN = "make the table again with `ptq4adm dispatch`"


@dataclass(frozen=True)
class LayerKey:
    """What a layer is looked up by.

    Attributes:
        kind: one of `KINDS`: the operator with its window and stride.
        bits: of a weight, 4 or 8.
        N: output features or channels.
        K: length of the sums without padding: input features, or channels times window.
    """

    kind: str
    bits: int
    N: int
    K: int

    def __str__(self) -> str:
        return f"w{self.bits}a8 {self.kind} {self.N}x{self.K}"


@dataclass(frozen=True)
class Times:
    """Medians of one layer at one number of rows, in microseconds, all of one run.

    Attributes:
        run: index in the table's `runs`.
        float16: of the float16 layer of PyTorch; None if it was not timed.
        product: backend to time of the product of int8 activations.
        layer: backend to time with the quantization of a float16 input.
        failed: backend to the reason why it has no time: wrong, or it does not run.
    """

    run: int = 0
    float16: float | None = None
    product: Mapping[str, float] = field(default_factory=dict)
    layer: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class DispatchTable:
    """Measured times of one device.

    Attributes:
        device: its name, as the driver says it.
        runs: columns of `RUN_COLUMNS` of each run that measured.
        layers: layer to number of rows M to times.
        source: where it was read, for messages.
    """

    device: str
    runs: tuple[Mapping[str, str], ...]
    layers: Mapping[LayerKey, Mapping[int, Times]]
    source: str = "a table in memory"

    @property
    def entries(self) -> int:
        """Pairs of a layer and a number of rows."""
        return sum(map(len, self.layers.values()))

    def find(self, key: LayerKey) -> Mapping[int, Times]:
        """Times of a layer by M; of its upsampling form where the plain one was not measured."""
        found = self.layers.get(key, {})
        if not found and key.kind == CONV3X3:
            found = self.layers.get(LayerKey(CONV3X3_UP, key.bits, key.N, key.K), {})
        return found

    def to_dict(self) -> dict[str, Any]:
        """The JSON of this module's docstring."""
        layers = [
            {
                "kind": key.kind,
                "bits": key.bits,
                "N": key.N,
                "K": key.K,
                "rows": [_times_dict(M, times[M]) for M in sorted(times)],
            }
            for key, times in self.layers.items()
        ]
        head = {"format": FORMAT, "version": VERSION, "device": self.device}
        return {**head, "runs": [dict(run) for run in self.runs], "layers": layers}


def _times_dict(M: int, times: Times) -> dict[str, Any]:
    return {
        "M": M,
        "run": times.run,
        "float16_us": times.float16,
        "product_us": dict(times.product),
        "layer_us": dict(times.layer),
        "failed": dict(times.failed),
    }


def save_table(path: Path, table: DispatchTable) -> None:
    """Write a table, atomically.

    Raises:
        OutputError: if it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(table.to_dict(), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot write the table ({error.strerror}); choose another place"
        ) from error


def load_table(path: Path) -> DispatchTable:
    """Read a table; a file that did not change is read once.

    Raises:
        DispatchTableError: if it is missing, not JSON, of another version, or wrong anywhere.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise DispatchTableError(
            f"{path}: cannot be read ({error.strerror}); {_AGAIN}, or name another"
        ) from error
    return _load(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _load(path: Path, modified: int, size: int) -> DispatchTable:  # noqa: ARG001 - key of the cache
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError) as error:
        raise DispatchTableError(f"{path}: cut short or not JSON ({error}); {_AGAIN}") from error
    return _Reader(path).table(content)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


class _Reader:
    """Checks every value of a file before it is used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def table(self, content: Any) -> DispatchTable:
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise self._error("format", f"needs {FORMAT!r}: this file is no dispatch table")
        version = content.get("version")
        if type(version) is not int or version != VERSION:
            raise DispatchTableError(
                f"{self.path}: table version {version!r}, this version of ptq4adm reads {VERSION}; "
                f"upgrade ptq4adm, or {_AGAIN}"
            )
        self._fields("the table", content, ("format", "version", "device", "runs", "layers"))
        device = self._text("device", content["device"])
        if not device:
            raise self._error("device", "is empty, needs the device's name")
        runs = tuple(
            self._run(f"runs[{i}]", run) for i, run in enumerate(self._list(content, "runs"))
        )
        layers: dict[LayerKey, dict[int, Times]] = {}
        for i, entry in enumerate(self._list(content, "layers")):
            where = f"layers[{i}]"
            key, times = self._layer(where, entry, len(runs))
            if key in layers:
                raise self._error(where, f"{key} stands twice")
            layers[key] = times
        return DispatchTable(device, runs, layers, str(self.path))

    def _run(self, where: str, run: Any) -> dict[str, str]:
        self._fields(where, run, RUN_COLUMNS)
        return {name: self._text(f"{where}.{name}", value) for name, value in run.items()}

    def _layer(self, where: str, entry: Any, runs: int) -> tuple[LayerKey, dict[int, Times]]:
        self._fields(where, entry, ("kind", "bits", "N", "K", "rows"))
        if entry["kind"] not in KINDS:
            known = ", ".join(KINDS)
            raise self._error(f"{where}.kind", f"= {entry['kind']!r}, needs one of {known}")
        if type(entry["bits"]) is not int or entry["bits"] not in (4, 8):
            raise self._error(f"{where}.bits", f"= {entry['bits']!r}, needs 4 or 8")
        N, K = (self._count(f"{where}.{name}", entry[name]) for name in "NK")
        times: dict[int, Times] = {}
        for j, row in enumerate(self._list(entry, "rows", where)):
            place = f"{where}.rows[{j}]"
            M, found = self._times(place, row, runs)
            if M in times:
                raise self._error(place, f"M = {M} stands twice")
            times[M] = found
        if not times:
            raise self._error(f"{where}.rows", "is empty, needs a row at least")
        return LayerKey(entry["kind"], entry["bits"], N, K), times

    def _times(self, where: str, row: Any, runs: int) -> tuple[int, Times]:
        names = ("M", "run", "float16_us", "product_us", "layer_us", "failed")
        self._fields(where, row, names)
        M = self._count(f"{where}.M", row["M"])
        run = row["run"]
        if type(run) is not int or not 0 <= run < runs:
            raise self._error(f"{where}.run", f"= {run!r}, needs an index of the {runs} runs")
        half = row["float16_us"]
        if half is not None:
            half = self._time(f"{where}.float16_us", half)
        product, layer = (
            {
                backend: self._time(f"{where}.{name}.{backend}", us)
                for backend, us in self._by_backend(f"{where}.{name}", row[name]).items()
            }
            for name in ("product_us", "layer_us")
        )
        failed = {
            backend: self._text(f"{where}.failed.{backend}", reason)
            for backend, reason in self._by_backend(f"{where}.failed", row["failed"]).items()
        }
        both = sorted(product.keys() & failed.keys())
        if both:
            raise self._error(where, f"{both[0]} has a time and failed")
        return M, Times(run, half, product, layer, failed)

    def _by_backend(self, where: str, values: Any) -> dict[str, Any]:
        if not isinstance(values, dict):
            raise self._error(where, f"= {values!r}, needs an object of backends")
        for name in values:
            if name not in BACKENDS:
                known = ", ".join(BACKENDS)
                raise self._error(where, f"names backend {name!r}, needs one of {known}")
        return values

    def _list(self, content: dict[str, Any], name: str, where: str = "") -> list[Any]:
        if not isinstance(content[name], list):
            place = f"{where}.{name}" if where else name
            raise self._error(place, f"= {content[name]!r}, needs a list")
        values: list[Any] = content[name]
        return values

    def _fields(self, where: str, values: Any, names: tuple[str, ...]) -> None:
        if not isinstance(values, dict):
            raise self._error(where, f"= {values!r}, needs an object")
        for name in (*names, *values):
            if name not in values:
                raise self._error(where, f"lacks {name!r}")
            if name not in names:
                raise self._error(where, f"holds {name!r}, which version {VERSION} does not know")

    def _text(self, where: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self._error(where, f"= {value!r}, needs text")
        return value

    def _count(self, where: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            raise self._error(where, f"= {value!r}, needs a whole number of at least 1")
        return value

    def _time(self, where: str, value: Any) -> float:
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise self._error(where, f"= {value!r}, needs microseconds above 0")
        return float(value)

    def _error(self, where: str, what: str) -> DispatchTableError:
        return DispatchTableError(f"{self.path}: {where} {what}; {_AGAIN}")
