"""The family sm90a: its tiles, what it refuses, boxes of pixels, and the way of results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated_backend import SAME, SM90A_TILES, emulate, on_cuda, sm90a_tile
from operator_cases import build_case

from ptq4adm.errors import ConfigError
from ptq4adm.kernels import tuning
from ptq4adm.kernels.tuning import Problem
from ptq4adm.ops import cuda_backend, cuda_boxes, cuda_matmul, cuda_tiles
from ptq4adm.ops.arguments import Conv2dGeometry
from ptq4adm.ops.cuda_choice import choose_tile, find_tile, possible_tiles
from ptq4adm.ops.cuda_tiles import CudaTile

SMALL = sm90a_tile(64, 64)


@pytest.fixture(autouse=True)
def _emulated(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    compiled = request.getfixturevalue("matmul_sm90_emulated")
    with emulate(compiled, monkeypatch):
        yield compiled


# --- tiles, and what is refused -----------------------------------------------------------------


def test_tiles_fit_into_the_gpu(matmul_sm90_emulated: ModuleType) -> None:
    """Blocks that registers let fit on a multiprocessor fit by shared memory as well."""
    tiles = matmul_sm90_emulated.matmul_sm90a_tiles()
    assert [(tile.block_m, tile.block_n) for tile in tiles] == SM90A_TILES
    together = dict(zip(SM90A_TILES, (1, 1, 2, 3, 4), strict=True))
    for tile in tiles:
        one, two = tile.shared_bytes
        assert max(one, two) <= 227 * 1024
        assert together[tile.block_m, tile.block_n] * (one + 1024) <= 228 * 1024
        assert 6 <= tile.stages <= 8


@pytest.mark.parametrize(
    ("change", "has_boxes"),
    [
        ({}, True),
        ({"kernel": "w8a8_conv2d", "box": (16, 8)}, True),
        ({"kernel": "w4a8_conv2d"}, False),
        ({"capability": 89}, False),
        ({"capability": 100}, False),
    ],
    ids=str,
)
def test_tiles_of_a_product(
    monkeypatch, matmul_sm90_emulated: ModuleType, change: dict[str, Any], has_boxes: bool
) -> None:
    older = [type("Info", (), {"block_m": 64, "block_n": 32})]
    monkeypatch.setattr(matmul_sm90_emulated, "matmul_tiles", lambda: older, raising=False)
    problem = replace(Problem("w4a8_gemm", 128, 64, (64,), capability=90), **change)
    newer = [sm90a_tile(*size) for size in SM90A_TILES] if has_boxes else []
    assert possible_tiles(problem) == [CudaTile(64, 32), *newer]


def test_a_measured_tile_of_the_family_is_taken(
    monkeypatch, tmp_path, matmul_sm90_emulated: ModuleType
) -> None:
    """Where the product can have it; a class of its own keeps the others from it."""
    monkeypatch.setattr(matmul_sm90_emulated, "matmul_tiles", list, raising=False)
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    boxed = Problem("w4a8_conv2d", 12, 20, (64,), 9, box=(4, 3), capability=90, device="h100")
    best = sm90a_tile(64, 64)
    path = cuda_tiles.config_file("h100")
    cuda_tiles.save(path, "h100", {cuda_tiles.class_name(boxed): {12: best}})
    assert find_tile(boxed) == best
    assert find_tile(replace(boxed, box=None)).family == "sm80"
    cuda_tiles.save(path, "h100", {cuda_tiles.class_name(boxed): {12: CudaTile(96, 32)}})
    with pytest.raises(ConfigError, match="this build has no such tile"):
        find_tile(boxed)
    cuda_tiles.forget()


@pytest.mark.parametrize(
    ("channels", "geometry", "box"),
    [
        (64, SAME, (4, 3)),
        (64, Conv2dGeometry((3, 3), stride=(2, 2)), None),
        (64, Conv2dGeometry((3, 3), padding=(1, 1), upsample=(8, 6)), None),
        (20, SAME, None),
    ],
)
def test_what_can_come_as_boxes_is_said_of_a_product(channels, geometry, box) -> None:
    call = build_case(4, (1, 4, 3), (channels,), 20, geometry).call
    problem = cuda_matmul.conv2d_problem(call, geometry)
    assert problem.box == box
    assert (problem.channels, problem.taps, problem.K) == ((64,), 9, 576)


def test_no_tile_of_the_family_is_chosen_unasked() -> None:
    assert choose_tile(8192, 1280, 20, 132).family == "sm80"


@pytest.mark.parametrize(
    ("shape", "channels", "geometry", "message"),
    [
        ((5,), 70, None, "rows of activations must begin at multiples of 16 bytes"),
        ((1, 4, 4), 64, Conv2dGeometry((3, 3), stride=(2, 2)), r"stride \(2, 2\): pixels of a box"),
        (
            (1, 4, 4),
            64,
            Conv2dGeometry((3, 3), padding=(1, 1), upsample=(8, 8)),
            r"upsample \(8, 8\): a box is cut out",
        ),
    ],
)
def test_products_that_cannot_come_as_boxes_are_refused(shape, channels, geometry, message) -> None:
    call = on_cuda(build_case(4, shape, (channels,), 20, geometry))
    run = cuda_matmul.linear if geometry is None else cuda_matmul.conv2d
    arguments = (call,) if geometry is None else (call, geometry)
    with pytest.raises(ConfigError, match=f"family 'sm90a': {message}.*'sm80' take every product"):
        run(*arguments, SMALL)


def test_activations_at_an_odd_address_are_refused() -> None:
    call = on_cuda(build_case(4, (5,), (64,), 20))
    odd = torch.zeros(5 * 64 + 1, dtype=torch.int8)[1:].view(5, 64)
    with pytest.raises(ConfigError, match="tensors at such addresses"):
        cuda_matmul.linear(replace(call, x_q=odd), SMALL)


def test_other_gpus_and_families_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    call = on_cuda(build_case(4, (5,), (64,), 20))
    with pytest.raises(ConfigError, match="family 'sm70': there are 'sm80' and 'sm90a'"):
        cuda_matmul.linear(call, CudaTile(64, 64, family="sm70"))
    monkeypatch.setattr(cuda_backend, "sm90a_reason", lambda _: "it is an A100")
    with pytest.raises(ConfigError, match="family 'sm90a': it is an A100"):
        cuda_matmul.linear(call, SMALL)


def test_illegal_tiles_are_refused() -> None:
    call = on_cuda(build_case(4, (5,), (64,), 20))
    with pytest.raises(ConfigError, match="split_k = 2: there are 1 steps of 64 k"):
        cuda_matmul.linear(call, sm90a_tile(64, 64, 2))
    with pytest.raises(ValueError, match="no kernel has a tile of this size"):
        cuda_matmul.linear(call, sm90a_tile(64, 32))


@pytest.mark.parametrize(
    ("capability", "tiles", "reason"),
    [
        ((9, 0), [1], None),
        ((8, 0), [1], "a GPU has compute capability 8.0, and its instructions are those of 9.0"),
        ((10, 0), [1], "a GPU has compute capability 10.0"),
        ((9, 0), [], "the module is built for 80; reinstall with .* PTQ4ADM_CUDA_ARCHS=90a"),
    ],
)
def test_reason_of_a_device(monkeypatch, capability, tiles, reason) -> None:
    monkeypatch.undo()
    info = type("Info", (), {"name": "a GPU", "major": capability[0], "minor": capability[1]})
    fake = type(
        "Module",
        (),
        {
            "device_info": staticmethod(lambda _: info),
            "archs": staticmethod(lambda: "80"),
            "matmul_sm90a_tiles": staticmethod(lambda: tiles),
        },
    )
    monkeypatch.setattr(cuda_backend, "module", lambda: fake)
    cuda_backend.sm90a_reason.cache_clear()
    got = cuda_backend.sm90a_reason(0)
    cuda_backend.sm90a_reason.cache_clear()
    assert (got is None) == (reason is None)
    assert got is None or re.search(reason, got)


# --- boxes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extent", "block_m", "box"),
    [
        ((16, 256, 2), 128, (16, 8, 1)),  # TANGO and AudioLDM, level 0
        ((8, 128, 2), 128, (8, 16, 1)),
        ((4, 64, 2), 256, (4, 64, 1)),
        ((2, 32, 2), 128, (2, 32, 2)),  # two images in a tile
        ((2, 32, 2), 64, (2, 32, 1)),
        ((64, 64, 2), 128, (64, 2, 1)),
        ((78, 10, 2), 128, (6, 10, 2)),  # 120 of 128 rows, where whole lines would fill 78
        ((10, 10, 2), 128, (10, 10, 1)),
        ((5, 39, 2), 128, (5, 20, 1)),
        ((300, 1, 1), 256, (150, 1, 1)),
        ((1, 1, 1), 64, (1, 1, 1)),
    ],
)
def test_boxes_are_cut_to_be_few(extent, block_m, box) -> None:
    got = cuda_boxes.cut_box(extent, block_m)
    assert cuda_boxes.box_count(extent, got) <= cuda_boxes.box_count(extent, box)
    assert got[0] * got[1] * got[2] <= block_m
    assert got == box


def test_every_pixel_is_in_one_box(matmul_sm90_emulated: ModuleType) -> None:
    for extent in ((10, 7, 3), (78, 3, 2), (2, 3, 5), (300, 2, 1)):
        for block_m in (64, 128, 256):
            box = cuda_boxes.cut_box(extent, block_m)
            found = matmul_sm90_emulated.box_rows(box, extent, block_m)
            assert len(found) == cuda_boxes.box_count(extent, box)
            rows = sorted(row for rows in found for row in rows if row >= 0)
            assert rows == list(range(extent[0] * extent[1] * extent[2]))


def test_pixels_of_a_box_run_along_columns_then_rows_then_images(
    matmul_sm90_emulated: ModuleType,
) -> None:
    (only, _) = matmul_sm90_emulated.box_rows((2, 2, 2), (3, 2, 2), 10)
    assert only == [0, 1, 3, 4, 6, 7, 9, 10, -1, -1]


def test_results_meet_no_bank_conflict(matmul_sm90_emulated: ModuleType) -> None:
    """A warp's stores of a sum each: eight channels of every other row of eight."""
    for columns in (64, 128, 256):
        for first in range(0, columns, 16):
            for half in (0, 1):
                for odd in (0, 1):
                    places = [
                        matmul_sm90_emulated.stage_offset(
                            2 * (lane % 4) + odd, first + lane // 4 + 8 * half, columns, 1
                        )
                        for lane in range(32)
                    ]
                    assert len({place // 4 % 32 for place in places}) == 32
        everywhere = {
            matmul_sm90_emulated.stage_offset(row, column, columns, 1)
            for row in range(64)
            for column in range(columns)
        }
        assert everywhere == set(range(0, 64 * columns * 4, 4))
