"""Integers that look at activations: which of two neighbours a weight becomes, layer by layer.

Plain rounding (`ptq4adm.quant.affine`) sees a weight alone. What is here sees the inputs that a
calibration kept (`ptq4adm.calibration.ChosenInputs`) and changes the integers, never the format.
"""

from ptq4adm.rounding.replay import Replay
from ptq4adm.rounding.task import LayerTask, Rounder, ShiftedRows

__all__ = ["LayerTask", "Replay", "Rounder", "ShiftedRows"]
