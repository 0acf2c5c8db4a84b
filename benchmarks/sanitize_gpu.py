"""Run every GPU kernel on tiny shapes in each of its forms, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python benchmarks/sanitize_gpu.py [--case conv-tma ...]
    compute-sanitizer --tool memcheck python benchmarks/sanitize_gpu.py --backend cuda
    TRITON_INTERPRET=1 python benchmarks/sanitize_gpu.py --rehearse

Cases are small and ragged, and each takes one of the ways that can go wrong: boxes of the hardware,
split sums, groups, two segments, everything an epilogue may have. Results are compared with the
reference, computed on the CPU so that the tools watch few kernels of PyTorch; a silent race shows
here, too. A case that fails does not stop the next.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq4adm import ops
from ptq4adm.bench.gpu_activations import quantizer
from ptq4adm.bench.gpu_backends import BACKENDS, CUDA, TRITON, backends_on
from ptq4adm.bench.gpu_calls import ProductCall, Tile
from ptq4adm.bench.gpu_environment import find_device
from ptq4adm.bench.gpu_faults import FAULTS, describe_fault
from ptq4adm.bench.gpu_shapes import ACTIVATION_KINDS, GROUP_NORM, GROUP_NORM_SILU
from ptq4adm.bench.gpu_tile_sets import TILE_SETS
from ptq4adm.bench.gpu_tiles import describe
from ptq4adm.bench.gpu_variant import check_close, check_equal, check_steps
from ptq4adm.kernels import tuner
from ptq4adm.kernels.tuning import Problem, TileConfig
from ptq4adm.ops import reference
from ptq4adm.ops.arguments import Conv2dGeometry, Matmul, MatmulOptions
from ptq4adm.ops.prepack import prepack
from ptq4adm.packing.layout import BLOCK_K, KLayout, pack_int4, weight_to_rows

SAME = Conv2dGeometry((3, 3), padding=(1, 1))
STEPS = 3  # rows of a table of scales
_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Case:
    """One product.

    Attributes:
        x: sizes of the activations: [M, K], or NHWC.
        N: output channels.
        geometry: of a convolution.
        bits: of the weight.
        second: channels of a second segment; 0 for none.
        parts: what the epilogue has: bias, temb, residual, table, rows, geglu, int8, groups.
    """

    x: tuple[int, ...]
    N: int
    geometry: Conv2dGeometry | None = None
    bits: int = 4
    second: int = 0
    parts: frozenset[str] = field(default_factory=frozenset)

    def layout(self) -> KLayout:
        """Order of the packed weight."""
        segments = (self.x[-1], self.second) if self.second else self.x[-1:]
        return KLayout(segments, (1, 1) if self.geometry is None else self.geometry.kernel_size)


def _parts(text: str) -> frozenset[str]:
    return frozenset(text.split())


FULL = "bias temb residual table"
CASES: dict[str, Case] = {
    # an image row of a power of two: boxes, where the GPU has them
    "conv-tma": Case((2, 5, 8, 80), 37, SAME),
    "conv-tma-groups-full": Case((2, 5, 8, 80), 37, SAME, parts=_parts(f"groups {FULL}")),
    "conv-tma-w8-int8": Case((2, 5, 8, 80), 37, SAME, 8, parts=_parts("bias int8")),
    "conv-gather": Case((2, 5, 7, 80), 37, SAME),
    # few pixels, long sums: split
    "conv-split": Case((1, 3, 3, 320), 40, SAME, parts=_parts(FULL)),
    "conv-segments": Case((2, 3, 5, 70), 33, SAME, second=40, parts=_parts(FULL)),
    "conv-stride": Case((1, 5, 6, 64), 20, Conv2dGeometry((3, 3), (2, 2), (1, 1))),
    "conv-upsample": Case(
        (1, 3, 2, 64), 20, Conv2dGeometry((3, 3), (1, 1), (1, 1), (1, 1), (5, 4))
    ),
    "conv-pointwise": Case((1, 5, 3, 70), 20, Conv2dGeometry((1, 1)), parts=_parts("residual")),
    "gemm": Case((21, 200), 50, parts=_parts("bias rows")),
    "gemm-w8": Case((21, 200), 50, bits=8, parts=_parts(f"{FULL} int8")),
    "gemm-split": Case((9, 640), 50, parts=_parts(FULL)),
    "gemm-groups": Case((21, 320), 50, parts=_parts("groups bias")),
    "gemm-segments": Case((21, 320), 50, second=130, parts=_parts("bias table")),
    "gemm-geglu": Case((21, 128), 68, parts=_parts("bias geglu")),
    # halves of whole units of 16 channels, which the cuda backend gates in its kernel
    "gemm-geglu-units": Case((21, 320), 96, parts=_parts("bias geglu int8 table")),
    "gemm-geglu-int8": Case((21, 320), 68, parts=_parts("groups bias geglu int8 table")),
}


def make_call(case: Case) -> Matmul:
    """Random numbers on the CPU; the same for the same case."""
    generator = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high + 1, size, generator=generator)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def scale(*size: int) -> Tensor:
        return 0.01 + 0.01 * torch.rand(size, generator=generator)

    layout = case.layout()
    low, high = (-8, 7) if case.bits == 4 else (-127, 127)
    weight = integers(low, high, case.N, sum(layout.segments), *layout.kernel_size).to(torch.int8)
    rows = weight_to_rows(weight, layout)
    table = scale(STEPS) if "table" in case.parts else scale(1)
    options = MatmulOptions(out_dtype=torch.float16)
    shape = (*case.x[:-1], case.N)
    if case.geometry is not None:
        shape = (case.x[0], *case.geometry.output_size(*case.x[1:3]), case.N)
    if "groups" in case.parts:
        options.w_mult = integers(1, 15, case.N, rows.shape[1] // BLOCK_K).to(torch.uint8)
    if case.second:
        options.x2_q = integers(-127, 127, *case.x[:-1], case.second).to(torch.int8)
        options.x2_scale = table.flip(0)
    if "table" in case.parts:
        options.step = torch.tensor(1)
    if "bias" in case.parts:
        options.bias = normal(case.N)
    if "temb" in case.parts:
        options.temb = normal(case.x[0] if case.geometry is not None else 3, case.N).half()
    if "residual" in case.parts:
        options.residual = normal(*shape).half()
    options.geglu = "geglu" in case.parts
    if "int8" in case.parts:
        options.out_scale = 0.5 * table
    return Matmul(
        case.bits,
        integers(-127, 127, *case.x).to(torch.int8),
        scale(case.x[0]) if "rows" in case.parts else table,
        pack_int4(rows) if case.bits == 4 else rows,
        scale(case.N),
        options,
    )


def move(call: Matmul, device: torch.device) -> Matmul:
    """The call with its tensors on a device."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    options = {f.name: moved(getattr(call.options, f.name)) for f in fields(MatmulOptions)}
    rest = {f.name: moved(getattr(call, f.name)) for f in fields(Matmul) if f.name != "options"}
    return Matmul(**rest, options=MatmulOptions(**options))


def tiles(problem: Problem, backend: str = TRITON) -> list[Tile]:
    """The tiles that take another way through a kernel, and a large one.

    Of ``triton`` the planned tile, one of each form, split and whole, and the largest: the plan
    gives small shapes small tiles, the large one has what the real shapes run with. Of ``cuda``
    every tile, and the first and the last of them split.
    """
    if backend == CUDA:
        found = TILE_SETS[CUDA].candidates(problem, None)
        whole = [tile for tile in found if tile.split_k == 1]
        ends = [(tile.block_m, tile.block_n) for tile in (whole[0], whole[-1])]
        split = [t for t in found if t.split_k in (2, 3) and (t.block_m, t.block_n) in ends]
        return [*whole, *split]
    candidates = tuner.candidates(problem, 64)
    kinds: dict[tuple[bool, str], TileConfig] = {}
    for config in candidates:
        kinds.setdefault((config.split_k > 1, config.form), config)
    largest = max(candidates, key=lambda c: (c.block_m * c.block_n, c.num_stages))
    return list(dict.fromkeys([*kinds.values(), largest]))


def way(tile: Tile) -> tuple[bool, str]:
    """Whether a tile's sums are split, and its form (``triton``) or family and sizes (``cuda``)."""
    if isinstance(tile, TileConfig):
        return tile.split_k > 1, tile.form
    return tile.split_k > 1, describe(replace(tile, split_k=1))


def run_product(
    name: str, case: Case, device: torch.device, backend: str = TRITON
) -> set[tuple[bool, str]]:
    """Run and check a product with every kind of tile; returns the `way` of each.

    Raises:
        BenchmarkError: if a result is wrong.
    """
    call, geometry = make_call(case), case.geometry
    if geometry is None:
        sums, expected = reference.accumulate_linear(call), reference.linear(call)
    else:
        sums = reference.accumulate_conv2d(call, geometry)
        expected = reference.conv2d(call, geometry)
    qweight = prepack(call.qweight, bits=case.bits, layout=case.layout(), backend=backend)
    product = ProductCall(move(replace(call, qweight=qweight), device), geometry, backend)
    ran = set()
    for tile in tiles(product.problem(), backend):
        label = f"{name}, {tile}"
        for got, exact in zip(product.accumulate(tile), sums, strict=True):
            check_equal(label, got.cpu(), exact)
        y = product.run(tile).cpu()
        if y.dtype == torch.int8:
            check_steps(label, y, expected)
        else:
            check_close(label, y, expected, _TOLERANCE)
        ran.add(way(tile))
    return ran


def run_activation(kind: str, device: torch.device) -> None:
    """Run and check a norm or a gate, with given and with measured scales.

    Raises:
        BenchmarkError: if a result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    is_image = kind in (GROUP_NORM, GROUP_NORM_SILU)
    size = (2, 5, 3, 96) if is_image else (13, 72)
    x = torch.randn(size, generator=generator).half()
    x = x.permute(0, 3, 1, 2) if is_image else x
    channels = x.shape[1]
    weight, bias = (torch.randn(channels, generator=generator).half() for _ in range(2))
    for x_scale in (torch.full((1,), 0.03), None):
        expected, scale = quantizer(kind, x, weight, bias, x_scale=x_scale, backend="reference")
        got, got_scale = quantizer(
            kind,
            x.to(device),
            weight.to(device),
            bias.to(device),
            x_scale=None if x_scale is None else x_scale.to(device),
            backend="triton",
        )
        check_steps(kind, got.cpu(), expected)
        check_close(f"scale of {kind}", got_scale.cpu(), scale, 1e-3)


def run_quantizer(device: torch.device) -> None:
    """Run and check plain quantization: a given scale, one of the tensor, one a row.

    Raises:
        BenchmarkError: if a result is wrong.
    """
    x = torch.randn(21, 72, generator=torch.Generator().manual_seed(0)).half()
    given: list[Mapping[str, Any]] = [
        {"x_scale": torch.full((1,), 0.03)},
        {"granularity": "tensor"},
        {"granularity": "row"},
    ]
    for keywords in given:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in keywords.items()}
        expected, _ = ops.quantize_int8(x, backend="reference", **keywords)
        got, _ = ops.quantize_int8(x.to(device), backend="triton", **moved)
        check_steps("quantize", got.cpu(), expected)


def all_names(backend: str) -> list[str]:
    """Names of a backend's cases: the cuda backend's norms, gates and quantizers are Triton's."""
    return [*CASES, *ACTIVATION_KINDS, "quantize"] if backend == TRITON else [*CASES]


def all_cases(device: torch.device, backend: str) -> dict[str, Callable[[], Any]]:
    """Every case by name."""
    cases: dict[str, Callable[[], Any]] = {
        name: lambda name=name, case=case: run_product(name, case, device, backend)
        for name, case in CASES.items()
    }
    if backend != TRITON:
        return cases
    cases |= {kind: lambda kind=kind: run_activation(kind, device) for kind in ACTIVATION_KINDS}
    return {**cases, "quantize": lambda: run_quantizer(device)}


def run_cases(
    names: list[str], device: torch.device, *, deadline: float | None, backend: str = TRITON
) -> int:
    """Run cases and print what became of each; returns the exit code."""
    cases = all_cases(device, backend)
    started = time.monotonic()
    failed, left_out, kinds = [], [], set()
    for name in names:
        if deadline is not None and time.monotonic() - started > deadline:
            left_out.append(name)
            continue
        try:
            with torch.inference_mode():
                kinds |= cases[name]() or set()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except FAULTS as error:
            failed.append(f"FAILED: {name}: {describe_fault(error, device)}")
            print(failed[-1], flush=True)
        else:
            print(f"{name}: right", flush=True)
    if left_out:
        print(f"no time for: {', '.join(left_out)}")
    ways = ", ".join(sorted(f"{form}{' split' if is_split else ''}" for is_split, form in kinds))
    ran = len(names) - len(left_out)
    print(f"{ran} of {len(names)} cases ran, {len(failed)} failed; tiles: {ways or 'none'}")
    return int(bool(failed))


def run_jobs(names: list[str], jobs: int, options: list[str]) -> int:
    """Run cases in several processes, which compile side by side; returns the exit code."""
    shares = [names[first::jobs] for first in range(min(jobs, len(names)))]
    started = []
    for share in shares:
        command = [sys.executable, "-P", str(Path(__file__).resolve()), *options]
        command += [part for name in share for part in ("--case", name)]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    failed = 0
    for process in started:
        text, _ = process.communicate()
        print(text, end="", flush=True)
        failed += process.returncode != 0
    print(f"{len(names)} cases in {len(shares)} processes, {failed} of which failed")
    return int(bool(failed))


def main() -> int:
    """Run the cases; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, default=TRITON, help="whose kernels")
    known = all_names(TRITON)
    parser.add_argument("--case", action="append", choices=known, help="repeatable (default: all)")
    parser.add_argument("--deadline", type=float, default=None, help="begin none after S seconds")
    parser.add_argument("--rehearse", action="store_true", help="interpreted, or emulated")
    parser.add_argument("--jobs", type=int, default=1, help="processes, not for a sanitizer")
    arguments = parser.parse_args()
    backend = arguments.backend
    names = arguments.case or all_names(backend)
    others = sorted(set(names) - set(all_names(backend)))
    if others:
        parser.error(f"case {others[0]!r}: backend {backend} runs Triton's")
    if arguments.jobs > 1:
        options = ["--backend", backend, *(["--rehearse"] if arguments.rehearse else [])]
        return run_jobs(names, arguments.jobs, options)
    device = find_device(is_rehearsal=arguments.rehearse)
    with backends_on(device, [backend]):
        return run_cases(names, device, deadline=arguments.deadline, backend=backend)


if __name__ == "__main__":
    sys.exit(main())
