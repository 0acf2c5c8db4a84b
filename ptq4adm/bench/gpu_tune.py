"""Measure tiles for the layers of real models and write the fastest: `ptq4adm tune`.

For every distinct product the tiles of one backend (`gpu_tile_sets`) are compiled on all cores, if
they are Triton's, checked (`gpu_tune_product`), timed side by side as `gpu_timing` describes -
weights from memory, activations from L2, as in a step - and the fastest is added to the backend's
file. That happens in batches of products, weightiest first; what is in a file already is not
measured again, so an interrupted run goes on where it was. A wrong tile becomes a row with the
reason, and is not used.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ptq4adm.bench.gpu_backends import TRITON, backends_on, check_names
from ptq4adm.bench.gpu_calls import Tile
from ptq4adm.bench.gpu_environment import find_device, gpu_environment
from ptq4adm.bench.gpu_faults import FAULTS, describe_fault, failed_lines
from ptq4adm.bench.gpu_kernels import time_calls
from ptq4adm.bench.gpu_precompile import Precompiler, Wanted, compiled_batches
from ptq4adm.bench.gpu_progress import with_progress
from ptq4adm.bench.gpu_report import TUNE, Save
from ptq4adm.bench.gpu_shapes import TOY_MODEL, gpu_layers
from ptq4adm.bench.gpu_tile_sets import TILE_SETS
from ptq4adm.bench.gpu_tiles import describe, tuning_problem
from ptq4adm.bench.gpu_timing import Timer, make_timer
from ptq4adm.bench.gpu_tune_product import Operands, Product
from ptq4adm.bench.shapes import KINDS
from ptq4adm.errors import BenchmarkError, ConfigError
from ptq4adm.kernels import tuner
from ptq4adm.kernels.tuning import Problem

TUNED_MODELS = ("tango", "audioldm-s", "audioldm-l")
_QUICK_CANDIDATES = 6
BATCH = 8  # products whose tiles are compiled, then measured
_SECONDS = 0.05


@dataclass(frozen=True)
class TuneJob:
    """What to tune.

    Args:
        models: names of `shapes.MODELS`.
        kinds: kinds of products, of `shapes.KINDS`.
        bits: 4, 8 or both, of the weights.
        backend: whose tiles, of `gpu_backends.BACKENDS`.
        output: folder of the files; None for the package's own.
        is_quick: six tiles for each product instead of 20 (``triton``) or all (``cuda``).
        is_rehearsal: in Triton's interpreter or the emulator, toy shapes, two tiles.
        deadline: seconds after which no other product is begun; None for no limit.
        is_fresh: measure again what is in the files.
        is_grouped: 4-bit weights with a multiplier for every 64 of a channel.

    Raises:
        ConfigError: if a value is unknown.
    """

    models: tuple[str, ...] = TUNED_MODELS
    kinds: tuple[str, ...] = KINDS
    bits: tuple[int, ...] = (4,)
    backend: str = TRITON
    output: Path | None = None
    is_quick: bool = False
    is_rehearsal: bool = False
    deadline: float | None = None
    is_fresh: bool = False
    is_grouped: bool = False

    def __post_init__(self) -> None:
        check_names([self.backend])
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
    def limit(self) -> int | None:
        """Most tiles of a product; None for what the backend's tuner does without a limit."""
        if self.is_rehearsal:
            return 2
        return _QUICK_CANDIDATES if self.is_quick else None

    def products(self, device: torch.device) -> list[Product]:
        """What to tune, weightiest first; one layer for each distinct problem."""
        models = (TOY_MODEL,) if self.is_rehearsal else self.models
        found: dict[Problem, Product] = {}
        for layer in sorted(gpu_layers(models, self.kinds), key=lambda layer: -layer.weight):
            for bits in self.bits:
                for is_gated in (False, True)[: 1 + layer.is_gated]:
                    problem = tuning_problem(
                        layer,
                        bits,
                        device,
                        is_gated=is_gated,
                        is_grouped=self.is_grouped,
                        backend=self.backend,
                    )
                    product = Product(layer, bits, is_gated, problem, self.backend)
                    found.setdefault(problem, product)
        return list(found.values())


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
        BackendUnavailableError: if there is no GPU, it is lost, or the backend cannot run.
        ConfigError: if a rehearsal has no folder to write to, or a file of tiles is broken.
    """
    started = time.perf_counter()
    ends = None if job.deadline is None else started + job.deadline
    device = find_device(is_rehearsal=job.is_rehearsal)
    timer = make_timer(device)
    run, keep = gpu_environment(device), save or (lambda *_: None)
    tile_set = TILE_SETS[job.backend]
    done = _Measured()
    files: dict[str, None] = {}
    left_out: list[str] = []
    with (
        torch.inference_mode(),
        backends_on(device, [job.backend]),
        Precompiler(device, ends=ends, progress=progress) as compiler,
    ):
        products = job.products(device)
        todo = [
            product
            for product in products
            if job.is_fresh or not tile_set.is_measured(product.problem, job.output)
        ]
        tiles = {p: tile_set.candidates(p.problem, job.limit) for p in todo}

        def wanted(batch: list[Product]) -> list[Wanted]:
            return [w for product in batch for t in tiles[product] for w in product.wanted(t)]

        ready = compiled_batches(todo, wanted, compiler, size=BATCH)
        shown = with_progress(ready, "tune", "product", total=len(todo), is_shown=progress)
        for product, is_ready in shown:
            if not is_ready or (ends is not None and time.perf_counter() > ends):
                left_out.append(product.name)
                continue
            result = measure_product(product, tiles[product], timer)
            keep(run, {TUNE: result.rows})
            done.add(result)
            if result.chosen is not None:
                path = tile_set.write(product.problem, result.chosen, job.output)
                files.setdefault(str(path))
    return {
        "run": run,
        "backend": job.backend,
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

    chosen: Tile | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)

    def add(self, other: _Measured) -> None:
        """Take over another product's rows and reasons."""
        self.rows += other.rows
        self.failed += other.failed
        self.unusable += other.unusable


def measure_product(product: Product, configs: tuple[Tile, ...], timer: Timer) -> _Measured:
    """Check and time the tiles of one product.

    Args:
        product: what is multiplied.
        configs: tiles, the planned one first.
        timer: of the device.

    Raises:
        BackendUnavailableError: if the GPU is lost.
    """
    result, device, name = _Measured(), timer.device, product.name
    try:
        operands = Operands(product, device)
    except FAULTS as error:
        result.failed.append(f"{name}: {describe_fault(error, device)}")
        result.rows.append(
            {**product.columns(), "failed": result.failed[0], **product.last_columns()}
        )
        return result
    reasons: dict[Tile, str] = {}
    usable: dict[str, Tile] = {}
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
        row = {**product.columns(), "tile": describe(config)}
        if timing is not None:
            row |= {
                "us": float(f"{timing.us:.4g}"),
                "p20_us": float(f"{timing.p20_us:.4g}"),
                "p80_us": float(f"{timing.p80_us:.4g}"),
            }
        row["planned"] = int(config == configs[0])
        row["chosen"] = int(config == result.chosen)
        row["failed"] = reasons.get(config, "")
        result.rows.append(row | product.last_columns(config))
    return result


def format_tune(result: dict[str, Any]) -> str:
    """The text that `ptq4adm tune` prints: what won, and what it gains over the plan."""
    run, rows = result["run"], result["rows"]
    lines = [
        f"{run['device']}, triton {run['triton']}, backend {result['backend']}: {len(rows)} "
        "measurements",
        "",
    ]
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
