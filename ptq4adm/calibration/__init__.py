"""Calibration: run listed prompts through the float model, and keep what its layers saw."""

from ptq4adm.calibration.fingerprint import fingerprint
from ptq4adm.calibration.prompts import default_prompts, prompts_hash
from ptq4adm.calibration.record import RunSettings, record
from ptq4adm.calibration.storage import Calibration, CalibrationMeta

__all__ = [
    "Calibration",
    "CalibrationMeta",
    "RunSettings",
    "default_prompts",
    "fingerprint",
    "prompts_hash",
    "record",
]
