"""The pipeline against diffusers' own, and its promises on seeds, shapes and broken folders."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from ptq4adm.errors import (
    CheckpointError,
    ConfigError,
    MissingComponentError,
    NonFiniteError,
    PromptError,
    ShapeError,
)
from ptq4adm.models.audioldm import AudioLDM
from ptq4adm.models.components import COMPONENTS, load_component
from ptq4adm.models.noise import initial_noise
from ptq4adm.models.original import load_tokenizer
from ptq4adm.models.pipeline import TextToAudioPipeline

PROMPTS = ["a dog barks", "rain falls on a roof while a bell rings"]


@pytest.fixture(scope="module")
def pipe(tiny_pipeline: Path) -> TextToAudioPipeline:
    return AudioLDM.from_folder(tiny_pipeline)


@pytest.mark.parametrize("guidance", [1.0, 2.5], ids=["unguided", "guided"])
def test_agrees_with_diffusers(pipe: TextToAudioPipeline, guidance: float) -> None:
    from diffusers import AudioLDMPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AudioLDMPipeline(
            vae=pipe.vae,
            text_encoder=pipe.text_encoder,
            tokenizer=pipe.tokenizer,
            unet=pipe.unet,
            scheduler=pipe.scheduler,
            vocoder=pipe.vocoder,
        )
        theirs.set_progress_bar_config(disable=True)
        expected = theirs(
            PROMPTS,
            num_inference_steps=3,
            guidance_scale=guidance,
            latents=initial_noise(2, pipe.latent_shape(), seed=5),
            output_type="pt",
        ).audios
    got = pipe(PROMPTS, steps=3, guidance=guidance, seed=5)
    assert got.shape == expected.shape
    # diffusers pads the empty prompt to another length, which reorders float sums and no more
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_quantized_diffusers_pipeline_agrees_too(tiny_pipeline: Path) -> None:
    from diffusers import AudioLDMPipeline

    import ptq4adm

    ours = AudioLDM.from_folder(tiny_pipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AudioLDMPipeline(**{name: getattr(ours, name) for name in COMPONENTS})
    theirs.set_progress_bar_config(disable=True)
    calibration = ptq4adm.calibrate(theirs, PROMPTS, steps=2, buckets=2, progress=False)
    config = ptq4adm.QuantConfig(scheme="w8a8", backend="reference", activation_observer="absmax")
    ptq4adm.quantize(theirs, config, calibration, progress=False)
    noise = initial_noise(2, ours.latent_shape(), seed=5)
    expected = theirs(PROMPTS, num_inference_steps=2, latents=noise, output_type="pt").audios
    got = ours(PROMPTS, steps=2, guidance=2.5, seed=5)
    # one rounding step of an activation may differ where float sums are ordered differently
    assert (got - expected).abs().max() <= 1e-2 * expected.abs().max()


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(pipe: TextToAudioPipeline) -> None:
    together = pipe.denoise(pipe.encode_prompts(PROMPTS), steps=2, seed=7)
    alone = pipe.denoise(pipe.encode_prompts(PROMPTS[1]), steps=2, seed=8)
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)


def test_projections_are_computed_before_the_loop(
    pipe: TextToAudioPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.nn.Module] = []
    projections = [m for n, m in pipe.unet.named_modules() if n.endswith("time_emb_proj")]
    linear = torch.nn.Linear.forward

    def count(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        calls.extend(p for p in projections if p is layer)
        return linear(layer, x)

    embeds = pipe.encode_prompts(PROMPTS)
    monkeypatch.setattr(torch.nn.Linear, "forward", count)
    counts = []
    for steps in (1, 4):
        calls.clear()
        pipe.denoise(embeds, steps=steps, seed=7)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_a_denoiser_of_another_class_computes_every_step_itself(pipe: TextToAudioPipeline) -> None:
    class Wrapped(torch.nn.Module):
        """As compilation wraps a model: its attributes, but not its class."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.config = inner, inner.config

        def forward(self, *args: object, **kwargs: object) -> object:
            return self.inner(*args, **kwargs)

    embeds = pipe.encode_prompts(PROMPTS)
    kept = pipe.denoise(embeds, steps=3, seed=7)
    plain = copy.copy(pipe)
    plain.unet = Wrapped(pipe.unet)
    computed = plain.denoise(embeds, steps=3, seed=7)
    assert (kept - computed).norm() <= 1e-4 * computed.norm()


def test_same_seed_gives_the_same_waveform_and_another_seed_does_not(
    pipe: TextToAudioPipeline,
) -> None:
    first, again, other = (pipe(PROMPTS[0], steps=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_length_of_a_clip_follows_the_config_and_the_wish(pipe: TextToAudioPipeline) -> None:
    assert pipe.sampling_rate == 16000
    assert pipe.seconds == pytest.approx(0.64)
    assert pipe(PROMPTS[0], steps=1).shape == (1, 10240)
    # 0.3 s are 30 frames: rounded up to 4 latent rows, and the waveform is cut back
    assert pipe.latent_shape(0.3) == (8, 4, 8)
    assert pipe(PROMPTS[0], steps=1, seconds=0.3).shape == (1, 4800)


def test_a_factor_4_vae_gives_the_published_latents(tiny_pipeline: Path) -> None:
    from diffusers import AutoencoderKL

    from ptq4adm.models import real_unet

    pipe = AudioLDM.from_folder(tiny_pipeline)
    pipe.unet = real_unet("audioldm-s", device="meta")
    pipe.vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=8,
        norm_num_groups=8,
    )
    assert pipe.seconds == pytest.approx(5.12)
    assert pipe.latent_shape(10.24) == (8, 256, 16)
    assert pipe.decode(torch.zeros(1, *pipe.latent_shape(1.0))).shape == (1, 16000)


def test_decode_mel_has_a_row_a_frame(pipe: TextToAudioPipeline) -> None:
    mel = pipe.decode_mel(torch.zeros(2, *pipe.latent_shape()))
    assert mel.shape == (2, 64, 64)
    assert mel.dtype == torch.float32


def test_callback_sees_every_step(pipe: TextToAudioPipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipe.denoise(
        pipe.encode_prompts(PROMPTS), steps=4, callback=lambda i, t, _: seen.append((i, t))
    )
    assert seen == [(0, 999), (1, 749), (2, 499), (3, 249)]


def test_saved_components_load_bit_equal_and_in_diffusers(
    pipe: TextToAudioPipeline, tiny_pipeline: Path, tmp_path: Path
) -> None:
    pipe.save_components(tmp_path)
    again = AudioLDM.from_folder(tmp_path)
    assert torch.equal(again(PROMPTS, steps=2), pipe(PROMPTS, steps=2))
    assert again.defaults == pipe.defaults
    for name in ("unet/diffusion_pytorch_model.safetensors", "vocoder/model.safetensors"):
        # float16 in, float16 out, although the computation is float32
        assert (tmp_path / name).stat().st_size < 1.1 * (tiny_pipeline / name).stat().st_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import AudioLDMPipeline

        assert AudioLDMPipeline.from_pretrained(tmp_path).unet.config.sample_size == 8


@pytest.mark.parametrize("prompts", ["", "  ", [], ["a dog", ""], [3]])
def test_empty_prompts_are_refused(pipe: TextToAudioPipeline, prompts: object) -> None:
    with pytest.raises(PromptError, match="prompt"):
        pipe.encode_prompts(prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1001),
        ("guidance", float("nan")),
        ("guidance", -1.0),
        ("seed", -1),
        ("seconds", 0.0),
        ("seconds", float("inf")),
    ],
)
def test_values_out_of_range_are_refused_by_name(
    pipe: TextToAudioPipeline, name: str, value: float
) -> None:
    with pytest.raises(ConfigError, match=name):
        pipe.denoise(pipe.encode_prompts(PROMPTS), **{name: value})  # type: ignore[arg-type]


def test_latents_of_another_shape_are_refused(pipe: TextToAudioPipeline) -> None:
    with pytest.raises(ShapeError, match=r"expected \(2, 8, 8, 8\), got \(1, 8, 8, 8\)"):
        pipe.denoise(pipe.encode_prompts(PROMPTS), steps=1, latents=torch.zeros(1, 8, 8, 8))


def test_nan_in_the_unet_is_reported(tiny_pipeline: Path) -> None:
    pipe = AudioLDM.from_folder(tiny_pipeline)
    pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN"):
        pipe(PROMPTS, steps=1)


def test_a_long_prompt_is_cut_with_a_warning(
    pipe: TextToAudioPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    pipe.encode_prompts("bell " * 50)
    assert "prompt cut to 48 tokens" in caplog.text


@pytest.mark.parametrize("name", ["vae", "text_encoder", "tokenizer", "scheduler", "vocoder"])
def test_a_missing_component_is_named(tiny_pipeline: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    shutil.rmtree(folder / name)
    with pytest.raises(MissingComponentError, match=f"'{name}' is missing"):
        AudioLDM.from_folder(folder)


def test_a_missing_folder_index_entry_or_weights_file_is_named(
    tiny_pipeline: Path, tmp_path: Path
) -> None:
    with pytest.raises(MissingComponentError, match="no such folder"):
        AudioLDM.from_folder(tmp_path / "nowhere")
    with pytest.raises(MissingComponentError, match=r"no model_index\.json"):
        AudioLDM.from_folder(tmp_path)
    folder = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(MissingComponentError, match="'vae' has no weights"):
        AudioLDM.from_folder(folder)
    index = json.loads((folder / "model_index.json").read_text())
    del index["vocoder"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(MissingComponentError, match="names no vocoder"):
        AudioLDM.from_folder(folder)


def test_broken_files_are_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    weights = folder / "vocoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot load SpeechT5HifiGan"):
        AudioLDM.from_folder(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        AudioLDM.from_folder(folder)


def test_weights_that_lack_tensors_are_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.bias"):
        AudioLDM.from_folder(folder)


def test_a_model_folder_cannot_name_code_to_run(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["subprocess", "Popen"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="'subprocess'"):
        AudioLDM.from_folder(folder)


@pytest.mark.parametrize("is_component", [True, False], ids=["component", "published"])
def test_code_beside_a_tokenizer_is_refused_and_nobody_is_asked(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_component: bool
) -> None:
    # transformers asks on the terminal, and runs the folder's code after a "y"
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = shutil.copytree(tiny_pipeline / "tokenizer", tmp_path / "tokenizer")
    (folder / "code.py").write_text(
        f"open({str(tmp_path / 'marker')!r}, 'w').close()\n"
        "from transformers import RobertaTokenizerFast as Own\n"
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", "code.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

    def load() -> None:
        if is_component:
            entry = ["transformers", "AutoTokenizer"]
            load_component(tmp_path, "tokenizer", entry, torch.float32)
        else:
            load_tokenizer([folder], "a tokenizer")

    with pytest.raises(CheckpointError, match="custom code"):
        load()
    assert not (tmp_path / "marker").exists()
