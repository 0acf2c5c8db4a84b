"""Backend ``cuda`` on the emulator, and the comparisons that both families of products pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from operator_cases import Case, build_case
from torch import Tensor

from ptq4adm.ops import cuda_backend, cuda_matmul, reference
from ptq4adm.ops.arguments import Conv2dGeometry, Matmul
from ptq4adm.ops.cuda_tiles import SM90A, CudaTile
from ptq4adm.ops.prepack import prepack

MODES = pytest.mark.parametrize(
    ("bits", "is_grouped"), [(4, False), (4, True), (8, False)], ids=["w4", "w4-groups", "w8"]
)
BITS = pytest.mark.parametrize("bits", [4, 8])
SAME = Conv2dGeometry((3, 3), padding=(1, 1))
SM90A_TILES = [(128, 256), (256, 128), (128, 128), (128, 64), (64, 64)]  # rows x channels

# image size, channels and geometry of each kind that comes as boxes
BOX_CONVOLUTIONS = {
    "3x3": ((2, 5, 8), (64,), SAME),
    "rows of 16": ((1, 9, 16), (32,), SAME),
    "rows of 2": ((3, 5, 2), (80,), SAME),
    "rows of 10": ((1, 13, 10), (48,), SAME),
    "rows of 5, several images": ((5, 3, 5), (16,), SAME),
    "rows of 78": ((1, 2, 78), (16,), SAME),
    "one pixel": ((3, 1, 1), (64,), SAME),
    "no padding": ((1, 6, 7), (16,), Conv2dGeometry((3, 3))),
    "padding larger than the kernel": ((1, 3, 3), (16,), Conv2dGeometry((3, 3), padding=(4, 5))),
    "dilation": ((1, 9, 8), (32,), Conv2dGeometry((3, 3), padding=(2, 3), dilation=(2, 3))),
    "5x1": ((1, 6, 3), (16,), Conv2dGeometry((5, 1), padding=(2, 0))),
    "1x1": ((2, 3, 5), (144,), Conv2dGeometry((1, 1))),
    "two segments": ((2, 5, 6), (64, 80), SAME),
}

# of a product of M rows and `n` channels: what an epilogue adds
M, K = 22, 200
TERMS = {
    "scales": lambda _: {},
    "bias": lambda n: {"bias": torch.randn(n)},
    "bias fp16": lambda n: {"bias": torch.randn(n).half()},
    "temb": lambda n: {"temb": torch.randn(2, n)},
    "temb, one a row": lambda n: {"temb": torch.randn(M, n).bfloat16()},
    "residual": lambda n: {"residual": torch.randn(M, n)},
    "residual fp16": lambda n: {"residual": torch.randn(M, n).half()},
    "all": lambda n: {
        "bias": torch.randn(n),
        "temb": torch.randn(11, n).half(),
        "residual": torch.randn(M, n).bfloat16(),
    },
}
OUTPUTS = {
    "float16": {"out_dtype": torch.float16},
    "bfloat16": {"out_dtype": torch.bfloat16},
    "int8": {"out_scale": torch.tensor(0.37)},
    "int8, clamped": {"out_scale": torch.tensor(0.001)},
}


def sm90a_tile(block_m: int, block_n: int, split_k: int = 1) -> CudaTile:
    """A tile of the family sm90a."""
    return CudaTile(block_m, block_n, split_k, SM90A)


@contextmanager
def emulate(compiled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Backend ``cuda`` on the emulator: CPU tensors, every address registered, outputs poisoned."""
    monkeypatch.setattr(cuda_backend, "module", lambda: compiled)
    monkeypatch.setattr(cuda_backend, "unavailable_reason", lambda _: None)
    monkeypatch.setattr(cuda_backend, "sm90a_reason", lambda _: None)
    monkeypatch.setattr(cuda_matmul, "multiprocessors", lambda _: 4)
    monkeypatch.setattr(cuda_matmul, "_index", lambda _: 0)

    def launch(module, arguments, bits, is_convolution, tile, _device) -> None:
        access = dict.fromkeys(("out0", "out1", "slabs"), module.Access.uninitialized)
        access["counters"] = module.Access.read_write
        module.forget_memory()
        for name, tensor in arguments.tensors.items():
            size = tensor.numel() * tensor.element_size()
            kind = access.get(name, module.Access.read)
            module.register_memory(tensor.data_ptr(), size, kind, name)
        rest = (bits, is_convolution, tile.block_m, tile.block_n, 0, 0)
        if arguments.box is None:
            module.matmul(arguments.params, *rest)
        else:
            module.matmul_sm90a(arguments.params, arguments.box, *rest)
        if "counters" in arguments.tensors:
            assert not bool(arguments.tensors["counters"].any()), "counters are left as found"

    monkeypatch.setattr(cuda_matmul, "_launch", launch)
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -77)

    monkeypatch.setattr(cuda_matmul.torch, "empty", poisoned)
    yield
    compiled.run_backward(False)
    compiled.forget_memory()


def on_cuda(case: Case) -> Matmul:
    """The call with its weight in order ``cuda``."""
    qweight = prepack(case.call.qweight, bits=case.call.bits, layout=case.layout, backend="cuda")
    return replace(case.call, qweight=qweight)


def assert_exact(case: Case, tile: CudaTile | None) -> None:
    """The accumulators are those of the oracle."""
    call = on_cuda(case)
    if case.geometry is None:
        got = cuda_matmul.accumulate_linear(call, tile)
    else:
        got = cuda_matmul.accumulate_conv2d(call, case.geometry, tile)
    for mine, expected in zip(got, case.oracle(), strict=True):
        assert torch.equal(mine, expected)


def assert_equal(case: Case, tile: CudaTile | None) -> None:
    """The result is the reference's, bit for bit."""
    if case.geometry is None:
        got, expected = cuda_matmul.linear(on_cuda(case), tile), reference.linear(case.call)
    else:
        got = cuda_matmul.conv2d(on_cuda(case), case.geometry, tile)
        expected = reference.conv2d(case.call, case.geometry)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def assert_close_after_gelu(case: Case, tile: CudaTile) -> None:
    """A gated result: gelu may differ in the last bits, so a rounding may go the other way."""
    got, expected = cuda_matmul.linear(on_cuda(case), tile), reference.linear(case.call)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if got.dtype == torch.int8:
        steps = (got.int() - expected.int()).abs()
        assert int(steps.max()) <= 1
        assert int(steps.sum()) <= max(1, steps.numel() // 1000)
    else:
        error = float((got.float() - expected.float()).abs().max())
        tolerance = 2e-6 if got.dtype == torch.float32 else 1e-3
        assert error <= tolerance * float(expected.float().abs().max())


def scaled(case: Case, x_scale: Tensor | None = None, **options: object) -> Case:
    """A case with scales that leave no product exact, and options."""
    x_scale = torch.tensor(0.0123) if x_scale is None else x_scale
    channels = len(case.call.w_scale)
    return case.with_scales(x_scale, torch.rand(channels) + 0.5).with_options(**options)


def gated(channels: int, out: str, k: int) -> Case:
    """Nine rows of a product whose channels are values and their gates."""
    case = build_case(4, (9,), (k,), channels)
    case = case.with_scales(torch.tensor(1e-3), torch.rand(channels) + 0.5)
    case = case.with_options(
        geglu=True, bias=torch.randn(channels), residual=torch.randn(9, channels).half()
    )
    if out == "int8":
        return case.with_options(out_scale=torch.tensor(0.02))
    return case.with_options(out_dtype=getattr(torch, out))
