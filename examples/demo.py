"""The main job from end to end: float in, W4A8 out, and what it cost.

    python examples/demo.py                 # or: make demo

Calibrates the shipped pipeline, quantizes it to W8A8 and W4A8, saves and loads both, makes the same
prompts with the same seeds in float and quantized, and prints sizes, time and paired quality.
Every number is measured in this run. Writes to build/demo/: the clips, a picture of two mel
spectrograms, the quantized models, and the table as JSON and CSV.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

import ptq4adm
from ptq4adm.bench.rows import append_rows, environment
from ptq4adm.calibration import default_prompts
from ptq4adm.cli.generate import file_name, write_wav
from ptq4adm.evaluation.mel import log_mel
from ptq4adm.evaluation.paired import latent_sqnr_db, log_mel_distance_db
from ptq4adm.evaluation.picture import draw_mel_pair
from ptq4adm.nn import resident_bytes

ROOT = Path(__file__).resolve().parents[1]

# one of each sound class of the shipped pipeline; neither trained nor calibrated on
PROMPTS = (
    "a man speaking, at a fast tempo and softly",
    "quietly, a drum set playing a busy beat",
    "a church organ playing, quietly and in the low range",
    "at a moderate speed, a flute playing a tune",
    "quietly, the sound of a music box playing a melody",
    "in the low range, an electric bass playing a single note",
    "loudly, waves on a sea shore rushing steadily",
    "quietly, the sound of a helicopter rotor",
    "a song bird chirping, at a middle pitch and quietly",
    "loudly, the sound of a phone bell ringing",
)
SCHEMES = ("w8a8", "w4a8")
WARM_UP_ROUNDS = 2


@dataclass
class Variant:
    """One way to run the pipeline, and what was measured of it."""

    name: str
    pipe: ptq4adm.TextToAudioPipeline
    disk_bytes: int
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    waveforms: Tensor = field(default_factory=lambda: torch.empty(0))
    step_seconds: list[float] = field(default_factory=list)

    @property
    def resident_bytes(self) -> int:
        """What the UNet occupies in memory."""
        return resident_bytes(self.pipe.unet)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo."""
    args = parse_arguments(argv)
    start = time.monotonic()
    try:
        run(args)
    except ptq4adm.Ptq4admError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    print(f"\ndone in {time.monotonic() - start:.0f} s")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="pipeline folder (default: the shipped one)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "demo")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the pipeline's)")
    parser.add_argument("--seed", type=int, default=100, help="seed of the first prompt")
    parser.add_argument("--rounds", type=int, default=15, help="timings of each variant")
    parser.add_argument("--calibration-prompts", type=int, help="use only the first N")
    parser.add_argument(
        "--augment",
        type=int,
        metavar="N",
        help="calibrate on N prompts chosen for coverage instead",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Everything, in order."""
    folder = args.model or ptq4adm.shipped_pipeline_path()
    prompts = list(PROMPTS)
    with stage(f"load {folder}"):
        pipe = ptq4adm.load_pipeline(folder)
    listed = default_prompts()[: args.calibration_prompts]
    if args.augment is not None:
        listed = augmented(pipe, args.augment)
    assert set(prompts).isdisjoint(listed), "a prompt that was calibrated on proves nothing"
    steps = args.steps or pipe.defaults.steps
    variants = [Variant("float32", pipe, weight_bytes(folder))]

    with stage(f"calibrate: {len(listed)} prompts, {steps} steps, scales for each timestep bucket"):
        calibration = ptq4adm.calibrate(pipe, listed, steps=steps, buckets=min(10, steps))

    for scheme in SCHEMES:
        with stage(f"quantize to {scheme.upper()}, save, load"):
            variants.append(make_variant(folder, args.output, scheme, calibration))

    seeds = f"seeds {args.seed}..{args.seed + len(prompts) - 1}"
    for variant in variants:
        with stage(f"generate {len(prompts)} prompts, {seeds}, in {variant.name}"):
            generate(variant, prompts, steps, args.seed)
            save_clips(variant, prompts, args.output / variant.name)

    with stage(f"time one step of each, interleaved, {args.rounds} rounds"):
        is_channels_last = time_steps(variants, prompts[0], args.rounds)

    rows = [measure(variant, variants[0]) for variant in variants]
    print_table(rows, variants[0], steps, is_channels_last)
    write_picture(args.output / "mel.png", variants[0], variants[-1], prompts)
    write_results(args.output, rows, steps)
    print(f"\nclips, mel.png, results.json and the models are in {args.output}")


def augmented(pipe: ptq4adm.TextToAudioPipeline, budget: int) -> list[str]:
    """Calibration prompts of the pipeline's domain, chosen for what they cover."""
    with stage(f"choose {budget} calibration prompts"):
        found = ptq4adm.augment_prompts(None, budget, pipe=pipe, exclude=PROMPTS)
        print(f"  pairs of aspects covered: {found.before.pairs:.0%}, then {found.after.pairs:.0%}")
    return list(found.prompts)


@contextmanager
def stage(message: str) -> Iterator[None]:
    """Announce a stage, and say how long it took."""
    print(f"- {message}", flush=True)
    start = time.monotonic()
    yield
    print(f"  {time.monotonic() - start:.1f} s", flush=True)


def weight_bytes(folder: Path) -> int:
    """Bytes of the UNet's files."""
    return sum(f.stat().st_size for f in (folder / "unet").glob("*.safetensors"))


def make_variant(
    folder: Path, output: Path, scheme: str, calibration: ptq4adm.Calibration
) -> Variant:
    """Quantize, save, load; the loaded pipeline must give the same bits as the one in memory."""
    pipe = ptq4adm.load_pipeline(folder)
    plan = ptq4adm.quantize(pipe, ptq4adm.QuantConfig(scheme=scheme), calibration)
    print(f"  {plan.summary()}")
    saved = ptq4adm.save_pipeline(pipe, output / f"model-{scheme}", overwrite=True)
    loaded = ptq4adm.load_pipeline(saved)
    conditioning = pipe.encode_prompts(PROMPTS[0])
    first, again = (p.denoise(conditioning, steps=1, seed=1) for p in (pipe, loaded))
    assert torch.equal(first, again), f"{saved} does not give the bits that were saved"
    return Variant(scheme, loaded, weight_bytes(saved))


def generate(variant: Variant, prompts: list[str], steps: int, seed: int) -> None:
    """Latents and waveforms of all prompts in one batch."""
    pipe = variant.pipe
    with tqdm(total=steps, desc=f"  {variant.name}", unit="step", disable=None) as bar:
        variant.latents = pipe.denoise(
            pipe.encode_prompts(prompts), steps=steps, seed=seed, callback=lambda *_: bar.update()
        )
    variant.waveforms = pipe.decode(variant.latents)


def save_clips(variant: Variant, prompts: list[str], folder: Path) -> None:
    """One 16-bit file a prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (prompt, waveform) in enumerate(zip(prompts, variant.waveforms, strict=True)):
        write_wav(folder / file_name(i, prompt), waveform, variant.pipe.sampling_rate)


def time_steps(variants: list[Variant], prompt: str, rounds: int) -> bool:
    """Time one UNet call for one prompt with guidance, the variants in turn.

    The float UNet runs in both memory formats, and the faster one is what the others are held
    against.

    Returns:
        Whether that was channels_last.
    """
    steps = {variant.name: step_function(variant.pipe, prompt) for variant in variants}
    times: dict[str, list[float]] = {name: [] for name in [*steps, "channels_last"]}
    unet = variants[0].pipe.unet
    for i in tqdm(range(rounds + WARM_UP_ROUNDS), desc="  time", unit="round", disable=None):
        for name in rotated(list(times), i):
            if name in ("float32", "channels_last"):
                is_last = name == "channels_last"
                unet.to(memory_format=torch.channels_last if is_last else torch.contiguous_format)
            seconds = steps.get(name, steps["float32"])()
            if i >= WARM_UP_ROUNDS:
                times[name].append(seconds)
    unet.to(memory_format=torch.contiguous_format)
    is_channels_last = statistics.median(times["channels_last"]) < statistics.median(
        times["float32"]
    )
    if is_channels_last:
        times["float32"] = times["channels_last"]
    for variant in variants:
        variant.step_seconds = times[variant.name]
    return is_channels_last


def rotated(names: list[str], count: int) -> list[str]:
    """The names, another one first in every round."""
    shift = count % len(names)
    return names[shift:] + names[:shift]


def step_function(pipe: ptq4adm.TextToAudioPipeline, prompt: str) -> Callable[[], float]:
    """A function that runs one guided step and returns its seconds."""
    conditioning = pipe.encode_prompts(prompt).repeat(2)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *pipe.latent_shape(), generator=generator)
    timestep = torch.tensor(pipe.scheduler.config.num_train_timesteps // 2)

    @torch.no_grad()
    def step() -> float:
        start = time.perf_counter()
        pipe.unet(latents, timestep, **conditioning.arguments)
        return time.perf_counter() - start

    return step


def measure(variant: Variant, reference: Variant) -> dict[str, str | int | float]:
    """One row of the table."""
    quantiles = statistics.quantiles(variant.step_seconds, n=5)
    row: dict[str, str | int | float] = {
        "variant": variant.name,
        "unet_bytes_resident": variant.resident_bytes,
        "unet_bytes_on_disk": variant.disk_bytes,
        "step_seconds_median": statistics.median(variant.step_seconds),
        "step_seconds_p20": quantiles[0],
        "step_seconds_p80": quantiles[-1],
    }
    if variant is not reference:
        sqnr = latent_sqnr_db(reference.latents, variant.latents)
        distance = log_mel_distance_db(reference.waveforms, variant.waveforms)
        row |= {
            "prompts": len(sqnr),
            "latent_sqnr_db_median": sqnr.median().item(),
            "latent_sqnr_db_min": sqnr.min().item(),
            "log_mel_distance_db_median": distance.median().item(),
            "log_mel_distance_db_max": distance.max().item(),
        }
    return row


def print_table(
    rows: list[dict[str, str | int | float]],
    reference: Variant,
    steps: int,
    is_channels_last: bool,
) -> None:
    """The table and what its columns mean."""
    float32 = float(rows[0]["unet_bytes_resident"])
    base = float(rows[0]["step_seconds_median"])
    print(
        f"\n{'UNet':<9}{'MB':>8}{'vs f32':>9}{'vs f16':>9}{'s/step':>9}{'speed':>8}"
        f"{'SQNR dB':>10}{'min':>7}{'log-mel dB':>12}{'max':>7}"
    )
    print(f"{'float16':<9}{float32 / 2e6:8.2f}{50.0:8.1f}%{100.0:8.1f}%{'(size only)':>17}")
    for row in rows:
        size, seconds = float(row["unet_bytes_resident"]), float(row["step_seconds_median"])
        line = (
            f"{row['variant']:<9}{size / 1e6:8.2f}{100 * size / float32:8.1f}%"
            f"{200 * size / float32:8.1f}%{seconds:9.3f}{base / seconds:7.2f}x"
        )
        if "latent_sqnr_db_median" in row:
            line += (
                f"{row['latent_sqnr_db_median']:10.1f}{row['latent_sqnr_db_min']:7.1f}"
                f"{row['log_mel_distance_db_median']:12.2f}{row['log_mel_distance_db_max']:7.2f}"
            )
        print(line)
    machine = environment(ROOT)
    layout = "channels_last" if is_channels_last else "contiguous"
    print(
        f"\nMB: the UNet's weights in memory. s/step: median of {len(reference.step_seconds)} "
        f"interleaved runs, one prompt with guidance\n(batch 2), {machine['threads']} threads on "
        f"{machine['device']}; float32 is {layout}, the faster of its two formats.\n"
        f"SQNR of the final latents and RMS log-mel distance of the clips to float32, same prompt "
        f"and seed:\nmedian and worst of {len(reference.latents)} prompts, {steps} steps, none "
        "calibrated on. Higher SQNR and smaller distance are better."
    )


def write_picture(path: Path, reference: Variant, test: Variant, prompts: list[str]) -> None:
    """Float and quantized mel spectrograms of the prompt whose SQNR is the median."""
    sqnr = latent_sqnr_db(reference.latents, test.latents)
    i = int(sqnr.argsort()[len(sqnr) // 2])
    mels = [log_mel(variant.waveforms[i : i + 1])[0] for variant in (reference, test)]
    draw_mel_pair(
        path,
        *mels,
        titles=("float32", f"{test.name.upper()}, latent SQNR {sqnr[i]:.1f} dB"),
        title=f"{prompts[i]} (the prompt of median SQNR)",
    )


def write_results(output: Path, rows: list[dict[str, str | int | float]], steps: int) -> None:
    """The table with the machine it was measured on, as JSON, and appended to a CSV file."""
    complete = [{**environment(ROOT), "steps": steps, **row} for row in rows]
    (output / "results.json").write_text(json.dumps(complete, indent=2) + "\n", encoding="utf-8")
    append_rows(output / "results.csv", complete)


if __name__ == "__main__":
    sys.exit(main())
