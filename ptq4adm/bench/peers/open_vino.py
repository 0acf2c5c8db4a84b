"""OpenVINO on the CPU: float32, and int8 through FakeQuantize, which is what NNCF inserts.

The int8 graph of one layer is made by hand: 256 levels for activations, int8 weights with one step
a channel. Whole models are quantized by NNCF itself (`ptq4adm.bench.unet`).
"""

from __future__ import annotations

from collections.abc import Callable
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
from ptq4adm.bench.problem import Problem, Variant, nchw_rows

_LEVELS = 256


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


def cpu_config(threads: int) -> dict[str, Any]:
    """Compile options: one stream, so many threads, no silent bfloat16."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # the default on processors with bfloat16 instructions would not be float32
        "INFERENCE_PRECISION_HINT": "f32",
    }


def _variant(problem: Problem, name: str, *, is_int8: bool) -> Variant:
    import openvino
    from openvino import opset13 as operators

    # NCHW is the layout that the runtime converts from and to
    x = problem.x if problem.is_linear else problem.x.contiguous()
    parameter = operators.parameter(list(x.shape), np.float32, name="x")
    node: Any = parameter
    if problem.shape.is_upsampled:
        node = _doubled(node)
    weight: Any
    if is_int8:
        node = _fake_quantized(node, problem.x)
        w_q, w_scale = symmetric_weight(problem.weight)
        per_channel = w_scale.reshape(-1, *(1,) * (problem.weight.dim() - 1)).numpy()
        integers = operators.constant(w_q.contiguous().numpy())
        weight = operators.multiply(operators.convert(integers, np.float32), per_channel)
    else:
        weight = operators.constant(problem.weight.contiguous().numpy())
    if problem.is_linear:
        node = operators.matmul(node, weight, False, True)
        node = operators.add(node, operators.constant(problem.bias.numpy()[None]))
    else:
        stride, padding = [problem.shape.stride] * 2, [problem.padding] * 2
        node = operators.convolution(node, weight, stride, padding, padding, [1, 1])
        node = operators.add(node, problem.bias.numpy().reshape(1, -1, 1, 1))
    model = openvino.Model([node], [parameter], "layer")
    compiled = openvino.Core().compile_model(model, "CPU", cpu_config(problem.threads))
    request = compiled.create_infer_request()
    given = openvino.Tensor(x.numpy())  # a copy: shared memory would die with the local x
    request.set_input_tensor(given)
    tolerance = INT8_TOLERANCE if is_int8 else FLOAT_TOLERANCE
    rows = _matrix if problem.is_linear else _conv_rows
    return Variant(name, _runner(request), rows, tolerance)


def _runner(request: Any) -> Callable[[], Any]:
    def run() -> Any:
        request.infer()
        return request

    return run


def _matrix(request: Any) -> Tensor:
    return torch.from_numpy(request.get_output_tensor().data.copy())


def _conv_rows(request: Any) -> Tensor:
    return nchw_rows(_matrix(request))


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
