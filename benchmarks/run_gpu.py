"""Everything that needs a GPU, in one command, on a machine that has only PyTorch and a compiler.

    python benchmarks/run_gpu.py --output DIR                      # = make gpu OUTPUT=DIR
    python benchmarks/run_gpu.py --output DIR --stages tune,bench  # measured tiles, used at once
    python benchmarks/run_gpu.py --output DIR --rehearse           # no GPU: Triton's interpreter

Builds and installs this checkout if Python does not have it, then runs tests, the sanitizer, the
kernel benchmark, whole UNet steps and the tuner, each within its part of --budget. A failing stage
does not stop the next; the exit code is 1 if one failed. A missing optional package is said and
skipped. DIR gets few files: summary.txt, rows (gpu-*.csv), configs.tar.gz (measured tiles, to be
unpacked into kernels/configs) and logs.tar.gz.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_stages import DEADLINE, Outcome, Stage, Step, format_summary, run_stages

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("tests", "sanitize", "bench", "unet", "tune")
BUDGET = 520.0  # seconds: below nine minutes with the installation
INSTALL_SECONDS = 150.0
OLDEST_SETUPTOOLS = 77  # knows pyproject.toml's form of the licence
_WEIGHTS = {"tests": 2.0, "sanitize": 1.2, "bench": 3.0, "unet": 2.4, "tune": 3.0}
_REPORTED = ("numpy", "triton", "diffusers", "transformers", "safetensors", "gemlite", "pytest")
_COMMAND = "import sys; from ptq4adm.cli import main; sys.exit(main(sys.argv[1:]))"


# --- installation -------------------------------------------------------------------------------


def is_installed(python: str) -> bool:
    """Whether a Python imports this very checkout, with its compiled module."""
    code = "import ptq4adm, ptq4adm._cpu, ptq4adm.kernels; print(ptq4adm.__file__)"
    done = subprocess.run(
        [python, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = done.stdout.strip()
    return done.returncode == 0 and Path(found).resolve().is_relative_to(ROOT)


def install(folder: Path) -> tuple[str, str]:
    """Build and install this checkout, editable, into the first place that takes it.

    Args:
        folder: for a virtual environment, should one be needed, and the log.

    Returns:
        The Python that has it, and how; an empty Python and the reason if none has.
    """
    if is_installed(sys.executable):
        return sys.executable, "was installed"
    log = folder / "install.log"
    ways = {
        "environment of this Python": [sys.executable],
        "user's packages": [sys.executable, "--user"],
        "virtual environment": [str(_environment(folder))],
    }
    for name, (python, *options) in ways.items():
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += [*options, "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
        with log.open("a") as output:
            output.write(f"--- {' '.join(command)}\n")
            output.flush()
            try:
                subprocess.run(
                    command,
                    cwd=ROOT,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    check=False,
                    timeout=INSTALL_SECONDS,
                )
            except subprocess.TimeoutExpired:
                output.write("took too long\n")
        if is_installed(python):
            return python, f"installed into the {name}"
    errors = [line for line in log.read_text().splitlines() if "rror" in line]
    return "", f"cannot be installed{_setuptools_hint()}; see install.log: {errors[-1:]}"


def _setuptools_hint() -> str:
    """What to do if the likely reason is setuptools."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    if int(version.split(".")[0]) >= OLDEST_SETUPTOOLS:
        return ""
    found = "is not installed" if version == "0" else f"{version} is too old"
    return f": setuptools {found}, needs {OLDEST_SETUPTOOLS} or newer"


def _environment(folder: Path) -> Path:
    """Python of a new virtual environment that sees the packages of this one."""
    target = folder / "venv"
    command = [sys.executable, "-m", "venv", "--system-site-packages", str(target)]
    subprocess.run(command, check=False, capture_output=True)
    # the system's packages are not those of a virtual environment that this one was made from
    lines = [path for path in sys.path if path.endswith("-packages")]
    for packages in target.glob("lib/python*/site-packages"):
        (packages / "parent.pth").write_text("\n".join(lines) + "\n")
    return target / "bin" / "python"


# --- what is run --------------------------------------------------------------------------------


def make_stages(
    names: Sequence[str], python: str, output: Path, work: Path, *, is_rehearsal: bool
) -> list[Stage]:
    """The commands of the named stages.

    Args:
        names: of `STAGES`, in the order in which they are to run.
        python: that has the package.
        output: folder of the rows.
        work: folder of everything else.
        is_rehearsal: toy shapes, in Triton's interpreter.
    """
    rehearse = ["--rehearse"] if is_rehearsal else []
    environment = {"TRITON_INTERPRET": "1"} if is_rehearsal else {}
    command = [python, "-P", "-c", _COMMAND]
    bench = [*command, "bench", "--device", "cuda", "--quiet", "--results", str(output), *rehearse]
    configs = work / "configs"

    def tuned(stage: str) -> list[str]:
        """Use measured tiles in a stage that comes after them."""
        before = names[: names.index(stage)] if stage in names else ()
        return [*bench, "--configs", str(configs)] if "tune" in before else bench

    steps = {
        "tests": _test_steps(python, is_rehearsal),
        "sanitize": _sanitize_steps(python, rehearse),
        "bench": [
            Step("kernels", [*tuned("bench"), "--deadline", DEADLINE], excerpt=before_shapes)
        ],
        "unet": _unet_steps(tuned("unet"), is_rehearsal),
        "tune": [
            Step(
                "tiles",
                [
                    *[*command, "tune", "--quiet", "--output", str(configs)],
                    *["--results", str(output), "--deadline", DEADLINE, *rehearse],
                ],
                excerpt=lambda lines: lines[-6:],
            )
        ],
    }
    return [
        Stage(
            name,
            [_with_environment(step, environment) for step in steps[name]],
            _WEIGHTS[name],
        )
        for name in names
    ]


def _with_environment(step: Step, environment: dict[str, str]) -> Step:
    return Step(
        step.name,
        step.command,
        step.skip,
        step.share,
        {**step.environment, **environment},
        step.excerpt,
    )


def _test_steps(python: str, is_rehearsal: bool) -> list[Step]:
    if not _has("pytest"):
        return [Step("pytest", skip="pytest not installed: pip install pytest")]
    pytest = [python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if is_rehearsal:
        return [Step("collect", [*pytest, "--collect-only", "tests/kernels"])]
    # modules that import diffusers cannot even be collected without it
    places = ["tests"] if _has("diffusers") else ["tests/kernels", "tests/ops"]
    return [
        Step("gpu", [*pytest, "-m", "gpu", *places]),
        Step(
            "kernels",
            # what is compiled for GPUs not at hand needs none
            [
                *pytest,
                "-m",
                "not gpu",
                "tests/kernels",
                "--ignore",
                "tests/kernels/test_compile.py",
            ],
        ),
    ]


def _sanitize_steps(python: str, rehearse: list[str]) -> list[Step]:
    script = [python, "-P", str(ROOT / "benchmarks" / "sanitize_gpu.py"), *rehearse]
    steps = [Step("plain", script)]  # compiles, so that the tools below meet a warm cache
    if rehearse:
        return steps
    tool = shutil.which("compute-sanitizer")
    for name in ("memcheck", "racecheck", "synccheck"):
        if tool is None:
            reason = "compute-sanitizer not found: it comes with CUDA's toolkit; put it on PATH"
            steps.append(Step(name, skip=reason))
            continue
        watched = [tool, "--tool", name, "--error-exitcode", "9"]
        # every tensor an allocation of its own, or a neighbour's memory hides an overrun
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        steps.append(Step(name, [*watched, *script], environment=alone))
    return steps


def _unet_steps(bench: list[str], is_rehearsal: bool) -> list[Step]:
    if not _has("diffusers"):
        return [Step("steps", skip="diffusers not installed: pip install diffusers")]
    whole = [*bench, "--unet", "all", "--deadline", DEADLINE, "--rounds"]
    if is_rehearsal:
        return [Step("steps", [*whole, "1"], excerpt=lambda lines: lines)]
    compiled = [*bench, "--unet", "audioldm-s", "--rounds", "20", "--deadline", DEADLINE]
    for variant in ("fp16-graph", "fp16-compiled-graph", "w4a8-static-graph"):
        compiled += ["--variant", variant]
    return [
        Step("steps", [*whole, "20"], share=1.5, excerpt=lambda lines: lines),
        Step("compiled", compiled, excerpt=lambda lines: lines),
    ]


def before_shapes(lines: list[str]) -> list[str]:
    """The part of the kernel benchmark's text that fits into a summary."""
    ends = [i for i, line in enumerate(lines) if line.startswith("every shape")]
    return lines[: ends[0]] if ends else lines[-10:]


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# --- what is handed back ------------------------------------------------------------------------


def describe_machine(python: str) -> dict[str, str]:
    """Versions, GPU and tools, for the summary."""
    code = (
        "import importlib.metadata as m, json, torch\n"
        "found = {'torch': torch.__version__, 'cuda': str(torch.version.cuda)}\n"
        "if torch.cuda.is_available():\n"
        "    p = torch.cuda.get_device_properties(0)\n"
        "    found['gpu'] = f'{p.name}, {p.multi_processor_count} multiprocessors, '\\\n"
        "        f'{p.total_memory / 1e9:.0f} GB, sm_{p.major}{p.minor}'\n"
        "else:\n"
        "    found['gpu'] = 'none'\n"
        f"for name in {_REPORTED!r}:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: found[name] = 'not installed'\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [python, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    found = json.loads(lines[-1]) if done.returncode == 0 and lines else {"torch": "broken"}
    found |= {"python": platform.python_version(), "platform": platform.platform()}
    for tool in ("nvidia-smi", "nvcc", "compute-sanitizer"):
        found[tool] = "found" if shutil.which(tool) else "not found"
    return found


def _pack(target: Path, folder: Path, pattern: str) -> None:
    """Put files of a folder into one archive; none if there are none."""
    files = sorted(folder.glob(pattern))
    if files:
        with tarfile.open(target, "w:gz") as archive:
            for file in files:
                archive.add(file, file.name)


def main() -> int:
    """Run the stages; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--stages", default=",".join(STAGES), help="in this order, with commas")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of all stages")
    parser.add_argument("--rehearse", action="store_true", help="toy shapes, no GPU")
    arguments = parser.parse_args()
    names = arguments.stages.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        parser.error(f"stage {unknown[0]!r} is unknown: expected some of {', '.join(STAGES)}")
    results = ROOT / "benchmarks" / "results"
    output = arguments.output.resolve()
    if arguments.rehearse and output.is_relative_to(results):
        parser.error("rows of a rehearsal are no measurements: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ptq4adm-gpu-") as folder:
        work = Path(folder)
        python, how = install(work)
        about = [f"ptq4adm: {how}"]
        print(about[0], flush=True)
        outcomes: list[Outcome] = []
        if python:
            about += [f"{key}: {value}" for key, value in describe_machine(python).items()]
            print("\n".join(about[1:]), flush=True)
            stages = make_stages(names, python, output, work, is_rehearsal=arguments.rehearse)
            budget = arguments.budget - (time.monotonic() - started)
            outcomes = run_stages(stages, budget=budget, folder=work, root=ROOT)
        summary = format_summary(outcomes, about)
        (output / "summary.txt").write_text(summary + "\n")
        _pack(output / "logs.tar.gz", work, "*.log")
        _pack(output / "configs.tar.gz", work / "configs", "*.json")
    print("\n" + summary)
    print(f"\n{time.monotonic() - started:.0f} s; results in {output}")
    return int(not outcomes or any(outcome.is_failure for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
