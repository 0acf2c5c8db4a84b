"""Calibration: run prompts through the float model, choose what counts, keep what layers saw."""

from ptq4adm.calibration.fingerprint import fingerprint
from ptq4adm.calibration.inputs import ChosenInputs, InputRecorder
from ptq4adm.calibration.prompts import default_prompts, prompts_hash
from ptq4adm.calibration.record import RunSettings, record
from ptq4adm.calibration.selection import Selection, SelectionSettings, select_pairs
from ptq4adm.calibration.signature_record import record_signatures
from ptq4adm.calibration.signatures import Signatures, open_signatures
from ptq4adm.calibration.storage import Calibration, CalibrationMeta
from ptq4adm.calibration.strategies import STRATEGIES, CalibrationStrategy

__all__ = [
    "STRATEGIES",
    "Calibration",
    "CalibrationMeta",
    "CalibrationStrategy",
    "ChosenInputs",
    "InputRecorder",
    "RunSettings",
    "Selection",
    "SelectionSettings",
    "Signatures",
    "default_prompts",
    "fingerprint",
    "open_signatures",
    "prompts_hash",
    "record",
    "record_signatures",
    "select_pairs",
]
