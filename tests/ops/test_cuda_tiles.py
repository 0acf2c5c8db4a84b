"""Measured tiles of backend cuda: the file, its strict reader, and who looks tiles up."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ptq4adm.errors import ConfigError
from ptq4adm.kernels import tuning
from ptq4adm.kernels.tuning import Problem
from ptq4adm.ops import cuda_backend, cuda_matmul, cuda_tiles
from ptq4adm.ops.arguments import Conv2dGeometry, Matmul, MatmulOptions
from ptq4adm.ops.cuda_choice import choose_tile, find_tile
from ptq4adm.ops.cuda_tiles import CudaTile

GPU = "some_gpu"
PROBLEM = Problem("w4a8_conv2d", 8192, 320, (320,), 9, multiprocessors=132, device=GPU)
CLASS = "w4a8_conv2d-n320-k2880"
TILE = {"family": "sm80", "block_m": 64, "block_n": 32, "split_k": 3}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    sizes = [(128, 128), (128, 64), (64, 64), (64, 32)]
    infos = [SimpleNamespace(block_m=m, block_n=n) for m, n in sizes]
    module = SimpleNamespace(matmul_tiles=lambda: infos, matmul_sm90a_tiles=list)
    monkeypatch.setattr(cuda_backend, "module", lambda: module)
    cuda_tiles.forget()
    yield
    cuda_tiles.forget()


def content(**changes: Any) -> dict[str, Any]:
    whole = {"format": "ptq4adm cuda tiles", "version": 1, "device": GPU}
    return {**whole, "tiles": {CLASS: {"8192": TILE}}, **changes}


def write(folder: Path, data: object) -> Path:
    path = folder / f"cuda-{GPU}.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    cuda_tiles.forget()
    return path


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    tiles = {
        CLASS: {8192: CudaTile(128, 64), 128: CudaTile(64, 32, 8, "sm90a")},
        "w8a8_gemm-geglu-n64-k128": {7: CudaTile(64, 64, 2)},
    }
    path = cuda_tiles.config_file(GPU)
    assert path == tmp_path / "cuda-some_gpu.json"
    assert cuda_tiles.load(path, GPU) == {}
    cuda_tiles.save(path, GPU, tiles)
    assert cuda_tiles.load(path, GPU) == tiles
    stored = json.loads(path.read_text())
    assert (stored["format"], stored["version"]) == ("ptq4adm cuda tiles", 1)
    assert list(stored["tiles"][CLASS]) == ["128", "8192"]
    first = stored["tiles"][CLASS]["128"]
    assert first == {"family": "sm90a", "block_m": 64, "block_n": 32, "split_k": 8}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # nothing temporary is left


def test_a_tile_without_a_family_is_of_the_one_that_runs_everywhere(tmp_path: Path) -> None:
    fields = {name: value for name, value in TILE.items() if name != "family"}
    write(tmp_path, content(tiles={CLASS: {"8192": fields}}))
    assert cuda_tiles.find(PROBLEM) == CudaTile(64, 32, 3, "sm80")


BROKEN = {
    "no JSON": ("{", "delete it, or measure again"),
    "a list": ([], "the format 'ptq4adm cuda tiles'"),
    "another format": (content(format="x"), "the format 'ptq4adm cuda tiles'"),
    "no version": (content(version=None), "version None: expected 1"),
    "a flag for a version": (content(version=True), "version True"),
    "a newer version": (content(version=2), r"newer than this ptq4adm reads \(1\)"),
    "another GPU": (content(device="other"), "device 'other', expected 'some_gpu'"),
    "no tiles": (content(tiles=None), "tiles = None"),
    "an unknown kernel": (content(tiles={"w2a8_gemm-n1-k64": {}}), "product 'w2a8_gemm-n1-k64'"),
    "a class of nothing": (content(tiles={CLASS: {}}), f"{CLASS}: expected an object of tiles"),
    "an M of 0": (content(tiles={CLASS: {"0": TILE}}), "M = '0', expected a positive number"),
    "an M with a sign": (content(tiles={CLASS: {"+8": TILE}}), "expected a positive number"),
    "a number for a tile": (content(tiles={CLASS: {"8": 3}}), "M 8: expected a tile, got 3"),
    "an unknown field": (content(tiles={CLASS: {"8": {**TILE, "warps": 4}}}), "expected block_m"),
    "a missing field": (content(tiles={CLASS: {"8": {"block_m": 64}}}), "got block_m"),
    "a text": (content(tiles={CLASS: {"8": {**TILE, "block_m": "64"}}}), "block_m = '64'"),
    "a flag": (content(tiles={CLASS: {"8": {**TILE, "split_k": True}}}), "split_k = True"),
    "nothing": (content(tiles={CLASS: {"8": {**TILE, "block_n": 0}}}), "block_n = 0"),
    "more splits than steps": (
        content(tiles={CLASS: {"8": {**TILE, "split_k": 46}}}),
        "split_k = 46, but there are 45 steps",
    ),
    "another family": (content(tiles={CLASS: {"8": {**TILE, "family": "x"}}}), "family 'x'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    data, message = BROKEN[name]
    path = write(tmp_path, data)
    for problem in (PROBLEM, replace(PROBLEM, N=64)):  # whatever is asked for
        with pytest.raises(ConfigError, match=message) as caught:
            find_tile(problem)
        assert str(path) in str(caught.value)


def test_the_nearest_m_of_the_class_is_taken(tmp_path: Path) -> None:
    small, large = {**TILE, "block_m": 64}, {**TILE, "block_m": 128, "block_n": 128, "split_k": 1}
    write(tmp_path, content(tiles={CLASS: {"128": small, "2048": large}}))
    for m, expected in ((128, small), (256, small), (1024, large), (8192, large)):
        tile = find_tile(replace(PROBLEM, M=m))
        assert (tile.block_m, tile.split_k) == (expected["block_m"], expected["split_k"])


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "w8a8_conv2d"},
        {"kernel": "w4a8_gemm"},
        {"N": 321},
        {"taps": 1},
        {"is_gated": True},
        {"is_grouped": True},
        {"M": 8192 * 4 + 1},
        {"M": 2047},
        {"device": "other_gpu"},
    ],
    ids=str,
)
def test_other_products_have_the_counted_tile(change: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, content())
    assert find_tile(PROBLEM) == CudaTile(64, 32, 3)
    other = replace(PROBLEM, **change)
    assert (
        find_tile(other) == choose_tile(other.M, other.N, other.K // 64, 132) != find_tile(PROBLEM)
    )


@pytest.mark.parametrize("change", [{"family": "sm90a"}, {"block_m": 96}], ids=str)
def test_a_tile_that_this_version_lacks_is_an_error(change: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, content(tiles={CLASS: {"8192": {**TILE, **change}}}))
    with pytest.raises(ConfigError, match="this build has no such tile") as caught:
        find_tile(PROBLEM)
    assert str(path) in str(caught.value)


def test_a_gpu_without_a_file_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    cuda_tiles._tell_untuned.cache_clear()
    with caplog.at_level(logging.WARNING):
        for n in (320, 640):
            find_tile(replace(PROBLEM, N=n, capability=90))
        find_tile(replace(PROBLEM, N=960, device="interpreter"))
    assert len(caplog.records) == 1
    assert "ptq4adm tune --backend cuda" in caplog.text


def asked_for(
    monkeypatch: pytest.MonkeyPatch, call: Matmul, geometry: Conv2dGeometry | None
) -> Any:
    """The problem that a product looks its tile up by."""
    seen = []

    class FoundError(Exception):
        pass

    def find(problem: Problem) -> CudaTile:
        seen.append(problem)
        raise FoundError

    monkeypatch.setattr(cuda_matmul, "find_tile", find)
    monkeypatch.setattr(cuda_matmul, "_check_device", lambda _: None)
    monkeypatch.setattr(cuda_matmul, "multiprocessors", lambda _: 7)
    monkeypatch.setattr(cuda_matmul.cuda_backend, "module", lambda: FakeModule)
    arguments = (call,) if geometry is None else (call, geometry)
    with pytest.raises(FoundError):
        (cuda_matmul.linear if geometry is None else cuda_matmul.conv2d)(*arguments)
    return seen[0]


class FakeModule:
    """Takes attributes, as the compiled parameters do."""

    class Params:
        pass

    class Window:
        def __init__(self, **_: object) -> None:
            pass


def matmul(bits: int, x: tuple[int, ...], N: int, k: int, **options: Any) -> Matmul:
    rows, columns = -(-N // 16), 16 * k * bits // 8
    qweight = torch.zeros(rows, columns, dtype=torch.uint8 if bits == 4 else torch.int8)
    x_q = torch.zeros(x, dtype=torch.int8)
    return Matmul(bits, x_q, torch.ones(1), qweight, torch.ones(N), MatmulOptions(**options))


def test_products_are_looked_up_as_the_tuner_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    same = Conv2dGeometry((3, 3), padding=(1, 1))
    cases = [
        (matmul(4, (5, 70), 37, 128), None, "w4a8_gemm-n37-k128", 5),
        (matmul(8, (5, 64), 64, 64, geglu=True), None, "w8a8_gemm-geglu-n64-k64", 5),
        (matmul(4, (2, 3, 5, 64), 32, 576), same, "w4a8_conv2d-boxes-n32-k576", 30),
        (matmul(4, (2, 3, 5, 40), 32, 576), same, "w4a8_conv2d-n32-k576", 30),
        (matmul(4, (2, 3, 5, 64), 32, 64), Conv2dGeometry((1, 1)), "w4a8_gemm-n32-k64", 30),
    ]
    groups = torch.ones(32, 3, dtype=torch.uint8)
    second = {"x2_q": torch.zeros(4, 66, dtype=torch.int8), "x2_scale": torch.ones(1)}
    grouped = matmul(4, (4, 64), 32, 192, w_mult=groups, **second)
    cases.append((grouped, None, "w4a8_gemm-grouped-n32-k192", 4))
    for call, geometry, name, m in cases:
        problem = asked_for(monkeypatch, call, geometry)
        assert (cuda_tiles.class_name(problem), problem.M) == (name, m)
        assert (problem.multiprocessors, problem.device) == (7, "interpreter")
