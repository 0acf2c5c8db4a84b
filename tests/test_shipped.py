"""The shipped pipeline: its size, its card's numbers, and that quantizing it keeps its sound."""

from __future__ import annotations

import json

import pytest
import torch

import ptq4adm
from ptq4adm.evaluation.paired import latent_sqnr_db


def test_it_fits_the_package() -> None:
    files = [p for p in ptq4adm.shipped_pipeline_path().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 30e6
    assert max(p.stat().st_size for p in files) <= 15e6


def test_its_evaluation_is_good_enough_to_be_worth_quantizing() -> None:
    report = json.loads((ptq4adm.shipped_pipeline_path() / "evaluation.json").read_text())
    assert report["real_test"]["accuracy"] >= 0.9
    assert report["generated"]["clips"] == 80
    assert report["generated"]["accuracy"] >= 0.6
    assert len(report["spread_ratio"]) == 10
    assert min(report["spread_ratio"].values()) >= 0.5


def test_its_card_shows_the_evaluation() -> None:
    folder = ptq4adm.shipped_pipeline_path()
    report = json.loads((folder / "evaluation.json").read_text())
    assert f"| {100 * report['generated']['accuracy']:.1f} %" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("scheme", "least_db"), [("w8a8", 25.0), ("w4a8", 8.0)])
def test_quantized_latents_stay_close(scheme: str, least_db: float) -> None:
    # few steps and prompts: the measured quality is in benchmarks/results, this only sees breakage
    pipe = ptq4adm.load_pipeline(ptq4adm.shipped_pipeline_path())
    embeds = pipe.encode_prompts(["a slow low cello melody", "loud drums"])
    reference = pipe.denoise(embeds, steps=4, seed=5)
    calibration = ptq4adm.calibrate(
        pipe, ["a bird chirping", "a man speaking", "drums"], steps=4, progress=False
    )
    ptq4adm.quantize(pipe, ptq4adm.QuantConfig(scheme=scheme), calibration, progress=False)
    test = pipe.denoise(embeds, steps=4, seed=5)
    assert bool((latent_sqnr_db(reference, test) > least_db).all())
    assert not torch.equal(reference, test)
