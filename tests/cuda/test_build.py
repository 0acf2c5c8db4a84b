"""The CUDA module's build: choosing nvcc and architectures, ptxas' report, and a real build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from build_support import cuda_resources, nvcc  # noqa: E402
from build_support.nvcc import BuildError  # noqa: E402

# kernels/ lies there as well, under a name that transformers looks for
sys.path.remove(str(ROOT))

# --- which architectures ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("80", ["80"]),
        ("80;89;90a", ["80", "89", "90a"]),
        ("90a, 80 ,120;80", ["80", "90a", "120"]),
        ("90a;90", ["90", "90a"]),
    ],
)
def test_list_of_architectures(text: str, archs: list[str]) -> None:
    assert nvcc.parse_archs(text) == archs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; expected such as 80;89;90a"),
        (" ; ", "empty"),
        ("8.0", "'8.0' is no architecture"),
        ("sm_80", "'sm_80' is no architecture"),
        ("80;native", "'native' is no architecture"),
        ("90b", "'90b' is no architecture"),
        ("80;75", "need 80 or newer, 75 is older"),
    ],
)
def test_list_of_architectures_is_refused(text: str, message: str) -> None:
    with pytest.raises(BuildError, match=message) as caught:
        nvcc.parse_archs(text)
    assert repr(text) in str(caught.value)


def test_variable_names_the_architectures() -> None:
    assert nvcc.wanted_archs({}) == ["80", "89", "90a"]
    assert nvcc.wanted_archs({"PTQ4ADM_CUDA_ARCHS": ""}) == ["80", "89", "90a"]
    assert nvcc.wanted_archs({"PTQ4ADM_CUDA_ARCHS": "86"}) == ["86"]


def test_machine_code_is_explicit_and_ptx_is_of_the_newest_portable_one() -> None:
    assert nvcc.code_flags(["80", "89", "90a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_89,code=sm_89",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_89,code=compute_89",
    ]
    assert nvcc.code_flags(["90a"]) == ["-gencode=arch=compute_90a,code=sm_90a"]


@pytest.mark.parametrize(
    ("name", "archs"),
    [
        ("device_info.cu", ["80", "89", "90a"]),
        ("matmul_sm80.cu", ["80", "89", "90a"]),
        ("matmul_sm89.cu", ["89", "90a"]),
        ("matmul_sm90a.cu", ["90a"]),
        ("matmul_sm100a.cu", []),
    ],
)
def test_family_of_a_file_is_in_its_name(name: str, archs: list[str]) -> None:
    assert nvcc.archs_of(Path(name), ["80", "89", "90a"]) == archs


# --- which nvcc ---------------------------------------------------------------------------------


def _fake_nvcc(folder: Path, script: str = "exit 0") -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_nvcc_of_cuda_home_then_path_then_wheels(tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    empty = {"PATH": str(tmp_path / "nothing")}
    assert nvcc.find_nvcc(empty, [site]) is None
    wheel = _fake_nvcc(site / "nvidia" / "cu13")
    assert nvcc.find_nvcc(empty, [tmp_path, site]) == wheel
    on_path = _fake_nvcc(tmp_path / "toolkit")
    path = {"PATH": str(on_path.parent)}
    assert nvcc.find_nvcc(path, [site]) == on_path
    home = _fake_nvcc(tmp_path / "home")
    assert nvcc.find_nvcc({**path, "CUDA_HOME": str(tmp_path / "home")}, [site]) == home


def test_cuda_home_without_nvcc_is_an_error(tmp_path: Path) -> None:
    _fake_nvcc(tmp_path / "site" / "nvidia" / "cu13")
    with pytest.raises(BuildError, match=r"there is no bin/nvcc in it; correct or unset it"):
        nvcc.find_nvcc({"CUDA_HOME": str(tmp_path)}, [tmp_path / "site"])


def test_folders_of_this_python_are_searched() -> None:
    assert Path(pytest.__file__).parents[1] in nvcc.site_folders()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo release 11.8, V11.8.89", r"is CUDA 11.8; the kernels need 12.0 or newer"),
        ("echo nothing", "--version failed: nothing"),
        ("echo broken >&2; exit 3", "--version failed: broken"),
    ],
)
def test_nvcc_that_cannot_be_used_is_an_error(tmp_path: Path, script: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        nvcc.nvcc_release(_fake_nvcc(tmp_path, script))


def test_release_of_nvcc(tmp_path: Path) -> None:
    script = "echo 'Cuda compilation tools, release 13.0, V13.0.88'"
    assert nvcc.nvcc_release(_fake_nvcc(tmp_path, script)) == (13, 0)


# --- ptxas' report ------------------------------------------------------------------------------

_LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_90a'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 9.612 ms
ptxas info    : Compiling entry function '_Z7spilledPf' for 'sm_80'
ptxas info    : Function properties for _Z7spilledPf
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Function properties for _Z6calledf
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 16 bytes cumulative stack size, 360 bytes cmem
"""


def test_report_of_ptxas() -> None:
    good, spilled = cuda_resources.parse_resources(_LOG)
    assert good == cuda_resources.Resources("_Z4goodPf", "90a", 40, 0, 0, 256)
    assert not good.is_in_local_memory
    assert spilled == cuda_resources.Resources("_Z7spilledPf", "80", 255, 24, 40, 0)
    assert spilled.is_in_local_memory
    text = cuda_resources.table([good, spilled])
    assert [line for line in text.splitlines() if line.endswith("<-")] == [
        line for line in text.splitlines() if "spilled" in line and "255" in line
    ]


def test_report_that_is_not_understood_is_an_error() -> None:
    with pytest.raises(BuildError, match="_Z4goodPf for sm_90a was not understood"):
        cuda_resources.parse_resources(_LOG.replace("bytes stack frame", "B of stack"))


def test_remarks_of_ptxas() -> None:
    serialized = "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    log = f"ptxas info    : {serialized}\nptxas info    : {serialized}\n{_LOG}"
    assert cuda_resources.parse_remarks(log) == [serialized]
    assert cuda_resources.parse_remarks(_LOG) == []


# --- with a real nvcc ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiler() -> Path:
    try:
        found = nvcc.find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    if found is None:
        pytest.skip(nvcc.missing_nvcc())
    return found


def test_real_spill_is_found(compiler: Path, tmp_path: Path) -> None:
    """512 threads of two blocks have 64 registers each: 128 sums do not fit."""
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(512, 2) spills(float* p) {\n"
        "  float s[128];\n"
        "#pragma unroll\n  for (int i = 0; i < 128; ++i) s[i] = p[i * 512 + threadIdx.x];\n"
        "  for (int k = 0; k < 9; ++k) {\n    __syncthreads();\n"
        "#pragma unroll\n    for (int i = 0; i < 128; ++i) s[i] += s[(i * 7 + 5) % 128] * p[k];\n"
        "  }\n"
        "#pragma unroll\n  for (int i = 0; i < 128; ++i) p[i * 512 + threadIdx.x] = s[i];\n}\n"
    )
    (spilled,), remarks = cuda_resources.compile_for(compiler, source, "80", tmp_path)
    assert remarks == []
    assert spilled.registers <= 64
    assert spilled.spill_bytes > 0
    assert spilled.is_in_local_memory


def test_sums_read_while_they_are_made_are_found(compiler: Path, tmp_path: Path) -> None:
    """ptxas then waits before the read, which no one asked for: a remark, and correct code."""
    source = tmp_path / "reads.cu"
    source.write_text(
        f'#include "{ROOT}/csrc/cuda/instructions_sm90.h"\n'
        "using namespace ptq4adm;\n"
        "__global__ void reads(int32_t* out, const uint32_t* w) {\n"
        "  int32_t acc[32] = {};\n  uint32_t a[4] = {w[0], w[1], w[2], w[3]};\n"
        "  wgmma_fence();\n"
        "  wgmma_s8_64xNx32<64>(acc, a, matrix_descriptor(shared_memory()));\n"
        "  wgmma_commit();\n"
        "  out[threadIdx.x] = acc[0];\n"
        "  wgmma_wait<0>();\n"
        "  out[threadIdx.x + 128] = acc[1];\n}\n"
    )
    (kernel,), remarks = cuda_resources.compile_for(compiler, source, "90a", tmp_path)
    assert not kernel.is_in_local_memory
    assert len(remarks) == 1
    assert remarks[0].startswith("reads.cu, sm_90a: (C75")
    assert "reads" in remarks[0]


def test_compile_error_names_file_and_architecture(compiler: Path, tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken() { nonsense; }\n")
    with pytest.raises(BuildError, match=r"broken.cu does not compile for sm_80") as caught:
        cuda_resources.compile_for(compiler, source, "80", tmp_path)
    assert "nonsense" in str(caught.value)


def _build(base: Path, wish: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Build into ``base/<wish>``; what an earlier build there compiled is not compiled again.

    Without optimization: the chain is tested here, and `make cuda` compiles as it is shipped.
    """
    compiler = base / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O0\n')
    compiler.chmod(0o755)
    return subprocess.run(
        [sys.executable, "setup.py", "build", f"--build-base={base}", f"--build-lib={base / wish}"],
        cwd=ROOT,
        env={
            **os.environ,
            "PTQ4ADM_BUILD": wish,
            "PTQ4ADM_CUDA_ARCHS": "80",
            "CC": str(compiler),
            "CXX": str(compiler),
            "NVCC_APPEND_FLAGS": "-Xcicc=-O0 -Xptxas=-O0",
            **variables,
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def built(compiler: Path, base: Path) -> Path:  # noqa: ARG001
    """Folder with a copy of the package whose compiled modules are a CPU and a CUDA one."""
    done = _build(base, "cuda")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "CUDA kernels for 80 by" in done.stderr
    assert "arch=compute_80,code=sm_80" in done.stdout
    return base / "cuda"


def _ask(built: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=built,
        env={**os.environ, "PYTHONPATH": str(built)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_module_says_what_it_is_built_for(built: Path) -> None:
    code = "from ptq4adm import _cuda; print(_cuda.archs(), _cuda.runtime_version() // 1000)"
    archs, major = _ask(built, code).split()
    assert archs == "80"
    assert int(major) >= 12
    assert "cudart" not in subprocess.run(
        ["ldd", next((built / "ptq4adm").glob("_cuda*.so"))], capture_output=True, text=True
    ).stdout  # fmt: skip


def test_sticky_errors_are_known(built: Path) -> None:
    code = (
        "from ptq4adm import _cuda\n"
        "for code in (700, 719, 1, 35): print(_cuda.is_sticky(code), _cuda.error_text(code))"
    )
    assert _ask(built, code).splitlines()[:2] == [
        "True an illegal memory access was encountered (cudaErrorIllegalAddress)",
        "True unspecified launch failure (cudaErrorLaunchFailure)",
    ]
    assert "True" not in "".join(_ask(built, code).splitlines()[2:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_machine_without_a_gpu_says_so_in_cudas_words(built: Path) -> None:
    """Nothing but the import of a GPU's driver library is missing here."""
    code = (
        "from ptq4adm import _cuda, ops\n"
        "try: _cuda.probe(0, 16, 1, 0)\n"
        "except _cuda.CudaError as error: print(type(error).__mro__[1].__name__, error)\n"
        "print([s.detail for s in ops.backend_report() if s.name.value == 'cuda'][0])\n"
        "try: ops.resolve_backend('cuda')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    probe, detail, resolved = _ask(built, code).splitlines()
    assert probe.startswith("RuntimeError ")
    assert detail.startswith("cudaGetDeviceCount: ")
    assert "(cudaError" in detail
    assert "use backend='triton', 'cpu' or 'reference'" in detail
    assert resolved == f"BackendUnavailableError backend 'cuda' is not available: {detail}"


@pytest.mark.parametrize(("wish", "is_error"), [("cuda", True), ("auto", False)])
def test_kernels_that_do_not_compile(
    built: Path, base: Path, tmp_path: Path, wish: str, is_error: bool
) -> None:
    """Named, it is an error; ``auto`` goes on with the CPU's kernels and says so."""
    assert built.is_dir()  # its objects of the CPU module are used again
    script = 'test "$1" = --version && echo release 13.0, && exit 0\necho broken >&2; exit 1'
    fake = _fake_nvcc(tmp_path, script)
    done = _build(base, wish, CUDA_HOME=str(fake.parents[1]))
    text = done.stdout + done.stderr
    assert (done.returncode != 0) == is_error, text[-3000:]
    assert "the CUDA kernels cannot be compiled" in text
    if wish == "auto":
        assert list((base / wish).rglob("_cpu*.so"))
        assert not list((base / wish).rglob("_cuda*.so"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_probe_runs_on_the_given_stream() -> None:
    _cuda = pytest.importorskip("ptq4adm._cuda")
    out = torch.full((1000,), -1, dtype=torch.int32, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    _cuda.probe(0, out.data_ptr(), 777, stream.cuda_stream)
    stream.synchronize()
    expected = [_cuda.probe_value(i) for i in range(777)]
    assert [value & 0xFFFFFFFF for value in out[:777].tolist()] == expected
    assert (out[777:] == -1).all()
    with pytest.raises(_cuda.CudaError, match="cudaErrorInvalidDevice"):
        _cuda.device_info(torch.cuda.device_count())
