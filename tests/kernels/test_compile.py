"""The machine code of every planned tile, by two versions of Triton; see compile_cases.py.

What a GPU would run is compiled here without one: products are on the tensor cores, weights go from
packed bytes to its registers, memory is copied 16 bytes at a time while it multiplies, nothing
spills, and as many programs fit on a multiprocessor as the plan counts on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ptq4adm.kernels import inspection
from ptq4adm.kernels.inspection import Counts, Resources
from ptq4adm.kernels.tuning import TileConfig

ROOT = Path(__file__).resolve().parents[2]
OLDEST = Path(sys.prefix) / "oldest"
VERSIONS = ("pinned", "oldest")
TARGETS = ("90", "80,86,89")  # each is a process
REGISTERS = 128  # of a thread, where two programs of 8 warps share a multiprocessor
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}


@dataclass(frozen=True)
class Case:
    """What compile_cases.py wrote about one kernel; see its ``read_case``."""

    name: str
    target: int
    used: Resources
    bits: int = 0
    segments: int = 1
    is_grouped: bool = False
    config: TileConfig = TileConfig(64, 64)  # noqa: RUF009 - frozen
    planned_programs: int = 0
    programs: int = 0
    planned_shared_bytes: int = 0

    def __str__(self) -> str:
        return f"sm_{self.target} w{self.bits} {self.name} x {self.segments} {self.config}"


def _case(fields: dict[str, Any]) -> Case:
    written = fields["used"]
    used = Resources(
        **{
            **written,
            "kernel": Counts(**written["kernel"]),
            "loops": tuple(Counts(**loop) for loop in written["loops"]),
            "ptx": Counts(**written["ptx"]),
        }
    )
    config = TileConfig(**fields.get("config", {"block_m": 64, "block_n": 64}))
    return Case(**{**fields, "used": used, "config": config})


def _compile(job: tuple[str, str], folder: Path) -> dict[str, Any]:
    version, targets = job
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")
    }
    # its keys are the sources, the options and the version: what is found there is true
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton-cache")
    if version == "oldest":
        environment["PYTHONPATH"] = str(OLDEST)
    output = folder / f"{version}-{targets}.json"
    script = Path(__file__).with_name("compile_cases.py")
    done = subprocess.run(
        [sys.executable, str(script), str(output), targets],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(output.read_text()))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What every process wrote, by version; nothing for one that is not installed."""
    folder = tmp_path_factory.mktemp("compiled")
    versions = [v for v in VERSIONS if v == "pinned" or OLDEST.is_dir()]
    jobs = [(version, targets) for version in versions for targets in TARGETS]
    with ThreadPoolExecutor(2) as pool:
        written = list(pool.map(lambda job: _compile(job, folder), jobs))
    return {
        version: [w for (v, _), w in zip(jobs, written, strict=True) if v == version]
        for version in versions
    }


@pytest.fixture(params=VERSIONS)
def results(
    request: pytest.FixtureRequest, compiled: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    if request.param not in compiled:
        pytest.skip(f"{OLDEST} is missing; run `make setup`")
    return compiled[request.param]


@pytest.fixture
def cases(results: list[dict[str, Any]]) -> list[Case]:
    return [_case(fields) for written in results for fields in written["cases"]]


@pytest.fixture
def controls(results: list[dict[str, Any]]) -> list[Case]:
    return [_case(fields) for written in results for fields in written["controls"]]


@pytest.fixture
def activations(results: list[dict[str, Any]]) -> list[Case]:
    return [_case(fields) for written in results for fields in written["activations"]]


def _failures(cases: list[Case], is_wrong: Callable[[Case], object]) -> list[str]:
    """A line for each case of which something is wrong, saying what."""
    found = ((case, is_wrong(case)) for case in cases)
    return [f"{case}: {wrong}" for case, wrong in found if wrong]


# --- what is covered ----------------------------------------------------------------------------


def test_every_architecture_and_form_is_compiled(cases: list[Case], results) -> None:
    versions = {written["triton"] for written in results}
    assert len(versions) == 1
    for target in SHARED_LIMIT:
        of_target = [case for case in cases if case.target == target and case.bits == 4]
        assert len(of_target) >= 5, target
        assert {case.segments for case in of_target} == {1, 2}, target
    for target in (80, 90):
        of_target = [case for case in cases if case.target == target and case.bits == 4]
        assert {case.is_grouped for case in of_target} == {True, False}
        assert {case.config.split_k > 1 for case in of_target} == {True, False}
        names = " ".join(case.name for case in of_target)
        for term in ("temb", "residual", "geglu", "int8"):
            assert term in names, (target, term)
    assert {case.config.form for case in cases if case.target == 90} == {"gather", "tma"}


def test_both_versions_are_the_ones_of_the_constraints(compiled) -> None:
    for version, name in (("pinned", "constraints.txt"), ("oldest", "constraints-oldest.txt")):
        if version in compiled:
            assert f"triton=={compiled[version][0]['triton']}" in (ROOT / name).read_text().split()


# --- the hot loop -------------------------------------------------------------------------------


def _steps_multiplied(case: Case, loop: Counts) -> float:
    """How many steps of the tile the tensor-core instructions of a loop multiply."""
    config, products = case.config, 0
    for mnemonic, count in loop.of_mnemonic.items():
        opcode, *rest = mnemonic.split(".")
        if opcode in inspection.TENSOR_CORE:
            shape, *modifiers = rest
            assert {"S8"} <= set(modifiers), f"{case}: {mnemonic}"
            if opcode == "IGMMA":
                rows, columns, k = map(int, shape.split("x"))
                products += count * rows * columns * k * config.num_warps // 4
            else:
                assert (opcode, shape) == ("IMMA", "16832"), f"{case}: {mnemonic}"
                products += count * 16 * 8 * 32 * config.num_warps
    return products / (config.block_m * config.block_n * config.block_k)


def test_one_step_is_multiplied_on_int8_tensor_cores(cases: list[Case]) -> None:
    def is_wrong(case: Case) -> object:
        expected = [1.0] * (1 if case.config.split_k > 1 else case.segments)
        steps = [_steps_multiplied(case, loop) for loop in case.used.loops]
        return steps != expected and steps

    assert _failures(cases, is_wrong) == []


def test_instructions_are_those_of_the_architecture(cases: list[Case]) -> None:
    def is_wrong(case: Case) -> object:
        mma, wgmma = case.used.ptx.count("mma", "s8"), case.used.ptx.count("wgmma", "s8")
        return (mma == 0 or wgmma) if case.target < 90 else (wgmma == 0 or mma)

    assert _failures(cases, is_wrong) == []


def test_wgmma_takes_decoded_weights_from_registers(cases: list[Case]) -> None:
    on_hopper = [case for case in cases if case.target == 90 and case.bits == 4]
    assert on_hopper
    assert _failures(on_hopper, lambda case: case.used.kernel.count("IGMMA", "SS")) == []


def test_nothing_is_stored_to_shared_memory_in_the_loop(cases: list[Case]) -> None:
    def is_wrong(case: Case) -> object:
        return [c for loop in case.used.loops if (c := loop.count("STS") + loop.count("STSM"))]

    assert _failures(cases, is_wrong) == []


def test_no_bytes_are_permuted_in_the_loop(cases: list[Case]) -> None:
    """But one or two of multipliers, which are bytes, by the oldest version."""

    def is_wrong(case: Case) -> object:
        most = 2 if case.is_grouped else 0
        return [c for loop in case.used.loops if (c := loop.count("PRMT")) > most]

    assert _failures(cases, is_wrong) == []


def test_few_bytes_are_permuted_outside(cases: list[Case]) -> None:
    """Packing int8 results takes one and a half an element; nothing may take more than two."""

    def is_wrong(case: Case) -> object:
        elements = case.config.block_m * case.config.block_n // case.used.threads
        return (count := case.used.kernel.count("PRMT")) > 2 * elements and count

    assert _failures(cases, is_wrong) == []


# --- memory -------------------------------------------------------------------------------------


def test_copies_are_asynchronous_and_16_bytes(cases: list[Case]) -> None:
    def is_wrong(case: Case) -> object:
        config, wrong = case.config, []
        copied = config.block_n * config.block_k * case.bits // 8
        if config.form == "gather":
            copied += config.block_m * config.block_k
        for loop in case.used.loops:
            copies = loop.count("LDGSTS"), loop.count("LDGSTS", "BYPASS", "128")
            if set(copies) != {copied // (16 * case.used.threads)}:
                wrong.append(copies)
            if (loop.count("UTMALDG") > 0) != (config.form == "tma"):
                wrong.append("boxes")
        return wrong

    assert _failures(cases, is_wrong) == []


def test_nothing_else_is_loaded_in_the_loop_but_multipliers(cases: list[Case]) -> None:
    def is_wrong(case: Case) -> object:
        loads = [loop.count("LDG") for loop in case.used.loops]
        bytewise = [loop.count("LDG", "U8") for loop in case.used.loops]
        return loads != bytewise or (max(loads) > (8 if case.is_grouped else 0) and loads)

    assert _failures(cases, is_wrong) == []


def test_loads_run_ahead_by_all_stages(cases: list[Case]) -> None:
    def is_wrong(case: Case) -> object:
        if case.config.num_stages < 3:
            return f"{case.config.num_stages} stages"
        in_loops = sum(loop.count("LDGSTS") for loop in case.used.loops)
        return (
            total := case.used.kernel.count("LDGSTS")
        ) != in_loops * case.config.num_stages and (
            total,
            in_loops,
        )

    assert _failures(cases, is_wrong) == []


def test_shared_memory_is_what_the_plan_expects(cases: list[Case]) -> None:
    def is_wrong(case: Case) -> object:
        used, planned = case.used.shared_bytes, case.planned_shared_bytes
        # the epilogue exchanges a tile of at most 4 bytes an element; boxes have 8-byte barriers
        most = max(planned, 4 * case.config.block_m * case.config.block_n)
        if used > SHARED_LIMIT[case.target]:
            return f"{used} bytes are over the limit"
        return not planned <= used <= most + 8 * case.config.num_stages and (used, planned)

    assert _failures(cases, is_wrong) == []


# --- registers ----------------------------------------------------------------------------------


def test_nothing_spills(cases: list[Case]) -> None:
    def is_wrong(case: Case) -> object:
        return case.used.spills or case.used.local_bytes or case.used.stack_bytes

    assert _failures(cases, is_wrong) == []


def test_as_many_programs_fit_as_planned(cases: list[Case]) -> None:
    def is_wrong(case: Case) -> object:
        return case.programs < case.planned_programs and (
            f"{case.programs} of {case.planned_programs}: {case.used.registers} registers, "
            f"{case.used.shared_bytes} bytes"
        )

    assert _failures(cases, is_wrong) == []


def test_two_programs_of_eight_warps_take_128_registers(cases: list[Case]) -> None:
    wide = [c for c in cases if c.config.num_warps == 8 and c.planned_programs == 2]
    assert {80, 90} <= {case.target for case in wide}
    assert _failures(wide, lambda c: c.used.registers > REGISTERS and c.used.registers) == []


# --- activations --------------------------------------------------------------------------------


def test_every_activation_kernel_is_compiled(activations: list[Case]) -> None:
    for target in (80, 90):
        names = {case.name for case in activations if case.target == target}
        for operator in ("group norm 1920", "layer norm", "geglu", "quantize"):
            assert any(name.startswith(operator) for name in names), (target, operator)
        kernels = {name.split(": ")[1] for name in names}
        assert {"statistics", "absmax", "quantize", "layernorm", "geglu"} <= kernels


def test_activation_kernels_spill_nothing_and_leave_room(activations: list[Case]) -> None:
    def is_wrong(case: Case) -> object:
        used = case.used
        return used.spills or used.stack_bytes or (used.registers > REGISTERS and used.registers)

    assert _failures(activations, is_wrong) == []


def test_activations_are_read_and_written_16_bytes_at_a_time(activations: list[Case]) -> None:
    def is_wrong(case: Case) -> object:
        kernel = case.used.kernel
        writes_int8 = not case.name.endswith(("statistics", "absmax"))
        return (kernel.count("LDG", "128") < 2 or kernel.count("STG", "128") < writes_int8) and (
            kernel.of_mnemonic
        )

    assert _failures(activations, is_wrong) == []


# --- the counters see what they look for --------------------------------------------------------


def test_a_kernel_that_shifts_permutes_bytes_in_its_loop(controls: list[Case]) -> None:
    shifting = [case for case in controls if case.name == "shifting" and case.target < 90]
    assert {case.target for case in shifting} == set(SHARED_LIMIT) - {90}
    for case in shifting:
        (loop,) = case.used.loops
        assert loop.count("PRMT") >= 32, case.target


def test_its_weights_pass_through_shared_memory_on_hopper(controls: list[Case]) -> None:
    (case,) = (c for c in controls if c.name == "shifting" and c.target == 90)
    loop = case.used.loops[0]
    assert loop.count("STS") > 0
    assert case.used.kernel.count("IGMMA", "SS") == case.used.kernel.count("IGMMA") > 0


def test_a_kernel_with_too_few_registers_spills(controls: list[Case]) -> None:
    spilling = [case for case in controls if case.name == "spilling"]
    assert {case.target for case in spilling} == set(SHARED_LIMIT)
    for case in spilling:
        assert case.used.registers <= 96, case.target
        assert case.used.spills > 0, case.target
        assert case.used.stack_bytes > 0, case.target
