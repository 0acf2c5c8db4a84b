"""Matrix product: int32 accumulators equal to exact integers, whatever the tile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptq4adm.kernels.tuning import TileConfig

OLDEST = Path(sys.prefix) / "oldest"
MODES = pytest.mark.parametrize(
    ("bits", "is_grouped"),
    [(4, False), (4, True), (8, False)],
    ids=["w4", "w4-groups", "w8"],
)
SMALL = TileConfig(16, 16, 64, 4, 1)
WIDE = TileConfig(16, 16, 128, 4, 1)
TANGO_K = 9 * 2560  # the longest sum of the seed models
LONGEST_K = 131008  # the last multiple of 64 below 131072


def _assert_exact(case, accumulate, config: TileConfig) -> None:
    for segment, (mine, exact) in enumerate(
        zip(accumulate(case.call, config), case.oracle(), strict=True)
    ):
        assert torch.equal(mine, exact), f"segment {segment}"


# --- sizes --------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["k64", "k128"])
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (1, 1, 1),
        (15, 17, 63),
        (16, 16, 64),
        (17, 15, 65),
        (33, 31, 127),
        (2, 48, 128),
        (7, 19, 130),
        (1, 40, 200),
    ],
)
def test_ragged_sizes(make_case, accumulate, M, N, K, config, bits, is_grouped) -> None:
    _assert_exact(make_case(bits, (M,), (K,), N, is_grouped=is_grouped), accumulate, config)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "tile",
    [(16, 128), (128, 16), (32, 64), (64, 64), (128, 128)],
    ids=lambda tile: "x".join(map(str, tile)),
)
def test_tiles(make_case, accumulate, tile, bits) -> None:
    """One row and channel more than a tile: the last tiles are nearly empty."""
    case = make_case(bits, (tile[0] + 1,), (130,), tile[1] + 1)
    _assert_exact(case, accumulate, TileConfig(*tile, 64, 4, 1))


@MODES
@pytest.mark.parametrize("K", [320, 1280, TANGO_K])
def test_real_k(make_case, accumulate, K, bits, is_grouped) -> None:
    _assert_exact(make_case(bits, (3,), (K,), 17, is_grouped=is_grouped), accumulate, WIDE)


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "w_value", "x_value"), [(4, -8, -128), (4, 7, -128), (8, -127, -128)]
)
def test_the_longest_sums_of_extremes(make_case, accumulate, bits, w_value, x_value) -> None:
    case = make_case(bits, (1,), (LONGEST_K,), 2, w_value=w_value, x_value=x_value)
    assert int(case.oracle()[0][0, 0]) == w_value * x_value * LONGEST_K
    _assert_exact(case, accumulate, WIDE)


def test_groups_of_extremes(make_case, accumulate) -> None:
    case = make_case(4, (2,), (TANGO_K,), 17, is_grouped=True, w_value=-8, x_value=-128)
    assert int(case.oracle()[0][0, 0]) == 120 * 128 * TANGO_K
    _assert_exact(case, accumulate, WIDE)


@pytest.mark.parametrize("bits", [4, 8])
def test_identity_gives_the_decoded_weight(make_case, accumulate, bits) -> None:
    case = make_case(bits, (130,), (130,), 33)
    eye = torch.eye(130, dtype=torch.int8)
    case.call.x_q, case.x = eye, eye.long()
    (got,) = accumulate(case.call, WIDE)
    assert torch.equal(got, case.weight[:, :, 0, 0].T.int())


def test_padding_of_the_weight_adds_nothing(make_case, accumulate) -> None:
    """Whatever lies in the padded k meets no activation."""
    case = make_case(8, (5,), (70,), 20)
    case.call.qweight[:, 70:] = 99
    _assert_exact(case, accumulate, WIDE)


# --- two segments -------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["k64", "k128"])
@pytest.mark.parametrize("segments", [(64, 64), (72, 40), (1, 130), (320, 64)], ids=str)
def test_two_segments(make_case, accumulate, segments, config, bits, is_grouped) -> None:
    _assert_exact(make_case(bits, (17,), segments, 18, is_grouped=is_grouped), accumulate, config)


# --- split K ------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [2, 3, 4, 5, 8])
@MODES
def test_splits_in_unequal_shares(make_case, accumulate, splits, bits, is_grouped) -> None:
    """Eleven steps: shares differ, and of eight splits two have none."""
    case = make_case(bits, (18,), (11 * 64 - 3,), 19, is_grouped=is_grouped)
    _assert_exact(case, accumulate, TileConfig(16, 16, 64, 4, 1, split_k=splits))


@pytest.mark.parametrize("splits", [2, 3, 5, 8])
@pytest.mark.parametrize("segments", [(640, 64), (70, 330)], ids=str)
@MODES
def test_splits_of_two_segments(make_case, accumulate, segments, splits, bits, is_grouped) -> None:
    case = make_case(bits, (18,), segments, 19, is_grouped=is_grouped)
    _assert_exact(case, accumulate, TileConfig(16, 16, 64, 4, 1, split_k=splits))


def test_splits_with_steps_of_128(make_case, accumulate) -> None:
    case = make_case(4, (20,), (1280,), 70)
    _assert_exact(case, accumulate, TileConfig(32, 64, 128, 4, 1, split_k=3))


def test_a_second_launch_is_the_same(make_case, accumulate) -> None:
    """Counters are zero again, slabs hold the first launch's sums."""
    case = make_case(4, (18,), (256,), 19)
    config = TileConfig(16, 16, 64, 4, 1, split_k=4)
    _assert_exact(case, accumulate, config)
    _assert_exact(case, accumulate, config)


# --- the oldest Triton --------------------------------------------------------------------------


def test_the_oldest_triton_agrees() -> None:
    """A handful of these tests in a process with the oldest supported version."""
    if not OLDEST.is_dir():
        pytest.skip(f"{OLDEST} is missing; run `make setup`")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is tested where there is no GPU")
    names = "test_identity or test_splits_with or (test_two_segments and 72 and k128)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", names],
        env=os.environ | {"PYTHONPATH": str(OLDEST)},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "6 passed" in done.stdout, done.stdout[-3000:]
