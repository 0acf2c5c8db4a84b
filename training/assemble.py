"""Put the trained parts together: one folder in diffusers' AudioLDM layout, float16."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from loop import load_average
from text import build_text_encoder, build_tokenizer
from torch import nn
from transformers import ClapTextModelWithProjection, RobertaTokenizerFast, SpeechT5HifiGan
from unet import build_scheduler, build_unet
from vae import build_vae
from vocoder import build_vocoder

SHARD = "14MB"
MODEL_INDEX = {
    "_class_name": "AudioLDMPipeline",
    "_diffusers_version": "0.33.1",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "ClapTextModelWithProjection"],
    "tokenizer": ["transformers", "RobertaTokenizerFast"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "vocoder": ["transformers", "SpeechT5HifiGan"],
}
STAND_IN_CAPTIONS = ["a piano plays a low note", "a dog barks", "a drum loop followed by a voice"]


def assemble(work: Path, output: Path, guidance: float, steps: int) -> dict[str, int]:
    """Write the pipeline of the trainings in ``work`` to ``output``.

    A part whose training has not finished comes from its last checkpoint, and one that has
    not begun has random weights: good enough to develop against, and printed.

    Args:
        work: the folder of `training/train.py`.
        output: replaced only when everything is written.
        guidance: default guidance scale, recorded in model_index.json.
        steps: default number of steps, recorded likewise.

    Returns:
        Bytes of each part.
    """
    work, output = Path(work), Path(output)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer, text_encoder = _load_text(work)
    tokenizer.save_pretrained(partial / "tokenizer")
    autoencoder = "decoder" if (work / "decoder" / "model").exists() else "vae"
    parts: dict[str, nn.Module] = {
        "text_encoder": text_encoder,
        "vae": _load_latest(work / autoencoder, AutoencoderKL, build_vae),
        "unet": _load_latest(work / "unet", UNet2DConditionModel, build_unet),
        "vocoder": _load_latest(work / "vocoder", SpeechT5HifiGan, build_vocoder),
    }
    for name, part in parts.items():
        part.to(torch.float16).save_pretrained(partial / name, max_shard_size=SHARD)
    build_scheduler().save_pretrained(partial / "scheduler")
    index = {
        **MODEL_INDEX,
        "_default_guidance_scale": guidance,
        "_default_steps": steps,
        "_prompt_domain": "audioldm-tiny",
    }
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for kept in ("README.md", "evaluation.json", "sweep.json"):
        if (output / kept).exists():
            shutil.copy(output / kept, partial / kept)
    for file in partial.rglob("*.safetensors"):
        file.chmod(0o644)
    for file in partial.glob("*/config.json"):  # holds the path of the training folder
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)
    return {
        folder.name: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in sorted(output.iterdir())
        if folder.is_dir()
    }


def _load_text(work: Path) -> tuple[RobertaTokenizerFast, ClapTextModelWithProjection]:
    if (work / "text" / "model").exists():
        tokenizer = RobertaTokenizerFast.from_pretrained(work / "text" / "tokenizer")
        return tokenizer, ClapTextModelWithProjection.from_pretrained(work / "text" / "model")
    print("text_encoder: random weights")
    tokenizer = build_tokenizer(STAND_IN_CAPTIONS)
    return tokenizer, build_text_encoder(len(tokenizer))


def _load_latest(folder: Path, cls: type, build: Callable[[], nn.Module]) -> nn.Module:
    """The finished part, or the averaged weights of its last checkpoint, or random weights."""
    if (folder / "model").exists():
        return cls.from_pretrained(folder / "model")
    part = build()
    if (folder / "checkpoint.pt").exists():
        step = load_average(folder, part)
        print(f"{folder.name}: averaged weights at step {step}, training unfinished")
    else:
        print(f"{folder.name}: random weights")
    return part
