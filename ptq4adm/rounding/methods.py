"""Rounding methods by the names that `QuantConfig.rounding` has for them."""

from __future__ import annotations

from functools import partial

from ptq4adm.errors import ConfigError
from ptq4adm.rounding.gptq import gptq
from ptq4adm.rounding.reconstruct import reconstruct
from ptq4adm.rounding.task import Rounder

ROUNDERS: dict[str, Rounder] = {"gptq": gptq, "reconstruct": reconstruct}


def check_rounder(rounder: Rounder, rounding: str) -> None:
    """Refuse a method that is not the one a config names: its checkpoint would tell a lie.

    Args:
        rounder: a method of `ROUNDERS`, perhaps as `functools.partial`, or a function of one's own.
        rounding: of the config.

    Raises:
        ConfigError: if "nearest" is named, which has no method, or another one than `rounder`.
    """
    if rounding == "nearest":
        raise ConfigError("rounder: config.rounding is 'nearest', which has none; name its method")
    method: object = rounder
    while isinstance(method, partial):
        method = method.func
    for name, known in ROUNDERS.items():
        if method is known and name != rounding:
            raise ConfigError(
                f"rounder: is that of rounding={name!r}, and config.rounding is {rounding!r}; "
                f"pass QuantConfig(rounding={name!r})"
            )
