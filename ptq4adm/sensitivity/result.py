"""What was measured of every layer, and the JSON file that keeps it.

    {"format": "ptq4adm-sensitivity", "format_version": 1, "fingerprint": str, "pairs": N,
     "float16_bytes": int, "fixed_bytes": int,
     "layers": [{"name", "parameters", "bytes": {"w4a8", "w8a8", "float"},
                 "error": {"w4a8", "w8a8"}}],
     "chosen": {layer: scheme} or null, "pareto": [{"bytes", "size_ratio", "error"}]}

Layers that the config, its overrides or the family's rules keep at one scheme are not listed: their
bytes are in `fixed_bytes`, with those of all other tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ptq4adm.calibration.files import write_json
from ptq4adm.calibration.fingerprint import check_fingerprint
from ptq4adm.errors import CalibrationError

FORMAT = "ptq4adm-sensitivity"
FORMAT_VERSION = 1
MEASURED = ("w4a8", "w8a8")
SCHEMES = (*MEASURED, "float")


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer.

    Attributes:
        name: module name.
        parameters: of weight and bias.
        bytes: scheme to all bytes stored for the layer, of "w4a8", "w8a8" and "float".
        error: scheme to the relative squared error of the model's output with this layer alone at
            it, of "w4a8" and "w8a8"; that of "float" is 0.
    """

    name: str
    parameters: int
    bytes: Mapping[str, int]
    error: Mapping[str, float]

    def error_at(self, scheme: str) -> float:
        """Output error at a scheme; 0 for float."""
        return 0.0 if scheme == "float" else float(self.error[scheme])


@dataclass(frozen=True)
class ParetoPoint:
    """The least predicted error that fits into some bytes.

    Attributes:
        bytes: of the whole denoiser.
        size_ratio: over its bytes in float16.
        error: predicted, the sum over layers.
    """

    bytes: int
    size_ratio: float
    error: float


@dataclass(frozen=True)
class Sensitivity:
    """All layers of one denoiser that may take several schemes.

    Attributes:
        fingerprint: of the float denoiser.
        pairs: (prompt, step) pairs that the errors are means over.
        float16_bytes: the whole denoiser in float16.
        fixed_bytes: all that is not in `layers`, as it is stored.
        layers: in module order.
        chosen: layer to scheme; None if nothing was assigned.
        pareto: from the smallest size to the largest.
    """

    fingerprint: str
    pairs: int
    float16_bytes: int
    fixed_bytes: int
    layers: tuple[LayerSensitivity, ...]
    chosen: Mapping[str, str] | None = None
    pareto: tuple[ParetoPoint, ...] = field(default=())

    def size_of(self, schemes: Mapping[str, str]) -> int:
        """Bytes of the whole denoiser with these schemes, one a layer."""
        return self.fixed_bytes + sum(layer.bytes[schemes[layer.name]] for layer in self.layers)

    def check(self, denoiser: nn.Module) -> None:
        """Refuse another model.

        Raises:
            CalibrationMismatchError: if weights or config differ.
        """
        check_fingerprint(
            denoiser, self.fingerprint, "sensitivity was measured", "measure this model"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe content."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        return head | asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        write_json(Path(path), self.to_dict(), "the sensitivity")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read a file written by `save`.

        Raises:
            CalibrationError: if it is missing, broken or of another kind.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            found = content["format"], content["format_version"]
            if found != (FORMAT, FORMAT_VERSION):
                raise CalibrationError(
                    f"{path}: is {found[0]} {found[1]}, this version reads {FORMAT} "
                    f"{FORMAT_VERSION}; measure again"
                )
            return cls(
                fingerprint=str(content["fingerprint"]),
                pairs=int(content["pairs"]),
                float16_bytes=int(content["float16_bytes"]),
                fixed_bytes=int(content["fixed_bytes"]),
                layers=tuple(_read_layer(layer) for layer in content["layers"]),
                chosen=content["chosen"],
                pareto=tuple(ParetoPoint(**point) for point in content["pareto"]),
            )
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, CalibrationError):
                raise
            raise CalibrationError(
                f"{path}: missing, cut short or no sensitivity ({error!r}); measure again"
            ) from error


def _read_layer(entry: Mapping[str, Any]) -> LayerSensitivity:
    errors = {scheme: float(entry["error"][scheme]) for scheme in MEASURED}
    if not all(math.isfinite(e) and e >= 0 for e in errors.values()):
        raise ValueError(f"layer {entry['name']!r} has errors {errors}")
    sizes = {scheme: int(entry["bytes"][scheme]) for scheme in SCHEMES}
    return LayerSensitivity(str(entry["name"]), int(entry["parameters"]), sizes, errors)
