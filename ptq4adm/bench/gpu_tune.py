"""Measure tiles for the layers of real models and write the fastest: `ptq4adm tune`.

For every distinct product the tiles of `kernels.tuner.candidates` are compiled (on all cores),
checked, timed side by side as `gpu_timing` describes - weights from memory, activations from L2, as
in a step - and the fastest is added to the file of its kernel, N, K and device. That happens in
batches of products, weightiest first; what is in a file already is not measured again, so an
interrupted run goes on where it was. A wrong tile becomes a row with the reason, and is not used.

The check uses the kernel that is timed, not another one with integer output: with all scales 1 and
sparse activations every sum is a small integer, which float16 holds exactly.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq4adm.bench.gpu_calls import ProductCall, layer_layout, layer_options, make_call
from ptq4adm.bench.gpu_environment import find_device, gpu_environment
from ptq4adm.bench.gpu_faults import FAULTS, describe_fault, failed_lines
from ptq4adm.bench.gpu_kernels import time_calls
from ptq4adm.bench.gpu_precompile import Precompiler, Wanted, compiled_batches
from ptq4adm.bench.gpu_problem import FLOAT16_EXACT, SMALL, GpuProblem
from ptq4adm.bench.gpu_products import gate
from ptq4adm.bench.gpu_progress import with_progress
from ptq4adm.bench.gpu_report import TUNE, Save
from ptq4adm.bench.gpu_shapes import TOY_MODEL, GpuLayer, gpu_layers
from ptq4adm.bench.gpu_tiles import describe, tuning_problem
from ptq4adm.bench.gpu_timing import GpuCall, Timer, make_timer
from ptq4adm.bench.gpu_variant import check_close, check_equal
from ptq4adm.bench.shapes import KINDS
from ptq4adm.errors import BenchmarkError, ConfigError
from ptq4adm.kernels import tuner
from ptq4adm.kernels.tuning import Problem, TileConfig
from ptq4adm.packing.layout import BLOCK_K, pack_int4, weight_to_rows

TUNED_MODELS = ("tango", "audioldm-s", "audioldm-l")
_QUICK_CANDIDATES = 6
BATCH = 8  # products whose tiles are compiled, then measured
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
        is_grouped: 4-bit weights with a multiplier for every 64 of a channel.

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
    is_grouped: bool = False

    def __post_init__(self) -> None:
        if self.is_grouped and self.bits != (4,):
            raise ConfigError(f"bits {self.bits}: groups are of 4-bit weights only; leave 8 out")
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
                    problem = tuning_problem(
                        layer, bits, device, is_gated=is_gated, is_grouped=self.is_grouped
                    )
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

    def wanted(self, tile: TileConfig) -> Wanted:
        """What is to be compiled for a tile."""
        return Wanted(
            self.layer, tile, self.bits, self.is_gated, is_grouped=self.problem.is_grouped
        )


def run_tune(job: TuneJob, *, progress: bool = True, save: Save | None = None) -> dict[str, Any]:
    """Tune.

    Args:
        job: what.
        progress: show bars on a terminal.
        save: called with the run's columns and rows by file name as soon as a product is measured.

    Returns:
        ``run``: columns of every row; ``rows``: one a product and tile, with ``failed`` = reason
        and no time if it is wrong or does not run; ``files``: those written; ``known``: products
        that were in the files; ``left_out``: for which the time did not suffice; ``failed``: wrong
        results, planned tiles that do not run, and products without a tile, in words;
        ``unusable``: other tiles that did not compile or run, which is no error.

    Raises:
        BackendUnavailableError: if there is no GPU, or it is lost.
        ConfigError: if a rehearsal has no folder to write to.
    """
    started = time.perf_counter()
    ends = None if job.deadline is None else started + job.deadline
    device = find_device(is_rehearsal=job.is_rehearsal)
    timer = make_timer(device)
    products = job.products(device)
    todo = [p for p in products if job.is_fresh or not tuner.is_measured(p.problem, job.output)]
    tiles = {p: tuner.candidates(p.problem, job.limit) for p in todo}
    run, keep = gpu_environment(device), save or (lambda *_: None)
    done = _Measured()
    files: dict[str, None] = {}
    left_out: list[str] = []

    def wanted(batch: list[Product]) -> list[Wanted]:
        return [product.wanted(tile) for product in batch for tile in tiles[product]]

    with torch.inference_mode(), Precompiler(device, ends=ends, progress=progress) as compiler:
        ready = compiled_batches(todo, wanted, compiler, size=BATCH)
        shown = with_progress(ready, "tune", "product", total=len(todo), is_shown=progress)
        for product, is_ready in shown:
            if not is_ready or (ends is not None and time.perf_counter() > ends):
                left_out.append(_name(product))
                continue
            result = measure_product(product, tiles[product], timer)
            keep(run, {TUNE: result.rows})
            done.add(result)
            if result.chosen is not None:
                path = tuner.write(product.problem, result.chosen, job.output)
                files.setdefault(str(path))
    return {
        "run": run,
        "rows": done.rows,
        "files": list(files),
        "known": len(products) - len(todo),
        "left_out": left_out,
        "failed": done.failed,
        "unusable": done.unusable + compiler.failed,
    }


@dataclass
class _Measured:
    """What came out for a product, or for several.

    Attributes:
        chosen: the fastest tile of one product; None if none can be used.
        rows: one a tile.
        failed: errors, in words.
        unusable: tiles that do not run, in words.
    """

    chosen: TileConfig | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)

    def add(self, other: _Measured) -> None:
        """Take over another product's rows and reasons."""
        self.rows += other.rows
        self.failed += other.failed
        self.unusable += other.unusable


def measure_product(product: Product, configs: tuple[TileConfig, ...], timer: Timer) -> _Measured:
    """Check and time the tiles of one product.

    Args:
        product: what is multiplied.
        configs: tiles, the planned one first.
        timer: of the device.

    Raises:
        BackendUnavailableError: if the GPU is lost.
    """
    result, device, name = _Measured(), timer.device, _name(product)
    try:
        operands = _Operands(product, device)
    except FAULTS as error:
        result.failed.append(f"{name}: {describe_fault(error, device)}")
        result.rows.append({**_columns(product), "failed": result.failed[0]})
        return result
    reasons: dict[TileConfig, str] = {}
    usable: dict[str, TileConfig] = {}
    for config in configs:
        try:
            operands.check(config)
            usable[describe(config)] = config
        except FAULTS as error:
            reasons[config] = describe_fault(error, device)
            is_wrong = isinstance(error, BenchmarkError) or config == configs[0]
            label = "planned tile " if config == configs[0] else ""
            where = result.failed if is_wrong else result.unusable
            where.append(f"{name}, {label}{describe(config)}: {reasons[config]}")
    calls = {text: operands.timed(config) for text, config in usable.items()}
    timings, untimed = time_calls(timer, calls, seconds=_SECONDS)
    for text, reason in untimed.items():
        reasons[usable[text]] = reason
        result.failed.append(f"{name}, {text}: {reason}")
    us = {config: timings[text].us for text, config in usable.items() if text in timings}
    result.chosen = tuner.fastest(us, configs[0]) if us else None
    if not us:
        result.failed.append(f"{name}: no tile can be used")
    for config in configs:
        timing = timings.get(describe(config))
        row = {**_columns(product), "tile": describe(config)}
        if timing is not None:
            row |= {
                "us": float(f"{timing.us:.4g}"),
                "p20_us": float(f"{timing.p20_us:.4g}"),
                "p80_us": float(f"{timing.p80_us:.4g}"),
            }
        row["planned"] = int(config == configs[0])
        row["chosen"] = int(config == result.chosen)
        row["failed"] = reasons.get(config, "")
        result.rows.append(row)
    return result


class _Operands:
    """Activations and copies of the weight of one product, and the check of its tiles."""

    def __init__(self, product: Product, device: torch.device) -> None:
        self.product = product
        self.problem = problem = GpuProblem(product.layer, device, backend="triton")
        # 8-bit weights get the 4-bit values: the check's sums have to stay small
        self.w_q = problem.quantized(4)
        rows = weight_to_rows(self.w_q, layer_layout(product.layer))
        self.copies = [pack_int4(rows) if product.bits == 4 else rows]
        # multipliers of 1 leave the exact sums as they are; that others are right is tested
        groups = (problem.shape.N, rows.shape[1] // BLOCK_K)
        self.w_mult = (
            torch.ones(groups, dtype=torch.uint8, device=device)
            if product.problem.is_grouped
            else None
        )
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
            options=layer_options(self.zeros, w_mult=self.w_mult, is_gated=self.product.is_gated),
        )

    def timed(self, config: TileConfig) -> GpuCall:
        """What is timed."""
        x_q = self.problem.x_q
        return GpuCall(lambda copy: self.call(x_q, copy).run(config), (x_q,))

    def check(self, config: TileConfig) -> None:
        """Compare with exact integers, and with the first right tile in every bit.

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
                    f"{label}: differs from the result of the first right tile; it is not used, "
                    "run pytest -m gpu"
                )


def _columns(product: Product) -> dict[str, Any]:
    problem = product.problem
    return {
        "kernel": problem.kernel,
        "shape": str(product.layer.shape),
        "gated": int(product.is_gated),
        "grouped": int(problem.is_grouped),
        "M": problem.M,
        "N": problem.N,
        "K": problem.K,
    }


def _name(product: Product) -> str:
    gated = " geglu" if product.is_gated else ""
    grouped = " groups" if product.problem.is_grouped else ""
    return f"{product.problem.kernel} {product.layer.shape}{gated}{grouped}"


def format_tune(result: dict[str, Any]) -> str:
    """The text that `ptq4adm tune` prints: what won, and what it gains over the plan."""
    run, rows = result["run"], result["rows"]
    lines = [f"{run['device']}, triton {run['triton']}: {len(rows)} measurements", ""]
    planned = {_key(row): row["us"] for row in rows if row.get("planned") and "us" in row}
    for row in rows:
        if row.get("chosen"):
            base = planned.get(_key(row))
            gain = "    - " if base is None else f"{base / row['us']:>5.2f} "
            lines.append(
                f"{row['kernel']:<12} {row['shape']:<38}{'geglu ' if row['gated'] else '':<6}"
                f"{row['us']:>9.1f} us  {gain}x planned  {row['tile']}"
            )
    lines += ["", f"{len(result['files'])} files written, {result['known']} products known before"]
    lines += [f"no time for: {name}" for name in result["left_out"]]
    lines += [f"did not run: {reason}" for reason in result["unusable"]]
    lines += failed_lines(result["failed"])
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("kernel", "shape", "gated"))
