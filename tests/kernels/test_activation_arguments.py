"""What the quantizing operators of the triton backend accept, refuse, and say by a NaN scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4adm.errors import BackendUnavailableError, ConfigError, DtypeError, ShapeError
from ptq4adm.ops import reference, triton_activation, triton_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
STATIC = {
    "measured": {},
    "static": {"x_scale": torch.tensor(0.021, device=DEVICE)},
    "table": {
        "x_scale": torch.tensor([9.0, 0.017, 7.0], device=DEVICE),
        "step": torch.tensor([1], device=DEVICE),
    },
}


def _calls(x: Tensor) -> dict:
    """Each operator on x [6, 40], as a function of the scale's keywords."""
    x = x.to(DEVICE)
    image = x.reshape(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    ones, zeros = torch.ones(40, device=DEVICE), torch.zeros(40, device=DEVICE)
    return {
        "quantize_int8": lambda **k: triton_activation.quantize_int8(x, **k),
        "groupnorm_silu_quantize": lambda **k: triton_activation.groupnorm_silu_quantize(
            image, 4, ones[:8], zeros[:8], EPS, **k
        ),
        "layernorm_quantize": lambda **k: triton_activation.layernorm_quantize(
            x, ones, zeros, EPS, **k
        ),
        "geglu_quantize": lambda **k: triton_activation.geglu_quantize(x, **k),
    }


OPERATORS = tuple(_calls(torch.zeros(6, 40)))


@pytest.mark.parametrize("operator", OPERATORS)
def test_step_outside_the_table_gives_a_scale_of_nan(operator) -> None:
    call = _calls(torch.randn(6, 40))[operator]
    table = torch.tensor([0.1, 0.2, 0.3], device=DEVICE)
    for step in (3, -1, 2**40, -(2**40)):
        assert call(x_scale=table, step=torch.tensor(step, device=DEVICE))[1].isnan()
    for step in (torch.tensor(2, device=DEVICE), torch.tensor([2], device=DEVICE)):
        _, scale = call(x_scale=table, step=step)
        assert scale == table[2]
        assert scale.shape == ()
    # one scale serves every step
    assert call(x_scale=table[:1], step=torch.tensor(99, device=DEVICE))[1] == table[0]
    strided = torch.stack([table, table + 9], dim=1)[:, 0]
    assert call(x_scale=strided, step=torch.tensor(1, device=DEVICE))[1] == table[1]


@pytest.mark.parametrize("operator", OPERATORS)
def test_scale_is_a_new_tensor(operator) -> None:
    table = torch.tensor([0.1, 0.2], device=DEVICE)
    call = _calls(torch.randn(6, 40))[operator]
    for keywords in (
        {"x_scale": table[:1]},
        {"x_scale": table, "step": torch.tensor(0).to(DEVICE)},
    ):
        _, scale = call(**keywords)
        assert scale == table[0]
        scale.zero_()
        assert table[0] == torch.tensor(0.1)


@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_is_read_by_the_host(operator, monkeypatch) -> None:
    """A CUDA graph is captured from these calls: what synchronizes would end the capture."""
    call = _calls(torch.randn(6, 40))[operator]

    def refuse(*_: object) -> None:
        raise AssertionError("the host reads a tensor")

    with monkeypatch.context() as patch:
        # the interpreter reads tensors itself, so launches are left out here
        for module in ("quantize", "geglu", "layernorm", "groupnorm", "group_statistics"):
            patch.setattr(f"ptq4adm.kernels.{module}.launch", lambda *_, **__: None)
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu"):
            patch.setattr(Tensor, name, refuse)
        for keywords in STATIC.values():
            call(**keywords)


@pytest.mark.parametrize("operator", OPERATORS)
def test_wrong_scales_are_refused(operator) -> None:
    call = _calls(torch.randn(6, 40))[operator]
    with pytest.raises(DtypeError, match=r"x_scale: expected torch\.float32, got torch\.float64"):
        call(x_scale=torch.tensor(0.1, dtype=torch.float64, device=DEVICE))
    with pytest.raises(ShapeError, match=r"x_scale \[2\]: expected one scale"):
        call(x_scale=torch.ones(2, device=DEVICE))
    with pytest.raises(ShapeError, match=r"x_scale \[2, 2\]: expected one scale"):
        call(x_scale=torch.ones(2, 2, device=DEVICE), step=torch.tensor(1, device=DEVICE))
    with pytest.raises(DtypeError, match=r"step: expected torch\.int64, got torch\.int32"):
        call(x_scale=torch.ones(2, device=DEVICE), step=torch.tensor(1).int().to(DEVICE))
    with pytest.raises(BackendUnavailableError, match=r"was given tensors on .* and meta"):
        call(x_scale=torch.ones(3, device="meta"), step=torch.tensor(1, device=DEVICE))
    with pytest.raises(BackendUnavailableError, match=r"was given tensors on .* and meta"):
        call(x_scale=torch.ones(3, device=DEVICE), step=torch.tensor(1, device="meta"))


def test_wrong_tensors_are_refused() -> None:
    x = torch.randn(2, 8, 3, 5, device=DEVICE)
    one = {size: torch.ones(size, device=DEVICE) for size in (5, 7, 8, 9)}
    with pytest.raises(ShapeError, match=r"weight \[7\]: expected \[8\]"):
        triton_activation.groupnorm_silu_quantize(x, 4, one[7], one[8], EPS)
    with pytest.raises(ShapeError, match="expected NCHW with C a multiple of 3"):
        triton_activation.groupnorm_silu_quantize(x, 3, one[8], one[8], EPS)
    with pytest.raises(ConfigError, match="num_groups = 0: expected at least 1"):
        triton_activation.groupnorm_silu_quantize(x, 0, one[8], one[8], EPS)
    with pytest.raises(ShapeError, match=r"bias \[9\]: expected \[5\]"):
        triton_activation.layernorm_quantize(x, one[5], one[9], EPS)
    with pytest.raises(ShapeError, match=r"x \[8, 3, 5\]: expected \[M, 2 K\]"):
        triton_activation.geglu_quantize(x[0])
    with pytest.raises(ShapeError, match=r"x \[5, 5\]: expected \[M, 2 K\]"):
        triton_activation.geglu_quantize(torch.zeros(5, 5, device=DEVICE))
    with pytest.raises(ConfigError, match="granularity 'channel': expected one of"):
        triton_activation.quantize_int8(x, granularity="channel")
    with pytest.raises(ShapeError, match="x has no dimension, so no rows"):
        triton_activation.quantize_int8(torch.tensor(1.0, device=DEVICE), granularity="row")


def test_tensors_on_other_devices_are_refused() -> None:
    x, meta = torch.randn(2, 5, device=DEVICE), torch.ones(5, device="meta")
    with pytest.raises(BackendUnavailableError, match=r"'triton' was given tensors on .* and meta"):
        triton_activation.layernorm_quantize(x, meta, torch.ones(5, device=DEVICE), EPS)
    with pytest.raises(BackendUnavailableError, match="backend 'triton' is not available: "):
        triton_activation.quantize_int8(meta)
    with pytest.raises(BackendUnavailableError, match="backend 'triton' is not available: "):
        triton_attention.attention(*(torch.ones(1, 2, 8, device="meta"),) * 3, heads=2)


@pytest.mark.parametrize("scale", STATIC)
def test_empty_input_gives_an_empty_result_and_a_scale(scale) -> None:
    one = torch.ones(8, device=DEVICE)
    keywords = STATIC[scale]

    def empty(*shape: int) -> Tensor:
        return torch.zeros(shape, device=DEVICE)

    calls = {
        "groupnorm_silu_quantize": [
            (empty(0, 8, 3, 5), 4, one, one, EPS), (empty(2, 8, 0, 5), 4, one, one, EPS),
        ],
        "layernorm_quantize": [(empty(0, 8), one, one, EPS), (empty(3, 0), one[:0], one[:0], EPS)],
        "geglu_quantize": [(empty(0, 8),), (empty(3, 0),)],
        "quantize_int8": [(empty(0, 8),), (empty(3, 0),)],
    }  # fmt: skip
    for operator, several in calls.items():
        for arguments in several:
            x_q, step = getattr(triton_activation, operator)(*arguments, **keywords)
            expected, expected_step = getattr(reference, operator)(*arguments, **keywords)
            assert x_q.shape == expected.shape
            assert torch.equal(step, expected_step), (operator, arguments[0].shape)


def test_attention_is_the_reference() -> None:
    q, k, v = (torch.randn(2, n, 32, device=DEVICE) for n in (5, 7, 7))
    bias = torch.randn(2, 7, device=DEVICE)
    got = triton_attention.attention(q, k, v, 4, bias=bias, scale=0.3)
    scores = torch.einsum(
        "bqhc,bkhc->bhqk",
        q.double().unflatten(2, (4, 8)),
        k.double().unflatten(2, (4, 8)),
    )
    weights = (0.3 * scores + bias.double()[:, None, None]).softmax(-1)
    exact = torch.einsum("bhqk,bkhc->bqhc", weights, v.double().unflatten(2, (4, 8))).flatten(2)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match="split into 3 heads"):
        triton_attention.attention(q, k, v, 3)
