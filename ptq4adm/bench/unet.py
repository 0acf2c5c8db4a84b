"""Whole steps of real UNets: this package, PyTorch float32, OpenVINO float32 and int8.

Every variant lives in a process of its own (`process.Worker`), so that its memory can be measured;
the processes take turns, one step each, in rotating order. All have the same random weights.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ptq4adm.bench.macs import describe_shares, mac_shares
from ptq4adm.bench.peers.base import missing_packages, package_version
from ptq4adm.bench.problem import relative_error
from ptq4adm.bench.process import ISAS, Worker
from ptq4adm.bench.rows import environment
from ptq4adm.bench.shapes import MODELS, model_spec
from ptq4adm.bench.timing import Timing
from ptq4adm.errors import BenchmarkError, ConfigError

FLOAT = "torch-fp32"
STATIC, DYNAMIC = "ptq4adm-static", "ptq4adm-dynamic"
OPENVINO_FLOAT, OPENVINO_INT8 = "openvino-fp32", "openvino-int8"
# largest relative RMS error against `FLOAT` that is still the same computation. A network of random
# weights answers noise with noise: 4 bits cost it more than a trained one.
TOLERANCES = {
    FLOAT: 1e-6,
    STATIC: 0.4,
    DYNAMIC: 0.4,
    OPENVINO_FLOAT: 1e-3,
    # 0.04 with VNNI; without it, pairs of 8-bit products saturate in its kernels: 0.17 was seen
    OPENVINO_INT8: 0.3,
}
_REST_SECONDS = 0.05  # waiting threads of the variant before go to sleep


@dataclass(frozen=True)
class UNetJob:
    """What to measure.

    Args:
        model: a name of `shapes.MODELS`.
        variants: names of `TOLERANCES`; `FLOAT` must be among them.
        isa: ``native`` or ``avx2``.
        threads: how many every variant uses.
        rounds: timed steps of each variant.
        bits: 4 or 8, of this package's weights.
        cache: folder that keeps the converted OpenVINO models; None converts again.

    Raises:
        ConfigError: if a value is unknown or out of range.
    """

    model: str
    variants: tuple[str, ...] = tuple(TOLERANCES)
    isa: str = "native"
    threads: int = 1
    rounds: int = 5
    bits: int = 4
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("model", self.model, tuple(MODELS)),
            *(("variant", variant, tuple(TOLERANCES)) for variant in self.variants),
            ("isa", self.isa, ISAS),
            ("bits", self.bits, (4, 8)),
        ):
            if value not in allowed:
                known = ", ".join(str(choice) for choice in allowed)
                raise ConfigError(f"{name} {value!r} is unknown: expected one of {known}")
        if FLOAT not in self.variants:
            raise ConfigError(f"variants {self.variants}: {FLOAT} is what the others are held to")
        if self.threads < 1 or self.rounds < 1:
            raise ConfigError(
                f"threads = {self.threads}, rounds = {self.rounds}: both must be at least 1"
            )


def missing_variants(variants: Sequence[str]) -> dict[str, str]:
    """Variants that cannot run here, with the reason and the remedy."""
    needs = {OPENVINO_FLOAT: ("openvino",), OPENVINO_INT8: ("openvino", "nncf")}
    return {
        variant: reason
        for variant in variants
        if (reason := missing_packages(*needs.get(variant, ()))) is not None
    }


def run_unet(job: UNetJob, *, progress: bool = True) -> dict[str, Any]:
    """Build every variant, compare its output with the float one's, time all in turns.

    Args:
        job: what.
        progress: show a bar on a terminal.

    Returns:
        ``run``: the environment with versions; ``rows``: one a variant; ``missing``: variant to
        reason.

    Raises:
        BenchmarkError: if an output is wrong, or a process fails.
    """
    missing = missing_variants(job.variants)
    variants = [name for name in job.variants if name not in missing]
    run = {**environment(), "threads": str(job.threads), "isa": job.isa, "bits": str(job.bits)}
    run |= {
        f"version_{name}": version
        for name in ("openvino", "nncf", "diffusers")
        if (version := package_version(name))
    }
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ptq4adm-bench-")))
        total = 2 * len(variants) + job.rounds * len(variants)
        bar = stack.enter_context(
            tqdm(total=total, desc=job.model, unit="step", disable=None if progress else True)
        )
        workers: dict[str, Worker] = {}
        built: dict[str, dict[str, Any]] = {}
        for name in variants:
            models = job.cache or folder
            _convert(job, name, models)
            worker = workers[name] = stack.enter_context(Worker(job.isa))
            built[name] = worker.ask(
                "open_unet",
                model=job.model,
                variant=name,
                bits=job.bits,
                threads=job.threads,
                isa=job.isa,
                folder=str(models),
            )
            bar.update()
        errors = {}
        for name in variants:
            workers[name].ask("save_step", path=str(folder / f"{name}.pt"))
            errors[name] = _check(name, folder, job)
            bar.update()
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for name in _turns(variants, job.rounds):
            time.sleep(_REST_SECONDS)
            seconds[name].append(float(workers[name].ask("time_step")))
            bar.update()
        memory = {name: workers[name].ask("memory") for name in variants}
    rows = [
        _row(job, name, Timing.of(seconds[name]), errors[name], built[name] | memory[name])
        for name in variants
    ]
    return {"run": run, "rows": rows, "missing": missing}


def _row(
    job: UNetJob, name: str, timing: Timing, error: float, about: dict[str, Any]
) -> dict[str, Any]:
    return {
        "model": job.model,
        "variant": name,
        "median_s": round(timing.median_s, 4),
        "p20_s": round(timing.p20_s, 4),
        "p80_s": round(timing.p80_s, 4),
        "samples": timing.samples,
        "error": float(f"{error:.4g}"),
        **{name: value for name, value in about.items() if name != "macs"},
        **mac_shares(about["macs"]),
    }


def _turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    for done in range(rounds):
        for turn in range(len(names)):
            yield names[(done + turn) % len(names)]


def _convert(job: UNetJob, variant: str, folder: Path) -> None:
    """Make the OpenVINO files that a variant loads, in a process that ends afterwards."""
    if variant not in (OPENVINO_FLOAT, OPENVINO_INT8):
        return
    # not restricted: statistics of the calibration do not depend on instruction sets
    with Worker("native") as worker:
        worker.ask(
            "convert_unet",
            model=job.model,
            is_int8=variant == OPENVINO_INT8,
            threads=job.threads,
            folder=str(folder),
        )


def _check(name: str, folder: Path, job: UNetJob) -> float:
    expected = torch.load(folder / f"{FLOAT}.pt")
    got = torch.load(folder / f"{name}.pt")
    if got.shape != (2, *model_spec(job.model).latents):
        raise BenchmarkError(f"{name} of {job.model}: output {list(got.shape)}; it is not timed")
    error = relative_error(got, expected)
    if not error <= TOLERANCES[name]:
        raise BenchmarkError(
            f"{name} of {job.model}: relative error {error:.3g} of the output is above "
            f"{TOLERANCES[name]}; it computes something else and is not timed"
        )
    return error


def format_unet(result: dict[str, Any]) -> str:
    """The text that `ptq4adm bench --unet` prints."""
    rows, run = result["rows"], result["run"]
    base = next(row for row in rows if row["variant"] == FLOAT)
    lines = [
        f"{rows[0]['model']}, one step of batch 2; {run['device']}, {run['threads']} threads, isa "
        f"{run['isa']}",
        "",
        f"{'variant':<18}{'median s':>10}{'x float':>9}{'error':>10}{'weights MB':>12}"
        f"{'peak MB':>9}  instructions",
    ]
    for row in rows:
        ratio = float(base["median_s"]) / float(row["median_s"])
        lines.append(
            f"{row['variant']:<18}{row['median_s']:>10.3f}{ratio:>9.2f}{row['error']:>10.2g}"
            f"{row['weights_mb']:>12.0f}{row['peak_mb']:>9.0f}  {row['variant_isa']}"
        )
    lines += [
        f"{row['variant']}: multiply-adds with weights: {shares}"
        for row in rows
        if (shares := describe_shares(row))
    ]
    lines += [f"not measured: {name}: {why}" for name, why in result["missing"].items()]
    return "\n".join(lines)
