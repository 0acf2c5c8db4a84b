"""How much each layer's quantization costs at the model's output, and what to spend a budget on.

`measure_sensitivity` quantizes one layer at a time and compares predictions; `assign_schemes` gives
every layer 4 bits, 8 bits or float so that the summed error is least under a size budget.
"""

from ptq4adm.sensitivity.assign import (
    assign_schemes,
    budget_bytes,
    choose,
    pareto_curve,
    predicted_error,
)
from ptq4adm.sensitivity.measure import measure_sensitivity, output_error, resize
from ptq4adm.sensitivity.result import LayerSensitivity, ParetoPoint, Sensitivity

__all__ = [
    "LayerSensitivity",
    "ParetoPoint",
    "Sensitivity",
    "assign_schemes",
    "budget_bytes",
    "choose",
    "measure_sensitivity",
    "output_error",
    "pareto_curve",
    "predicted_error",
    "resize",
]
