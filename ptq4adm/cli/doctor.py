"""`ptq4adm doctor`: what this installation can do, and a small exact test of every backend."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import ptq4adm
from ptq4adm.cli.options import add_output_options, print_result
from ptq4adm.errors import DispatchTableError, MissingComponentError
from ptq4adm.models import shipped_pipeline_path

_PACKAGES = ("torch", "numpy", "diffusers", "transformers", "safetensors", "soundfile", "tqdm")
_OPTIONAL_PACKAGES = ("matplotlib", "triton")
# what the kernels can use, as the Linux kernel names it
_CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8")


def add_command(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "doctor",
        help="check this installation",
        description="Show versions, processor, backends, shipped pipeline; test the kernels.",
    )
    add_output_options(parser)
    parser.set_defaults(run=run, parser=parser, when_interrupted="nothing was changed")


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if something that should work does not."""
    report = examine()
    print_result(args, report, _format(report))
    return 0 if report["is_healthy"] else 1


def examine() -> dict[str, Any]:
    """Everything that `doctor` shows."""
    import torch

    from ptq4adm.ops import backend_report

    backends = []
    for status in backend_report():
        backend = {
            "name": status.name.value,
            "is_available": status.available,
            "detail": status.detail,
        }
        if status.available:
            backend["self_test"] = self_test(status.name.value, status.device_type)
        backends.append(backend)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    tables, are_tables_right = _dispatch_tables(devices)
    shipped = _shipped()
    disk = shutil.disk_usage(Path.cwd())
    is_healthy = all(b.get("self_test", "exact") == "exact" for b in backends)
    return {
        "ptq4adm": ptq4adm.__version__,
        "location": str(Path(ptq4adm.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in (*_PACKAGES, *_OPTIONAL_PACKAGES)},
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "openmp_environment": {
            key: os.environ[key]
            for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
            if key in os.environ
        },
        "cuda_devices": devices,
        "backends": backends,
        "dispatch_tables": tables,
        "shipped_pipeline": shipped,
        "disk_free_bytes": disk.free,
        "is_healthy": is_healthy and are_tables_right and shipped["is_present"],
    }


def self_test(backend: str, device: str = "cpu") -> str:
    """Multiply small integers on a backend and compare with exact arithmetic.

    Args:
        backend: a backend that is available.
        device: where its tensors live.

    Returns:
        "exact", or what was wrong.
    """
    import torch

    from ptq4adm import ops
    from ptq4adm.packing.layout import KLayout, pack_int4, weight_to_rows

    generator = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)

    one = torch.ones(())
    for bits, limit in ((4, 7), (8, 127)):
        x_q, w_q = integers(-127, 127, 3, 5, 7, 40), integers(-limit, limit, 24, 40, 3, 3)
        layout = KLayout((40,), (3, 3))
        rows = weight_to_rows(w_q, layout)
        qweight = ops.prepack(
            pack_int4(rows) if bits == 4 else rows, bits=bits, layout=layout, backend=backend
        )
        got = ops.conv2d(
            x_q.to(device),
            one.to(device),
            qweight.to(device),
            torch.ones(24, device=device),
            bits=bits,
            kernel_size=(3, 3),
            padding=(1, 1),
            backend=backend,
        )
        exact = torch.nn.functional.conv2d(
            x_q.permute(0, 3, 1, 2).double(), w_q.double(), padding=1
        ).permute(0, 2, 3, 1)
        if not torch.equal(got.cpu().double(), exact):
            return f"w{bits}a8_conv2d differs from exact arithmetic; reinstall ptq4adm"
    return "exact"


def _dispatch_tables(devices: list[str]) -> tuple[list[str], bool]:
    """Which table of measured times holds for each GPU, and whether none of them is wrong."""
    from ptq4adm.dispatch import VARIABLE, describe_table, files, load_table

    named = Path(os.environ.get(VARIABLE, ""))
    try:
        lines = [describe_table(device) for device in dict.fromkeys(devices)]
        if not devices:
            lines = ["no CUDA device here, so none is used"]
            if named.is_file():
                table = load_table(named)
                lines = [f"{named} is of {table.device} ({table.entries} entries); {lines[0]}"]
            elif str(named) not in (".", files.OFF) and not named.exists():
                return [f"{VARIABLE} = {str(named)!r}: there is no such file or folder"], False
    except DispatchTableError as error:
        return [str(error)], False
    return lines, True


def _shipped() -> dict[str, Any]:
    try:
        folder = shipped_pipeline_path()
    except MissingComponentError as error:
        return {"is_present": False, "detail": str(error)}
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return {"is_present": True, "detail": str(folder), "bytes": size}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    is_known = hasattr(os, "sched_getaffinity")
    return {
        "name": name,
        "cores": len(os.sched_getaffinity(0)) if is_known else os.cpu_count(),
        "features": [feature for feature in _CPU_FEATURES if feature in flags],
    }


def _format(report: dict[str, Any]) -> str:
    packages = report["packages"]
    lines = [
        f"ptq4adm {report['ptq4adm']} in {report['location']}",
        f"Python {report['python']} on {report['platform']}",
        "packages: " + ", ".join(f"{n} {packages[n] or 'missing'}" for n in _PACKAGES),
        "optional: "
        + ", ".join(f"{n} {packages[n] or 'not installed'}" for n in _OPTIONAL_PACKAGES),
        f"processor: {report['cpu']['name']}, {report['cpu']['cores']} cores "
        f"({' '.join(report['cpu']['features']) or 'no feature the kernels use'})",
        f"threads: {report['threads']}",
        "CUDA devices: " + (", ".join(report["cuda_devices"]) or "none"),
    ]
    for backend in report["backends"]:
        state = "yes" if backend["is_available"] else "no "
        test = f"; self-test: {backend['self_test']}" if "self_test" in backend else ""
        lines.append(f"backend {backend['name']:<10}{state}  {backend['detail']}{test}")
    lines += [f"dispatch table: {line}" for line in report["dispatch_tables"]]
    shipped = report["shipped_pipeline"]
    size = f" ({shipped['bytes'] / 1e6:.1f} MB)" if shipped["is_present"] else ""
    lines.append(f"shipped pipeline: {shipped['detail']}{size}")
    lines.append(f"disk: {report['disk_free_bytes'] / 1e9:.1f} GB free here")
    lines.append("all well" if report["is_healthy"] else "something is wrong: see above")
    return "\n".join(lines)
