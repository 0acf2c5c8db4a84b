"""What a person asks of the quantizer: one frozen dataclass, checked when it is made.

Owns the names of schemes and observers. Which layer takes which scheme is decided in
`ptq4adm.quantize`, from this config and the rules of the model family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from ptq4adm.errors import ConfigError

# what `quantization_config` in a model's config.json says of itself
METHOD = "ptq4adm"
FORMAT_VERSION = 1

GROUP_SIZES = (None, 64)
WEIGHT_OBSERVERS = ("squared_error", "absmax", "p2.4")
ACTIVATION_MODES = ("static", "dynamic")
ACTIVATION_OBSERVERS = ("absmax", "percentile", "squared_error", "p2.4")
# "nearest" looks at a weight alone; the others are those of ptq4adm.rounding.methods
ROUNDINGS = ("nearest", "gptq", "reconstruct")
# timestep buckets of a calibration; at most as many as there are steps
DEFAULT_BUCKETS = 10
# (prompt, step) pairs that layers' errors are measured on
DEFAULT_PAIRS = 32


class Scheme(str, Enum):
    """How one layer is stored and run.

    `W4A8`: packed 4-bit weights, int8 activations. `W8A8`: int8 weights, int8 activations. `W8`:
    int8 weights only, activations stay float. `FLOAT`: stored in float16, converted to the input's
    dtype at each call.
    """

    W4A8 = "w4a8"
    W8A8 = "w8a8"
    W8 = "w8"
    FLOAT = "float"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class QuantConfig:
    """What to quantize, and how scales are chosen.

    Args:
        scheme: scheme of every linear and convolution that neither the family's rules nor
            `overrides` name.
        overrides: `fnmatch` pattern on module names to scheme; a later pattern wins, and all win
            over the family's rules.
        weight_observer: "squared_error" searches the clip that loses least, "p2.4" the one of least
            |error|^2.4, "absmax" never clips.
        activation: "static" reads calibrated scales, one for each timestep bucket; "dynamic"
            measures every input as it comes and needs no calibration.
        activation_observer: how a static scale follows from the recorded histogram.
        percentile: share of magnitudes, in percent, that "percentile" keeps unclipped.
        protect_sensitive: whether layers that a family's rules call sensitive take 8 bits where
            `scheme` is W4A8; they are few and small.
        group_size: None for one weight scale a channel, or 64 for integer multipliers a block of 64
            weights (4-bit layers only).
        backend: "auto" or the name of a backend.
        rounding: how integers of W4A8 and W8A8 layers are chosen: "nearest" looks at the weight
            alone; "gptq" at the inputs that a calibration kept, too, layer by layer; "reconstruct"
            trains the 4-bit ones and their scales together on what the model makes of the inputs.

    Raises:
        ConfigError: for a value that is not listed above.
    """

    scheme: str = Scheme.W4A8.value
    overrides: Mapping[str, str] = field(default_factory=dict)
    weight_observer: str = "squared_error"
    activation: str = "static"
    activation_observer: str = "p2.4"
    percentile: float = 99.999
    protect_sensitive: bool = True
    group_size: int | None = None
    backend: str = "auto"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheme", _scheme_name("scheme", self.scheme))
        if not isinstance(self.overrides, Mapping):
            raise ConfigError(
                "overrides: expected a mapping of name pattern to scheme, got "
                f"{type(self.overrides).__name__}"
            )
        checked = {}
        for pattern, scheme in self.overrides.items():
            if not isinstance(pattern, str) or not pattern:
                raise ConfigError(
                    f"overrides: a pattern must be a non-empty string, got {pattern!r}"
                )
            checked[pattern] = _scheme_name(f"overrides[{pattern!r}]", scheme)
        object.__setattr__(self, "overrides", checked)
        _check_choice("weight_observer", self.weight_observer, WEIGHT_OBSERVERS)
        _check_choice("activation", self.activation, ACTIVATION_MODES)
        _check_choice("activation_observer", self.activation_observer, ACTIVATION_OBSERVERS)
        _check_choice("group_size", self.group_size, GROUP_SIZES)
        _check_choice("rounding", self.rounding, ROUNDINGS)
        if not isinstance(self.protect_sensitive, bool):
            raise ConfigError(
                f"protect_sensitive: got {self.protect_sensitive!r}, needs True or False"
            )
        if isinstance(self.percentile, bool) or not isinstance(self.percentile, (int, float)):
            raise ConfigError(
                f"percentile: expected a number, got {type(self.percentile).__name__}"
            )
        if not 50.0 <= self.percentile <= 100.0:
            raise ConfigError(f"percentile: got {self.percentile}, needs 50 to 100, in percent")
        if not isinstance(self.backend, str):
            raise ConfigError(f"backend: expected a name, got {type(self.backend).__name__}")
        # an enum member is a string too; the plain string is what JSON and messages show
        object.__setattr__(self, "backend", str(getattr(self.backend, "value", self.backend)))

    def __hash__(self) -> int:
        return hash((self.scheme, frozenset(self.overrides.items()), self.backend))

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values of all fields."""
        return {f.name: _jsonable(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: for an unknown field or value.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"config: expected a mapping of fields, got {type(values).__name__}")
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"config: unknown field {unknown[0]!r}; known are {', '.join(known)}")
        return cls(**dict(values))


def _jsonable(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _scheme_name(where: str, value: object) -> str:
    try:
        return Scheme(value).value
    except ValueError as error:
        raise ConfigError(
            f"{where}: got {value!r}, needs one of {', '.join(s.value for s in Scheme)}"
        ) from error


def _check_choice(where: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or isinstance(value, bool):
        raise ConfigError(
            f"{where}: got {value!r}, needs one of {', '.join(str(a) for a in allowed)}"
        )
