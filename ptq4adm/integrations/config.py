"""`PTQ4ADMConfig`: what diffusers' `quantization_config=` takes, and what config.json holds.

Two forms of one class. A request says how a float model is to be quantized. A description comes
from a folder and also says what every layer became; `ptq4adm.packing.description` writes it.
"""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from ptq4adm.calibration import Calibration, ChosenInputs
from ptq4adm.config import FORMAT_VERSION, METHOD, QuantConfig
from ptq4adm.errors import CheckpointError, ConfigError
from ptq4adm.packing.description import check_version

__all__ = ["Method", "PTQ4ADMConfig"]

logger = logging.getLogger(__name__)

_DESCRIBED = ("config", "schemes", "segments", "dynamic", "buckets", "calibration")
_OPTIONAL = ("rows",)
_HEADER = {"quant_method": METHOD, "format_version": FORMAT_VERSION}


class Method(str, Enum):
    """The method's name; diffusers asks for its `.value`, and its own enum cannot be extended."""

    PTQ4ADM = METHOD

    def __str__(self) -> str:
        return self.value


class PTQ4ADMConfig(QuantizationConfigMixin):
    """How diffusers is to quantize a UNet, or how one was quantized.

    Args:
        scheme: as in `ptq4adm.QuantConfig`, like the nine that follow.
        overrides: name pattern to scheme.
        weight_observer: how weight scales are chosen.
        activation: "dynamic" needs no calibration; "static" needs `calibration`.
        activation_observer: how a static scale follows from what was recorded.
        percentile: for the observer of that name.
        protect_sensitive: 8 bits for the layers that the family's rules call sensitive.
        group_size: None or 64.
        backend: "auto" or the name of a backend.
        rounding: "nearest", or a method that needs `inputs`.
        calibration: of this very model, or a file of one; used once and not stored here.
        inputs: what `ptq4adm.calibrate(..., inputs=FILE)` kept of this very model, or its file;
            used once and not stored here.

    Raises:
        ConfigError: for an unknown field or value, or a calibration that nothing would use.
    """

    def __init__(  # noqa: PLR0913 - the fields of QuantConfig, as diffusers' users expect them
        self,
        scheme: str = "w4a8",
        overrides: Mapping[str, str] | None = None,
        weight_observer: str = "squared_error",
        activation: str = "dynamic",
        activation_observer: str = "p2.4",
        percentile: float = 99.999,
        protect_sensitive: bool = True,
        group_size: int | None = None,
        backend: str = "auto",
        rounding: str = "nearest",
        calibration: Calibration | str | Path | None = None,
        inputs: ChosenInputs | str | Path | None = None,
        **unknown: Any,
    ) -> None:
        given = {
            "scheme": scheme,
            "overrides": dict(overrides or {}),
            "weight_observer": weight_observer,
            "activation": activation,
            "activation_observer": activation_observer,
            "percentile": percentile,
            "protect_sensitive": protect_sensitive,
            "group_size": group_size,
            "backend": backend,
            "rounding": rounding,
        }
        self.quant_method = Method.PTQ4ADM
        # through from_dict: an unknown field is named with all known ones
        self.quant_config = QuantConfig.from_dict({**given, **unknown})
        self.calibration = calibration
        self.inputs = inputs
        self._described: dict[str, Any] | None = None
        if calibration is not None and activation != "static":
            raise ConfigError(
                f"calibration: given, but activation={activation!r} measures every input; pass "
                "activation='static'"
            )

    @property
    def is_description(self) -> bool:
        """Whether it says what every layer became, rather than what is wanted."""
        return self._described is not None

    @property
    def description(self) -> dict[str, Any]:
        """The whole entry of config.json.

        Raises:
            ConfigError: if this is a request.
        """
        if self._described is None:
            raise ConfigError("quantization_config: a request names no layers; quantize with it")
        return self._described

    def load_calibration(self) -> Calibration | None:
        """The calibration, read from its file if one was named."""
        if isinstance(self.calibration, (str, Path)):
            return Calibration.load(self.calibration)
        return self.calibration

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe content, as in config.json; no prompt, and no path of this machine."""
        if self._described is not None:
            return copy.deepcopy(self._described)
        return {**_HEADER, "config": self.quant_config.to_dict()}

    def to_diff_dict(self) -> dict[str, Any]:
        """The part of `to_dict` that is not the default: what `repr` shows."""
        defaults = PTQ4ADMConfig().quant_config.to_dict()
        values = self.quant_config.to_dict()
        changed = {key: value for key, value in values.items() if value != defaults[key]}
        if self._described is not None:
            schemes = self._described["schemes"]
            changed["layers"] = {scheme: len(names) for scheme, names in schemes.items()}
        return {"quant_method": METHOD, **changed}

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Change fields of a request; returns what it does not know.

        Raises:
            ConfigError: for an unknown value, or a field of a description.
        """
        fields = self.quant_config.to_dict()
        known = {key: value for key, value in kwargs.items() if key in fields}
        if known and self.is_description:
            raise ConfigError(
                f"{', '.join(known)}: this quantization_config says what a quantized model is, and "
                "cannot be changed; quantize the float model with another PTQ4ADMConfig"
            )
        self.quant_config = QuantConfig.from_dict({**fields, **known})
        return {key: value for key, value in kwargs.items() if key not in fields}

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Inverse of `to_dict`; a request may also have its fields side by side.

        What a later version of this package adds to a description, beside what this one knows, is
        passed over: it raises the format's version when that would not be safe.

        Raises:
            CheckpointVersionError: for another method or another version of the format.
            CheckpointError: if a description lacks an entry.
            ConfigError: for an unknown field or value of the config.
        """
        if not isinstance(config_dict, Mapping):
            raise ConfigError(
                f"quantization_config: got a {type(config_dict).__name__}, needs a mapping"
            )
        check_version("quantization_config", {**_HEADER, **config_dict})
        values = {key: value for key, value in config_dict.items() if key not in _HEADER}
        config = cls._described_by(values) if "schemes" in values else cls._asked_by(values)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def _asked_by(cls, values: Mapping[str, Any]) -> PTQ4ADMConfig:
        if "config" not in values:
            return cls(**values)
        if not isinstance(values["config"], Mapping):
            raise ConfigError("quantization_config: its entry 'config' must be a mapping of fields")
        return cls(**values["config"])

    @classmethod
    def _described_by(cls, values: Mapping[str, Any]) -> PTQ4ADMConfig:
        missing = [key for key in _DESCRIBED if key not in values]
        if missing:
            raise CheckpointError(
                f"quantization_config: lacks {missing[0]!r} ({len(missing)} entries missing); copy "
                "the model again"
            )
        unknown = sorted(set(values) - {*_DESCRIBED, *_OPTIONAL})
        if unknown:
            logger.info("quantization_config: %s of a later version passed over", unknown)
        config = cls()
        config.quant_config = QuantConfig.from_dict(values["config"])
        config._described = copy.deepcopy({**_HEADER, **values})
        return config

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """For `dict(config)`."""
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PTQ4ADMConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


# imported first, this module is the reason why the registry was not told yet
importlib.import_module("ptq4adm.integrations.quantizer")
