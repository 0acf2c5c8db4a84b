"""The model card of a trained pipeline, from what training and evaluation measured."""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

PARTS = {
    "unet": (
        "UNet2DConditionModel",
        "denoiser on latents of 8 x 32 x 8, v-prediction, averaged weights",
    ),
    "vae": ("AutoencoderKL", "log-mel of 256 x 64 to latents and back, factor 8, 8 channels"),
    "text_encoder": ("ClapTextModelWithProjection", "prompt to a unit vector of 128 numbers"),
    "vocoder": ("SpeechT5HifiGan", "log-mel to a 16 kHz waveform"),
}
CURVE_POINTS = 8

HEADER = """# audioldm-tiny

A text-to-audio latent diffusion model of AudioLDM's architecture (Liu et al. 2023) at small size,
made to have something real to quantize: {parameters:.1f} million parameters, {megabytes:.1f} MB in
float16. A prompt gives {seconds} s of audio at 16 kHz, and
`diffusers.AudioLDMPipeline.from_pretrained` loads this folder.
Defaults: {steps} DDIM steps, guidance scale {guidance}.

## Parts

| part | class | million parameters | what it does |
| --- | --- | --- | --- |
"""

CONTRACT = """
The log-mel is that of `ptq4adm.evaluation.mel` (16 kHz, 64 bins up to 8 kHz, hop 160, natural
logarithm clamped at 1e-5); autoencoder and vocoder take and give it as it is. Latents have zero
mean and unit variance in each channel (`scaling_factor` 1). The noise schedule is AudioLDM's;
steps are spaced "trailing". The unconditional embedding is that of the empty prompt.

## Data

{clips} clips of 2.56 s, rendered by `training/corpus.py` with captions from a grammar: ten sound
classes ({classes}), other sources, and mixtures
of two. No recording was collected. Made with:

"""

LIMITS = """
## Limits

- It knows the ten classes above, roughly a dozen other sources, and mixtures of two; other prompts
  give whichever of these is nearest. Captions are English and come from one grammar.
- Clips last 2.56 s. Whether words of pitch, tempo and loudness are followed was not measured; no
  caption says what a voice says, so speech is no language.
- The vocoder makes sinusoids at multiples of 100 Hz (one over its hop) and was trained without a
  discriminator. Rhythm and colour are right; a steady tone between two multiples comes out as
  both, so melodies are rough and not in tune.
- Instruments come from one sound font and voices from one synthesiser, so variety is theirs.
"""


def write_card(folder: Path, work: Path, manifest: Path) -> None:
    """Write README.md into an assembled pipeline.

    Args:
        folder: the pipeline; its evaluation.json and sweep.json are used if they are there.
        work: the training's folder, for the curves.
        manifest: the corpus manifest, for classes and licences.
    """
    folder, work = Path(folder), Path(work)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    counts = {name: _count_parameters(folder / name) for name in PARTS}
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    text = HEADER.format(
        parameters=sum(counts.values()) / 1e6,
        megabytes=size / 1e6,
        seconds=2.56,
        steps=index.get("_default_steps", 25),
        guidance=index.get("_default_guidance_scale", 2.5),
    )
    for name, (cls, task) in PARTS.items():
        text += f"| {name} | {cls} | {counts[name] / 1e6:.2f} | {task} |\n"
    text += _data_section(work, json.loads(Path(manifest).read_text(encoding="utf-8")))
    text += _training_section(work) + _evaluation_section(folder) + LIMITS
    (folder / "README.md").write_text(text, encoding="utf-8")


def _count_parameters(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            total += sum(int(np.prod(tensors.get_slice(key).get_shape())) for key in tensors.keys())
    return total


def _data_section(work: Path, manifest: dict) -> str:
    mels = work / "mels.npy"
    clips = np.load(mels, mmap_mode="r").shape[0] if mels.exists() else "?"
    text = CONTRACT.format(clips=clips, classes=", ".join(manifest["classes"]))
    for package in manifest["packages"]:
        text += f"- {package['name']} ({package['kind']}): {package['licence']}\n"
    return text


def _read_curve(folder: Path) -> list[dict]:
    path = folder / "curve.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _training_section(work: Path) -> str:
    text = "\n## Training\n\n`python training/train.py` on two CPU cores shared with other work;"
    text += " wall-clock minutes, measured.\n\n"
    text += "| part | minutes | steps | loss, from start to end |\n| --- | --- | --- | --- |\n"
    for name in ("text", "vae", "decoder", "unet", "vocoder"):
        curve = _read_curve(work / name)
        if curve:
            points = [
                curve[i]
                for i in np.unique(np.linspace(0, len(curve) - 1, CURVE_POINTS).astype(int))
            ]
            losses = ", ".join(f"{row['loss']:.3g}" for row in points)
            text += f"| {name} | {curve[-1]['minutes']:.0f} | {curve[-1]['step']} | {losses} |\n"
    for name in ("text", "vae", "decoder"):
        report = work / name / "report.json"
        if report.exists():
            numbers = json.loads(report.read_text(encoding="utf-8"))
            text += f"\n{name}, measured on the test split: {numbers}\n"
    return text


def _evaluation_section(folder: Path) -> str:
    path = folder / "evaluation.json"
    if not path.exists():
        return "\n## Evaluation\n\nNot evaluated yet: run `python training/evaluate.py`.\n"
    report = json.loads(path.read_text(encoding="utf-8"))
    text = (
        "\n## Evaluation\n\n"
        "A nearest-centroid classifier of log-mel statistics, fitted on the real\n"
        "training clips, judges"
        f" {report['generated']['clips']} clips generated from prompts absent from training"
        f" ({report['steps']} steps, guidance {report['guidance']})."
        f"\n\n{evaluation_table(report)}\n"
    )
    sweep = folder / "sweep.json"
    if sweep.exists():
        text += "\nGuidance and steps were chosen on captions of the validation split, before the"
        text += " decoder stage (six clips a class; one clip is 1.7 %):\n\n"
        text += (
            "| guidance | steps | right class | mean spread ratio |\n| --- | --- | --- | --- |\n"
        )
        for row in json.loads(sweep.read_text(encoding="utf-8")):
            text += f"| {row['guidance']} | {row['steps']} | {100 * row['accuracy']:.1f} % |"
            text += f" {row['spread_ratio']:.2f} |\n"
    return text


def evaluation_table(report: dict) -> str:
    """The numbers of `training/evaluate.py` as Markdown tables."""
    names, generated = report["classes"], report["generated"]
    lines = [
        "| | clips | right class | mean spread, relative to real |",
        "| --- | --- | --- | --- |",
    ]
    real = report["real_test"]["spread"]
    titles = {
        "real_test": "real test clips",
        "vocoder": "... through the vocoder",
        "vae_vocoder": "... through autoencoder and vocoder",
        "generated": "generated from held-out prompts",
    }
    for key, title in titles.items():
        part = report[key]
        ratio = np.mean([part["spread"][name] / real[name] for name in names])
        lines.append(
            f"| {title} | {part['clips']} | {100 * part['accuracy']:.1f} % | {ratio:.2f} |"
        )
    lines += ["", "Rows are the prompt's class, columns the class found in the generated clip.", ""]
    lines.append("| | " + " | ".join(names) + " | spread ratio |")
    lines.append("| --- |" + " --- |" * (len(names) + 1))
    for name, counts in zip(names, generated["confusion"], strict=True):
        cells = " | ".join(str(count) if count else "" for count in counts)
        lines.append(f"| {name} | {cells} | {report['spread_ratio'][name]:.2f} |")
    return "\n".join(lines)
