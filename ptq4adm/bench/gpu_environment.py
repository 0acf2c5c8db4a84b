"""Which GPU a measurement was made on, with what software; and where rows may go."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import torch

from ptq4adm.bench.rows import environment
from ptq4adm.errors import BackendUnavailableError, OutputError
from ptq4adm.kernels import launch

REHEARSAL = "interpreter"
_QUERY = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
_ROOT = Path(__file__).resolve().parents[2]


def find_device(*, is_rehearsal: bool) -> torch.device:
    """The device that is measured.

    Args:
        is_rehearsal: run everything in Triton's interpreter, on the CPU.

    Raises:
        BackendUnavailableError: if there is no such GPU, or kernels are not interpreted where they
            should be.
    """
    if is_rehearsal and not launch.IS_INTERPRETED:
        raise BackendUnavailableError(
            "a rehearsal runs in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
        )
    device = torch.device("cpu") if is_rehearsal else torch.device("cuda", 0)
    if not is_rehearsal and launch.IS_INTERPRETED:
        raise BackendUnavailableError(
            "TRITON_INTERPRET=1 is set, so kernels would run on the CPU: unset it to measure a "
            "GPU, or give --rehearse"
        )
    reason = launch.unavailable_reason(device)
    if reason is not None:
        raise BackendUnavailableError(f"--device cuda: {reason}; --rehearse needs no GPU")
    return device


def gpu_environment(device: torch.device) -> dict[str, str]:
    """Columns of every row: GPU, driver, versions, commit."""
    host = environment(_ROOT)
    run = {
        "date": host["date"],
        "commit": host["commit"],
        "device": REHEARSAL,
        "driver": "",
        "cuda": str(torch.version.cuda or ""),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "python": host["python"],
        "host": host["device"],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        run |= {
            "device": properties.name,
            "multiprocessors": str(properties.multi_processor_count),
            "l2_mb": f"{properties.L2_cache_size / 1e6:.0f}",
            "memory_gb": f"{properties.total_memory / 1e9:.0f}",
            "cudnn": str(torch.backends.cudnn.version()),
        }
        run |= _driver()
    return run


def check_results(folder: Path | None, *, is_rehearsal: bool) -> None:
    """Refuse to mix a rehearsal's rows with measured ones; asked before anything is run.

    Raises:
        OutputError: if a rehearsal would write below benchmarks/results.
    """
    results = _ROOT / "benchmarks" / "results"
    if is_rehearsal and folder is not None and folder.resolve().is_relative_to(results):
        raise OutputError(
            f"{folder}: rows of a rehearsal are no measurements; choose a folder outside of "
            "benchmarks/results"
        )


def _driver() -> dict[str, str]:
    """What nvidia-smi says; nothing where it cannot be run."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    names = ("driver", "max_sm_mhz", "max_memory_mhz", "power_limit_w")
    if done.returncode != 0 or len(values) != len(names):
        return {}
    return dict(zip(names, values, strict=True))


def package_version(package: str) -> str:
    """Version of an installed package; empty if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
