"""AudioLDM2 against diffusers' live pipeline: two texts, batches, calibration, packed folders."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AudioLDM2Pipeline
from tiny_audioldm2 import GPT, T5, make_tiny_audioldm2, tiny_audioldm2_unet
from torch import Tensor

import ptq4adm
from ptq4adm.errors import MissingComponentError
from ptq4adm.models import AudioLDM2, UNet2DAdapter, find_adapter
from ptq4adm.models.noise import initial_noise
from ptq4adm.nn import fusion_report, prepared
from ptq4adm.packing.checkpoint import load_denoiser, save_denoiser

PROMPTS = ["a dog barks", "rain falls"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "audioldm2"
    make_tiny_audioldm2(path)
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> AudioLDM2:
    pipe = ptq4adm.load_pipeline(folder)
    assert isinstance(pipe, AudioLDM2)
    return pipe


def _theirs(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = AudioLDM2Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((got - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("guidance", [1.0, 3.5], ids=["unguided", "guided"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_alone_agrees_with_diffusers(
    ours: AudioLDM2, folder: Path, prompt: str, guidance: float
) -> None:
    expected = _theirs(folder)(
        prompt,
        num_inference_steps=3,
        guidance_scale=guidance,
        latents=initial_noise(1, ours.latent_shape(), seed=5),
        output_type="pt",
    ).audios
    got = ours(prompt, steps=3, guidance=guidance, seed=5)
    assert got.shape == expected.shape
    assert _close(got, expected, 1e-5)


def test_its_defaults_are_those_of_diffusers(ours: AudioLDM2) -> None:
    assert (ours.defaults.steps, ours.defaults.guidance) == (200, 3.5)


def test_the_conditioning_has_two_texts_and_one_mask(ours: AudioLDM2) -> None:
    given = ours.encode_prompts(PROMPTS).tensors
    lengths = [len(ids) for ids in ours.tokenizer_2(PROMPTS)["input_ids"]]
    assert lengths[0] != lengths[1]
    assert given["encoder_hidden_states"].shape == (2, 8, GPT)
    assert given["encoder_hidden_states_1"].shape == (2, max(lengths), T5)
    assert given["encoder_attention_mask_1"].sum(dim=1).tolist() == lengths


@pytest.mark.parametrize("guidance", [1.0, 3.5], ids=["unguided", "guided"])
def test_a_sample_depends_on_its_prompt_and_seed_and_not_on_its_batch(
    ours: AudioLDM2, guidance: float
) -> None:
    together = ours.denoise(ours.encode_prompts(PROMPTS), steps=2, guidance=guidance, seed=7)
    for i, prompt in enumerate(PROMPTS):
        alone = ours.denoise(ours.encode_prompts(prompt), steps=2, guidance=guidance, seed=7 + i)
        assert _close(together[i : i + 1], alone, 1e-4)


def test_the_mask_hides_what_is_padded(ours: AudioLDM2) -> None:
    given = ours.encode_prompts(PROMPTS)
    noisy = {name: tensor.clone() for name, tensor in given.tensors.items()}
    hidden = noisy["encoder_attention_mask_1"] == 0
    assert bool(hidden.any())
    noisy["encoder_hidden_states_1"][hidden] = 1e3
    other = type(given)(noisy)
    a, b = (ours.denoise(c, steps=1, guidance=1.0, seed=1) for c in (given, other))
    assert _close(a, b, 1e-5)


# --- quantization --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Any:
    """diffusers' pipeline, calibrated and packed in place."""
    pipe = _theirs(folder)
    calibration = ptq4adm.calibrate(pipe, PROMPTS, steps=2, progress=False)
    # both halves of the batch, both texts: every layer was seen at every step
    seen = calibration.records
    assert all(calibration.is_recorded(name) for name in seen)
    config = ptq4adm.QuantConfig(weight_observer="absmax")
    ptq4adm.quantize(pipe, config, calibration, progress=False)
    return pipe


def test_calibration_is_the_same_through_either_pipeline(folder: Path, ours: AudioLDM2) -> None:
    first, second = (
        ptq4adm.calibrate(pipe, PROMPTS, steps=1, progress=False)
        for pipe in (ours, _theirs(folder))
    )
    assert first.digest() == second.digest()


def test_every_block_is_fused(quantized: Any) -> None:
    count = fusion_report(quantized.unet).count()
    assert count["all"] > 0
    assert count["some"] == count["none"] == 0


def test_it_stays_close_to_the_float_model(ours: AudioLDM2, quantized: Any) -> None:
    packed = find_adapter(quantized).as_pipeline(quantized)  # type: ignore[attr-defined]
    given = ours.encode_prompts(PROMPTS)
    expected = ours.denoise(given, steps=2, seed=3)
    got = packed.denoise(given, steps=2, seed=3)
    assert not torch.equal(got, expected)
    assert _close(got, expected, 0.2)


def test_a_packed_folder_is_read_by_either_bit_equal(quantized: Any, tmp_path: Path) -> None:
    ptq4adm.save_pipeline(quantized, tmp_path / "out")
    theirs, ours = _theirs(tmp_path / "out"), ptq4adm.load_pipeline(tmp_path / "out")
    noise = initial_noise(1, ours.latent_shape(), seed=2)
    results = [
        pipe(PROMPTS[0], num_inference_steps=2, latents=noise, output_type="latent").audios
        for pipe in (quantized, theirs)
    ]
    assert torch.equal(*results)
    assert torch.equal(ours.denoise(ours.encode_prompts(PROMPTS[0]), steps=2, seed=2), results[0])
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "AudioLDM2Pipeline"


def test_a_bare_unet_is_packed_too(tmp_path: Path) -> None:
    unet = tiny_audioldm2_unet().eval()
    assert isinstance(find_adapter(unet), UNet2DAdapter)
    config = ptq4adm.QuantConfig(activation="dynamic", weight_observer="absmax")
    plan = ptq4adm.quantize(unet, config, progress=False)
    schemes = {row.name: row.scheme for row in plan.rows}
    assert schemes["conv_in"] == schemes["conv_out"] == "float"
    assert schemes["time_embedding.linear_1"] == "w8"
    shortcuts = {row.name: row.segments for row in plan.rows if row.segments}
    assert shortcuts
    assert all(name.endswith("conv_shortcut") for name in shortcuts)
    save_denoiser(unet, tmp_path)
    again = load_denoiser(tmp_path)
    assert torch.equal(_call(again), _call(unet))


# --- constant work leaves the loop ---------------------------------------------------------------


def _conditions() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "encoder_hidden_states": torch.randn(2, 8, GPT, generator=generator),
        "encoder_hidden_states_1": torch.randn(2, 5, T5, generator=generator),
    }


def _call(unet: Any, timestep: int = 300, conditions: dict[str, Tensor] | None = None) -> Tensor:
    sample = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        result: Tensor = unet(
            sample,
            torch.tensor(timestep),
            **(conditions or _conditions()),
            encoder_attention_mask_1=mask,
        ).sample
    return result


@pytest.mark.parametrize("is_packed", [False, True], ids=["float", "packed"])
def test_keys_and_values_of_both_texts_are_computed_once(is_packed: bool) -> None:
    unet: Any = tiny_audioldm2_unet().eval()
    if is_packed:
        config = ptq4adm.QuantConfig(activation="dynamic", weight_observer="absmax")
        ptq4adm.quantize(unet, config, progress=False)
    conditions, timesteps = _conditions(), torch.tensor([700, 300])
    expected = [_call(unet, int(t), conditions) for t in timesteps]
    wide = [
        m.to_k
        for m in unet.modules()
        if getattr(m, "is_cross_attention", False) and m.to_k.in_features in (GPT, T5)
    ]
    assert len({layer.in_features for layer in wide}) == 2
    with prepared(unet, timesteps, **conditions):
        assert all("forward" in layer.__dict__ for layer in wide)
        seen: list[object] = []
        with pytest.MonkeyPatch.context() as patch:
            for cls in {type(layer) for layer in wide}:
                # fused blocks multiply without calling the module
                name = "matmul" if is_packed else "forward"
                method = getattr(cls, name)

                def count(layer: Any, *args: Any, method: Any = method, **keywords: Any) -> Any:
                    seen.extend(item for item in wide if item is layer)
                    return method(layer, *args, **keywords)

                patch.setattr(cls, name, count)
            got = [_call(unet, int(t), conditions) for t in timesteps]
            assert seen == []
            _call(unet, 300, {name: tensor + 1 for name, tensor in conditions.items()})
            assert len(seen) == len(wide)
        for result, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)
        # another text is computed as if nothing were prepared
        other = {**conditions, "encoder_hidden_states_1": torch.randn(2, 5, T5)}
        inside = _call(unet, 300, other)
    torch.testing.assert_close(inside, _call(unet, 300, other), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(inside, expected[1])


# --- what is missing -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["language_model", "projection_model", "tokenizer_2"])
def test_a_missing_component_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / name)
    with pytest.raises(MissingComponentError, match=f"'{name}' is missing"):
        ptq4adm.load_pipeline(copy)
    index = json.loads((copy / "model_index.json").read_text())
    del index[name]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(MissingComponentError, match=f"names no {name}"):
        ptq4adm.load_pipeline(copy)


def test_a_pipeline_that_lacks_one_is_refused(ours: AudioLDM2) -> None:
    class Partial:
        unet = ours.unet
        vae = ours.vae

    with pytest.raises(MissingComponentError, match="language_model"):
        find_adapter(Partial())
