"""TANGO's published folder: loaded and held against plain torch, quantized, refused when broken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import tango as original
from originals.tango import TINY_TANGO

import ptq4adm
from ptq4adm.errors import (
    CheckpointError,
    CheckpointShapeError,
    MissingComponentError,
    TruncatedCheckpointError,
    UnsafeCheckpointError,
    UnsupportedModelError,
)
from ptq4adm.models import Tango, tango_files
from ptq4adm.models.families import recognize
from ptq4adm.models.noise import draw_noise, noise_generators

PROMPTS = ["a dog barks", "rain falls on a roof while a bell rings"]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, never write into it."""
    folder = tmp_path_factory.mktemp("published") / "tango"
    original.write_tango(folder, TINY_TANGO)
    return folder


@pytest.fixture(scope="module")
def loaded(published: Path) -> Tango:
    """Never quantized."""
    pipe = ptq4adm.load_pipeline(published)
    assert isinstance(pipe, Tango)
    return pipe


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "copy")


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


# --- what it computes -----------------------------------------------------------------------------


def test_latents_and_sound_are_those_of_the_original(loaded: Tango, published: Path) -> None:
    steps, seed = 3, 5
    shape = loaded.latent_shape()
    assert shape == (8, 8, 16)
    assert loaded.seconds == pytest.approx(0.32)
    generators = noise_generators(2, seed)
    noise = [draw_noise(shape, generators) for _ in range(steps + 1)]
    tokens = loaded.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    assert int(tokens.attention_mask.sum(1)[0]) < tokens.input_ids.shape[1]  # one is padded
    main = torch.load(published / "pytorch_model_main.bin", weights_only=True)
    expected = original.denoise(
        main, TINY_TANGO, tokens.input_ids, tokens.attention_mask, noise, steps, guidance=3.0
    )
    latents = loaded.denoise(loaded.encode_prompts(PROMPTS), steps=steps, guidance=3.0, seed=seed)
    assert _error(latents, expected) < TOLERANCE
    first_stage = torch.load(published / "pytorch_model_vae.bin", weights_only=True)
    mel, wave = original.decode(first_stage, TINY_TANGO, expected)
    assert _error(loaded.decode_mel(expected), mel) < TOLERANCE
    assert _error(loaded.decode(expected), wave) < TOLERANCE


def test_the_first_stage_encodes_as_the_original(loaded: Tango, published: Path) -> None:
    from originals import vae

    weights = torch.load(published / "pytorch_model_vae.bin", weights_only=True)
    mel = torch.randn(1, 1, 32, 64)
    expected = vae.encode(weights, TINY_TANGO.vae, mel)
    assert _error(loaded.vae.encode(mel).latent_dist.mean, expected) < TOLERANCE


def test_the_schedule_is_the_published_one(loaded: Tango) -> None:
    assert (loaded.defaults.steps, loaded.defaults.guidance) == (200, 3.0)
    loaded.scheduler.set_timesteps(200)
    assert loaded.scheduler.timesteps[:2].tolist() == [996, 991]
    assert loaded.scheduler.timesteps[-1] == 1
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    betas = loaded.scheduler.betas
    assert (float(betas[0]), float(betas[-1])) == pytest.approx((0.00085, 0.012))


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(loaded: Tango) -> None:
    together = loaded.denoise(loaded.encode_prompts(PROMPTS), steps=4, seed=7)
    # alone, the first prompt is not padded, and its noise is the same at every step
    for i, prompt in enumerate(PROMPTS):
        alone = loaded.denoise(loaded.encode_prompts(prompt), steps=4, seed=7 + i)
        assert _error(together[i : i + 1], alone) < 1e-4
    other = loaded.denoise(loaded.encode_prompts(PROMPTS[0]), steps=4, seed=8)
    assert _error(together[:1], other) > 0.1


def test_the_noise_of_the_steps_is_the_same_whoever_gives_the_first(loaded: Tango) -> None:
    conditioning = loaded.encode_prompts(PROMPTS)
    noise = draw_noise(loaded.latent_shape(), noise_generators(2, 3))
    given = loaded.denoise(conditioning, steps=3, seed=3, latents=noise)
    assert torch.equal(given, loaded.denoise(conditioning, steps=3, seed=3))


def test_the_text_encoder_stays_float32_and_the_rest_follows(published: Path) -> None:
    pipe = ptq4adm.load_pipeline(published, dtype=torch.bfloat16)
    assert pipe.text_encoder.dtype == torch.float32
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.dtype == torch.bfloat16
    conditioning = pipe.encode_prompts(PROMPTS)
    assert conditioning.tensors["encoder_hidden_states"].dtype == torch.float32
    assert pipe(PROMPTS, steps=1).isfinite().all()


def test_keys_and_values_of_the_text_are_computed_once(
    loaded: Tango, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    layers = {m for n, m in loaded.unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))}
    linear = torch.nn.Linear.forward

    def count(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += layer in layers
        return linear(layer, x)

    conditioning = loaded.encode_prompts(PROMPTS)
    monkeypatch.setattr(torch.nn.Linear, "forward", count)
    loaded.denoise(conditioning, steps=3)
    assert calls == len(layers) == 8


def test_weights_stay_in_the_file(loaded: Tango) -> None:
    mapped = Path("/proc/self/maps").read_text()
    for module in (loaded.unet, loaded.text_encoder, loaded.vae):
        address = next(module.parameters()).data_ptr()
        (line,) = (row for row in mapped.splitlines() if _contains(row, address))
        assert line.endswith(".bin")
    words = loaded.text_encoder.shared.weight
    assert loaded.text_encoder.encoder.embed_tokens.weight is words


def _contains(row: str, address: int) -> bool:
    start, _, end = row.split()[0].partition("-")
    return int(start, 16) <= address < int(end, 16)


# --- quantized ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(published: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tango, Path]:
    """A quantized pipeline and the folder that it was saved to."""
    pipe: Any = ptq4adm.load_pipeline(published)
    calibration = ptq4adm.calibrate(pipe, PROMPTS, steps=4, buckets=2, progress=False)
    plan = ptq4adm.quantize(pipe, ptq4adm.QuantConfig(), calibration, progress=False)
    schemes = {row.name: row.scheme for row in plan.rows}
    text = [name for name in schemes if name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert {schemes[name] for name in text} == {"w8"}
    assert {schemes["conv_in"], schemes["conv_out"]} == {"float"}
    assert schemes["mid_block.attentions.0.transformer_blocks.0.attn2.to_q"] == "w4a8"
    out = tmp_path_factory.mktemp("quantized") / "tango"
    return pipe, ptq4adm.save_pipeline(pipe, out)


def test_it_stays_close_to_the_float_model(published: Path, quantized: tuple[Tango, Path]) -> None:
    pipe: Any = ptq4adm.load_pipeline(published)
    arguments = pipe.encode_prompts(PROMPTS).arguments
    latents, t = torch.randn(2, *pipe.latent_shape()), torch.tensor(501)
    expected = pipe.unet(latents, t, **arguments).sample
    # random weights in four bits: only breakage shows; in eight, everything else does
    four_bits = quantized[0].unet(latents, t, **arguments).sample
    assert 0.05 < _error(four_bits, expected) < 0.6
    calibration = ptq4adm.calibrate(pipe, PROMPTS, steps=4, buckets=2, progress=False)
    ptq4adm.quantize(pipe, ptq4adm.QuantConfig(scheme="w8a8"), calibration, progress=False)
    assert _error(pipe.unet(latents, t, **arguments).sample, expected) < 0.06


def test_every_block_is_fused(quantized: tuple[Tango, Path]) -> None:
    from ptq4adm.nn.fuse import fusion_report

    count = fusion_report(quantized[0].unet).count()
    assert count == {"all": 17, "some": 0, "none": 0}


def test_saved_and_loaded_it_gives_the_same_bits(quantized: tuple[Tango, Path]) -> None:
    pipe, folder = quantized
    found = recognize(folder)
    assert (found.pipeline_class, found.is_original) == (Tango, False)
    again: Any = ptq4adm.load_pipeline(folder)
    assert isinstance(again, Tango)
    assert again.defaults == pipe.defaults
    assert torch.equal(again(PROMPTS, steps=2, seed=4), pipe(PROMPTS, steps=2, seed=4))


def test_a_float_pipeline_is_saved_in_diffusers_layout(loaded: Tango, tmp_path: Path) -> None:
    folder = ptq4adm.save_pipeline(loaded, tmp_path / "out")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "TangoPipeline"
    again = ptq4adm.load_pipeline(folder)
    assert torch.equal(again(PROMPTS, steps=2), loaded(PROMPTS, steps=2))


def test_the_command_recognises_it(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ptq4adm.cli import main

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog barks\n")
    given = ["--prompts", str(prompts), "--steps", "2", "--batch", "1", "--threads", "1"]
    assert main(["quantize", str(published), "-o", str(tmp_path / "out"), *given]) == 0
    assert "tango in the original layout" in capsys.readouterr().err
    wav = tmp_path / "a.wav"
    given = ["--prompt", "a bell", "--steps", "2", "-o", str(wav), "--quiet"]
    assert main(["generate", str(tmp_path / "out"), *given]) == 0
    assert wav.stat().st_size == 44 + 2 * 5120


# --- refused --------------------------------------------------------------------------------------


def _edit(folder: Path, name: str, **changes: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **changes}))


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "main") -> None:
    path = folder / f"pytorch_model_{name}.bin"
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)


def _refused(folder: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ptq4adm.load_pipeline(folder)


FILES = [
    "main_config.json",
    "vae_config.json",
    "stft_config.json",
    "pytorch_model_main.bin",
    "pytorch_model_vae.bin",
]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    _refused(copy, MissingComponentError, f"no {name}")


def test_a_missing_tokenizer_is_named(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    place = copy / "flan-t5-large"
    elsewhere = place.rename(tmp_path / "elsewhere")
    _refused(copy, MissingComponentError, "no tokenizer in .*flan-t5-large")
    pipe = ptq4adm.load_pipeline(copy, tokenizer=elsewhere)
    assert pipe.encode_prompts("a dog").batch == 1


def test_a_tokenizer_of_another_model_is_refused(copy: Path) -> None:
    def shrink(weights: dict[str, Any]) -> None:
        for name in ("shared", "encoder.embed_tokens"):
            weights[f"text_encoder.{name}.weight"] = torch.zeros(9, 48)

    _rewrite(copy, shrink)
    _refused(copy, CheckpointError, "knows 9 tokens, the tokenizer has 30")


def test_missing_and_unknown_tensors_are_named(copy: Path) -> None:
    _rewrite(copy, lambda w: w.pop("unet.conv_in.bias"))
    _refused(copy, CheckpointError, r"lacks 1 tensors \('unet\.conv_in\.bias'\)")
    _rewrite(copy, lambda w: w.update({"unet.conv_in.bias": torch.zeros(32)}))
    _rewrite(copy, lambda w: w.update({"group_in.0.weight": torch.zeros(2)}))
    _refused(copy, CheckpointError, r"1 unknown tensors \('group_in\.0\.weight'\)")
    _rewrite(copy, lambda w: w.pop("group_in.0.weight"))
    _rewrite(copy, lambda w: w.pop("text_encoder.encoder.block.1.layer.0.layer_norm.weight"))
    _refused(copy, CheckpointError, r"text_encoder\.encoder\.block\.1\.layer\.0\.layer_norm")
    _rewrite(copy, lambda w: w.pop("vocoder.conv_pre.weight"), "vae")
    _refused(copy, CheckpointError, r"its vocoder\. is not the HiFi-GAN")


def test_a_config_that_contradicts_the_weights_is_named(copy: Path) -> None:
    _edit(copy, "diffusion_model_config.json", cross_attention_dim=64)
    _refused(copy, CheckpointShapeError, r"attn2\.to_k\.weight is \[32, 48\], needs \[32, 64\]")
    _edit(copy, "diffusion_model_config.json", cross_attention_dim=48)
    _edit(copy, "stft_config.json", hop_length=256)
    _refused(copy, CheckpointError, r"'hop_length': 256.*'hop_length': 160")
    _edit(copy, "stft_config.json", hop_length=160)
    config = json.loads((copy / "vae_config.json").read_text())["ddconfig"]
    _edit(copy, "vae_config.json", ddconfig={**config, "ch_mult": [1, 2, 4]})
    _refused(copy, CheckpointError, r"ch_mult is \[1, 2, 4\], the weights .* \[1, 1, 2\]")
    _edit(copy, "vae_config.json", ddconfig=config, scale_factor=0)
    _refused(copy, CheckpointError, "scale_factor is 0")


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"text_encoder_name": "roberta-base"}, UnsupportedModelError, "'roberta-base'"),
        ({"unet_model_config_path": None}, UnsupportedModelError, "unet_model_config_path"),
        ({"unet_model_config_path": "configs/xl.json"}, MissingComponentError, "no xl.json"),
        ({"scheduler_name": "other/model"}, MissingComponentError, "'other/model'"),
    ],
)
def test_parts_of_another_model_are_refused(
    copy: Path, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    _edit(copy, "main_config.json", **changes)
    _refused(copy, error, match)


def test_a_scheduler_beside_the_weights_is_taken(copy: Path) -> None:
    _edit(copy, "main_config.json", scheduler_name="other/model")
    (copy / "scheduler").mkdir()
    config = {**tango_files.SCHEDULER_CONFIG, "prediction_type": "epsilon"}
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert ptq4adm.load_pipeline(copy).scheduler.config.prediction_type == "epsilon"


def test_a_file_cut_short_is_named(copy: Path) -> None:
    path = copy / "pytorch_model_main.bin"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    _refused(copy, TruncatedCheckpointError, r"pytorch_model_main\.bin")


def test_code_in_a_file_is_refused_and_not_run(copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {marker}",)

    _rewrite(copy, lambda w: w.update(extra=Trap()))
    _refused(copy, UnsafeCheckpointError, r"pytorch_model_main\.bin.*nothing of it was run")
    assert not marker.exists()


def test_the_published_configs_are_known_without_files() -> None:
    main = {"unet_model_config_path": "configs/diffusion_model_config.json"}
    config = tango_files._unet_config(Path("nowhere"), main)
    assert config["sample_size"] == (256, 16)
    assert config["attention_head_dim"] == (5, 10, 20, 20)
