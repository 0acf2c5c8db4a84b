"""Tiles: what is legal, what is planned for the real shapes, files of measured ones."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ptq4adm.bench.shapes import CONV3X3, LINEAR, MODELS, LayerShape, model_layers
from ptq4adm.errors import ConfigError
from ptq4adm.kernels import tuning
from ptq4adm.kernels.tuning import (
    GATHER,
    TMA,
    Problem,
    TileConfig,
    config_file,
    find_config,
    illegal_reason,
    load_configs,
    plan_config,
    planned_programs,
    save_configs,
    shared_bytes,
)

MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132}
GEMM = Problem("w4a8_gemm", M=2048, N=640, channels=(640,), capability=80, multiprocessors=108)
CONV = Problem(
    "w4a8_conv2d", M=8192, N=320, channels=(320,), taps=9, box=(256, 16), capability=90,
    multiprocessors=132,
)  # fmt: skip
TILE = TileConfig(64, 64)


# --- what is legal ------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [48, 0, -64])
@pytest.mark.parametrize("name", ["block_m", "block_n", "num_warps"])
def test_sizes_and_warps_are_powers_of_two(name, block) -> None:
    reason = illegal_reason(replace(TILE, **{name: block}), GEMM)
    assert reason is not None
    assert "sizes and warps must be powers of two" in reason
    assert f"{name}={block}" in reason


@pytest.mark.parametrize(
    ("config", "problem", "reason"),
    [
        (replace(TILE, block_k=32), GEMM, "block_k = 32: expected 64 or 128"),
        (replace(TILE, block_k=256), GEMM, "block_k = 256: expected 64 or 128"),
        (replace(TILE, block_m=8), GEMM, "tile 8 x 64: the tensor core needs 16 x 16"),
        (replace(TILE, block_n=8), GEMM, "tile 64 x 8: the tensor core needs 16 x 16"),
        (replace(TILE, block_k=128), CONV, r"block_k = 128: a tap of \(320,\) channels ends"),
        (replace(TILE, split_k=0), GEMM, "split_k = 0: expected 1, or at least one a segment"),
        (replace(TILE, split_k=11), GEMM, "split_k = 11: there are 10 steps of 64 k"),
        (replace(TILE, block_k=128, split_k=6), GEMM, "split_k = 6: there are 5 steps of 128 k"),
        (replace(TILE, num_stages=0), GEMM, "num_stages = 0: expected at least 1"),
        (
            replace(TILE, num_stages=30),
            GEMM,
            "178176 bytes of shared memory, a program may have 166912",
        ),
        (replace(TILE, form="im2col"), GEMM, "form 'im2col': expected 'gather' or 'tma'"),
        (replace(TILE, form=TMA), GEMM, "form 'tma': needs compute capability 9.0, got 8.0"),
        (
            replace(TILE, form=TMA),
            replace(CONV, box=None),
            "form 'tma': needs stride 1, one image row of a power of two, and no upsampling",
        ),
        (
            replace(TILE, block_m=16, form=TMA),
            replace(CONV, box=(8, 32)),
            "form 'tma': rows of 32 pixels do not fit block_m 16",
        ),
        (
            replace(TILE, form=TMA),
            replace(CONV, channels=(320, 320)),
            "form 'tma': takes one K segment",
        ),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_illegal_tiles_say_why(config, problem, reason) -> None:

    found = illegal_reason(config, problem)
    assert found is not None
    assert re.search(reason, found), found


def test_a_split_for_each_segment() -> None:
    two = replace(GEMM, channels=(320, 320))
    assert illegal_reason(replace(TILE, split_k=2), two) is None
    assert illegal_reason(TILE, two) is None


def test_the_interpreter_takes_boxes_and_any_shared_memory() -> None:
    anywhere = replace(CONV, capability=0)
    assert illegal_reason(replace(TILE, form=TMA, num_stages=99), anywhere) is None


@pytest.mark.parametrize(
    ("capability", "bits", "expected"),
    [
        (80, 4, 3 * (64 * 64 + 64 * 32)),
        (80, 8, 3 * (64 * 64 + 64 * 64)),
        (90, 4, 4 * 64 * 64 + 3 * 64 * 32),  # wgmma reads activations from shared memory
        (90, 8, 4 * (64 * 64 + 64 * 64)),  # and 8-bit weights, too
    ],
)
def test_shared_memory_of_a_tile(capability, bits, expected) -> None:
    assert shared_bytes(TILE, bits, capability) == expected


# --- what is planned ----------------------------------------------------------------------------


def _problems(capability: int) -> list[Problem]:
    """Every layer of every model, in each of its weights' forms."""
    shapes = {layer.shape for model in MODELS for layer in model_layers(model)}
    found = []
    for shape in shapes:
        for bits, is_grouped in ((4, False), (4, True), (8, False)):
            found += _problems_of(shape, bits, is_grouped, capability)
    return found


def _problems_of(shape: LayerShape, bits: int, is_grouped: bool, capability: int) -> list[Problem]:
    is_product = shape.kernel == 1
    width = shape.out_size[1]
    problem = Problem(
        f"w{bits}a8_{'gemm' if is_product else 'conv2d'}",
        M=shape.M,
        N=shape.N,
        channels=(-(-shape.in_channels // 64) * 64,),
        taps=shape.kernel**2,
        is_grouped=is_grouped,
        box=shape.out_size if shape.kind == CONV3X3 and width & (width - 1) == 0 else None,
        capability=capability,
        multiprocessors=MULTIPROCESSORS[capability],
    )
    if shape.kind == LINEAR:
        return [problem, replace(problem, is_gated=True)]
    if shape.in_channels > shape.out_channels and is_product:
        rest = shape.in_channels - shape.out_channels
        return [problem, replace(problem, channels=(rest, shape.out_channels))]
    return [problem]


@pytest.fixture(params=MULTIPROCESSORS, scope="module")
def planned(request: pytest.FixtureRequest) -> list[tuple[Problem, TileConfig]]:
    return [(problem, plan_config(problem)) for problem in _problems(request.param)]


def test_plans_are_legal(planned) -> None:
    assert len(planned) > 300
    assert {illegal_reason(config, problem) for problem, config in planned} == {None}


def test_plans_have_three_stages_and_copy_16_bytes_a_thread(planned) -> None:
    for problem, config in planned:
        assert config.num_stages >= 3, (problem, config)
        threads = 32 * config.num_warps
        for rows, bits in ((config.block_m, 8), (config.block_n, problem.bits)):
            assert rows * config.block_k * bits // 8 >= 16 * threads, (problem, config)


def test_plans_leave_room_for_two_programs(planned) -> None:
    for problem, config in planned:
        assert planned_programs(config, problem) >= 2, (problem, config)


def test_tiles_that_need_many_registers_are_not_planned(planned) -> None:
    for problem, config in planned:
        is_heavy = problem.is_gated or len(problem.channels) > 1 or config.split_k > 1
        if is_heavy:
            assert config.block_m * config.block_n <= 128 * 64, (problem, config)
        if problem.is_grouped:
            assert config.block_k == 64, (problem, config)


def test_boxes_are_planned_where_they_can_be_cut(planned) -> None:
    for problem, config in planned:
        expected = TMA if problem.capability == 90 and problem.box is not None else GATHER
        assert config.form == expected, (problem, config)


def test_small_products_are_split(planned) -> None:
    """The lowest level: 128 pixels are too few tiles for a hundred multiprocessors."""
    small = [(p, c) for p, c in planned if p.M == 128 and p.K >= 5760 and p.N == 640]
    assert small
    for problem, config in small:
        assert config.split_k > 1, (problem, config)


def test_short_sums_of_many_tiles_are_not_split(planned) -> None:
    large = [(p, c) for p, c in planned if p.M >= 8192 and p.N >= 320 and p.K <= 640]
    assert large
    assert {config.split_k for _, config in large} == {1}


def test_every_multiprocessor_has_work_or_k_is_short(planned) -> None:
    for problem, config in planned:
        if problem.M * problem.N * problem.K < 1 << 28:
            continue
        tiles = -(-problem.M // config.block_m) * -(-problem.N // config.block_n)
        assert 4 * tiles * config.split_k >= problem.multiprocessors, (problem, config)


@pytest.mark.parametrize("width", [256, 512])
def test_images_wider_than_a_tile_are_gathered(width) -> None:
    wide = replace(CONV, box=(64, width), M=64 * width)
    assert plan_config(wide).form == GATHER
    assert illegal_reason(plan_config(wide), wide) is None


def test_the_interpreter_gets_few_programs() -> None:
    config = plan_config(replace(GEMM, capability=0))
    assert config == TileConfig(64, 64, 64, 4, 1)


def test_an_unknown_capability_is_planned_for() -> None:
    newer = replace(GEMM, capability=120)
    assert illegal_reason(plan_config(newer), newer) is None


# --- measured tiles -----------------------------------------------------------------------------


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder in place of the package's."""
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path / "configs")
    load_configs.cache_clear()
    tuning._tell_untuned.cache_clear()
    return tmp_path / "configs"


@pytest.mark.usefixtures("configs")
def test_names_of_files() -> None:
    device = replace(GEMM, device="nvidia_h100")
    assert config_file(device).name == "w4a8_gemm-n640-k640-nvidia_h100.json"
    gated, grouped = replace(device, is_gated=True), replace(device, is_grouped=True)
    assert config_file(gated).name == "w4a8_gemm-geglu-n640-k640-nvidia_h100.json"
    assert config_file(grouped).name == "w4a8_gemm-grouped-n640-k640-nvidia_h100.json"
    assert config_file(replace(device, M=1)) == config_file(device)
    assert config_file(CONV).name == "w4a8_conv2d-n320-k2880-interpreter.json"


def test_saved_tiles_are_read_back(configs) -> None:
    tiles = {512: TileConfig(64, 128, 128, 8, 3, 2, TMA), 64: TILE}
    path = configs / "deeper" / "file.json"
    save_configs(path, tiles)
    assert load_configs(path) == tiles
    assert list(json.loads(path.read_text())) == ["64", "512"]
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_saving_again_replaces_what_was_read(configs) -> None:
    path = configs / "file.json"
    save_configs(path, {64: TILE})
    assert load_configs(path) == {64: TILE}
    save_configs(path, {128: replace(TILE, num_warps=8)})
    assert load_configs(path) == {128: replace(TILE, num_warps=8)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"64": 3}',
        '{"64": {"block_m": 64}}',
        '{"64": {"block_m": 64, "block_n": 64, "colour": 1}}',
        '{"64": {"block_m": "64", "block_n": 64}}',
        '{"64": {"block_m": 64.0, "block_n": 64}}',
        '{"64": {"block_m": true, "block_n": 64}}',
        '{"64": {"block_m": 64, "block_n": 64, "form": 1}}',
        '{"many": {"block_m": 64, "block_n": 64}}',
    ],
)
def test_a_file_without_tiles_is_refused(configs, text) -> None:
    path = configs / "file.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"file.json: expected an object of tiles by M .*delete"):
        load_configs(path)


@pytest.mark.usefixtures("configs")
@pytest.mark.parametrize(
    ("M", "nearest"), [(16, 64), (64, 64), (127, 64), (129, 256), (255, 256), (4096, 1024)]
)
def test_the_nearest_measured_m_is_taken(M, nearest) -> None:
    """Nearest in ratio: 64 and 256 are as far from 128."""
    tiles = {m: replace(TILE, num_stages=i + 1) for i, m in enumerate((64, 256, 1024))}
    save_configs(config_file(GEMM), tiles)
    assert find_config(replace(GEMM, M=M)) == tiles[nearest]


@pytest.mark.usefixtures("configs")
@pytest.mark.parametrize("M", [1, 15, 9999])
def test_a_far_m_says_nothing(M) -> None:
    save_configs(config_file(GEMM), {64: TILE, 1024: TILE})
    problem = replace(GEMM, M=M)
    assert find_config(problem) == plan_config(problem) != TILE


@pytest.mark.usefixtures("configs")
def test_new_files_are_found() -> None:
    assert find_config(GEMM) == plan_config(GEMM) != TILE
    save_configs(config_file(GEMM), {GEMM.M: TILE})
    assert find_config(GEMM) == TILE


@pytest.mark.usefixtures("configs")
def test_a_measured_tile_that_is_illegal_here_is_passed_over() -> None:
    save_configs(config_file(GEMM), {2048: replace(TILE, split_k=99), 1024: TILE})
    assert find_config(GEMM) == TILE


@pytest.mark.usefixtures("configs")
def test_a_device_without_files_is_told_once(caplog) -> None:
    tuned = replace(GEMM, device="nvidia_a100")
    with caplog.at_level(logging.WARNING, logger="ptq4adm.kernels.tuning"):
        assert find_config(tuned) == plan_config(tuned)
        find_config(replace(tuned, N=320))
    (record,) = caplog.records
    assert record.getMessage() == (
        "no measured tiles for nvidia_a100 in configs: planned ones are used; "
        "`ptq4adm tune` measures them"
    )


@pytest.mark.usefixtures("configs")
def test_the_interpreter_is_told_nothing(caplog) -> None:
    find_config(replace(GEMM, capability=0))
    assert caplog.records == []


def test_nothing_is_read_on_import() -> None:
    source = Path(tuning.__file__).read_text()
    assert "import triton" not in source
    assert "import torch" not in source
