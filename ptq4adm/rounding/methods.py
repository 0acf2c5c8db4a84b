"""Rounding methods by the names that `QuantConfig.rounding` has for them."""

from __future__ import annotations

from ptq4adm.rounding.gptq import gptq
from ptq4adm.rounding.reconstruct import reconstruct
from ptq4adm.rounding.task import Rounder

ROUNDERS: dict[str, Rounder] = {"gptq": gptq, "reconstruct": reconstruct}
