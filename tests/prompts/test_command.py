"""`ptq4adm prompts`, and the commands that take its prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ptq4adm
from ptq4adm.cli import main
from ptq4adm.prompts import Augmentation, find_domain


def test_it_prints_coverage_and_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = tmp_path / "seeds.txt"
    seeds.write_text("# mine\na dog barking loudly\nrain on a roof\n")
    arguments = ["prompts", str(seeds), "--budget", "8", "--pool", "100"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "before:    2 prompts cover" in shown
    assert "after:     8 prompts cover" in shown
    assert "added 6:" in shown
    out = tmp_path / "out.txt"
    assert main([*arguments, "-o", str(out)]) == 0
    prompts = out.read_text().splitlines()
    assert prompts[:2] == ["a dog barking loudly", "rain on a roof"]
    assert len(prompts) == 8
    assert all(f"  {prompt}" in shown for prompt in prompts[2:])
    assert main([*arguments, "-o", str(tmp_path / "out.json"), "--json"]) == 0
    # what the two files said was printed before
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :])["prompts"] == prompts
    assert Augmentation.load(tmp_path / "out.json").prompts == tuple(prompts)


def test_a_model_brings_its_domain_and_encoder(
    tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prompts", "--model", str(tiny_pipeline), "--domain", "audioldm-tiny"]
    arguments += ["--budget", "20", "--pool", "80", "--json", "--quiet"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["domain"], result["encoder"]) == ("audioldm-tiny", "AudioLDM")
    assert result["curve"][-1]["coverage"]["radius"] < result["curve"][0]["coverage"]["radius"]
    assert main([*arguments, "--encoder", "none"]) == 0
    assert json.loads(capsys.readouterr().out)["encoder"] is None


def test_excluded_and_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds, held = tmp_path / "seeds.txt", tmp_path / "held.txt"
    seeds.write_text("a dog barking loudly\nrain on a roof\n")
    held.write_text("The dog barks loudly.\n")
    arguments = ["prompts", str(seeds), "--budget", "3", "--pool", "50"]
    assert main([*arguments, "--exclude", str(held), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"][0] == "rain on a roof"
    for bad, code, message in (
        (["--encoder", "pipeline"], 2, "needs --model"),
        (["--grid-weight", "2"], 1, "grid_weight: got 2.0"),
        (["--domain", "x"], 1, "prompt domain 'x': unknown"),
        (["--plot", "a.pdf"], 1, "a picture is a .png or a .svg file"),
        (["--budget", "1"], 1, "budget 1 is below the 2 seeds"),
    ):
        assert main([*arguments, *bad]) == code
        assert message in capsys.readouterr().err


def test_quantize_augments(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = tmp_path / "seeds.txt"
    seeds.write_text("a dog barking loudly\nrain on a roof\n")
    arguments = ["quantize", str(tiny_pipeline), "-o", str(tmp_path / "out"), "--steps", "1"]
    arguments += ["--prompts", str(seeds), "--augment", "3"]
    assert main(arguments) == 0
    noted = capsys.readouterr().err
    assert "3 prompts from 2 seeds of the domain 'general' cover" in noted
    assert "calibrating on 3 prompts" in noted


def test_a_folder_keeps_its_domain(tiny_pipeline: Path, tmp_path: Path) -> None:
    index = json.loads((ptq4adm.shipped_pipeline_path() / "model_index.json").read_text())
    assert find_domain(index["_prompt_domain"]).name == "audioldm-tiny"
    pipe = ptq4adm.load_pipeline(tiny_pipeline)
    assert pipe.prompt_domain is None
    pipe.prompt_domain = "audioldm-tiny"
    ptq4adm.save_pipeline(pipe, tmp_path / "out")
    assert ptq4adm.load_pipeline(tmp_path / "out").prompt_domain == "audioldm-tiny"
