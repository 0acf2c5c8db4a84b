"""Every kernel of a whole step compiles: AudioLDM-S, quantized and fused, for GPUs not at hand.

The interpreter takes code that the compiler refuses, so what a step launches is compiled from the
very launches: layers, fused blocks, norms, quantizers, with their real shapes and scale tables.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDEST = Path(sys.prefix) / "oldest"
RUNS = [("pinned", 90), ("oldest", 80)]


def _compile(version: str, capability: int, folder: Path) -> dict[str, Any]:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")
    }
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton-cache")
    environment["OMP_NUM_THREADS"] = "1"
    if version == "oldest":
        environment["PYTHONPATH"] = str(OLDEST)
    output = folder / f"{version}.json"
    script = Path(__file__).with_name("compile_unet.py")
    done = subprocess.run(
        [sys.executable, str(script), str(output), str(capability)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(output.read_text())
    return report


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each version compiled; both at once, a core each."""
    if not (OLDEST / "triton").is_dir():
        pytest.skip("the oldest Triton is not installed; run `make setup`")
    folder = tmp_path_factory.mktemp("unet")
    with ThreadPoolExecutor(2) as pool:
        jobs = {version: pool.submit(_compile, version, cc, folder) for version, cc in RUNS}
        return {version: job.result() for version, job in jobs.items()}


@pytest.mark.parametrize("version", [version for version, _ in RUNS])
def test_every_layer_of_a_step_compiles(reports, version) -> None:
    report = reports[version]
    launches = report["launches"]
    products = ("_gemm_kernel", "_conv2d_kernel", "_conv2d_tma_kernel")
    # a launch a layer: shortcuts of two segments, gates and residuals included
    assert sum(launches.get(name, 0) for name in products) == report["layers"]
    assert launches["_statistics_kernel"] > 50
    assert launches["_layernorm_kernel"] > 40
    assert ("_conv2d_tma_kernel" in launches) == (version == "pinned")  # compute capability 9.0


@pytest.mark.parametrize("version", [version for version, _ in RUNS])
def test_no_kernel_of_a_step_spills(reports, version) -> None:
    assert reports[version]["spilling"] == []


@pytest.mark.parametrize("version", [version for version, _ in RUNS])
def test_nothing_is_launched_for_no_rows(reports, version) -> None:
    assert reports[version]["empty"] == [[0, 20], [0, 3, 4, 20]]
    assert reports[version]["launches_of_empty"] == 0
