"""ONNX Runtime on the CPU: float32, int8 and 4-bit weights, each one small graph.

Linear layers: MatMul; DynamicQuantizeLinear and MatMulInteger (8 bits, dynamic); MatMulNBits with
int8 accumulation (`accuracy_level=4`) and blocks of 32 or 128 weights, its 4-bit kernel.
Convolutions: Conv, and QuantizeLinear with QLinearConv (8 bits in and out). They get NCHW memory,
the layout that these kernels expect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq4adm.bench.peers.base import (
    FLOAT_TOLERANCE,
    INT4_TOLERANCE,
    INT8_TOLERANCE,
    Affine,
    missing_packages,
    package_version,
    symmetric_weight,
)
from ptq4adm.bench.problem import Problem, Variant, nchw_rows

_OPSET, _IR_VERSION = 21, 10
_MICROSOFT = "com.microsoft"
_BLOCKS = (32, 128)
_INT8_COMPUTE = 4  # accuracy_level of MatMulNBits: activations are quantized to int8

Arrays = dict[str, NDArray[Any]]


class OnnxRuntime:
    """`onnxruntime.InferenceSession` on graphs made by hand."""

    name = "onnxruntime"

    def missing(self) -> str | None:
        """A reason if `onnxruntime` or `onnx` is not installed."""
        return missing_packages("onnxruntime", "onnx")

    def version(self) -> str:
        """Version of onnxruntime."""
        return package_version("onnxruntime")

    def variants(self, problem: Problem) -> list[Variant]:
        """Float and int8 for every layer; int4 for linear layers whose K the blocks divide."""
        if not problem.is_linear:
            return [_float_conv(problem), _int8_conv(problem)]
        found = [_float_linear(problem), _int8_linear(problem)]
        found += [_int4_linear(problem, b) for b in _BLOCKS if problem.shape.K % b == 0]
        return found


class _Graph:
    """Nodes and constants of one graph from ``x`` to ``y``."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: Arrays = {}

    def constant(self, name: str, value: Any) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        return outputs[0]

    def resize(self, x: str) -> str:
        """Nearest-neighbour doubling of the last two sizes."""
        scales = self.constant("scales", np.array([1, 1, 2, 2], np.float32))
        return self.node(
            "Resize",
            [x, "", scales],
            ["resized"],
            mode="nearest",
            nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        )

    def compile(self, x: Tensor, out_type: int, threads: int) -> Callable[[], NDArray[Any]]:
        """A call that runs the graph on ``x``."""
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        graph = helper.make_graph(
            self.nodes,
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
            [helper.make_tensor_value_info("y", out_type, None)],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid(_MICROSOFT, 1)],
            ir_version=_IR_VERSION,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # its threads would go on spinning while the next variant is timed
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        values = x.numpy()
        given = onnxruntime.OrtValue.ortvalue_from_numpy(values)
        binding.bind_ortvalue_input("x", given)
        binding.bind_output("y")

        def run() -> Any:
            session.run_with_iobinding(binding)
            return binding.get_outputs()[0]

        return run


def _numpy(value: Any) -> Tensor:
    return torch.from_numpy(value.numpy())


def _float_linear(problem: Problem) -> Variant:
    from onnx import TensorProto

    graph = _Graph()
    weight = graph.constant("w", np.ascontiguousarray(problem.weight.numpy().T))
    bias = graph.constant("b", problem.bias.numpy())
    graph.node("Gemm", ["x", weight, bias], ["y"])
    run = graph.compile(problem.x, TensorProto.FLOAT, problem.threads)
    return Variant("onnxruntime-fp32", run, _numpy, FLOAT_TOLERANCE)


def _int8_linear(problem: Problem) -> Variant:
    from onnx import TensorProto

    w_q, w_scale = symmetric_weight(problem.weight)
    graph = _Graph()
    weight = graph.constant("w", np.ascontiguousarray(w_q.numpy().T))
    x_q = graph.node("DynamicQuantizeLinear", ["x"], ["x_q", "x_scale", "x_zero"])
    acc = graph.node("MatMulInteger", [x_q, weight, "x_zero"], ["acc"])
    # this chain is what ONNX Runtime fuses into one DynamicQuantizeMatMul with bias
    real = graph.node("Cast", [acc], ["real"], to=TensorProto.FLOAT)
    scale = graph.node("Mul", ["x_scale", graph.constant("w_scale", w_scale.numpy())], ["scale"])
    product = graph.node("Mul", [real, scale], ["product"])
    graph.node("Add", [product, graph.constant("b", problem.bias.numpy())], ["y"])
    run = graph.compile(problem.x, TensorProto.FLOAT, problem.threads)
    return Variant("onnxruntime-int8", run, _numpy, INT8_TOLERANCE)


def _int4_linear(problem: Problem, block: int) -> Variant:
    from onnx import TensorProto

    N, K = problem.weight.shape
    blocks = problem.weight.reshape(N, K // block, block)
    scale = blocks.abs().amax(dim=2) / 7
    integers = torch.round(blocks / scale[..., None]).clamp(-8, 7).to(torch.int16) + 8
    packed = (integers[..., 0::2] | integers[..., 1::2] << 4).to(torch.uint8)
    graph = _Graph()
    weight = graph.constant("w", packed.numpy())
    scales = graph.constant("w_scale", scale.flatten().numpy())
    bias = graph.constant("b", problem.bias.numpy())
    graph.node(
        "MatMulNBits",
        ["x", weight, scales, "", "", bias],
        ["y"],
        domain=_MICROSOFT,
        K=K,
        N=N,
        bits=4,
        block_size=block,
        accuracy_level=_INT8_COMPUTE,
    )
    run = graph.compile(problem.x, TensorProto.FLOAT, problem.threads)
    return Variant(f"onnxruntime-int4-{block}", run, _numpy, INT4_TOLERANCE)


def _conv_attributes(problem: Problem) -> dict[str, Any]:
    shape = problem.shape
    return {
        "kernel_shape": [shape.kernel] * 2,
        "strides": [shape.stride] * 2,
        "pads": [problem.padding] * 4,
    }


def _float_conv(problem: Problem) -> Variant:
    from onnx import TensorProto

    graph = _Graph()
    x = graph.resize("x") if problem.shape.is_upsampled else "x"
    weight = graph.constant("w", problem.weight.contiguous().numpy())
    bias = graph.constant("b", problem.bias.numpy())
    graph.node("Conv", [x, weight, bias], ["y"], **_conv_attributes(problem))
    run = graph.compile(problem.x.contiguous(), TensorProto.FLOAT, problem.threads)
    return Variant("onnxruntime-fp32", run, lambda y: nchw_rows(_numpy(y)), FLOAT_TOLERANCE)


def _int8_conv(problem: Problem) -> Variant:
    from onnx import TensorProto

    w_q, w_scale = symmetric_weight(problem.weight)
    affine, out = Affine.of(problem.x), Affine.of(problem.expected)
    graph = _Graph()
    x_scale = graph.constant("x_scale", np.float32(affine.scale))
    x_zero = graph.constant("x_zero", np.uint8(affine.zero_point))
    x_q = graph.node("QuantizeLinear", ["x", x_scale, x_zero], ["x_q"])
    if problem.shape.is_upsampled:
        x_q = graph.resize(x_q)
    bias = torch.round(problem.bias / (w_scale * affine.scale)).to(torch.int32)
    inputs = [
        x_q,
        x_scale,
        x_zero,
        graph.constant("w", w_q.contiguous().numpy()),
        graph.constant("w_scale", w_scale.numpy()),
        graph.constant("w_zero", np.zeros(w_scale.shape[0], np.int8)),
        graph.constant("y_scale", np.float32(out.scale)),
        graph.constant("y_zero", np.uint8(out.zero_point)),
        graph.constant("b", bias.numpy()),
    ]
    graph.node("QLinearConv", inputs, ["y"], **_conv_attributes(problem))
    run = graph.compile(problem.x.contiguous(), TensorProto.UINT8, problem.threads)

    def rows(y: Any) -> Tensor:
        return nchw_rows((_numpy(y).float() - out.zero_point) * out.scale)

    return Variant("onnxruntime-int8", run, rows, INT8_TOLERANCE)
