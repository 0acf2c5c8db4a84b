"""Run every GPU operator once on tiny shapes, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python benchmarks/sanitize_gpu.py
    TRITON_INTERPRET=1 python benchmarks/sanitize_gpu.py --rehearse

Results are compared with the reference as well, so a silent race shows here, too.
"""

from __future__ import annotations

import argparse

import torch
from ptq4adm.kernels import tuner
from ptq4adm.kernels.tuning import TileConfig

from ptq4adm.bench.gpu_activations import activation_variants
from ptq4adm.bench.gpu_calls import ProductCall, empty_call
from ptq4adm.bench.gpu_environment import find_device
from ptq4adm.bench.gpu_problem import GpuProblem
from ptq4adm.bench.gpu_products import product_variants
from ptq4adm.bench.gpu_shapes import TOY_LAYERS, GpuLayer


def tiles(call: ProductCall) -> list[TileConfig]:
    """The planned tile, and one of each kind that takes another way through the kernel."""
    kinds: dict[tuple[bool, str], TileConfig] = {}
    for config in tuner.candidates(call.problem(), 64):
        kinds.setdefault((config.split_k > 1, config.form), config)
    return list(kinds.values())


def run_layer(layer: GpuLayer, device: torch.device) -> int:
    """Run and check every variant of a layer; returns how many ran."""
    if not layer.is_product:
        variants = activation_variants(layer, device, backend="triton")
        for variant in variants:
            variant.check()
        return len(variants)
    problem = GpuProblem(layer, device, backend="triton")
    variants = product_variants(problem)
    for variant in variants:
        variant.check()
    count = len(variants)
    for bits in (4, 8):
        call = empty_call(layer, bits, device)
        call.call.x_q.copy_(problem.x_q)
        weight = problem.packed(bits, 0)
        call.call.qweight.copy_(weight.qweight)
        call.call.w_scale.copy_(weight.w_scale)
        call.call.options.bias.copy_(weight.bias)
        first, *others = (call.run(config) for config in tiles(call))
        for other in others:
            if not torch.equal(first, other):
                raise SystemExit(f"{layer.shape}, {bits} bits: tiles differ")
        count += 1 + len(others)
    return count


def main() -> None:
    """Run all layers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="in Triton's interpreter")
    device = find_device(is_rehearsal=parser.parse_args().rehearse)
    with torch.inference_mode():
        count = sum(run_layer(layer, device) for layer in TOY_LAYERS)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{count} calls ran on {len(TOY_LAYERS)} shapes")


if __name__ == "__main__":
    main()
