"""The demo on the small pipeline: it runs, and its table is what it measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import soundfile

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "demo", module)
        spec.loader.exec_module(module)
    return module


def test_demo_writes_clips_picture_and_results(
    demo: ModuleType, tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'demo'")
    arguments = ["--model", str(tiny_pipeline), "--output", str(tmp_path), "--steps", "2"]
    assert demo.main([*arguments, "--rounds", "2", "--calibration-prompts", "2"]) == 0
    rows = {row["variant"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    assert list(rows) == ["float32", "w8a8", "w4a8"]
    assert rows["w8a8"]["prompts"] == len(demo.PROMPTS) >= 8
    assert rows["w8a8"]["latent_sqnr_db_min"] > rows["w4a8"]["latent_sqnr_db_median"]
    sizes = [row["unet_bytes_resident"] for row in rows.values()]
    assert sizes == sorted(sizes, reverse=True)
    table = capsys.readouterr().out
    for name, row in rows.items():
        assert f"{name:<9}{row['unet_bytes_resident'] / 1e6:8.2f}" in table
        assert len(list((tmp_path / name).glob("*.wav"))) == len(demo.PROMPTS)
    assert soundfile.info(next((tmp_path / "w4a8").glob("*.wav"))).frames == 10240
    assert (tmp_path / "mel.png").stat().st_size > 10_000
    assert (tmp_path / "results.csv").read_text().count("\n") == 4


def test_demo_prompts_are_not_calibrated_on(demo: ModuleType) -> None:
    from ptq4adm.calibration import default_prompts

    assert set(demo.PROMPTS).isdisjoint(default_prompts())


def test_demo_says_when_there_is_no_model(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--model", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith("demo: error: ")
