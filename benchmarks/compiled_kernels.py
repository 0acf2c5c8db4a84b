"""What the Triton kernels compile to for the real shapes, tile by tile; no GPU needed.

    python benchmarks/compiled_kernels.py                      # every architecture
    python benchmarks/compiled_kernels.py --target 90          # one of them
    python benchmarks/compiled_kernels.py --oldest             # by the oldest supported Triton
    python benchmarks/compiled_kernels.py --write              # rewrite docs/compiled-kernels.md

Every layer shape of AudioLDM-S and TANGO is launched offline with the tile that is planned for it,
and each kernel that results is read once. A row is a tile (channels x rows x k, warps, stages) of a
kernel. Columns: how many kernels have it (epilogues, splits, sizes), registers a thread, bytes of
shared memory, programs that a multiprocessor holds; then instructions of one iteration of the hot
loop, and of these: tensor core, LOP3 (which decode weights), shared loads, 16-byte copies or boxes,
byte permutations.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from ptq4adm.bench.shapes import CONV1X1, CONV3X3, LINEAR, LayerShape, model_layers
from ptq4adm.kernels.inspection import Resources, programs_at_once, resources
from ptq4adm.kernels.launch import CompiledKernel, OfflineTarget, compile_only
from ptq4adm.kernels.tuning import Problem, TileConfig, plan_config
from ptq4adm.ops import triton_matmul
from ptq4adm.ops.arguments import Conv2dGeometry, Matmul, MatmulOptions
from ptq4adm.packing.layout import BLOCK_K, KLayout

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "compiled-kernels.md"
OLDEST = Path(sys.prefix) / "oldest"  # where `make setup` puts the oldest supported Triton
MODELS = ("audioldm-s", "tango")
# compute capability -> a GPU that has it, and its multiprocessors
TARGETS = {80: ("A100", 108), 86: ("RTX 3090", 82), 89: ("RTX 4090", 128), 90: ("H100", 132)}
BUCKETS = 4


@dataclass(frozen=True)
class Product:
    """A call of a matrix product with an epilogue that a model has.

    Attributes:
        name: what it is, such as ``conv3x3 temb``.
        call: operands of the right sizes, uninitialized.
        geometry: of a convolution.
    """

    name: str
    call: Matmul
    geometry: Conv2dGeometry | None

    def problem(self) -> Problem:
        """What the tile is chosen by, for the GPU that is compiled for."""
        if self.geometry is None:
            return triton_matmul.linear_problem(self.call)
        return triton_matmul.conv2d_problem(self.call, self.geometry)

    def plan(self) -> TileConfig:
        """The tile planned for that GPU."""
        return plan_config(self.problem())

    def launch(self, config: TileConfig) -> None:
        """Launch with a tile: inside ``compile_only``, to compile it."""
        if self.geometry is None:
            triton_matmul.linear(self.call, config)
        else:
            triton_matmul.conv2d(self.call, self.geometry, config)


@dataclass(frozen=True)
class Specimen:
    """A kernel as compiled for one product.

    Attributes:
        product: the first that needs it.
        config: its tile.
        compiled: the launch.
        used: what was read out of its machine code.
    """

    product: Product
    config: TileConfig
    compiled: CompiledKernel
    used: Resources


def make_product(
    shape: LayerShape,
    bits: int,
    *terms: str,
    out_dtype: torch.dtype = torch.float16,
    segments: tuple[int, ...] = (),
    is_grouped: bool = False,
    row_scales: bool = False,
) -> Product:
    """Build a call of a layer's shape.

    Args:
        shape: of the layer.
        bits: 4 or 8, of a weight.
        *terms: of ``bias``, ``temb``, ``residual``, ``geglu`` and ``int8``: the epilogue.
        out_dtype: of the output.
        segments: channels of two K segments, or none.
        is_grouped: whether groups of 64 weights have multipliers.
        row_scales: one activation scale a row, as without calibration; else a table.
    """
    is_linear = shape.kind == LINEAR
    layout = KLayout(segments or (shape.in_channels,), (shape.kernel, shape.kernel))
    N, K = shape.N, layout.k_padded
    size = (shape.M,) if is_linear else (shape.batch, shape.height, shape.width)
    parts = [torch.empty(*size, c, dtype=torch.int8) for c in layout.segments]
    scale = torch.empty(shape.M if row_scales else BUCKETS)
    out_size = (shape.M,) if is_linear else (shape.batch, *shape.out_size)

    def optional(term: str, *sizes: int) -> Tensor | None:
        return torch.empty(*sizes, dtype=torch.float16) if term in terms else None

    options = MatmulOptions(
        w_mult=torch.empty(N, K // BLOCK_K, dtype=torch.uint8) if is_grouped else None,
        bias=optional("bias", N),
        temb=optional("temb", shape.batch, N),
        residual=optional("residual", *out_size, N),
        x2_q=parts[1] if segments else None,
        x2_scale=torch.empty(BUCKETS) if segments else None,
        step=None if row_scales else torch.zeros(1, dtype=torch.int64),
        out_scale=torch.empty(BUCKETS) if "int8" in terms else None,
        geglu="geglu" in terms,
        out_dtype=out_dtype,
    )
    qweight = torch.empty(N, K * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8)
    call = Matmul(bits, parts[0], scale, qweight, torch.empty(N), options)
    name = " ".join([shape.kind, *terms[1:], *(["groups"] if is_grouped else [])])
    return Product(name, call, None if is_linear else _geometry(shape))


def _geometry(shape: LayerShape) -> Conv2dGeometry:
    return Conv2dGeometry(
        (shape.kernel, shape.kernel),
        stride=(shape.stride, shape.stride),
        padding=(shape.kernel // 2, shape.kernel // 2),
        upsample=shape.out_size if shape.is_upsampled else None,
    )


def model_products(bits: int) -> Iterator[Product]:
    """Yield every layer shape of `MODELS`, with the epilogues that blocks give it."""
    shapes = {layer.shape for model in MODELS for layer in model_layers(model)}
    for shape in sorted(shapes, key=lambda s: (s.kind, s.M, s.N, s.K)):
        if shape.kind == CONV3X3:
            yield make_product(shape, bits, "bias", "temb")
            if shape.in_channels == shape.out_channels:
                yield make_product(shape, bits, "bias", "residual")
        elif shape.kind == CONV1X1 and shape.in_channels > shape.out_channels:
            # the shortcut of a skip concatenation
            halves = (shape.in_channels - shape.out_channels, shape.out_channels)
            yield make_product(shape, bits, "bias", segments=halves)
        elif shape.kind == LINEAR and shape.N == 8 * shape.K:
            yield make_product(shape, bits, "bias", "geglu", "int8")
        elif shape.kind == LINEAR and shape.N <= shape.K and shape.K != 1024:
            yield make_product(shape, bits, "bias", "residual")
        else:
            yield make_product(shape, bits, "bias")


def compile_products(products: Iterator[Product], target: OfflineTarget) -> Iterator[Specimen]:
    """Compile products inside ``compile_only`` and yield each kernel once."""
    seen = set()
    for product in products:
        config = product.plan()
        product.launch(config)
        compiled = target.compiled[-1]
        if compiled.kernel.hash not in seen:
            seen.add(compiled.kernel.hash)
            yield Specimen(product, config, compiled, resources(compiled))


# --- the table ----------------------------------------------------------------------------------

HEADER = (
    "kernel", "tile", "kernels", "registers", "shared", "programs", "loop", "tensor core",
    "decode", "loads", "copies", "PRMT",
)  # fmt: skip


def table_row(specimens: list[Specimen], capability: int) -> list[str]:
    """One row of the table: kernels of one tile. Loops are the first's; they hardly differ."""
    first, config = specimens[0], specimens[0].config
    loop = first.used.loops[0]
    name = first.compiled.name.strip("_").removesuffix("_kernel")
    registers = [s.used.registers for s in specimens]
    return [
        f"w{first.product.call.bits}a8_{name}",
        f"{config.block_n}x{config.block_m}x{config.block_k} {config.num_warps}w "
        f"{config.num_stages}s",
        str(len(specimens)),
        _span(registers),
        _span([s.used.shared_bytes for s in specimens]),
        _span([programs_at_once(s.used, capability) for s in specimens]),
        str(loop.total),
        str(loop.count("IMMA") + loop.count("IGMMA")),
        str(loop.count("LOP3")),
        str(loop.count("LDS") + loop.count("LDSM")),
        str(loop.count("LDGSTS", "128") + loop.count("UTMALDG")),
        str(max(hot.count("PRMT") for s in specimens for hot in s.used.loops)),
    ]


def _span(values: list[int]) -> str:
    least, most = min(values), max(values)
    return str(least) if least == most else f"{least} to {most}"


def by_tile(specimens: Iterable[Specimen]) -> list[list[Specimen]]:
    """Group kernels by name, bits and tile, whatever their splits and epilogues."""
    groups: dict[tuple[object, ...], list[Specimen]] = {}
    for specimen in specimens:
        key = (
            specimen.compiled.name,
            specimen.product.call.bits,
            replace(specimen.config, split_k=1),
        )
        groups.setdefault(key, []).append(specimen)
    return list(groups.values())


def tables(targets: list[int]) -> Iterator[str]:
    """Yield a Markdown table for each architecture."""
    for capability in targets:
        name, multiprocessors = TARGETS[capability]
        with compile_only(capability, multiprocessors) as target:
            specimens = [
                specimen
                for bits in (4, 8)
                for specimen in compile_products(model_products(bits), target)
            ]
        spills = sum(specimen.used.spills for specimen in specimens)
        rows = sorted(table_row(group, capability) for group in by_tile(specimens))
        lines = [HEADER, ["---"] * len(HEADER), *rows]
        yield "\n".join(
            [
                f"### sm_{capability}, planned for {name} ({multiprocessors} multiprocessors)\n",
                f"Triton {triton.__version__}, {len(specimens)} kernels, {spills} spills.\n",
                *("| " + " | ".join(line) + " |" for line in lines),
            ]
        )


def write(text: str) -> None:
    """Replace what stands between the document's markers."""
    start, end = "<!-- compiled kernels -->\n", "<!-- end -->"
    before, _, rest = DOCUMENT.read_text().partition(start)
    _, _, after = rest.partition(end)
    DOCUMENT.write_text(f"{before}{start}{text}\n{end}{after}")


def main() -> int:
    """Print or write the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default=",".join(map(str, TARGETS)), help="such as 80,90")
    parser.add_argument("--oldest", action="store_true", help="the oldest supported Triton")
    parser.add_argument("--write", action="store_true", help=f"into docs/{DOCUMENT.name}")
    arguments = parser.parse_args()
    if arguments.oldest and OLDEST not in Path(triton.__file__).parents:
        if not OLDEST.is_dir():
            parser.error(f"{OLDEST} does not exist; run `make setup`")
        environment = os.environ | {"PYTHONPATH": str(OLDEST)}
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode
    found = tables([int(target) for target in arguments.target.split(",")])
    if arguments.write:
        write("\n\n".join(found))
    else:
        for table in found:
            print(table, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
