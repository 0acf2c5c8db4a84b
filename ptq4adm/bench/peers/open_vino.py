"""OpenVINO on the CPU: float32, and int8 through FakeQuantize, which is what NNCF inserts.

The int8 graph of one layer is made by hand: 256 levels for activations, int8 weights with one step
a channel. Whole models are quantized by NNCF itself (`ptq4adm.bench.unet`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq4adm.bench.peers.base import (
    FLOAT_TOLERANCE,
    INT8_TOLERANCE,
    Affine,
    missing_packages,
    package_version,
    symmetric_weight,
)
from ptq4adm.bench.peers.signal_stack import own_signal_stack
from ptq4adm.bench.problem import Problem, Variant

_LEVELS = 256
_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


class OpenVino:
    """`openvino.Core` on graphs made by hand."""

    name = "openvino"

    def missing(self) -> str | None:
        """A reason if `openvino` is not installed."""
        return missing_packages("openvino")

    def version(self) -> str:
        """Version of openvino."""
        return package_version("openvino")

    def variants(self, problem: Problem) -> list[Variant]:
        """Float and int8 for every layer."""
        return [
            _variant(problem, "openvino-fp32", is_int8=False),
            _variant(problem, "openvino-int8", is_int8=True),
        ]


def compiled_request(model: Any, threads: int) -> Any:
    """Compile a model for so many threads, one stream, float32 where it is not int8.

    Args:
        model: an `openvino.Model`, or the path of one.
        threads: of inference.

    Returns:
        An `openvino.InferRequest`.
    """
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # the default on processors with bfloat16 instructions would not be float32
        "INFERENCE_PRECISION_HINT": "f32",
    }
    with own_signal_stack():
        return openvino.Core().compile_model(model, "CPU", options).create_infer_request()


def _variant(problem: Problem, name: str, *, is_int8: bool) -> Variant:
    import openvino
    from openvino import opset13 as operators

    # NHWC outside: the memory that its convolutions work on, up to 2.4 times faster here than NCHW
    x = problem.x if problem.is_linear else problem.x.permute(0, 2, 3, 1)
    parameter = operators.parameter(list(x.shape), np.float32, name="x")
    node: Any = _fake_quantized(parameter, problem.x) if is_int8 else parameter
    weight = _weight_node(problem.weight, is_int8)
    if problem.is_linear:
        node = operators.matmul(node, weight, False, True)
        node = operators.add(node, operators.constant(problem.bias.numpy()[None]))
    else:
        node = _convolution(problem, node, weight)
    model = openvino.Model([node], [parameter], "layer")
    request = compiled_request(model, problem.threads)
    request.set_input_tensor(openvino.Tensor(x.numpy()))  # a copy: shared memory could be freed
    tolerance = INT8_TOLERANCE if is_int8 else FLOAT_TOLERANCE
    return Variant(name, _runner(request), partial(_rows, N=problem.shape.N), tolerance)


def _weight_node(weight: Tensor, is_int8: bool) -> Any:
    from openvino import opset13 as operators

    if not is_int8:
        return operators.constant(weight.contiguous().numpy())
    w_q, w_scale = symmetric_weight(weight)
    per_channel = w_scale.reshape(-1, *(1,) * (weight.dim() - 1)).numpy()
    integers = operators.constant(w_q.contiguous().numpy())
    return operators.multiply(operators.convert(integers, np.float32), per_channel)


def _convolution(problem: Problem, node: Any, weight: Any) -> Any:
    from openvino import opset13 as operators

    node = operators.transpose(node, operators.constant(np.array(_TO_NCHW)))
    if problem.shape.is_upsampled:
        node = _doubled(node)
    stride, padding = [problem.shape.stride] * 2, [problem.padding] * 2
    node = operators.convolution(node, weight, stride, padding, padding, [1, 1])
    node = operators.add(node, problem.bias.numpy().reshape(1, -1, 1, 1))
    return operators.transpose(node, operators.constant(np.array(_TO_NHWC)))


def _runner(request: Any) -> Callable[[], Any]:
    def run() -> Any:
        request.infer()
        return request

    return run


def _rows(request: Any, N: int) -> Tensor:
    return torch.from_numpy(request.get_output_tensor().data.copy()).reshape(-1, N)


def _doubled(node: Any) -> Any:
    from openvino import opset13 as operators

    return operators.interpolate(
        node,
        operators.constant(np.array([2.0, 2.0], np.float32)),
        "nearest",
        "scales",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
        axes=operators.constant(np.array([2, 3], np.int64)),
    )


def _fake_quantized(node: Any, x: Tensor) -> Any:
    from openvino import opset13 as operators

    affine = Affine.of(x)
    low = np.float32(-affine.zero_point * affine.scale)
    high = np.float32((_LEVELS - 1 - affine.zero_point) * affine.scale)
    return operators.fake_quantize(node, low, high, low, high, _LEVELS)
