"""The page: whole, self-contained, escaped, readable without scripts."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ptq4adm import TextToAudioPipeline
from ptq4adm.errors import CalibrationMismatchError, OutputError, PromptError
from ptq4adm.evaluation.result import Evaluation, Metric
from ptq4adm.report import Report, gather, render, write_report
from ptq4adm.report.gather import ReportSettings
from ptq4adm.sensitivity import LayerSensitivity, ParetoPoint, Sensitivity

PROMPTS = ["rain <script>alert(1)</script>", 'a "bell" & a dog']
QUIET = ReportSettings(steps=2, seed=5, progress=False)


class Reader(HTMLParser):
    """Collects elements; complains of one that is not closed."""

    VOID = frozenset({"meta", "img", "link", "br", "circle", "line", "rect", "polygon", "polyline"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of all elements of one name."""
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def report(tiny_pipeline: Path) -> Report:
    """Two prompts with markup in them, nothing measured beside."""
    return gather(tiny_pipeline, PROMPTS, settings=QUIET)


def full(report: Report) -> Report:
    """The same with everything measured."""
    layers = [
        LayerSensitivity(
            "mid.<b>", 10, {"w4a8": 5, "w8a8": 9, "float": 20}, {"w4a8": 0.1, "w8a8": 0.01}
        ),
        LayerSensitivity(
            "down", 10, {"w4a8": 5, "w8a8": 9, "float": 20}, {"w4a8": 0.02, "w8a8": 1e-3}
        ),
    ]
    sensitivity = Sensitivity(
        fingerprint=report.calibration.meta.fingerprint,
        pairs=3,
        float16_bytes=50,
        fixed_bytes=2,
        layers=tuple(layers),
        chosen={"mid.<b>": "w8a8", "down": "w4a8"},
        pareto=(ParetoPoint(12, 0.24, 0.12), ParetoPoint(16, 0.32, 0.03)),
    )
    metric = Metric("frechet_distance", 1.5, 1.25, 1.75, 0.95, "", "at 9 <clips>")
    evaluation = Evaluation("logmel", "none", 4, 9, "real", "W4A8", (metric,), ("few <clips>",))
    return replace(report, sensitivity=sensitivity, evaluations=(evaluation,))


def test_every_clip_is_there_and_is_what_the_model_made(
    report: Report, float_pipe: TextToAudioPipeline
) -> None:
    page = Reader(render(report))
    audios, images = page.named("audio"), page.named("img")
    assert len(audios) == 2 * 3
    assert len(images) == 2 * 4
    assert all((image["alt"] or "").strip() for image in images)
    assert all(audio["aria-label"] for audio in audios)
    expected = float_pipe(PROMPTS, steps=2, seed=5)
    for i in range(2):
        uri = audios[3 * i]["src"] or ""
        assert uri.startswith("data:audio/wav;base64,")
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(uri.split(",")[1])))
        assert rate == float_pipe.sampling_rate
        assert np.abs(samples - expected[i].numpy()).max() < 2**-15
        names = [take.name for take in report.samples[i].takes]
        assert names == ["float", "W8A8", "W4A8"]
    assert report.samples[0].takes[0].sqnr_db is None
    assert all(
        take.sqnr_db is not None and take.sqnr_db > 0 for take in report.samples[0].takes[1:]
    )


def test_nothing_is_loaded_from_elsewhere(report: Report) -> None:
    text = render(full(report))
    page = Reader(text)
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), value
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert "@import" not in text
    assert "url(" not in text


def test_what_comes_from_outside_is_escaped(report: Report) -> None:
    text = render(full(report))
    assert "<script>alert" not in text
    page = Reader(text)
    assert len(page.named("script")) == 2
    assert "mid.<b>: 1.00e-01, w8a8" in page.texts
    assert "“rain <script>alert(1)</script>” " in page.texts
    assert page.named("audio")[3]["aria-label"] == 'float: a "bell" & a dog'
    assert "Warning: few <clips>" in page.texts
    pairs = re.search(r'id="blind-pairs">(.*?)</script>', text, re.DOTALL)
    assert pairs is not None
    found = json.loads(pairs[1])
    assert [pair["prompt"] for pair in found] == PROMPTS
    ids = {audio["id"] for audio in page.named("audio")}
    assert all(take["id"] in ids for pair in found for take in pair["takes"])


def test_what_was_not_measured_is_said_with_its_command(report: Report) -> None:
    words = " ".join(Reader(render(report)).texts)
    assert "ptq4adm sensitivity MODEL" in words
    assert "ptq4adm evaluate REFERENCE TEST" in words
    measured = " ".join(Reader(render(full(report))).texts)
    assert "ptq4adm evaluate REFERENCE TEST" not in measured
    assert "1.25 to 1.75" in measured
    assert "chosen: 0.320 of float16" in measured


def test_every_link_and_label_has_its_place(report: Report) -> None:
    page = Reader(render(report))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [(link["href"] or "")[1:] for link in page.named("a")]
    assert len(targets) == 9
    assert set(targets) <= set(ids)
    assert all(section["aria-labelledby"] in ids for section in page.named("section"))
    assert page.named("html") == [{"lang": "en"}]


def test_an_assignment_is_a_form_of_its_own(tiny_pipeline: Path, report: Report) -> None:
    names = [name for name in report.calibration.records if "attn" in name][:2]
    layers = tuple(
        LayerSensitivity(n, 1, {"w4a8": 1, "w8a8": 2, "float": 4}, {"w4a8": 0.1, "w8a8": 0.01})
        for n in names
    )
    meta = report.calibration.meta
    found = Sensitivity(meta.fingerprint, 1, 9, 1, layers, dict.fromkeys(names, "float"))
    assigned = gather(
        tiny_pipeline,
        PROMPTS,
        calibration=report.calibration,
        sensitivity=found,
        settings=QUIET,
    )
    assert [size.name for size in assigned.sizes][-1] == "W4A8, assigned"
    assert assigned.sizes[-1].layers["float"] == assigned.sizes[-2].layers["float"] + 2
    assert torch.equal(assigned.samples[0].takes[0].wave, report.samples[0].takes[0].wave)
    with pytest.raises(CalibrationMismatchError, match="sensitivity was measured on"):
        gather(tiny_pipeline, PROMPTS, sensitivity=replace(found, fingerprint="f" * 64))


def test_the_file_is_whole_and_not_replaced_unasked(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    assert write_report(report, path) == path.absolute()
    before = path.read_text()
    assert before.endswith("</html>\n")
    with pytest.raises(OutputError, match="exists already"):
        write_report(report, path)
    write_report(replace(report, title="another"), path, overwrite=True)
    assert "<title>another</title>" in path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(OutputError, match="is a folder"):
        write_report(report, tmp_path)
    with pytest.raises(OutputError, match=r"report\.html is a file, not a folder"):
        write_report(report, path / "report.html")


def test_prompts_are_needed(tiny_pipeline: Path) -> None:
    with pytest.raises(PromptError, match="empty list"):
        gather(tiny_pipeline, [], settings=QUIET)
