"""Whole pipelines of diffusers: quantized by component, saved, loaded, offloaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AudioLDM2Pipeline, AudioLDMPipeline, PipelineQuantizationConfig
from tiny_audioldm2 import make_tiny_audioldm2
from torch import Tensor

import ptq4adm
from ptq4adm import PTQ4ADMConfig, QuantConfig
from ptq4adm.packing.checkpoint import is_quantized

FAST = {"weight_observer": "absmax"}


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny AudioLDM2 in float."""
    folder = tmp_path_factory.mktemp("pipelines") / "audioldm2"
    make_tiny_audioldm2(folder)
    return folder


@pytest.fixture(params=["AudioLDM", "AudioLDM2"])
def family(request: pytest.FixtureRequest, tiny_pipeline: Path, second: Path) -> tuple[Any, Path]:
    """Class and float folder."""
    if request.param == "AudioLDM":
        return AudioLDMPipeline, tiny_pipeline
    return AudioLDM2Pipeline, second


def _load(cls: Any, folder: Path, **arguments: Any) -> Any:
    # named: left alone, transformers takes the file's dtype, and diffusers float32
    arguments.setdefault("torch_dtype", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of them is deprecated
        pipe = cls.from_pretrained(folder, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sound(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    result: Tensor = pipe(
        "a dog barks", num_inference_steps=2, generator=generator, output_type="pt"
    ).audios
    return result


def test_a_mapping_quantizes_the_unet_of_a_pipeline(family: tuple[Any, Path]) -> None:
    cls, folder = family
    mapping = {"unet": PTQ4ADMConfig(**FAST)}
    pipe = _load(cls, folder, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping))
    assert is_quantized(pipe.unet)
    assert not is_quantized(pipe.vae)
    by_hand = _load(cls, folder)
    ptq4adm.quantize(by_hand, QuantConfig(activation="dynamic", **FAST), progress=False)
    assert torch.equal(_sound(pipe), _sound(by_hand))


def test_a_pipeline_is_saved_by_either_and_loaded_by_either(
    family: tuple[Any, Path], tmp_path: Path
) -> None:
    cls, folder = family
    pipe = _load(cls, folder)
    calibration = ptq4adm.calibrate(pipe, ["a dog barks"], steps=2, progress=False)
    ptq4adm.quantize(pipe, QuantConfig(**FAST), calibration, progress=False)
    pipe.save_pretrained(tmp_path / "theirs")
    ptq4adm.save_pipeline(pipe, tmp_path / "ours")
    expected = _sound(pipe)
    ours = []
    for name in ("theirs", "ours"):
        assert torch.equal(_sound(_load(cls, tmp_path / name)), expected)
        loaded = ptq4adm.load_pipeline(tmp_path / name)
        ours.append(loaded("a dog barks", steps=2, seed=1))
    assert torch.equal(*ours)


def test_a_pipeline_in_half_precision_keeps_its_scales(
    family: tuple[Any, Path], tmp_path: Path
) -> None:
    cls, folder = family
    pipe = _load(cls, folder)
    ptq4adm.quantize(pipe, QuantConfig(activation="dynamic", **FAST), progress=False)
    pipe.save_pretrained(tmp_path)
    half = _load(cls, tmp_path, torch_dtype=torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16
    scales = [m.w_scale for m in half.unet.modules() if hasattr(m, "w_scale")]
    assert {s.dtype for s in scales} == {torch.float32}
    pipe.to(torch.bfloat16)
    exact = [m.w_scale for m in pipe.unet.modules() if hasattr(m, "w_scale")]
    assert all(torch.equal(a, b) for a, b in zip(scales, exact, strict=True))


def test_a_pipeline_takes_no_other_class_of_config(tiny_pipeline: Path) -> None:
    with pytest.raises(ValueError, match="PipelineQuantizationConfig"):
        _load(AudioLDMPipeline, tiny_pipeline, quantization_config=PTQ4ADMConfig(**FAST))


def test_a_backend_for_all_components_is_refused_by_diffusers() -> None:
    # transformers has no such method: a mapping names the components
    with pytest.raises(ValueError, match="ptq4adm"):
        PipelineQuantizationConfig(quant_backend="ptq4adm", quant_kwargs=FAST)


def test_models_are_offloaded_one_by_one(second: Path) -> None:
    pipe = _load(AudioLDM2Pipeline, second)
    ptq4adm.quantize(pipe, QuantConfig(activation="dynamic", **FAST), progress=False)
    expected = _sound(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(_sound(pipe), expected)
    assert hasattr(pipe.unet, "_hf_hook")
    pipe.remove_all_hooks()
    assert torch.equal(_sound(pipe), expected)


def test_a_pipeline_moves_as_a_whole(family: tuple[Any, Path]) -> None:
    cls, folder = family
    pipe = _load(cls, folder)
    ptq4adm.quantize(pipe, QuantConfig(activation="dynamic", **FAST), progress=False)
    expected = _sound(pipe)
    assert torch.equal(_sound(pipe.to("cpu")), expected)
    pipe.unet.to("meta")
    assert {t.device.type for t in (*pipe.unet.parameters(), *pipe.unet.buffers())} == {"meta"}


def test_an_unknown_component_is_left_alone(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping: dict[str, PTQ4ADMConfig] = {"unet_2": PTQ4ADMConfig(**FAST)}
    quantize: Callable[..., Any] = lambda *_: pytest.fail("quantized")  # noqa: E731
    monkeypatch.setattr("ptq4adm.integrations.quantizer.quantize", quantize)
    config = PipelineQuantizationConfig(quant_mapping=mapping)
    assert not is_quantized(_load(AudioLDMPipeline, tiny_pipeline, quantization_config=config).unet)
