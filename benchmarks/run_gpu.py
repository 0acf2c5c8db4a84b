"""Everything that needs a GPU, in one command, on a machine that has only PyTorch and a compiler.

    python benchmarks/run_gpu.py --output DIR --stages tests,sanitize       # the first call
    python benchmarks/run_gpu.py --output DIR --stages bench,unet           # the second
    python benchmarks/run_gpu.py --output DIR --stages tune,bench,compiled  # measured tiles, used
    python benchmarks/run_gpu.py --output DIR --rehearse        # no GPU: interpreter and emulator

Builds and installs this checkout if Python does not have it, then runs stages, each within its part
of --budget: a call is meant for a machine that cuts commands at ten minutes, and all stages take
three calls. The CUDA module is built for the GPU beside them; steps that cannot do without wait. A
failing stage does not stop the next; the exit code is 1 if one failed. A stage that lacks a package
says which and is skipped. DIR gets few files: summary.txt and rows (gpu-*.csv), to which calls add,
configs.tar.gz (measured tiles, to be unpacked into kernels/configs) and a logs-*.tar.gz a call.
Rows are written as they are measured: a call that is cut keeps what it did.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_build
from gpu_build import Build
from gpu_install import KEPT, ROOT, install, install_wheels, missing_for, remedy
from gpu_stages import DEADLINE, Outcome, Stage, Step, format_outcome, format_summary, run_stages
from gpu_table import short_table

STAGES = ("tests", "sanitize", "bench", "unet", "compiled", "tune")
BUDGET = 520.0  # seconds of one call: below nine minutes with the installation
_WEIGHTS = {"tests": 3.0, "sanitize": 3.2, "bench": 3.0, "unet": 2.8, "compiled": 2.0, "tune": 3.0}
_REPORTED = ("numpy", "triton", "diffusers", "transformers", "safetensors", "gemlite", "pytest")
_REPORTED += ("tqdm", "setuptools", "pybind11", "ninja")
_COMMAND = "import sys; from ptq4adm.cli import main; sys.exit(main(sys.argv[1:]))"
_REHEARSED = ("conv-tma", "gemm-split", "groupnorm-silu", "quantize")
_FOUND = 9  # exit code of compute-sanitizer if it found something
_TOOLS = ("memcheck", "racecheck", "synccheck")
_HAZARDS = (
    "racecheck reports hazards: read its log. Triton's own barriers may be among them, so this is "
    "no failure by itself, and no proof that there is none"
)
_REHEARSED_CUDA = ("conv-split", "gemm-geglu-units")


# where tests with the mark gpu are, none of which needs diffusers: the others are not collected
GPU_TESTS = [
    "tests/kernels",
    "tests/ops",
    "tests/bench/test_gpu_timing.py",
    "tests/dispatch/test_dispatch_gpu.py",
]
# these need the CUDA module
GPU_TESTS_OF_CUDA = ["tests/cuda/test_build.py", "tests/cuda/test_matmul_gpu.py"]
# these do, and are collected where it is
GPU_TESTS_OF_BLOCKS = ["tests/nn/test_graph_gpu.py"]


# --- what is run --------------------------------------------------------------------------------


def make_stages(
    names: Sequence[str],
    python: str,
    output: Path,
    configs: Path,
    *,
    build: Build | None = None,
    is_rehearsal: bool = False,
    is_tuned: bool = False,
) -> list[Stage]:
    """The commands of the named stages.

    Args:
        names: of `STAGES`, in the order in which they are to run.
        python: that has the package.
        output: folder of the rows.
        configs: folder of measured tiles.
        build: of the CUDA module, which steps wait for; None if it is there.
        is_rehearsal: toy shapes, in Triton's interpreter and the emulator.
        is_tuned: take tiles that an earlier call measured.
    """
    rehearse = ["--rehearse"] if is_rehearsal else []
    environment = {"TRITON_INTERPRET": "1"} if is_rehearsal else {}
    command = [python, "-P", "-c", _COMMAND]
    bench = [*command, "bench", "--device", "cuda", "--quiet", "--results", str(output), *rehearse]

    def tuned(stage: str) -> list[str]:
        """Use measured tiles in a stage that comes after them."""
        before = names[: names.index(stage)] if stage in names else ()
        is_used = is_tuned or "tune" in before
        return [*bench, "--configs", str(configs)] if is_used else bench

    need, expect = (None, None) if build is None else (build.need, build.expect)
    tune = [*command, "tune", "--quiet", "--output", str(configs), "--results", str(output)]
    tune += ["--deadline", DEADLINE, *rehearse]
    kernels = [*tuned("bench"), "--deadline", DEADLINE]
    steps = {
        "tests": _test_steps(python, output, is_rehearsal, need),
        "sanitize": _sanitize_steps(python, rehearse, need),
        # these measure every backend that there is, and say which there is not
        "bench": [Step("kernels", kernels, excerpt=before_shapes, ready=expect)],
        "unet": _unet_steps(tuned("unet"), is_rehearsal, expect),
        "compiled": _compiled_steps(tuned("compiled"), expect),
        "tune": [
            # compiling is what Triton's tiles take, and what the others do not
            Step("triton", tune, share=2.0, excerpt=lambda lines: lines[-6:]),
            Step("cuda", [*tune, "--backend", "cuda"], excerpt=lambda ls: ls[-6:], ready=need),
        ],
    }
    stages = []
    for name in names:
        missing = [] if is_rehearsal else missing_for(name)
        found = [Step("packages", skip=remedy(missing))] if missing else steps[name]
        found = [replace(s, environment={**s.environment, **environment}) for s in found]
        stages.append(Stage(name, found, _WEIGHTS[name]))
    return stages


def _test_steps(
    python: str, output: Path, is_rehearsal: bool, need: Callable[[float], str] | None
) -> list[Step]:
    if is_rehearsal:
        pytest = [python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        collected = ["tests/kernels", *GPU_TESTS_OF_CUDA]
        return [Step("collect", [*pytest, "--collect-only", *collected])]
    script = [python, "-P", str(ROOT / "benchmarks" / "gpu_tests.py"), "--results", str(output)]
    script += ["--deadline", DEADLINE, "--"]
    # what is compiled for GPUs not at hand needs none
    others = ["-m", "not gpu", "tests/kernels"]
    others += ["--ignore", "tests/kernels/test_compile.py"]
    others += ["--ignore", "tests/kernels/test_compile_unet.py"]
    blocks = GPU_TESTS_OF_BLOCKS if importlib.util.find_spec("diffusers") else []
    return [
        Step(
            "gpu",
            [*script, "-m", "gpu", *GPU_TESTS, *blocks],
            share=4.0,
            excerpt=lambda lines: lines[-5:],
        ),
        Step("kernels", [*script, *others], excerpt=lambda lines: lines[-5:]),
        # last: the module is built meanwhile
        Step(
            "cuda",
            [*script, "-m", "gpu", *GPU_TESTS_OF_CUDA],
            excerpt=lambda lines: lines[-5:],
            ready=need,
        ),
    ]


def _sanitize_steps(
    python: str, rehearse: list[str], need: Callable[[float], str] | None
) -> list[Step]:
    script = [python, "-P", str(ROOT / "benchmarks" / "sanitize_gpu.py"), *rehearse]
    cuda = [*script, "--backend", "cuda"]
    if rehearse:
        few, others = (
            [part for name in names for part in ("--case", name)]
            for names in (_REHEARSED, _REHEARSED_CUDA)
        )
        return [Step("plain", [*script, *few]), Step("cuda-plain", [*cuda, *others], ready=need)]
    # compiles, so that the tools below meet a warm cache; a failure here needs no tool to be seen
    steps = [
        Step("plain", [*script, "--jobs", "8"], share=2.0, excerpt=lambda lines: lines[-3:]),
        Step("cuda-plain", cuda, share=0.5, excerpt=lambda lines: lines[-3:], ready=need),
    ]
    tool = shutil.which("compute-sanitizer")
    for name in _TOOLS:
        if tool is None:
            reason = "compute-sanitizer not found: it comes with CUDA's toolkit; put it on PATH"
            steps += [Step(name, skip=reason), Step(f"cuda-{name}", skip=reason)]
            continue
        watched = [tool, "--tool", name, "--error-exitcode", str(_FOUND)]
        # every tensor an allocation of its own, or a neighbour's memory hides an overrun
        common = {
            "environment": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            "excerpt": lambda lines: lines[-3:],
        }
        noted = {_FOUND: _HAZARDS} if name == "racecheck" else {}
        run = [*watched, *script, "--deadline", DEADLINE]
        steps.append(Step(name, run, share=2.0, noted=noted, **common))
        # a hazard in a kernel of this package's own CUDA is a failure
        run = [*watched, *cuda, "--deadline", DEADLINE]
        steps.append(Step(f"cuda-{name}", run, ready=need, **common))
    return steps


def _unet_steps(
    bench: list[str], is_rehearsal: bool, expect: Callable[[float], str] | None
) -> list[Step]:
    rounds = "1" if is_rehearsal else "20"
    whole = [*bench, "--unet", "all", "--deadline", DEADLINE, "--rounds", rounds]
    return [Step("steps", whole, excerpt=lambda lines: lines, ready=expect)]


def _compiled_steps(bench: list[str], expect: Callable[[float], str] | None) -> list[Step]:
    compiled = [*bench, "--unet", "audioldm-s,tango", "--rounds", "20", "--deadline", DEADLINE]
    for variant in ("fp16-graph", "fp16-compiled-graph", "w4a8-static-graph"):
        compiled += ["--variant", variant]
    return [Step("compiled", compiled, excerpt=lambda lines: lines, ready=expect)]


def before_shapes(lines: list[str]) -> list[str]:
    """The part of the kernel benchmark's text that fits into a summary."""
    ends = [i for i, line in enumerate(lines) if line.startswith("every shape")]
    return lines[: ends[0]] if ends else lines[-10:]


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


class Report:
    """What a call hands back, written again after each step: the call may be cut.

    Args:
        output: the folder.
        names: of the call's stages.
        work: folder of its logs.
        configs: folder of measured tiles.
    """

    def __init__(self, output: Path, names: Sequence[str], work: Path, configs: Path) -> None:
        self.output, self.work, self.configs = output, work, configs
        self.about: list[str] = []
        self.build: Build | None = None
        self._logs = f"logs-{'-'.join(names)}.tar.gz"
        summary = output / "summary.txt"
        self._before = summary.read_text() + "\n" if summary.exists() else ""
        self._title = f"=== {' '.join(names)}"

        self.text = ""

    def write(self, outcomes: list[Outcome]) -> None:
        """Write summary.txt, which keeps what earlier calls said, and the archives."""
        every = [*self._built(), *outcomes]
        table = ["", *short_table(self.output)]
        self.text = "\n".join([self._title, format_summary(every, self.about), *table])
        (self.output / "summary.txt").write_text(self._before + self.text + "\n")
        self.pack()

    def _built(self) -> list[Outcome]:
        return [] if self.build is None else [self.build.outcome()]

    def is_failure(self, outcomes: list[Outcome]) -> bool:
        """Whether anything failed, the build included, or nothing ran."""
        return not outcomes or any(o.is_failure for o in (*self._built(), *outcomes))

    def pack(self) -> None:
        """Write the archives."""
        _pack(self.output / self._logs, self.work, "*.log")
        _pack(self.output / "configs.tar.gz", self.configs, "*.json")


def _pack(target: Path, folder: Path, pattern: str) -> None:
    """Put files of a folder into one archive; none if there are none."""
    files = sorted(folder.glob(pattern))
    if files:
        with tarfile.open(target, "w:gz") as archive:
            for file in files:
                archive.add(file, file.name)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--stages", default=",".join(STAGES), help="in this order, with commas")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of this call")
    parser.add_argument("--wheels", type=Path, help="install what is missing from this folder")
    parser.add_argument("--configs", type=Path, default=KEPT / "configs", help="measured tiles")
    parser.add_argument("--tuned", action="store_true", help="take tiles of an earlier call")
    parser.add_argument("--rehearse", action="store_true", help="toy shapes, no GPU")
    arguments = parser.parse_args()
    arguments.names = arguments.stages.split(",")
    unknown = [name for name in arguments.names if name not in STAGES]
    if unknown:
        parser.error(f"stage {unknown[0]!r} is unknown: expected some of {', '.join(STAGES)}")
    arguments.output = arguments.output.resolve()
    results = ROOT / "benchmarks" / "results"
    if arguments.rehearse and arguments.output.is_relative_to(results):
        parser.error("rows of a rehearsal are no measurements: choose another --output")
    if arguments.wheels is not None and not arguments.wheels.is_dir():
        parser.error(f"--wheels {arguments.wheels}: there is no such folder")
    return arguments


def _stop(number: int, frame: object) -> None:
    """Turn SIGTERM into an exit, so that children end and logs are packed."""
    del frame
    raise SystemExit(128 + number)


def main() -> int:
    """Run the stages; returns the exit code."""
    arguments = _parse()
    signal.signal(signal.SIGTERM, _stop)
    arguments.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="ptq4adm-gpu-") as folder:
        work, configs = Path(folder), arguments.configs.resolve()
        report = Report(arguments.output, arguments.names, work, configs)
        about = report.about
        if arguments.wheels is not None:
            done = install_wheels(arguments.wheels.resolve(), work / "install.log")
            about.append(f"wheels: {done}")
        python, how = install(work / "install.log")
        about.append(f"ptq4adm: {how}")
        if python:
            about += [f"{key}: {value}" for key, value in describe_machine(python).items()]
        print("\n".join(about), flush=True)
        report.write(outcomes)
        try:
            if python:
                outcomes = _run(arguments, python, report, arguments.budget - _since(started))
        finally:
            if report.build is not None:
                report.build.stop()
            report.pack()
        print("\n" + report.text)
    print(f"\n{_since(started):.0f} s; results in {arguments.output}")
    return int(report.is_failure(outcomes))


def _since(started: float) -> float:
    return time.monotonic() - started


def _run(
    arguments: argparse.Namespace, python: str, report: Report, budget: float
) -> list[Outcome]:
    """Build beside the stages, and run them."""
    log = report.work / "build-cuda.log"
    report.build = gpu_build.start(python, log, is_rehearsal=arguments.rehearse)
    stages = make_stages(
        arguments.names,
        python,
        arguments.output,
        report.configs,
        build=report.build,
        is_rehearsal=arguments.rehearse,
        is_tuned=arguments.tuned,
    )
    outcomes = run_stages(stages, budget=budget, folder=report.work, root=ROOT, told=report.write)
    print(format_outcome(report.build.outcome()))
    report.write(outcomes)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
