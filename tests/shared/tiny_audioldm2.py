"""A folder of diffusers' `AudioLDM2Pipeline` with small random components; no network."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

CLAP, T5, GPT = 32, 48, 64  # widths of the three text models


def make_tiny_audioldm2(folder: Path, *, seed: int = 0) -> None:
    """Write the pipeline; clips of 0.64 s, latents [8, 8, 8]."""
    from diffusers import AudioLDM2Pipeline

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = AudioLDM2Pipeline(**_text_parts(), **_audio_parts())
        pipe.save_pretrained(folder)


def tiny_audioldm2_unet() -> torch.nn.Module:
    """Two contexts, as the published one: attention layers without, with the first, the second."""
    from diffusers import AudioLDM2UNet2DConditionModel

    unet: torch.nn.Module = AudioLDM2UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=[[None, GPT, T5]] * 2,
    )
    return unet


def _text_parts() -> dict[str, Any]:
    from diffusers import AudioLDM2ProjectionModel
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        ClapAudioConfig,
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        ClapTextConfig,
        GPT2Config,
        GPT2LMHeadModel,
        RobertaTokenizerFast,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {token: i for i, token in enumerate([*special, *letters])}
    clap_text = ClapTextConfig(
        vocab_size=len(vocab),
        hidden_size=CLAP,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=37,
        projection_dim=CLAP,
        max_position_embeddings=64,
    )
    clap_audio = ClapAudioConfig(
        spec_size=64,
        window_size=4,
        num_mel_bins=64,
        intermediate_size=37,
        depths=[2, 2],
        num_attention_heads=[2, 2],
        num_hidden_layers=2,
        hidden_size=192,
        projection_dim=CLAP,
        patch_size=2,
        patch_stride=2,
        patch_embed_input_channels=4,
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return {
        "text_encoder": ClapModel(
            ClapConfig(text_config=clap_text, audio_config=clap_audio, projection_dim=CLAP)
        ),
        "tokenizer": RobertaTokenizerFast(vocab=vocab, merges=[], model_max_length=48),
        "text_encoder_2": T5EncoderModel(
            T5Config(vocab_size=len(pieces), d_model=T5, d_kv=8, d_ff=37, num_layers=1, num_heads=2)
        ),
        "tokenizer_2": T5TokenizerFast(
            tokenizer_object=unigram, extra_ids=0, model_max_length=32, pad_token="<pad>"
        ),
        "projection_model": AudioLDM2ProjectionModel(
            text_encoder_dim=CLAP, text_encoder_1_dim=T5, langauge_model_dim=GPT
        ),
        "language_model": GPT2LMHeadModel(
            GPT2Config(vocab_size=99, n_embd=GPT, n_layer=1, n_head=2, n_ctx=99, max_new_tokens=8)
        ),
        "feature_extractor": ClapFeatureExtractor(feature_size=64, sampling_rate=16000),
    }


def _audio_parts() -> dict[str, Any]:
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    return {
        "unet": tiny_audioldm2_unet(),
        "vae": AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            latent_channels=8,
            norm_num_groups=8,
            mid_block_add_attention=False,
        ),
        "vocoder": SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=64,
                sampling_rate=16000,
                upsample_initial_channel=16,
                upsample_rates=[5, 4, 4, 2],
                upsample_kernel_sizes=[11, 8, 8, 4],
                resblock_kernel_sizes=[3],
                resblock_dilation_sizes=[[1, 3]],
            )
        ),
        "scheduler": DDIMScheduler(
            beta_start=0.0015,
            beta_end=0.0195,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
        ),
    }
