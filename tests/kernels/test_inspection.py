"""Reading machine code: loops, counts, occupancy; on texts written here."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptq4adm.errors import BackendUnavailableError
from ptq4adm.kernels import inspection
from ptq4adm.kernels.inspection import Counts, Resources, count_ptx, hot_loops, parse_sass

# a loop with an inner loop, and a cold block behind the end that jumps back into it
SASS = """
.text.kernel:
        /*0000*/                   LDG.E R1, [R2] ;
.L_x_0:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_1:
        /*0020*/              @!PT LDS RZ, [RZ] ;
        /*0030*/                   IGMMA.64x128x32.S8.S8 R24, R96, gdesc[UR12], R24 ;
        /*0040*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR8], R24, gsb0 ;
        /*0050*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/               @P2 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   PRMT R5, R5, 0x5410, R6 ;
        /*00a0*/                   BRA `(.L_x_2);
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
"""


def test_the_innermost_loop_holds_its_cold_block_and_nothing_else() -> None:
    (loop,) = hot_loops(parse_sass(SASS))
    counts = inspection.count_instructions(loop)
    assert counts.count("PRMT") == 1
    assert counts.count("IADD3") == counts.count("LDG") == counts.count("EXIT") == 0
    assert counts.count("BRA") == 3


def test_wgmma_tells_where_its_first_operand_comes_from() -> None:
    counts = inspection.count_instructions(hot_loops(parse_sass(SASS))[0])
    assert counts.count("IGMMA", "RS") == counts.count("IGMMA", "SS") == 1


def test_what_never_executes_is_not_counted() -> None:
    assert inspection.count_instructions(hot_loops(parse_sass(SASS))[0]).count("LDS") == 0


def test_code_without_a_loop_has_no_hot_loop() -> None:
    code = parse_sass("        /*0000*/  IMMA.16832.S8.S8.SAT R4, R8.ROW, R2.COL, R4 ;\n")
    assert hot_loops(code) == []


def test_counts_select_by_parts_of_the_mnemonic() -> None:
    counts = Counts({"LDGSTS.E.BYPASS.128": 3, "LDGSTS.E.64": 2, "LDG.E.128": 5})
    assert counts.count("LDGSTS") == 5
    assert counts.count("LDGSTS", "128") == 3
    assert counts.count("128") == 0
    assert counts.total == 10


def test_ptx_is_counted_by_instruction() -> None:
    text = (
        "\tcp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;\n"
        "\t@%p1 bra \t$L__BB0_3;\n// mma.sync in a comment\n"
        "\tmma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {%r1}, {%r2}, {%r3}, {%r4};\n"
    )
    counts = count_ptx(text)
    assert counts.count("cp", "async", "cg") == counts.count("mma", "s8") == 1
    assert counts.count("bra") == 1
    assert counts.total == 3


def test_occupancy_is_the_least_of_what_a_multiprocessor_has() -> None:
    nothing = Counts({})

    def programs(registers: int, shared: int, threads: int, target: int) -> int:
        used = Resources(registers, 0, 0, shared, threads, nothing, (), nothing)
        return inspection.programs_at_once(used, target)

    assert programs(128, 0, 256, 80) == 2
    assert programs(129, 0, 256, 80) == 1  # registers are handed out by eight
    assert programs(32, 49_152, 128, 86) == 2
    assert programs(16, 0, 256, 89) == 6  # 1536 threads
    assert programs(16, 0, 32, 86) == 16


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inspection.triton, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(BackendUnavailableError, match=r"nvdisasm is not in Triton .* install the"):
        inspection._run("nvdisasm", "-c", "kernel.cubin")
