"""The activation kernels of the triton backend against the reference.

`quantize_int8` is equal bit for bit. Norms and gates fused with quantization: a measured scale
within 1e-5, the integers within one step and equal on 99.9 % of elements. Without a GPU the kernels
run in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ptq4adm.kernels import activation, group_statistics, groupnorm, launch
from ptq4adm.ops import reference, triton_activation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
# extremes overflow on purpose, and NumPy, which the interpreter computes with, tells
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SCALES = {
    "measured": {},
    "static": {"x_scale": torch.tensor(0.021)},
    "table": {"x_scale": torch.tensor([9.0, 0.017, 7.0]), "step": torch.tensor([1])},
}
# equal distances of rows, of columns, of nothing; sizes around a tile's and around a warp's
INPUTS = {
    "no dimension": lambda: torch.randn(()),
    "one element": lambda: torch.randn(1, 1),
    "odd": lambda: torch.randn(7, 61),
    "several tiles": lambda: torch.randn(5, 1333),
    "one less than a tile": lambda: torch.randn(1, 2047),
    "one more than a tile": lambda: torch.randn(1, 2049),
    "rows longer than registers": lambda: torch.randn(2, 8195),
    "four dimensions": lambda: torch.randn(2, 3, 5, 70),
    "zeros": lambda: torch.zeros(3, 40),
    "one outlier": lambda: torch.randn(9, 50).index_put(
        (torch.tensor(4), torch.tensor(49)), torch.tensor(1e6)
    ),
    "negative only": lambda: -torch.rand(5, 33),
    "tiny": lambda: torch.randn(4, 64) * 1e-12,
    "subnormal": lambda: torch.randn(4, 64) * 1e-40,
    "huge": lambda: torch.randn(4, 64).sign() * 3e38,
    "ties": lambda: torch.arange(-128, 128).float().reshape(4, 64) * 0.5,
    # the product with the rounded reciprocal and the quotient round to different integers
    "between the static steps": lambda: (torch.arange(-127, 127) + 0.5)[None] * 0.021,
    "between the table's steps": lambda: (torch.arange(-127, 127) + 0.5)[None] * 0.017,
    "rows apart": lambda: torch.randn(2, 5, 6, 20)[..., 3:14],
    "half the channels": lambda: torch.randn(2, 3, 4, 640)[..., 320:],
    "columns apart": lambda: torch.randn(9, 40)[:, ::3],
    "odd address": lambda: torch.randn(401)[1:].reshape(8, 50),
    "one column": lambda: torch.randn(7, 4)[:, 2:3],
    "expanded": lambda: torch.randn(1, 21).expand(4, 21),
    "not contiguous": lambda: torch.randn(2, 8, 5, 6).permute(0, 2, 3, 1),
    "no columns": lambda: torch.zeros(3, 0),
    "no rows": lambda: torch.zeros(0, 8),
}


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what is allocated with what no kernel writes, so that an element nobody wrote shows.

    The largest int32 is what a maximum of partial results would keep.
    """
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        info = torch.iinfo(tensor.dtype)
        return tensor.fill_(info.min if tensor.dtype == torch.int8 else info.max)

    monkeypatch.setattr(triton_activation.torch, "empty", poisoned)


def _run(operator: str, x: Tensor, *arguments: object, **keywords: object) -> tuple[Tensor, Tensor]:
    """Run an operator of the backend where kernels run, and return its results on the CPU."""

    def move(value: object) -> object:
        return value.to(DEVICE) if isinstance(value, Tensor) else value

    x_q, scale = getattr(triton_activation, operator)(
        # a copy to a GPU keeps no gaps between rows
        x if DEVICE.type == "cpu" else x.to(DEVICE),
        *(move(value) for value in arguments),
        **{name: move(value) for name, value in keywords.items()},
    )
    return x_q.cpu(), scale.cpu()


def _check(operator: str, x: Tensor, *arguments: object, **keywords: object) -> None:
    """Compare with the reference: the promise of the module's docstring."""
    x_q, scale = _run(operator, x, *arguments, **keywords)
    expected, expected_scale = getattr(reference, operator)(x, *arguments, **keywords)
    assert x_q.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert x_q.shape == expected.shape
    assert scale.shape == expected_scale.shape
    assert x_q.is_contiguous()
    if keywords.get("x_scale") is None:
        torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    else:
        assert torch.equal(scale, expected_scale)
    difference = (x_q.int() - expected.int()).abs()
    assert int(difference.max()) <= 1, f"x_q: {int(difference.max())} steps from the reference"
    differing = int((difference > 0).sum())
    assert differing <= max(1e-3 * x_q.numel(), 1), f"{differing} of {x_q.numel()} differ"


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# --- quantization ---------------------------------------------------------------------------------


def _check_equal(x: Tensor, **keywords: object) -> None:
    got = _run("quantize_int8", x, **keywords)
    expected = reference.quantize_int8(x, **keywords)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert mine.is_contiguous()
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("name", "scale"),
    # what has no dimension has no rows
    [(n, s) for n in INPUTS for s in (*SCALES, "row") if (n, s) != ("no dimension", "row")],
)
def test_quantize_equals_reference_bit_for_bit(name, scale) -> None:
    _check_equal(INPUTS[name](), **SCALES.get(scale, {"granularity": "row"}))


@pytest.mark.parametrize("scale", [*SCALES, "row"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_equals_reference_in_every_dtype(dtype, scale) -> None:
    keywords = SCALES.get(scale, {"granularity": "row"})
    _check_equal((torch.randn(6, 48) * 3).to(dtype), **keywords)
    _check_equal((torch.randn(6, 97) * 3).to(dtype)[:, ::2], **keywords)


def test_quantize_reduces_more_maxima_than_there_are_lanes(monkeypatch) -> None:
    """Programs take several tiles, and the second launch several blocks of partial maxima."""
    monkeypatch.setattr(activation, "TILE", 16)
    monkeypatch.setattr("ptq4adm.kernels.quantize.PARTIALS", 7)
    monkeypatch.setattr(activation, "PARTIALS", 4)
    for position in (0, 111, 112, 499):
        x = torch.randn(500)
        x[position] = -9.0
        _check_equal(x)


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("position", [0, 40, 499])
def test_what_is_not_finite_shows_in_a_measured_scale(position, granularity, bad) -> None:
    x = torch.randn(5, 100)
    x.view(-1)[position] = bad
    _, scale = _run("quantize_int8", x, granularity=granularity)
    if granularity == "row":
        others = torch.arange(5) != position // 100
        assert torch.equal(scale[others], reference.quantize_int8(x[others], granularity="row")[1])
        scale = scale[position // 100]
    assert not math.isfinite(float(scale))
    assert math.isnan(float(scale)) == math.isnan(bad)


def test_the_reciprocal_is_rounded_before_the_product() -> None:
    """The inputs above tell the contract's formula from a division."""
    for name, scale in (("static", 0.021), ("table's", 0.017)):
        x = INPUTS[f"between the {name} steps"]()
        quotient = (x / torch.tensor(scale)).round().clamp(-127, 127)
        assert not torch.equal(reference.quantize_int8(x, x_scale=torch.tensor(scale))[0], quotient)


# --- group norm -----------------------------------------------------------------------------------

# B, C, H, W, groups
IMAGES = {
    "model": (2, 320, 4, 4, 32),
    "wide": (1, 1280, 5, 3, 32),
    "narrow": (2, 128, 3, 5, 32),
    "one channel a group": (3, 20, 5, 7, 20),
    "one group": (1, 33, 3, 3, 1),
    "two channels a group": (2, 10, 3, 3, 5),
    "groups of three": (2, 6, 1, 5, 2),
    "several chunks, the last ragged": (1, 36, 41, 31, 4),
    "a group wider than a tile": (1, 2100, 2, 3, 1),
    "groups that begin anywhere": (1, 777, 3, 2, 3),
    "one channel": (2, 1, 9, 4, 1),
    "one pixel": (2, 64, 1, 1, 8),
}


def _image(name: str, mean: float = 0.3) -> tuple[Tensor, int, Tensor, Tensor]:
    """x in channels-last memory, groups, weight and bias; some weights are negative."""
    batch, channels, height, width, groups = IMAGES[name]
    x = _channels_last(torch.randn(batch, channels, height, width) * 2 + mean)
    return x, groups, torch.randn(channels), torch.randn(channels)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", IMAGES)
def test_groupnorm(name, scale) -> None:
    _check("groupnorm_silu_quantize", *_image(name), EPS, **SCALES[scale])


@pytest.mark.parametrize("name", ["model", "several chunks, the last ragged"])
def test_groupnorm_without_silu(name) -> None:
    _check("groupnorm_silu_quantize", *_image(name), EPS, silu=False)
    _check("groupnorm_silu_quantize", *_image(name), EPS, silu=False, **SCALES["static"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_groupnorm_in_every_dtype(dtype) -> None:
    x, groups, weight, bias = _image("model")
    _check("groupnorm_silu_quantize", x.to(dtype), groups, weight.to(dtype), bias.to(dtype), EPS)
    _check("groupnorm_silu_quantize", x.to(dtype), groups, weight, bias.half(), EPS)


@pytest.mark.parametrize("name", ["model", "several chunks, the last ragged", "wide", "one group"])
@pytest.mark.parametrize("silu", [True, False])
def test_groupnorm_of_a_mean_far_above_the_deviation(name, silu) -> None:
    x, *rest = _image(name)
    x = _channels_last(torch.randn_like(x) + 1000)
    _check("groupnorm_silu_quantize", x, *rest, EPS, silu=silu)


def test_groupnorm_of_an_outlier_in_the_first_pixel() -> None:
    """The number that sums are taken relative to is then far from all others."""
    x, *rest = _image("several chunks, the last ragged")
    x[:, :, 0, 0] = 1e4
    _check("groupnorm_silu_quantize", x, *rest, EPS, x_scale=torch.tensor(0.004))


@pytest.mark.parametrize("value", [0.0, 3.25, 1e6])
def test_groupnorm_of_a_constant_is_the_bias(value) -> None:
    x, groups, weight, bias = _image("one channel a group")
    x.fill_(value)
    x_q, scale = _run("groupnorm_silu_quantize", x, groups, weight, bias, EPS, silu=False)
    expected, expected_scale = reference.quantize_int8(bias.expand(3, 5, 7, 20).contiguous())
    assert torch.equal(x_q, expected)
    assert torch.equal(scale, expected_scale)


def test_groupnorm_where_silu_has_nearly_nothing_left() -> None:
    x, groups, weight, bias = _image("model")
    weight.fill_(0.3)
    bias.fill_(-100.0)
    _check("groupnorm_silu_quantize", x, groups, weight, bias, EPS, x_scale=torch.tensor(0.01))


@pytest.fixture
def _plans_are_forgotten() -> Iterator[None]:
    """Plans are cached: what a test changes in them must end with it."""
    yield
    group_statistics.plan_statistics.cache_clear()
    groupnorm.plan_norm.cache_clear()


@pytest.mark.usefixtures("_plans_are_forgotten")
@pytest.mark.parametrize(("most_chunks", "most_programs", "tiles"), [(7, 53, 1), (3, 20, 3)])
def test_groupnorm_walks_through_tiles(monkeypatch, most_chunks, most_programs, tiles) -> None:
    """Programs of several tiles, as in large images: of 16 pixels, then of 2, of 105 in all."""
    monkeypatch.setattr(group_statistics, "_TILE", 32 * 16)
    monkeypatch.setattr(group_statistics, "_MOST_CHUNKS", most_chunks)
    monkeypatch.setattr(groupnorm, "TILE", 128 * 2)
    monkeypatch.setattr(groupnorm, "PARTIALS", most_programs)
    group_statistics.plan_statistics.cache_clear()
    groupnorm.plan_norm.cache_clear()
    x, weight, bias = _channels_last(torch.randn(1, 128, 7, 15) + 5), *torch.randn(2, 128)
    for keywords in (SCALES["measured"], SCALES["table"]):
        _check("groupnorm_silu_quantize", x, 4, weight, bias, EPS, **keywords)
    multiprocessors = launch.multiprocessors(DEVICE)
    chunk = group_statistics.plan_statistics(1, 105, 128, 4, multiprocessors)
    norm = groupnorm.plan_norm(1, 105, 128, 4, multiprocessors)
    assert chunk.chunk_pixels == tiles * 16
    assert norm.program_pixels == tiles * 2


LAYOUTS = {
    "NCHW": lambda x: x.contiguous(),
    "slice of channels": lambda x: _channels_last(
        torch.cat([torch.randn(2, 5, 3, 7), x, x], dim=1)
    )[:, 5:25],
    "slice of rows": lambda x: _channels_last(torch.nn.functional.pad(x, (0, 0, 1, 2)))[:, :, 1:-2],
    "slice of columns": lambda x: _channels_last(torch.nn.functional.pad(x, (1, 2)))[..., 1:-2],
    "every other sample": lambda x: _channels_last(x.repeat_interleave(2, dim=0))[::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groupnorm_of_every_memory_order_is_the_same(layout) -> None:
    plain = _channels_last(torch.randn(2, 20, 3, 7))
    weight, bias = torch.randn(20), torch.randn(20)
    x = LAYOUTS[layout](plain)
    assert torch.equal(x, plain)
    expected = _run("groupnorm_silu_quantize", plain, 4, weight, bias, EPS)
    got = _run("groupnorm_silu_quantize", x, 4, weight, bias, EPS)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


# --- layer norm and gate --------------------------------------------------------------------------

ROWS = [(1, 1), (5, 3), (7, 61), (9, 320), (2, 1280), (2, 8195), (70, 96)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", ROWS)
def test_layernorm(shape, scale) -> None:
    x, weight, bias = torch.randn(shape) * 3 - 1, torch.randn(shape[1]), torch.randn(shape[1])
    _check("layernorm_quantize", x, weight, bias, EPS, **SCALES[scale])


@pytest.mark.parametrize("shape", [(9, 320), (2, 8195)])
def test_layernorm_of_a_mean_far_above_the_deviation(shape) -> None:
    x, weight, bias = torch.randn(shape) + 1000, torch.randn(shape[1]), torch.randn(shape[1])
    _check("layernorm_quantize", x, weight, bias, EPS)
    _check("layernorm_quantize", x, weight, bias, EPS, **SCALES["static"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layernorm_in_every_dtype(dtype) -> None:
    x, weight, bias = (torch.randn(6, 40) * 3).to(dtype), torch.randn(40), torch.randn(40)
    _check("layernorm_quantize", x, weight.to(dtype), bias.to(dtype), EPS)
    _check("layernorm_quantize", x, weight, bias.half(), EPS)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", ROWS)
def test_geglu(shape, scale) -> None:
    _check("geglu_quantize", torch.randn(shape[0], 2 * shape[1]) * 3, **SCALES[scale])


@pytest.mark.parametrize("dtype", DTYPES)
def test_geglu_in_every_dtype(dtype) -> None:
    _check("geglu_quantize", (torch.randn(6, 96) * 3).to(dtype))


@pytest.mark.parametrize("gate", [-1e30, -30.0, -5.7, 0.0, 5.7, 30.0, 1e30])
def test_geglu_of_extreme_gates(gate) -> None:
    x = torch.cat([torch.randn(3, 40), torch.full((3, 40), gate)], dim=1)
    _check("geglu_quantize", x, x_scale=torch.tensor(0.01))


@pytest.mark.parametrize("operator", ["layernorm_quantize", "geglu_quantize"])
def test_rows_apart_are_read_in_place(operator) -> None:
    x = torch.randn(9, 100)[:, 7:47]
    assert triton_activation._as_rows(x).data_ptr() == x.data_ptr()
    arguments = (torch.randn(40), torch.randn(40), EPS) if operator[0] == "l" else ()
    got = _run(operator, x, *arguments)
    expected = _run(operator, x.contiguous(), *arguments)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("operator", ["layernorm_quantize", "geglu_quantize"])
def test_nan_in_a_row_shows_in_its_scale(operator) -> None:
    x = torch.randn(5, 96)
    x[3, 70] = float("nan")
    arguments = (torch.randn(96), torch.randn(96), EPS) if operator[0] == "l" else ()
    _, scale = _run(operator, x, *arguments)
    assert scale.isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("position", [0, 7, 1270])
def test_nan_in_a_pixel_shows_in_the_scale(position) -> None:
    x, *rest = _image("several chunks, the last ragged")
    x[0, 35].view(-1)[position] = float("nan")
    _, scale = _run("groupnorm_silu_quantize", x, *rest, EPS)
    assert scale.isnan()


# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [1, 64, 256, 1024, 4096, 4097, 10**6])
@pytest.mark.parametrize("channels", [1, 7, 128, 320, 384, 640, 960, 1280, 1920, 2560, 50000])
@pytest.mark.parametrize("multiprocessors", [1, 108, 132])
def test_plans_of_group_norms_cover_the_image(channels, pixels, multiprocessors) -> None:
    for batch, groups in ((1, 1), (2, 32), (2, channels)):
        if channels % groups:
            continue
        width = channels // groups
        chunk = group_statistics.plan_statistics(batch, pixels, channels, groups, multiprocessors)
        assert chunk.chunks <= 32
        assert (chunk.chunks - 1) * chunk.chunk_pixels < pixels
        assert chunk.chunks * chunk.chunk_pixels >= pixels
        assert chunk.pixels * chunk.channels <= 4096
        # a tile holds whole groups, or is part of one
        assert chunk.groups == 1 or chunk.groups * width <= chunk.channels
        norm = groupnorm.plan_norm(batch, pixels, channels, groups, multiprocessors)
        blocks = -(-channels // norm.channels)
        assert norm.grid == (batch * blocks, -(-pixels // norm.program_pixels))
        assert norm.grid[1] <= 1024
        assert norm.pixels * norm.channels <= 2048
        for first in range(0, channels, norm.channels):
            last = min(first + norm.channels, channels) - 1
            assert last // width - first // width < norm.groups


@pytest.mark.parametrize(("channels", "width"), [(128, 4), (320, 10), (640, 20), (1280, 40)])
def test_programs_of_statistics_begin_on_16_bytes(channels, width) -> None:
    chunk = group_statistics.plan_statistics(2, 1024, channels, channels // width, 108)
    assert chunk.groups * width * 2 % 16 == 0


@pytest.mark.parametrize("K", [1, 128, 320, 2560, 5120, 8192, 8193, 10**6])
@pytest.mark.parametrize("M", [0, 1, 3, 8192])
def test_plans_of_rows_fit_registers(M, K) -> None:
    tile = activation.plan_rows(M, K)
    assert tile.columns >= min(K, activation.LONGEST_ROW // 4)
    assert tile.rows * tile.columns <= 32 * 32 * tile.num_warps
    assert tile.num_warps in (1, 2, 4, 8)
    assert (tile.columns >= K) == (K <= activation.LONGEST_ROW)
