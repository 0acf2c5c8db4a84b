"""Build the module of backend `cuda` for one GPU while other stages run; used by `run_gpu.py`.

    python benchmarks/gpu_build.py --arch 90a      # what the background process runs

The build has a folder of its own, and its module is put into the package in one move: processes
that run meanwhile never meet half of it. It is not built again for the same sources, architecture
and compiler. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_install import KEPT, ROOT
from gpu_stages import FAILED, NOTED, OK, SKIPPED, Outcome

FOLDER = KEPT / "cuda"
STAMP = "built-for.txt"
NO_COMPILER = 3  # exit code: there is no nvcc, which is no failure
_SHOWN_LINES = 15


# --- in run_gpu.py ------------------------------------------------------------------------------


@dataclass
class Build:
    """A build in the background.

    Attributes:
        what: is built, in words.
        log: its output.
        process: that builds; None if it was not started.
        reason: why it was not started; empty if it was.
        started: `time.monotonic` of its start.
        seconds: that it took, as soon as it has ended.
        ended: set then.
    """

    what: str
    log: Path
    process: subprocess.Popen[bytes] | None = None
    reason: str = ""
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    ended: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Note when the process ends, which nobody may be waiting for."""
        assert self.process is not None
        self.process.wait()
        self.seconds = time.monotonic() - self.started
        self.ended.set()

    def need(self, seconds: float) -> str:
        """Wait at most some seconds; returns why the module cannot be used, or nothing."""
        if self.process is None:
            return self.reason
        if not self.ended.wait(max(0.0, seconds)):
            return f"{self.what} is not built after {time.monotonic() - self.started:.0f} s"
        return "" if self.process.returncode == 0 else f"{self.what}: {self._lines()[-1]}"

    def expect(self, seconds: float) -> str:
        """Wait, and let a stage run in any case: it says itself what it has to leave out."""
        self.need(seconds)
        return ""

    def outcome(self) -> Outcome:
        """What became of it so far, for the summary."""
        if self.process is None:
            return Outcome("build", "cuda", SKIPPED, 0.0, self.reason)
        if not self.ended.is_set():
            seconds = time.monotonic() - self.started
            return Outcome("build", "cuda", NOTED, seconds, f"{self.what}: still being built")
        lines, code = self._lines(), self.process.returncode
        if code in (0, NO_COMPILER):
            status = OK if code == 0 else SKIPPED
            return Outcome("build", "cuda", status, self.seconds, lines[-1])
        tail = tuple(lines[-_SHOWN_LINES:])
        return Outcome("build", "cuda", FAILED, self.seconds, f"exit code {code}", tail)

    def stop(self) -> None:
        """End it with its compilers, if it still runs."""
        if self.process is not None and not self.ended.is_set():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.ended.wait()

    def _lines(self) -> list[str]:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return [line for line in text.splitlines() if line.strip()] or ["no output"]


def start(python: str, log: Path, *, is_rehearsal: bool = False) -> Build:
    """Start building in the background.

    Args:
        python: that has the package.
        log: gets the output.
        is_rehearsal: build the emulator instead, which needs no nvcc.
    """
    if is_rehearsal:
        what, command = "the emulator", [python, "-P", "-m", "ptq4adm.bench.gpu_emulation"]
    else:
        arch = architecture(python)
        what = f"the module for {arch}"
        if not arch:
            return Build("the module", log, reason="torch finds no GPU to build for")
        command = [python, "-P", str(Path(__file__).resolve()), "--arch", arch]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its compilers end with it
        )
    started = Build(what, log, process)
    threading.Thread(target=started.watch, daemon=True).start()
    return started


def architecture(python: str) -> str:
    """What `PTQ4ADM_CUDA_ARCHS` has to be for the first GPU; empty if there is none.

    On compute capability 9.0 code of exactly that GPU, with the kernels that only it can run.
    """
    code = "import torch; print(*torch.cuda.get_device_capability(0))"
    done = subprocess.run(
        [python, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = done.stdout.split()
    if done.returncode != 0 or len(found) != 2:
        return ""
    return "90a" if found == ["9", "0"] else "".join(found)


# --- in the background --------------------------------------------------------------------------


def fingerprint(arch: str, compiler: Sequence[str]) -> str:
    """Equal for builds that come out equal: sources, architecture, compiler, Python."""
    digest = hashlib.sha256("\0".join([arch, sys.version, *compiler]).encode())
    for path in sorted(
        [*ROOT.glob("csrc/*/*"), *ROOT.glob("build_support/*.py"), ROOT / "setup.py"]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build(arch: str, folder: Path, package: Path) -> str:
    """Build the module and put it into the package, unless this very one is there.

    Args:
        arch: such as ``90a``.
        folder: of the build.
        package: where the module belongs.

    Returns:
        What was done, in words.

    Raises:
        BuildError: if there is no nvcc, or none that can be used.
        CalledProcessError: if it does not compile.
    """
    from build_support import nvcc as toolkit

    nvcc = toolkit.find_nvcc()
    if nvcc is None:
        raise toolkit.BuildError(toolkit.missing_nvcc())
    release = ".".join(map(str, toolkit.nvcc_release(nvcc)))
    stamp, key = folder / STAMP, fingerprint(arch, [str(nvcc), release])
    name = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if stamp.exists() and stamp.read_text() == key and (package / name).exists():
        return f"for {arch} by CUDA {release}: was built for these sources"
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-temp", str(folder / "temp"), "--build-lib", str(folder / "lib")]
    environment = {**os.environ, "PTQ4ADM_BUILD": "cuda", "PTQ4ADM_CUDA_ARCHS": arch}
    began = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    (folder / "lib" / "ptq4adm" / name).replace(package / name)
    stamp.write_text(key)
    return f"for {arch} by CUDA {release} in {time.monotonic() - began:.0f} s"


def main() -> int:
    """Build; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", required=True, help="such as 90a")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the build")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from build_support.nvcc import BuildError

    if importlib.util.find_spec("pybind11") is None:
        print("pybind11 not installed: pip install pybind11")
        return 1
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        done = build(arguments.arch, arguments.folder.resolve(), ROOT / "ptq4adm")
    except BuildError as error:
        print(error)
        return NO_COMPILER
    except subprocess.CalledProcessError as error:
        print(f"setup.py failed with exit code {error.returncode}")
        return 1
    print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
