"""Published layouts at their real size, with random weights: load, compare, quantize, load again.

    python benchmarks/real_checkpoints.py make-an-audio --work build/real
    python benchmarks/real_checkpoints.py audioldm-s --work build/real
    python benchmarks/real_checkpoints.py tango --work build/real          (needs 8 GB of disk)

Weights of the models cannot be part of this repository. Their names and shapes can: this writes
files of them, as their authors published them, and does with them what a user does. Every part is
compared with a plain-torch forward of the original (tests/shared/originals). Each stage runs in a
process of its own, which says how long it took and how much memory it needed: at most in all
("peak"), and of that what is not a mapped file ("own", at the end).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "shared"))

MODELS = ("make-an-audio", "audioldm-s", "tango")
STAGES = ("write", "load", "compare", "quantize", "reload")
PROMPT = "a dog barks while rain falls on a roof"


def main() -> None:
    """Run one stage, or all of them one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--work", type=Path, required=True, help="folder for the files")
    parser.add_argument("--stage", choices=STAGES, help="only this one (default: all)")
    args = parser.parse_args()
    if args.stage is None:
        for stage in STAGES:
            own = [args.model, "--work", str(args.work), "--stage", stage]
            subprocess.run([sys.executable, __file__, *own], check=True)
        return
    folder = args.work / args.model
    start = time.monotonic()
    found = globals()[args.stage](args.model, folder)
    row = {"model": args.model, "stage": args.stage, "seconds": time.monotonic() - start}
    row |= {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, "own_mb": own_mb()}
    print(json.dumps({**row, **found}, default=lambda value: f"{value:.4g}"))


def own_mb() -> float:
    """Memory of this process that belongs to no file, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1.024e-3
    return 0.0


def write(model: str, folder: Path) -> dict[str, Any]:
    """Write the published files, unless they are there."""
    from originals import checkpoints, tango

    path = weights_file(model, folder)
    if not path.is_file():
        if model == "tango":
            tango.write_tango(folder, tango.TangoSizes())
        elif model == "make-an-audio":
            checkpoints.write_make_an_audio(folder, checkpoints.MakeAnAudioSizes())
        else:
            checkpoints.write_audioldm(path, checkpoints.AudioLDMSizes())
    return {"file_mb": path.stat().st_size / 1e6}


def weights_file(model: str, folder: Path) -> Path:
    """The file of the UNet's weights."""
    names = {"make-an-audio": "maa1_full.ckpt", "tango": "pytorch_model_main.bin"}
    return folder / names.get(model, "audioldm-s-full.ckpt")


def original(model: str, folder: Path) -> Path:
    """What a user names: the checkpoint, or TANGO's folder."""
    return folder if model == "tango" else weights_file(model, folder)


def heads_of(model: str) -> dict[str, str]:
    """The option that gives AudioLDM the heads of its original code."""
    return {"heads": "original"} if model == "audioldm-s" else {}


def load(model: str, folder: Path) -> dict[str, Any]:
    """Load every part, through the function that a user calls."""
    import ptq4adm

    start = time.monotonic()
    pipe = ptq4adm.load_pipeline(original(model, folder), **heads_of(model))
    counts = {
        name: sum(p.numel() for p in getattr(pipe, name).parameters()) / 1e6
        for name in ("unet", "vae", "text_encoder", "vocoder")
    }
    return {"load_seconds": time.monotonic() - start, "millions": counts}


def compare(model: str, folder: Path) -> dict[str, Any]:
    """Relative differences of every part to the original in plain torch."""
    if model == "tango":
        return compare_tango(folder)
    import torch
    from originals import checkpoints, text, unet, vae
    from originals.sampling import below

    import ptq4adm

    pipe = ptq4adm.load_pipeline(original(model, folder), **heads_of(model))
    weights = torch.load(original(model, folder), weights_only=True, mmap=True)["state_dict"]
    torch.manual_seed(0)
    times = torch.tensor([991, 991])
    is_tokens = model == "make-an-audio"
    sizes: Any = checkpoints.MakeAnAudioSizes() if is_tokens else checkpoints.AudioLDMSizes()
    with torch.no_grad():
        arguments = pipe.encode_prompts([PROMPT, "a bell"]).arguments
        tokens = pipe.tokenizer(
            [PROMPT, "a bell"], padding="max_length", max_length=77, return_tensors="pt"
        )
        if is_tokens:
            own = below(weights, "cond_stage_model.caption_encoder.")
            expected = text.clap_tokens(own, sizes.text, tokens.input_ids)
            conditions = {"context": expected}
        else:
            own = below(weights, "cond_stage_model.model.")
            expected = text.clap_text(own, sizes.text, tokens.input_ids, tokens.attention_mask)
            conditions = {"y": expected}
        given = arguments["encoder_hidden_states" if is_tokens else "class_labels"]
        found = {"text": difference(given, expected)}
        own = below(weights, "model.diffusion_model.")
        for columns in (76, 78, 80) if is_tokens else (64,):
            size = (4, 10, columns) if is_tokens else (8, columns, 16)
            x = torch.randn(2, *size)
            expected = unet.forward(own, sizes.unet, x, times, **conditions)
            got = pipe.unet(x, 991, **arguments).sample
            found[f"unet {list(size)}"] = difference(got, expected)
        latents = torch.randn(1, 4, 10, 8) if is_tokens else torch.randn(1, 8, 16, 16)
        expected = vae.decode(below(weights, "first_stage_model."), sizes.vae, latents)
        found["vae"] = difference(pipe.vae.decode(latents).sample, expected)
        found["vocoder"] = vocoder_difference(pipe, folder, weights, sizes, is_tokens=is_tokens)
    assert all(value < 1e-5 for value in found.values()), found
    return {"relative differences": found}


def compare_tango(folder: Path) -> dict[str, Any]:
    """`compare` for TANGO's folder."""
    import torch
    from originals import hifigan, stable_unet, t5, tango, vae
    from originals.sampling import below

    import ptq4adm

    pipe = ptq4adm.load_pipeline(folder)
    main, first_stage = (
        torch.load(folder / f"pytorch_model_{name}.bin", weights_only=True, mmap=True)
        for name in ("main", "vae")
    )
    sizes = tango.TangoSizes()
    torch.manual_seed(0)
    with torch.no_grad():
        prompts = [PROMPT, "a bell"]
        arguments = pipe.encode_prompts(prompts).arguments
        tokens = pipe.tokenizer(prompts, padding=True, return_tensors="pt")
        mask = tokens.attention_mask
        states = t5.encode(below(main, "text_encoder."), sizes.text, tokens.input_ids, mask)
        # what is padded is masked in the UNet
        given = arguments["encoder_hidden_states"]
        found = {"text": difference(given[mask == 1], states[mask == 1])}
        x = torch.randn(2, 8, 64, 16)
        expected = stable_unet.forward(below(main, "unet."), sizes.unet, x, 991, states, mask == 1)
        found["unet"] = difference(pipe.unet(x, 991, **arguments).sample, expected)
        latents = torch.randn(1, 8, 16, 16)
        expected = vae.decode(first_stage, sizes.vae, latents)
        found["vae"] = difference(pipe.vae.decode(latents).sample, expected)
        mel = torch.randn(1, 64, 32)
        expected = hifigan.forward(below(first_stage, "vocoder."), sizes.vocoder, mel)
        found["vocoder"] = difference(pipe.vocoder(mel.transpose(1, 2)), expected)
    assert all(value < 1e-5 for value in found.values()), found
    return {"relative differences": found}


def vocoder_difference(
    pipe: Any, folder: Path, weights: Any, sizes: Any, *, is_tokens: bool
) -> float:
    """Relative difference of the waveforms of one spectrogram."""
    import torch
    from originals import bigvgan, hifigan
    from originals.sampling import below

    mel = torch.randn(1, sizes.vocoder.num_mels, 32)
    if is_tokens:
        own = torch.load(folder / "bigvgan" / "best_netG.pt", weights_only=True)["generator"]
        expected = bigvgan.forward(own, sizes.vocoder, mel)[:, 0]
        return difference(pipe.vocoder(mel), expected)
    own = below(weights, "first_stage_model.vocoder.")
    expected = hifigan.forward(own, sizes.vocoder, mel)
    return difference(pipe.vocoder(mel.transpose(1, 2)), expected)


def difference(got: Any, expected: Any) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((got - expected).norm() / expected.norm())


def quantize(model: str, folder: Path) -> dict[str, Any]:
    """Calibrate on one prompt and two steps, quantize, save."""
    import ptq4adm

    start = time.monotonic()
    pipe = ptq4adm.load_pipeline(original(model, folder))
    calibration = ptq4adm.calibrate(pipe, [PROMPT], steps=2, buckets=2, progress=False)
    calibrated = time.monotonic()
    plan = ptq4adm.quantize(pipe, ptq4adm.QuantConfig(), calibration, progress=False)
    quantized = time.monotonic()
    ptq4adm.save_pipeline(pipe, folder / "w4a8", overwrite=True)
    weights = folder / "w4a8" / "unet" / "diffusion_pytorch_model.safetensors"
    return {
        "calibrate_seconds": calibrated - start,
        "quantize_seconds": quantized - calibrated,
        "save_seconds": time.monotonic() - quantized,
        "unet_mb_float16": plan.bytes_before / 1e6,
        "unet_mb": weights.stat().st_size / 1e6,
        "of float16": weights.stat().st_size / plan.bytes_before,
        "of float32": weights.stat().st_size / plan.bytes_before / 2,
    }


def reload(model: str, folder: Path) -> dict[str, Any]:  # noqa: ARG001 - one form for all stages
    """Load what was saved, and make a second of audio in two steps."""
    import ptq4adm

    start = time.monotonic()
    pipe = ptq4adm.load_pipeline(folder / "w4a8")
    loaded = time.monotonic()
    audio = pipe(PROMPT, steps=2, seconds=1.0)
    return {
        "load_seconds": loaded - start,
        "generate_seconds": time.monotonic() - loaded,
        "samples": audio.shape[1],
    }


if __name__ == "__main__":
    main()
