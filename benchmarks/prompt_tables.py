"""Tables of docs/prompts.md from the rows of benchmarks/bench_prompt*.py."""

from __future__ import annotations

import statistics
from pathlib import Path

from cpu_tables import markdown

from ptq4adm.bench import read_rows

_BUDGETS = ("32", "64", "128")
_SHOWN = ("seeds", "random", "greedy", "greedy, grid only", "greedy, space only")
_ENCODERS = {"none": "", "TextToAudioPipeline": "the pipeline's", "all-MiniLM-L6-v2": "MiniLM's"}
Row = dict[str, str]


def grid_table(results: Path) -> str:
    """Cells and pairs by the grid alone: seeds, random and greedy at every budget."""
    rows = [row for row in _newest(results) if row["encoder"] == "none"]
    header = ["domain", "prompts", "seeds: pairs (cells)", "random", "best random draw", "greedy"]
    lines = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        found = {(r["choice"], r["prompts"]): r for r in rows if r["domain"] == domain}
        seeds = next(row for (choice, _), row in found.items() if choice == "seeds")
        for budget in _BUDGETS:
            chance, greedy = found["random", budget], found["greedy", budget]
            best = f"{float(chance['pairs_best_draw']):.1%}"
            cells = [_grid(row) for row in (seeds, chance, greedy)]
            lines.append([domain, budget, cells[0], cells[1], best, cells[2]])
    return markdown(header, lines, _note(rows))


def space_table(results: Path) -> str:
    """Pairs, radius and mean distance in each encoder's space."""
    rows = [row for row in _newest(results) if row["encoder"] != "none"]
    header = ["domain, space", "prompts", "choice", "pairs", "radius", "mean distance"]
    header += ["mean distance of unseen candidates", "of held-out prompts"]
    lines = []
    for row in rows:
        if row["choice"] not in _SHOWN:
            continue
        space = f"{row['domain']}, {_ENCODERS[row['encoder']]}"
        held = f"{float(row['heldout_mean']):.3f}" if row["heldout_mean"] else ""
        numbers = [f"{float(row[key]):.3f}" for key in ("radius", "mean_distance", "unseen_mean")]
        pairs = f"{float(row['pairs']):.1%}"
        lines.append([space, row["prompts"], row["choice"], pairs, *numbers, held])
    return markdown(header, lines, _note(rows))


def reading_table(results: Path) -> str:
    """The tagger on captions by hand, and the grammar's round trip: newest row of each."""
    newest = {row["what"]: row for row in read_rows(results / "prompts-reading.csv")}
    header = [
        "what",
        "prompts",
        "right in all",
        "of what is found, right",
        "of what is said, found",
    ]
    lines = []
    for row in newest.values():
        precision = f"{float(row['precision']):.1%}" if row["precision"] else ""
        recall = f"{float(row['recall']):.1%}"
        lines.append([row["what"], row["count"], row["exact"], precision, recall])
    last = list(newest.values())[-1]
    note = f"`benchmarks/bench_prompt_reading.py`; commit {last['commit']}, {last['date']} UTC."
    return markdown(header, lines, note)


def quality_table(results: Path) -> str:
    """Latent SQNR of W4A8 by the choice of 16 calibration prompts."""
    newest = {(r["choice"], r["repeat"]): r for r in read_rows(results / "prompts-quality.csv")}
    rows = list(newest.values())
    header = ["16 calibration prompts", "sets", "latent SQNR, mean of each set", "their mean"]
    lines = []
    for choice in dict.fromkeys(row["choice"] for row in rows):
        means = [float(row["sqnr_mean_db"]) for row in rows if row["choice"] == choice]
        each = ", ".join(f"{mean:.2f}" for mean in means)
        lines.append([choice, str(len(means)), f"{each} dB", f"{statistics.mean(means):.2f} dB"])
    note = (
        f"W4A8 of all layers with absmax scales, against float, {rows[-1]['clips']} held-out "
        "prompts; "
        f"`benchmarks/bench_prompt_quality.py`; {rows[-1]['device']}, commit "
        f"{rows[-1]['commit']}, {rows[-1]['date']} UTC."
    )
    return markdown(header, lines, note)


def _newest(results: Path) -> list[Row]:
    """The newest row of each domain, encoder, choice and size; "random, ..." becomes "random"."""
    found: dict[tuple[str, ...], Row] = {}
    for row in read_rows(results / "prompts.csv"):
        choice = "random" if row["choice"].startswith("random") else row["choice"]
        key = (row["domain"], row["encoder"], choice, row["prompts"])
        found[key] = {**row, "choice": choice}
    return list(found.values())


def _grid(row: Row) -> str:
    return f"{float(row['pairs']):.1%} ({float(row['cells']):.1%})"


def _note(rows: list[Row]) -> str:
    last = rows[-1]
    return (
        f"`benchmarks/bench_prompts.py`; {last['device']}, {last['threads']} threads, commit "
        f"{last['commit']}, {last['date']} UTC."
    )
