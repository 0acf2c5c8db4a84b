"""Float, W8A8 and W4A8 of AudioLDM, TANGO and Make-An-Audio against real clips: the paper's table.

    python benchmarks/paper_table.py --model audioldm=audioldm-s-full --model tango=tango \
        --model make-an-audio=make-an-audio --real audiocaps-test --captions audiocaps-test.csv \
        --embedding cnn14-16k=Cnn14_16k_mAP=0.438.pth --embedding vggish=vggish-10086976.pth

For people who have the weights (docs/models says where they are) and the clips: `--captions` is a
CSV file with the columns `file` and `caption`, one row a clip of the folder `--real`. Each model is
calibrated once, quantized and saved, and makes one clip a caption from the same noise in every
variant; what a run that was stopped has made is not made again, and what was made with another
seed, other steps or captions is refused. Rows go to
benchmarks/results/paper-table.csv, and the table is printed. A Frechet distance is named by its
embedding: "FD" of papers on text to audio is cnn14-16k, "FAD" is vggish.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import ptq4adm
from ptq4adm.bench import append_rows, environment
from ptq4adm.calibration import Calibration
from ptq4adm.cli.generate import write_wav
from ptq4adm.evaluation.clips import ClipSet, read_folder
from ptq4adm.evaluation.embeddings import AudioEmbedding, load_embedding
from ptq4adm.evaluation.evaluate import EvaluationSettings, evaluate

ROOT = Path(__file__).resolve().parents[1]
VARIANTS: dict[str, dict[str, Any] | None] = {
    "float": None,
    "W8A8": {"scheme": "w8a8"},
    "W4A8": {"scheme": "w4a8"},
}
# shown of every embedding, where it has them
_FIGURES = ("frechet_distance", "kl_softmax", "inception_score")


def main() -> None:
    """Make what is missing, measure, append the rows, print the table."""
    arguments = _arguments()
    captions = read_captions(arguments.captions, arguments.real, arguments.clips)
    embeddings = [load_embedding(name, path) for name, path in arguments.embedding]
    every = read_folder(arguments.real)
    waveforms = dict(zip(every.keys, every.waveforms, strict=True))
    real = ClipSet([waveforms[f] for f in captions], every.sample_rate, every.name, tuple(captions))
    for model, folder in arguments.model:
        claim(arguments.work / model, folder, captions, arguments)
    rows: list[dict[str, Any]] = []
    for model, folder in arguments.model:
        for variant, config in VARIANTS.items():
            work = arguments.work / model
            size = make_clips(folder, config, captions, work / variant.lower(), arguments)
            about = {"model": model, "variant": variant, "seed": arguments.seed, "unet_mb": size}
            clips = read_folder(work / variant.lower() / "clips")
            chosen = dict(zip(clips.keys, clips.waveforms, strict=True))
            made = ClipSet([chosen[f] for f in captions], clips.sample_rate, clips.name, real.keys)
            for embedding in embeddings:
                found = measure(real, made, embedding, arguments.work / "embedded")
                print(about | found, flush=True)
                rows.append({**environment(ROOT), **about, **found})
    append_rows(arguments.results / "paper-table.csv", rows)
    print(table(rows))


def read_captions(path: Path, real: Path, count: int | None) -> dict[str, str]:
    """File name to caption, in the order of the rows; the first `count`."""
    with path.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or not {"file", "caption"} <= set(rows[0]):
        sys.exit(f"{path}: needs a header with the columns file and caption, and rows")
    found = {row["file"]: row["caption"] for row in rows[:count]}
    missing = [name for name in found if not (real / name).is_file()]
    if missing:
        sys.exit(
            f"{path}: {len(missing)} of {len(found)} files are not in {real}, such as "
            f"{missing[0]!r}; leave their rows out"
        )
    return found


def claim(
    work: Path, source: Path, captions: Mapping[str, str], arguments: argparse.Namespace
) -> None:
    """Exit if a folder holds clips of other settings: they would be measured as those of these."""
    path = work / "made-of.json"
    # a list: the seed of a clip is its place in it. More captions than before are no other ones
    listed = [list(pair) for pair in captions.items()]
    made: dict[str, Any] = {
        "source": str(source.resolve()),
        "steps": arguments.steps,
        "seed": arguments.seed,
        "captions": listed,
    }
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        both = min(len(listed), len(before["captions"]))
        other = [name for name in ("source", "steps", "seed") if made[name] != before[name]]
        other += ["captions"] if listed[:both] != before["captions"][:both] else []
        if other:
            sys.exit(f"{work}: made with other {', '.join(other)}; name another folder by --work")
        made["captions"] = max(listed, before["captions"], key=len)
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made), encoding="utf-8")


def make_clips(
    source: Path,
    config: dict[str, Any] | None,
    captions: Mapping[str, str],
    work: Path,
    arguments: argparse.Namespace,
) -> float:
    """Quantize, unless it was; write the clips that are missing; return the UNet's MB."""
    torch.set_num_threads(arguments.threads)
    saved = work / "model"
    if config is not None and not saved.is_dir():
        pipe = ptq4adm.load_pipeline(source, device=arguments.device)
        path = work.parent / "calibration.safetensors"
        if not path.is_file():
            ptq4adm.calibrate(pipe, batch=arguments.batch, cache=work.parent).save(path)
        ptq4adm.quantize(pipe, ptq4adm.QuantConfig(**config), Calibration.load(path))
        ptq4adm.save_pipeline(pipe, saved)
    # a quantized model is read again: what is measured is what a user loads
    pipe = ptq4adm.load_pipeline(source if config is None else saved, device=arguments.device)
    clips = work / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    names = list(captions)
    for first in range(0, len(names), arguments.batch):
        part = names[first : first + arguments.batch]
        if all((clips / name).is_file() for name in part):
            continue
        waves = pipe(
            [captions[name] for name in part], steps=arguments.steps, seed=arguments.seed + first
        )
        for name, wave in zip(part, waves, strict=True):
            write_wav(clips / name, wave.cpu(), pipe.sampling_rate)
    tensors = pipe.unet.state_dict().values()
    # a float UNet is counted in float16
    size = sum(t.numel() * (2 if config is None else t.element_size()) for t in tensors)
    return round(size / 1e6, 1)


def measure(real: ClipSet, made: ClipSet, embedding: AudioEmbedding, cache: Path) -> dict[str, Any]:
    """Figures of one set of clips in one embedding, with the ends of their intervals."""
    settings = EvaluationSettings(subsets=30)
    result = evaluate(real, made, embedding=embedding, paired=True, settings=settings, cache=cache)
    found: dict[str, Any] = {"embedding": embedding.name, "clips": result.clips}
    for metric in result.metrics:
        found[metric.name] = f"{metric.value:.6g}"
        found[f"{metric.name}_low"] = f"{metric.low:.6g}"
        found[f"{metric.name}_high"] = f"{metric.high:.6g}"
    return found | {"warnings": "; ".join(result.warnings)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown: a line a model and variant, a column a figure and embedding."""
    embeddings = list(dict.fromkeys(row["embedding"] for row in rows))
    columns = [
        (name, figure)
        for name in embeddings
        for figure in _FIGURES
        if any(row["embedding"] == name and row.get(figure) for row in rows)
    ]
    lines = [["model", "", "UNet MB", *(f"{figure} ({name})" for name, figure in columns)]]
    lines.append(["---"] * len(lines[0]))
    places = dict.fromkeys((row["model"], row["variant"]) for row in rows)
    base: dict[tuple[str, str], float] = {}
    for model, variant in places:
        mine = {
            row["embedding"]: row
            for row in rows
            if (row["model"], row["variant"]) == (model, variant)
        }
        cells = [model, variant, str(next(iter(mine.values()))["unet_mb"])]
        for name, figure in columns:
            value = float(mine[name][figure])
            cell = f"{value:.3f}"
            if figure == _FIGURES[0] and variant == "float":
                base[model, name] = value
            elif figure == _FIGURES[0]:
                cell += f" ({100 * (value / base[model, name] - 1):+.1f} %)"
            cells.append(cell)
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=_pair, action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--real", type=Path, required=True, help="folder of .wav files")
    parser.add_argument("--captions", type=Path, required=True, help="CSV: file, caption")
    parser.add_argument(
        "--embedding", type=_pair, action="append", required=True, metavar="NAME[=WEIGHTS]"
    )
    parser.add_argument("--clips", type=int, help="of the captions, the first (default: all)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "paper-table")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def _pair(text: str) -> tuple[str, Path | None]:
    name, _, path = text.partition("=")
    return name, Path(path) if path else None


if __name__ == "__main__":
    main()
