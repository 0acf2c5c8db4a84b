"""Compile kernels offline and write what their machine code holds; started by test_compile.py.

    python compile_cases.py OUTPUT.json 80,86,89

A process of its own, because Triton interprets kernels in the one of the tests, and because it runs
with two versions of Triton. A case is a planned tile of a real shape, a variant of it that models
use, or a control: a kernel made to be bad, which shows that the counters see it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from ptq4adm.kernels.inspection import programs_at_once, resources
from ptq4adm.kernels.launch import OfflineTarget, compile_only, launch
from ptq4adm.kernels.tuning import TileConfig, planned_programs, shared_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from compiled_kernels import TARGETS, Product, make_product, model_products

from ptq4adm.bench.shapes import CONV1X1, CONV3X3, LINEAR, LayerShape
from ptq4adm.ops import triton_activation

LEVEL0 = LayerShape(CONV3X3, 2, 256, 16, 320, 320)
LEVEL3 = LayerShape(CONV3X3, 2, 32, 2, 1280, 1280)
SHORTCUT = LayerShape(CONV1X1, 2, 64, 4, 1920, 1280)
TOKENS = LayerShape(LINEAR, 1, 2048, 1, 640, 640)
FEW_TOKENS = LayerShape(LINEAR, 1, 128, 1, 1280, 1280)
PROJECTION = LayerShape(LINEAR, 1, 2048, 1, 640, 5120)


def variants(bits: int) -> Iterator[Product]:
    """Yield what `model_products` does not: groups, gates, dtypes, row scales."""
    if bits == 4:
        for shape in (LEVEL0, LEVEL3, TOKENS, FEW_TOKENS):
            yield make_product(shape, bits, "bias", "residual", is_grouped=True)
        yield make_product(SHORTCUT, bits, "bias", segments=(640, 1280), is_grouped=True)
    yield make_product(TOKENS, bits, "bias", row_scales=True, out_dtype=torch.float32)
    yield make_product(TOKENS, bits, "bias", "int8")
    yield make_product(LEVEL0, bits, "bias", "temb", "residual", out_dtype=torch.bfloat16)
    yield make_product(PROJECTION, bits, "bias", "geglu")


def products(
    bits: int, target: int, seen: set[tuple[object, ...]]
) -> Iterator[tuple[Product, TileConfig]]:
    """Yield a product for every planned tile, once for each form of its kernel.

    Left out are specializations that hardly differ in what is asserted: other counts of splits,
    sizes that happen to be multiples of 16, epilogues of tiles with registers to spare, and of
    8-bit weights all tiles but the largest.

    Args:
        bits: 4 or 8.
        target: compute capability; `variants` are compiled for 8.0 and 9.0.
        seen: forms that were yielded before; added to.
    """
    wanted = [*model_products(bits), *(variants(bits) if target in (80, 90) else ())]
    for product in wanted:
        config, options = product.plan(), product.call.options
        tile = (config.block_n, config.block_m)
        if bits == 8 and tile != (128, 128):
            continue
        is_critical = tile in ((64, 64), (128, 128))  # these are to fit in 128 registers
        form: tuple[object, ...] = (
            bits,
            replace(config, split_k=min(config.split_k, 2) if is_critical else 1),
            product.geometry is not None and product.geometry.kernel_size[0] > 1,
            options.x2_q is None,
            options.w_mult is None,
            options.geglu,
        )
        if is_critical:
            form += (*product.name.split()[1:], options.out_dtype)
        if form not in seen:
            seen.add(form)
            yield product, config


def read_case(product: Product, config: TileConfig, target: OfflineTarget) -> dict[str, Any]:
    """Compile one case and return what its kernel holds."""
    product.launch(config)
    used = resources(target.compiled[-1])
    call = product.call
    return {
        "name": product.name,
        "target": target.capability,
        "bits": call.bits,
        "segments": 1 if call.options.x2_q is None else 2,
        "is_grouped": call.options.w_mult is not None,
        "config": asdict(config),
        "planned_programs": planned_programs(config, product.problem()),
        "programs": programs_at_once(used, target.capability),
        "planned_shared_bytes": shared_bytes(config, call.bits, target.capability),
        "used": asdict(used),
    }


# --- activations --------------------------------------------------------------------------------


def activation_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield calls of the activation operators at shapes of TANGO, float16."""
    table, step = torch.ones(4), torch.zeros(1, dtype=torch.int64)
    static = {"x_scale": table, "step": step}
    for channels, height, width in ((320, 256, 16), (1920, 64, 4)):
        x = torch.empty(2, channels, height, width, dtype=torch.float16)
        x = x.to(memory_format=torch.channels_last)
        ones = torch.ones(channels, dtype=torch.float16)
        norm = partial(triton_activation.groupnorm_silu_quantize, x, 32, ones, ones, 1e-5)
        yield f"group norm {channels}", partial(norm, **static) if channels == 320 else norm
    for rows, features in ((8192, 320), (512, 1280)):
        x = torch.empty(rows, features, dtype=torch.float16)
        ones = torch.ones(features, dtype=torch.float16)
        norm = partial(triton_activation.layernorm_quantize, x, ones, ones, 1e-5)
        yield f"layer norm {features}", partial(norm, **static)
        gate = torch.empty(rows, 8 * features, dtype=torch.float16)
        yield f"geglu {features}", partial(triton_activation.geglu_quantize, gate, **static)
        yield f"geglu {features} rows", partial(triton_activation.geglu_quantize, gate)
    yield "quantize", partial(triton_activation.quantize_int8, x, **static)
    yield "quantize dynamic", partial(triton_activation.quantize_int8, x)
    yield "quantize rows", partial(triton_activation.quantize_int8, x, granularity="row")


def activation_cases(target: OfflineTarget) -> Iterator[dict[str, Any]]:
    """Compile the activation operators and yield what each of their kernels holds."""
    seen = set()
    for name, call in activation_calls():
        first = len(target.compiled)
        call()
        for compiled in target.compiled[first:]:
            if compiled.kernel.hash not in seen:
                seen.add(compiled.kernel.hash)
                kernel = compiled.name.strip("_").removesuffix("_kernel")
                used = asdict(resources(compiled))
                yield {"name": f"{name}: {kernel}", "target": target.capability, "used": used}


# --- controls: kernels made to be bad -----------------------------------------------------------


@triton.jit
def _shifting_kernel(x_ptr, w_ptr, y_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """W4A8 with even and odd k unpacked by shifts of int8, and the weight as the B operand."""
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        x_q = tl.load(x_ptr + offs[:, None] * K + k + tl.arange(0, BLOCK_K)[None, :])
        offs_byte = k // 2 + tl.arange(0, BLOCK_K // 2)
        packed = tl.load(w_ptr + offs[:, None] * (K // 2) + offs_byte[None, :]).to(tl.int8)
        w_q = tl.interleave((packed << 4) >> 4, packed >> 4)  # [BLOCK, BLOCK_K]
        acc = tl.dot(x_q, w_q.T, acc, out_dtype=tl.int32)
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


def control_cases(target: OfflineTarget) -> Iterator[dict[str, Any]]:
    """Yield a kernel that decodes by shifts, and a good one that gets too few registers."""
    x_q, w_q = torch.empty(128, 512, dtype=torch.int8), torch.empty(128, 256, dtype=torch.uint8)
    for name, options in (("shifting", {}), ("spilling", {"maxnreg": 96})):
        launch(
            _shifting_kernel,
            (1,),
            x_q.device,
            x_q,
            w_q,
            torch.empty(128, 128, dtype=torch.int32),
            512,
            BLOCK=128,
            BLOCK_K=64,
            num_warps=4,
            num_stages=3,
            **options,
        )
        used = resources(target.compiled[-1])
        yield {"name": name, "target": target.capability, "used": asdict(used)}


def main(output: Path, targets: list[int]) -> None:
    """Compile everything for some architectures and write it."""
    is_oldest = "oldest" in Path(triton.__file__).parts
    cases: list[dict[str, Any]] = []
    controls: list[dict[str, Any]] = []
    activations: list[dict[str, Any]] = []
    seen: dict[int, set[tuple[object, ...]]] = {}
    for target in targets:
        # 8.9 runs the machine code of 8.6: what both plan is compiled once
        forms = seen.setdefault(86 if target == 89 else target, set())
        with compile_only(target, TARGETS[target][1]) as offline:
            controls += control_cases(offline)
            # nobody decodes 8-bit weights: one version of Triton shows enough
            for bits in (4, 8) if target in (80, 90) and not is_oldest else (4,):
                cases += [read_case(*case, offline) for case in products(bits, target, forms)]
            if target in (80, 90):
                activations += activation_cases(offline)
    lists = {"cases": cases, "controls": controls, "activations": activations}
    text = json.dumps({"triton": triton.__version__, **lists})
    output.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(target) for target in sys.argv[2].split(",")])
