"""Drop-in modules: quantized linears and convolutions, what stays beside them, fused blocks."""

from ptq4adm.nn.base import QuantizedLayer
from ptq4adm.nn.conv import W4A8Conv2d, W8A8Conv2d
from ptq4adm.nn.floating import FloatReport, use_float_where_faster, use_packed_everywhere
from ptq4adm.nn.fuse import (
    FusionReport,
    fuse_blocks,
    fusion_report,
    set_backend,
    unfuse_blocks,
)
from ptq4adm.nn.half import HalfConv2d, HalfLinear
from ptq4adm.nn.hoist import prepared
from ptq4adm.nn.linear import W4A8Linear, W8A8Linear
from ptq4adm.nn.storage import StorageLayer, resident_bytes
from ptq4adm.nn.timestep import StepIndex, attach_step_hook, find_step
from ptq4adm.nn.weight_only import W8Linear

__all__ = [
    "FloatReport",
    "FusionReport",
    "HalfConv2d",
    "HalfLinear",
    "QuantizedLayer",
    "StepIndex",
    "StorageLayer",
    "W4A8Conv2d",
    "W4A8Linear",
    "W8A8Conv2d",
    "W8A8Linear",
    "W8Linear",
    "attach_step_hook",
    "find_step",
    "fuse_blocks",
    "fusion_report",
    "prepared",
    "resident_bytes",
    "set_backend",
    "unfuse_blocks",
    "use_float_where_faster",
    "use_packed_everywhere",
]
