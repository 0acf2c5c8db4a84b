"""Fixtures of all tests: seeds, and a small pipeline of real classes with random weights."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported; the kernels then run in its interpreter, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

import ptq4adm
from ptq4adm.ops import cpu

if TYPE_CHECKING:
    from ptq4adm import Calibration, TextToAudioPipeline

TEXT_WIDTH = 64
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # Roberta's order: pad is 1


def pytest_report_header() -> str:
    """Which build of the kernels is tested: `make sanitize` tests another one."""
    return f"compiled kernels: {cpu.module_file()}"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # the models are small: a second thread gains nothing, and waits for a core on a busy machine
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pipeline in diffusers' layout, float16: read it, never write into it.

    A UNet of 64 and 128 channels over latents [8, 8, 8], clips of 0.64 s, AudioLDM's conditioning.
    """
    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    make_tiny_pipeline(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def other_tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights: another model."""
    folder = tmp_path_factory.mktemp("pipelines") / "other"
    make_tiny_pipeline(folder, seed=1)
    return folder


def make_tiny_pipeline(folder: Path, *, seed: int) -> None:
    """Write the pipeline of `tiny_pipeline` to a folder that does not exist."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        ClapTextConfig,
        ClapTextModelWithProjection,
        RobertaTokenizerFast,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
    )

    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())])}
    torch.manual_seed(seed)
    parts = {
        "tokenizer": RobertaTokenizerFast(vocab=vocab, merges=[], model_max_length=48),
        "text_encoder": ClapTextModelWithProjection(
            ClapTextConfig(
                vocab_size=len(vocab),
                hidden_size=TEXT_WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=2 * TEXT_WIDTH,
                projection_dim=TEXT_WIDTH,
                max_position_embeddings=TEXT_WIDTH + 8,
            )
        ),
        "unet": UNet2DConditionModel(
            sample_size=8,
            in_channels=8,
            out_channels=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(64, 128),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=(64, 128),
            class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=TEXT_WIDTH,
            class_embeddings_concat=True,
        ),
        "vae": AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            latent_channels=8,
            norm_num_groups=8,
            sample_size=64,
            scaling_factor=0.9,
            mid_block_add_attention=False,
        ),
        "vocoder": SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=64,
                sampling_rate=16000,
                upsample_initial_channel=32,
                upsample_rates=[5, 4, 4, 2],
                upsample_kernel_sizes=[11, 8, 8, 4],
                resblock_kernel_sizes=[3],
                resblock_dilation_sizes=[[1, 3]],
            )
        ),
        "scheduler": DDIMScheduler(
            num_train_timesteps=1000,
            beta_start=0.0015,
            beta_end=0.0195,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
        ),
    }
    index: dict[str, object] = {"_class_name": "AudioLDMPipeline", "_diffusers_version": "0.33.1"}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            part = torch.nn.Module.to(part, dtype=torch.float16)
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    index |= {"_default_steps": 4, "_default_guidance_scale": 2.5}
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def tiny_calibration(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of a calibration of `tiny_pipeline`: two prompts, four steps, four buckets."""
    from ptq4adm.quantization import calibrate, load_pipeline

    path = tmp_path_factory.mktemp("calibrations") / "tiny.safetensors"
    pipe = load_pipeline(tiny_pipeline)
    calibrate(pipe, ["a dog barks", "a bell rings"], steps=4, progress=False).save(path)
    return path


@pytest.fixture(scope="session")
def float_pipe(tiny_pipeline: Path) -> TextToAudioPipeline:
    """Never quantized: tests that quantize take `pipe`."""
    return ptq4adm.load_pipeline(tiny_pipeline)


@pytest.fixture
def pipe(float_pipe: TextToAudioPipeline) -> TextToAudioPipeline:
    """A copy that a test may quantize."""
    twin = copy.copy(float_pipe)
    twin.unet = copy.deepcopy(float_pipe.unet)
    return twin


@pytest.fixture(scope="session")
def calibration(tiny_calibration: Path) -> Calibration:
    return ptq4adm.Calibration.load(tiny_calibration)


@pytest.fixture(scope="session")
def quantized(float_pipe: TextToAudioPipeline, calibration: Calibration) -> TextToAudioPipeline:
    """W4A8 with scales that take no search: read it."""
    twin = copy.copy(float_pipe)
    twin.unet = copy.deepcopy(float_pipe.unet)
    config = ptq4adm.QuantConfig(weight_observer="absmax", activation_observer="absmax")
    ptq4adm.quantize(twin, config, calibration, progress=False)
    return twin
