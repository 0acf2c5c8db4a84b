"""Float attention: every instruction set against softmax(q k^T * scale + bias) v in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4adm.errors import DtypeError, ShapeError
from ptq4adm.ops import attention, cpu_attention

# relative to the largest output: sums of up to 4096 float32 products, exponentials within 1e-7
TOLERANCE = 1e-5

# batch, queries, keys, heads, head_dim: tiles of 6 queries, panels of 16 to 64 keys, blocks of 512
# keys and 192 queries; one less, one more, odd, the models'
SIZES = [
    (1, 1, 1, 1, 1),
    (1, 7, 5, 1, 40),
    (2, 6, 64, 3, 16),
    (1, 5, 63, 2, 17),
    (1, 193, 65, 1, 33),
    (2, 64, 64, 8, 80),
    (1, 13, 511, 2, 48),
    (1, 13, 513, 2, 64),
    (1, 400, 1030, 1, 96),
    (1, 31, 77, 10, 64),
    (1, 3, 20, 1, 160),
]


@pytest.fixture(params=["scalar", "avx2", "avx512_vnni"])
def loops(request: pytest.FixtureRequest) -> str:
    """Every set of attention loops that this machine runs."""
    try:
        cpu_attention.attention(*(torch.zeros(1, 1, 1),) * 3, 1, isa=request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    return str(request.param)


def oracle(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    out = torch.empty(q.shape, dtype=torch.float64)
    width = q.shape[2] // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[..., part].double() @ k[..., part].double().transpose(1, 2) / width**0.5
        if bias is not None:
            scores = scores + bias.double()[:, None]
        out[..., part] = scores.softmax(-1) @ v[..., part].double()
    return out


def assert_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape
    error = float((got.double() - expected).abs().max() / expected.abs().max())
    assert error < tolerance, f"attention is off by {error:.1e} of its largest value"


def random_inputs(size: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, keys, heads, width = size
    shapes = [(batch, n, heads * width) for n in (queries, keys, keys)]
    q, k, v = (torch.randn(shape) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_oracle(loops: str, size: tuple[int, ...]) -> None:
    q, k, v = random_inputs(size)
    assert_close(cpu_attention.attention(q, k, v, size[3], isa=loops), oracle(q, k, v, size[3]))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_operator_equals_the_oracle(backend: str) -> None:
    q, k, v = random_inputs((2, 9, 21, 2, 24))
    bias = torch.randn(2, 21)
    got = attention(q, k, v, 2, bias=bias, backend=backend)
    assert_close(got, oracle(q, k, v, 2, bias))


def test_bias_hides_keys(loops: str) -> None:
    q, k, v = random_inputs((2, 10, 70, 2, 16))
    bias = torch.zeros(2, 70)
    bias[0, 30:] = -10000.0
    bias[1, :69] = -float("inf")
    got = cpu_attention.attention(q, k, v, 2, bias=bias, isa=loops)
    assert_close(got[:1], oracle(q[:1], k[:1, :30], v[:1, :30], 2))
    assert_close(got[1:], v[1:, 69:].double().expand(1, 10, 32))


def test_whole_blocks_of_hidden_keys_weigh_nothing(loops: str) -> None:
    """The first block of 512 keys has no largest score yet; later ones find everything hidden."""
    q, k, v = random_inputs((2, 7, 1600, 1, 16))
    bias = torch.full((2, 1600), -float("inf"))
    bias[0, 530:540] = 0.0
    bias[1, 1599] = -3.0
    got = cpu_attention.attention(q, k, v, 1, bias=bias, isa=loops)
    assert_close(got[:1], oracle(q[:1], k[:1, 530:540], v[:1, 530:540], 1))
    assert_close(got[1:], v[1:, 1599:].double().expand(1, 7, 16))


def test_queries_without_keys_get_what_the_reference_gives(loops: str) -> None:
    q, k, v = random_inputs((1, 3, 8, 1, 16))
    bias = torch.full((1, 8), -float("inf"))
    got = cpu_attention.attention(q, k, v, 1, bias=bias, isa=loops)
    assert torch.equal(got, attention(q, k, v, 1, bias=bias, backend="reference"))


# minus infinity in the bias is no error: it hides a key
BROKEN = [
    (which, value)
    for which in ("q", "k", "v", "bias")
    for value in (float("nan"), float("inf"), -float("inf"))
    if (which, value) != ("bias", -float("inf"))
]


@pytest.mark.parametrize(("which", "value"), BROKEN)
@pytest.mark.parametrize("keys", [5, 700])
def test_inputs_that_are_not_finite_do_not_look_finite(
    loops: str, which: str, value: float, keys: int
) -> None:
    q, k, v = random_inputs((1, 9, keys, 1, 16))
    bias = torch.zeros(1, keys)
    inputs = {"q": q, "k": k, "v": v, "bias": bias}
    inputs[which].view(-1)[3] = value
    got = cpu_attention.attention(q, k, v, 1, bias=bias, isa=loops)
    first = got[0, 0] if which == "q" else got
    assert not bool(torch.isfinite(first).all())
    if which == "q":
        assert bool(torch.isfinite(got[0, 1:]).all())


def test_large_scores_do_not_overflow(loops: str) -> None:
    q, k, v = random_inputs((1, 12, 600, 1, 32))
    q, k = q * 60, k * 60
    assert_close(cpu_attention.attention(q, k, v, 1, isa=loops), oracle(q, k, v, 1), 1e-3)


def test_the_largest_score_may_come_last(loops: str) -> None:
    """Every block of keys raises the running maximum, so earlier sums shrink."""
    q = torch.ones(1, 8, 16)
    k = torch.linspace(-40, 40, 1100)[None, :, None].expand(1, 1100, 16).contiguous()
    v = torch.randn(1, 1100, 16)
    assert_close(cpu_attention.attention(q, k, v, 1, isa=loops), oracle(q, k, v, 1), 1e-4)


def test_slices_of_wider_rows_are_read_in_place(loops: str) -> None:
    wide = torch.randn(2, 30, 3 * 40 + 1)
    q, k, v = (wide[..., i * 40 + 1 : (i + 1) * 40 + 1] for i in range(3))
    assert_close(cpu_attention.attention(q, k, v, 5, isa=loops), oracle(q, k, v, 5))


@pytest.mark.parametrize("threads", [2, 3])
def test_result_does_not_depend_on_threads(loops: str, threads: int) -> None:
    q, k, v = random_inputs((1, 800, 40, 1, 16))
    alone = cpu_attention.attention(q, k, v, 1, isa=loops)
    torch.set_num_threads(threads)
    assert torch.equal(cpu_attention.attention(q, k, v, 1, isa=loops), alone)


def test_half_precision_is_computed_in_float32() -> None:
    q, k, v = (x.half() for x in random_inputs((1, 20, 30, 2, 16)))
    got = attention(q, k, v, 2, backend="cpu")
    assert got.dtype == torch.float16
    assert_close(got, oracle(q, k, v, 2), 1e-3)


def test_no_samples_give_no_samples() -> None:
    q, k, v = torch.zeros(0, 4, 8), torch.zeros(0, 5, 8), torch.zeros(0, 5, 8)
    assert attention(q, k, v, 2, backend="cpu").shape == (0, 4, 8)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_wrong_tensors_are_refused(backend: str) -> None:
    q, k, v = random_inputs((2, 4, 5, 2, 8))
    with pytest.raises(ShapeError, match="expected at least one key and channels that split"):
        attention(q, k, v, 3, backend=backend)
    with pytest.raises(ShapeError, match="at least one key"):
        attention(q, k[:, :0], v[:, :0], 2, backend=backend)
    with pytest.raises(ShapeError, match="twice"):
        attention(q, k, v[:, 1:], 2, backend=backend)
    with pytest.raises(ShapeError, match=r"bias \[2, 4\]: expected \[2, 5\]"):
        attention(q, k, v, 2, bias=torch.zeros(2, 4), backend=backend)
    with pytest.raises(DtypeError, match=r"bias torch.bool: expected float"):
        attention(q, k, v, 2, bias=torch.ones(2, 5, dtype=torch.bool), backend=backend)
    with pytest.raises(DtypeError, match="expected one float dtype"):
        attention(q, k.half(), v, 2, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_operator_passes_opcheck(backend: str) -> None:
    q, k, v = random_inputs((1, 3, 4, 2, 8))
    torch.library.opcheck(torch.ops.ptq4adm.attention.default, (q, k, v, 2), {"backend": backend})
