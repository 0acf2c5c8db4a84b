"""The kernel benchmark: every layer shape of the models, this package's kernels and the peers'.

For each shape all variants are checked first (`problem.check_variant`), then timed side by side.
Which instructions a variant executes is sampled once for each kind of layer, on its largest shape.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from tqdm.auto import tqdm

from ptq4adm.bench.ours import QUANTIZE, own_variants
from ptq4adm.bench.peers import PEERS, Peer, select_peers
from ptq4adm.bench.problem import Problem, Variant, check_variant
from ptq4adm.bench.process import ISAS, Worker, is_restricted, kernel_isa
from ptq4adm.bench.rows import environment
from ptq4adm.bench.shapes import KINDS, MODELS, LayerShape, ModelLayer, model_layers
from ptq4adm.bench.timing import time_interleaved
from ptq4adm.errors import ConfigError
from ptq4adm.ops.machine import measure_peak, peak_kinds, sample_instructions, sampler_missing

QUICK_SHAPES = 2  # of each kind
_QUICK_SECONDS, _FULL_SECONDS = 0.3, 1.5
_SAMPLE_SECONDS = 0.2
_PEAK_MS, _PEAK_TRIES = 40.0, 5


@dataclass(frozen=True)
class KernelJob:
    """What to measure.

    Args:
        models: names of `shapes.MODELS`.
        kinds: kinds of layers, of `shapes.KINDS`.
        isa: ``native`` or ``avx2``.
        threads: how many every variant uses.
        bits: 4 or 8, of this package's weights.
        peers: names of `peers.PEERS`; None for all.
        is_quick: the two most important shapes of each kind, shortly.
        seconds: of timing a shape; None for 1.5, or 0.3 if quick.

    Raises:
        ConfigError: if a value is unknown or out of range.
    """

    models: tuple[str, ...] = tuple(MODELS)
    kinds: tuple[str, ...] = KINDS
    isa: str = "native"
    threads: int = 1
    bits: int = 4
    peers: tuple[str, ...] | None = None
    is_quick: bool = False
    seconds: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):  # lists come back from JSON
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        for name, value, allowed in (
            *(("model", model, tuple(MODELS)) for model in self.models),
            *(("kind", kind, KINDS) for kind in self.kinds),
            *(("peer", peer, tuple(PEERS)) for peer in self.peers or ()),
            ("isa", self.isa, ISAS),
            ("bits", self.bits, (4, 8)),
        ):
            if value not in allowed:
                known = ", ".join(str(choice) for choice in allowed)
                raise ConfigError(f"{name} {value!r} is unknown: expected one of {known}")
        if self.threads < 1:
            raise ConfigError(f"threads = {self.threads}: expected at least 1")

    @property
    def seconds_a_shape(self) -> float:
        """Timing budget of one shape."""
        if self.seconds is not None:
            return self.seconds
        return _QUICK_SECONDS if self.is_quick else _FULL_SECONDS

    def layers(self) -> list[ModelLayer]:
        """The shapes to measure; two models may share one."""
        found = [layer for model in self.models for layer in model_layers(model)]
        found = [layer for layer in found if layer.shape.kind in self.kinds]
        if not self.is_quick:
            return found
        by_work = sorted(found, key=lambda layer: -layer.count * layer.shape.operations)
        return [
            layer
            for kind in self.kinds
            for layer in [layer for layer in by_work if layer.shape.kind == kind][:QUICK_SHAPES]
        ]


def run_kernels(job: KernelJob, *, progress: bool = True) -> dict[str, Any]:
    """Measure, in this process or, to restrict the peers, in a child.

    Args:
        job: what.
        progress: show a bar on a terminal.

    Returns:
        ``run``: the environment with versions; ``rows``: one a shape and variant; ``peaks``: one a
        ceiling and number of threads; ``missing``: peer to reason.

    Raises:
        BenchmarkError: if a variant's result is wrong; nothing is returned then.
    """
    if is_restricted(job.isa):
        return measure(job, job.layers(), progress=progress)
    with Worker(job.isa) as worker:
        result: dict[str, Any] = worker.ask("kernels", job=asdict(job), progress=progress)
        return result


def measure(
    job: KernelJob, layers: Iterable[ModelLayer], *, progress: bool = False
) -> dict[str, Any]:
    """`run_kernels` for given layers, in this process."""
    layers = list(layers)
    peers, missing = select_peers(job.peers)
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        run = {**environment(), "isa": job.isa, "bits": str(job.bits)}
        run |= {f"version_{peer.name}": peer.version() for peer in peers}
        measured: dict[LayerShape, list[dict[str, Any]]] = {}
        with torch.inference_mode():
            sampled = _sampled_shapes(layer.shape for layer in layers)
            # smallest work first: a wrong variant stops the run early
            shapes = sorted({layer.shape for layer in layers}, key=lambda s: s.operations)
            for shape in tqdm(
                shapes, desc=f"kernels, {job.isa}", unit="shape", disable=None if progress else True
            ):
                measured[shape] = _measure_shape(job, shape, peers, shape in sampled)
        peaks = measure_peaks(job.threads)
    finally:
        torch.set_num_threads(before)
    isas = {
        (row["kind"], row["variant"]): row.pop("sampled")
        for rows in measured.values()
        for row in rows
        if "sampled" in row
    }
    for rows in measured.values():
        for row in rows:
            row["variant_isa"] = isas.get((row["kind"], row["variant"]), "?")
    rows = [
        {"model": layer.model, "count": layer.count, **row}
        for layer in layers
        for row in measured[layer.shape]
    ]
    return {"run": run, "rows": rows, "peaks": peaks, "missing": missing}


def measure_peaks(threads: int) -> list[dict[str, Any]]:
    """Ceilings of this machine on one thread and on `threads`: one row each, the best of five."""
    kinds = [kind for kind, reason in peak_kinds().items() if not reason]
    best: dict[tuple[str, int], float] = {}
    for _ in range(_PEAK_TRIES):
        for kind in kinds:
            for count in sorted({1, threads}):
                rate = measure_peak(kind, milliseconds=_PEAK_MS, threads=count)
                best[kind, count] = max(rate, best.get((kind, count), 0.0))
    return [
        {"peak": kind, "threads": count, "giga_a_second": round(rate, 1)}
        for (kind, count), rate in best.items()
    ]


def _sampled_shapes(shapes: Iterable[LayerShape]) -> set[LayerShape]:
    """The largest shape of each kind."""
    largest: dict[str, LayerShape] = {}
    for shape in shapes:
        if shape.kind not in largest or shape.operations > largest[shape.kind].operations:
            largest[shape.kind] = shape
    return set(largest.values())


def _measure_shape(
    job: KernelJob, shape: LayerShape, peers: list[Peer], is_sampled: bool
) -> list[dict[str, Any]]:
    problem = Problem.random(shape, threads=job.threads)
    variants = own_variants(problem, bits=job.bits, isa=kernel_isa(job.isa))
    for peer in peers:
        variants += peer.variants(problem)
    errors = {variant.name: check_variant(variant, problem) for variant in variants}
    timings = time_interleaved(
        {variant.name: variant.run for variant in variants}, seconds=job.seconds_a_shape
    )
    rows = []
    for variant in variants:
        timing = timings[variant.name]
        row: dict[str, Any] = {
            "kind": shape.kind,
            "shape": str(shape),
            "M": shape.M,
            "N": shape.N,
            "K": shape.K,
            "variant": variant.name,
            "median_ms": _rounded(timing.median_s * 1e3),
            "p20_ms": _rounded(timing.p20_s * 1e3),
            "p80_ms": _rounded(timing.p80_s * 1e3),
            "samples": timing.samples,
            "error": _rounded(errors[variant.name]),
        }
        if is_sampled:
            row["sampled"] = _executed_isa(variant)
        rows.append(row)
    return rows


def _executed_isa(variant: Variant) -> str:
    if variant.name == QUANTIZE or sampler_missing():
        return "?"

    def work() -> None:
        start = time.process_time()
        while time.process_time() < start + _SAMPLE_SECONDS:
            variant.run()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's waiting threads would be sampled as well
    try:
        return sample_instructions(work).isa()
    finally:
        torch.set_num_threads(threads)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
