"""A packed UNet in diffusers' hands: moved, converted, offloaded, copied, compiled, restored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import ptq4adm
from ptq4adm.errors import BackendUnavailableError, ConfigError, UnknownBackendError
from ptq4adm.nn import HalfConv2d, QuantizedLayer, StorageLayer, find_step, fusion_report
from ptq4adm.nn.fusing import FusedBlock
from ptq4adm.packing.checkpoint import is_quantized, load_denoiser

Load = Callable[..., nn.Module]
Run = Callable[..., Tensor]


def _stored(unet: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, layer in unet.named_modules()
        if isinstance(layer, StorageLayer)
        for key, tensor in layer.state_dict().items()
    }


# --- dtype and device ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        lambda unet: unet.half(),
        lambda unet: unet.to(torch.float16),
        lambda unet: unet.to("cpu", torch.float16),
        lambda unet: unet.to(dtype=torch.float16),
    ],
    ids=["half", "to(dtype)", "to(device, dtype)", "to(dtype=)"],
)
def test_a_dtype_converts_what_is_float_and_leaves_the_packed_layers(
    load_packed: Load, run: Run, convert: Callable[[nn.Module], nn.Module]
) -> None:
    # diffusers' other quantizers refuse this; these layers keep their tensors' dtypes
    before = _stored(load_packed())
    unet = convert(load_packed())
    after = _stored(unet)
    assert unet.conv_norm_out.weight.dtype == torch.float16
    assert all(
        torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in after
    )
    half = load_packed(dtype=torch.float16)
    assert torch.equal(run(unet, dtype=torch.float16), run(half, dtype=torch.float16))
    assert unet.float().dtype == torch.float32


def test_a_device_takes_every_tensor_and_its_own_backend_along(load_packed: Load) -> None:
    # meta stands for a device that the compiled backend cannot run on
    unet = load_packed().to("meta")
    layers = [m for m in unet.modules() if isinstance(m, QuantizedLayer)]
    assert {layer.backend for layer in layers} == {"reference"}
    assert {b.device.type for m in unet.modules() for b in m.buffers()} == {"meta"}
    step = find_step(unet)
    assert step is not None
    assert step.index.device.type == "meta"
    assert {layer.step for layer in layers} == {step}
    assert {t.shape for t in _stored(unet).values()} == {
        t.shape for t in _stored(load_packed()).values()
    }


def test_the_backend_is_chosen_for_where_the_model_is_loaded(load_packed: Load, run: Run) -> None:
    expected = ptq4adm.nn.base.ops.resolve_backend("auto", "cpu")
    unet = load_packed()
    assert {m.backend for m in unet.modules() if isinstance(m, QuantizedLayer)} == {expected}
    fast = run(unet)
    report = ptq4adm.set_backend(unet, "reference")
    assert {m.backend for m in unet.modules() if isinstance(m, QuantizedLayer)} == {"reference"}
    assert report.to_dict() == fusion_report(unet).to_dict()
    torch.testing.assert_close(run(unet), fast, rtol=1e-3, atol=1e-3)
    ptq4adm.set_backend(unet, "auto")
    assert torch.equal(run(unet), fast)


@pytest.mark.parametrize(
    ("name", "error"), [("fpga", UnknownBackendError), ("cuda", BackendUnavailableError)]
)
def test_a_backend_that_cannot_run_changes_nothing(
    load_packed: Load, run: Run, name: str, error: type[Exception]
) -> None:
    unet = load_packed()
    expected = run(unet)
    with pytest.raises(error):
        ptq4adm.set_backend(unet, name)
    assert torch.equal(run(unet), expected)


def test_a_copy_is_a_model_of_its_own(load_packed: Load, run: Run, tmp_path: Path) -> None:
    unet = load_packed()
    twin = copy.deepcopy(unet)
    expected = run(twin)
    unet.dequantize()
    assert torch.equal(run(twin), expected)
    twin.save_pretrained(tmp_path)
    assert torch.equal(run(load_denoiser(tmp_path)), expected)


# --- offloading ----------------------------------------------------------------------------------


def test_whole_models_are_offloaded(load_packed: Load, run: Run) -> None:
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    unet = load_packed()
    expected = run(unet)
    _, hook = cpu_offload_with_hook(unet, torch.device("cpu"))
    assert torch.equal(run(unet), expected)
    hook.offload()
    assert torch.equal(run(unet), expected)
    # its hook is the root's: blocks go on running fused
    assert all(isinstance(b, FusedBlock) and not b.fusion.find_change() for b in _blocks(unet))
    remove_hook_from_module(unet)
    assert torch.equal(run(unet), expected)


def test_layer_by_layer_only_weights_in_the_stored_order_are_offloaded(
    load_packed: Load, run: Run
) -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    unet = load_packed()
    ptq4adm.set_backend(unet, "cpu")
    cpu_offload(unet, torch.device("cpu"), offload_buffers=True)
    # accelerate puts the state dict's tensor in the place of a panel order of another shape
    with pytest.raises(ValueError, match="qweight"):
        run(unet)
    unet = load_packed()
    ptq4adm.set_backend(unet, "reference")
    expected = run(unet)
    cpu_offload(unet, torch.device("cpu"), offload_buffers=True)
    torch.testing.assert_close(run(unet), expected, rtol=1e-2, atol=1e-2)
    remove_hook_from_module(unet, recurse=True)
    assert torch.equal(run(unet), expected)


def _blocks(unet: nn.Module) -> list[nn.Module]:
    names = [block.name for block in fusion_report(unet).blocks]
    return [unet.get_submodule(name) for name in names]


# --- dequantize ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dequantize_gives_an_ordinary_float_model(
    load_packed: Load, run: Run, tmp_path: Path, dtype: torch.dtype
) -> None:
    unet = load_packed(dtype=dtype)
    packed_result = run(unet, dtype=dtype).float()
    assert unet.dequantize() is unet
    assert not is_quantized(unet)
    assert {p.dtype for p in unet.parameters()} == {dtype}
    assert not any(isinstance(m, FusedBlock) for m in unet.modules())
    assert find_step(unet) is None
    assert not hasattr(unet, "hf_quantizer")
    assert "quantization_config" not in unet.config
    result = run(unet.float())
    assert (result - packed_result).norm() <= 0.1 * result.norm()
    # what is saved is a float folder like any other
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert not is_quantized(again)
    torch.testing.assert_close(run(again), result, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="not quantized"):
        ptq4adm.dequantize(unet)


def test_the_weights_are_what_the_integers_stand_for(load_packed: Load) -> None:
    unet = load_packed()
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, QuantizedLayer)}
    expected = {name: layer.float_weight() for name, layer in layers.items()}
    unet.dequantize()
    for name, weight in expected.items():
        found = unet.get_submodule(name).weight
        assert isinstance(found, nn.Parameter)
        assert torch.equal(found.reshape(weight.shape), weight)


def test_what_was_dequantized_can_be_quantized_again(load_packed: Load) -> None:
    unet = load_packed()
    unet.dequantize()
    config = ptq4adm.QuantConfig(activation="dynamic", weight_observer="absmax")
    ptq4adm.quantize(unet, config, progress=False)
    assert is_quantized(unet)
    assert isinstance(unet.conv_in, HalfConv2d)


# --- compile -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_it_compiles_to_one_graph_and_no_step_compiles_another(
    load_packed: Load, run: Run, backend: str
) -> None:
    import torch._dynamo

    unet = load_packed()
    ptq4adm.set_backend(unet, backend)
    timesteps = [999, 749, 0]
    expected = [run(unet, t) for t in timesteps]
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    results = [run(compiled, timesteps[0])]
    with torch._dynamo.config.patch(error_on_recompile=True):
        results += [run(compiled, t) for t in timesteps[1:]]
    # each step read its own scales: the graph holds no bucket
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert not torch.equal(expected[0], expected[1])
