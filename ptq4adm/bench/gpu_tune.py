"""Measure tiles for the layers of real models and write the fastest: `ptq4adm tune`.

For every distinct product the tiles of `kernels.tuner.candidates` are compiled (on all cores),
checked, timed side by side as `gpu_timing` describes - weights from memory, activations from L2, as
in a step - and the fastest is added to the file of its kernel, N, K and device. What is in a file
already is not measured again, so an interrupted run goes on where it was.

The check uses the kernel that is timed, not another one with integer output: with all scales 1 and
sparse activations every sum is a small integer, which float16 holds exactly.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from triton.errors import TritonError

from ptq4adm.bench.gpu_calls import ProductCall, layer_layout, make_call
from ptq4adm.bench.gpu_environment import find_device, gpu_environment
from ptq4adm.bench.gpu_precompile import Wanted, precompile
from ptq4adm.bench.gpu_problem import FLOAT16_EXACT, SMALL, GpuProblem
from ptq4adm.bench.gpu_products import gate
from ptq4adm.bench.gpu_shapes import TOY_MODEL, GpuLayer, gpu_layers
from ptq4adm.bench.gpu_tiles import describe, tuning_problem
from ptq4adm.bench.gpu_timing import GpuCall, Timer, make_timer
from ptq4adm.bench.gpu_variant import check_close, check_equal
from ptq4adm.bench.shapes import KINDS
from ptq4adm.errors import BenchmarkError, ConfigError
from ptq4adm.kernels import tuner
from ptq4adm.kernels.tuning import Problem, TileConfig
from ptq4adm.packing.layout import pack_int4, weight_to_rows

TUNED_MODELS = ("tango", "audioldm-s", "audioldm-l")
_QUICK_CANDIDATES = 6
_SECONDS = 0.05
_GATE_TOLERANCE = 5e-3


@dataclass(frozen=True)
class TuneJob:
    """What to tune.

    Args:
        models: names of `shapes.MODELS`.
        kinds: kinds of products, of `shapes.KINDS`.
        bits: 4, 8 or both, of the weights.
        output: folder of the files; None for the package's own.
        is_quick: six tiles for each product instead of 20.
        is_rehearsal: in Triton's interpreter, toy shapes, two tiles.
        deadline: seconds after which no other product is begun; None for no limit.
        is_fresh: measure again what is in the files.

    Raises:
        ConfigError: if a value is unknown.
    """

    models: tuple[str, ...] = TUNED_MODELS
    kinds: tuple[str, ...] = KINDS
    bits: tuple[int, ...] = (4,)
    output: Path | None = None
    is_quick: bool = False
    is_rehearsal: bool = False
    deadline: float | None = None
    is_fresh: bool = False

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                known = ", ".join(KINDS)
                raise ConfigError(f"kind {kind!r} has no tiles: expected one of {known}")
        for width in self.bits:
            if width not in (4, 8):
                raise ConfigError(f"bits {width} is unknown: expected 4 or 8")
        gpu_layers(self.models)

    @property
    def limit(self) -> int:
        """Most tiles of a product."""
        if self.is_rehearsal:
            return 2
        return _QUICK_CANDIDATES if self.is_quick else tuner.MOST_CANDIDATES

    def products(self, device: torch.device) -> list[Product]:
        """What to tune, weightiest first; one layer for each distinct problem."""
        models = (TOY_MODEL,) if self.is_rehearsal else self.models
        found: dict[Problem, Product] = {}
        for layer in sorted(gpu_layers(models, self.kinds), key=lambda layer: -layer.weight):
            for bits in self.bits:
                for is_gated in (False, True)[: 1 + layer.is_gated]:
                    problem = tuning_problem(layer, bits, device, is_gated=is_gated)
                    product = Product(layer, bits, is_gated, problem)
                    found.setdefault(problem, product)
        return list(found.values())


@dataclass(frozen=True)
class Product:
    """One problem, with a layer that poses it.

    Attributes:
        layer: the sizes.
        bits: of the weight.
        is_gated: with GEGLU.
        problem: what its tile is chosen by.
    """

    layer: GpuLayer
    bits: int
    is_gated: bool
    problem: Problem


def run_tune(job: TuneJob, *, progress: bool = True) -> dict[str, Any]:
    """Tune.

    Args:
        job: what.
        progress: show bars on a terminal.

    Returns:
        ``run``: columns of every row; ``rows``: one a product and tile; ``files``: those written;
        ``known``: products that were in the files; ``left_out``: for which the time did not
        suffice; ``failed``: tiles that did not compile or run, with the reason.

    Raises:
        BackendUnavailableError: if there is no GPU.
        BenchmarkError: if a tile's result is wrong; files of earlier products stay.
        ConfigError: if a rehearsal has no folder to write to.
    """
    started = time.perf_counter()
    device = find_device(is_rehearsal=job.is_rehearsal)
    timer = make_timer(device)
    products = job.products(device)
    todo = [p for p in products if job.is_fresh or not tuner.is_measured(p.problem, job.output)]
    tiles = {p: tuner.candidates(p.problem, job.limit) for p in todo}
    failed: list[str] = []
    if device.type == "cuda":
        wanted = [Wanted(p.layer, tile, p.bits, p.is_gated) for p in todo for tile in tiles[p]]
        failed += precompile(wanted, device, progress=progress)
    rows: list[dict[str, Any]] = []
    files: dict[str, None] = {}
    left_out: list[str] = []
    with torch.inference_mode():
        for product in tqdm(todo, desc="tune", unit="product", disable=None if progress else True):
            if job.deadline is not None and time.perf_counter() - started > job.deadline:
                left_out.append(_name(product))
                continue
            result = measure_product(product, tiles[product], timer)
            failed += result.failed
            rows += result.rows
            files.setdefault(str(tuner.write(product.problem, result.chosen, job.output)))
    return {
        "run": gpu_environment(device),
        "rows": rows,
        "files": list(files),
        "known": len(products) - len(todo),
        "left_out": left_out,
        "failed": failed,
    }


@dataclass(frozen=True)
class _Measured:
    chosen: TileConfig
    rows: list[dict[str, Any]]
    failed: list[str]


def measure_product(product: Product, configs: tuple[TileConfig, ...], timer: Timer) -> _Measured:
    """Check and time the tiles of one product.

    Args:
        product: what is multiplied.
        configs: tiles, the planned one first.
        timer: of the device.

    Raises:
        BenchmarkError: if the planned tile does not run, or one computes another result.
    """
    operands = _Operands(product, timer.device)
    usable: dict[TileConfig, GpuCall] = {}
    failed = []
    for config in configs:
        try:
            operands.check(config)
        except (TritonError, RuntimeError) as error:
            if isinstance(error, BenchmarkError):
                raise
            if timer.device.type == "cuda":
                torch.cuda.synchronize()  # raises if the device is lost: no other tile would run
            failed.append(f"{_name(product)}, {describe(config)}: {type(error).__name__}: {error}")
            if config == configs[0]:
                raise BenchmarkError(f"the planned tile does not run: {failed[-1]}") from error
            continue
        usable[config] = operands.timed(config)
    timings = timer.time(
        {describe(config): call for config, call in usable.items()}, seconds=_SECONDS
    )
    us = {config: timings[describe(config)].us for config in usable}
    chosen = tuner.fastest(us, configs[0])
    rows = [
        {
            **_columns(product),
            "tile": describe(config),
            "us": float(f"{us[config]:.4g}"),
            "p20_us": float(f"{timings[describe(config)].p20_us:.4g}"),
            "p80_us": float(f"{timings[describe(config)].p80_us:.4g}"),
            "planned": int(config == configs[0]),
            "chosen": int(config == chosen),
        }
        for config in usable
    ]
    return _Measured(chosen, rows, failed)


class _Operands:
    """Activations and copies of the weight of one product, and the check of its tiles."""

    def __init__(self, product: Product, device: torch.device) -> None:
        self.product = product
        self.problem = problem = GpuProblem(product.layer, device, backend="triton")
        # 8-bit weights get the 4-bit values: the check's sums have to stay small
        self.w_q = problem.quantized(4)
        rows = weight_to_rows(self.w_q, layer_layout(product.layer))
        self.copies = [pack_int4(rows) if product.bits == 4 else rows]
        self.sparse = problem.sparse(4)
        self.zeros = torch.zeros(problem.shape.N, device=device)
        self.ones = torch.ones(problem.shape.N, device=device)
        self.small = self.ones * SMALL
        self.outputs: list[Tensor] = []

    def call(self, x_q: Tensor, copy: int) -> ProductCall:
        """The product of one copy: of sparse activations with all scales 1."""
        while len(self.copies) <= copy:
            self.copies.append(self.copies[0].clone())
        return make_call(
            self.product.layer,
            self.product.bits,
            x_q=x_q,
            qweight=self.copies[copy],
            w_scale=self.ones if x_q is self.sparse else self.small,
            bias=self.zeros,
            is_gated=self.product.is_gated,
        )

    def timed(self, config: TileConfig) -> GpuCall:
        """What is timed."""
        x_q = self.problem.x_q
        return GpuCall(lambda copy: self.call(x_q, copy).run(config), (x_q,))

    def check(self, config: TileConfig) -> None:
        """Compare with exact integers, and with the first tile in every bit.

        Raises:
            BenchmarkError: if one differs.
        """
        outputs = [self.call(x_q, 0).run(config) for x_q in (self.sparse, self.problem.x_q)]
        label = f"{_name(self.product)}, {describe(config)}"
        if not self.outputs:
            exact = self.problem.exact_rows(4, self.sparse)
            assert int(exact.abs().max()) <= FLOAT16_EXACT, "sums were to be small"
            got = self.problem.pick(outputs[0])
            if self.product.is_gated:
                check_close(label, got, gate(exact.double()), _GATE_TOLERANCE)
            else:
                check_equal(label, got, exact)
            self.outputs = outputs
        for got, expected in zip(outputs, self.outputs, strict=True):
            if not torch.equal(got, expected):
                raise BenchmarkError(
                    f"{label}: differs from the planned tile's result; nothing is written for it, "
                    "run pytest -m gpu"
                )


def _columns(product: Product) -> dict[str, Any]:
    problem = product.problem
    return {
        "kernel": problem.kernel,
        "shape": str(product.layer.shape),
        "gated": int(product.is_gated),
        "M": problem.M,
        "N": problem.N,
        "K": problem.K,
    }


def _name(product: Product) -> str:
    gated = " geglu" if product.is_gated else ""
    return f"{product.problem.kernel} {product.layer.shape}{gated}"


def format_tune(result: dict[str, Any]) -> str:
    """The text that `ptq4adm tune` prints: what won, and what it gains over the plan."""
    run, rows = result["run"], result["rows"]
    lines = [f"{run['device']}, triton {run['triton']}: {len(rows)} measurements", ""]
    planned = {_key(row): row for row in rows if row["planned"]}
    for row in rows:
        if row["chosen"]:
            gain = planned[_key(row)]["us"] / row["us"]
            lines.append(
                f"{row['kernel']:<12} {row['shape']:<38}{'geglu ' if row['gated'] else '':<6}"
                f"{row['us']:>9.1f} us  {gain:>5.2f} x planned  {row['tile']}"
            )
    lines += ["", f"{len(result['files'])} files written, {result['known']} products known before"]
    lines += [f"no time for: {name}" for name in result["left_out"]]
    lines += [f"did not run: {reason}" for reason in result["failed"]]
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("kernel", "shape", "gated"))
