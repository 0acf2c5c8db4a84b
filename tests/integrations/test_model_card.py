"""The model card: its header, its example, and sizes that are the files'."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import ptq4adm
from ptq4adm.errors import CheckpointError, ConfigError, MissingComponentError
from ptq4adm.packing.checkpoint import WEIGHTS_FILE


def test_a_pipeline_s_card_says_what_it_is_and_how_it_is_loaded(packed: Path) -> None:
    card = ptq4adm.model_card(
        packed, repo_id="someone/audioldm-w4a8", base_model="a/base", license_name="cc-by-nc-sa-4.0"
    )
    header = card.split("---\n")[1]
    for line in (
        "library_name: diffusers",
        "base_model: a/base",
        "base_model_relation: quantized",
        "license: cc-by-nc-sa-4.0",
        "- ptq4adm",
    ):
        assert f"{line}\n" in header
    assert "`import ptq4adm` must come before" in card
    assert 'DiffusionPipeline.from_pretrained("someone/audioldm-w4a8")' in card
    assert "2 float" in card
    assert "4 timestep buckets" in card


def test_its_sizes_are_the_files(packed: Path) -> None:
    card = ptq4adm.model_card(packed)
    stored = (packed / "unet" / WEIGHTS_FILE).stat().st_size
    floats = ptq4adm.load_pipeline(packed).unet.dequantize()
    parameters = sum(p.numel() for p in floats.parameters())
    assert f"| this folder | {stored / 1e6:.1f} | {stored / (2 * parameters):.3f} |" in card
    assert f"| float16 | {2 * parameters / 1e6:.1f} | 1.000 |" in card


def test_its_example_runs(packed: Path) -> None:
    card = ptq4adm.model_card(packed / "unet", repo_id=(packed / "unet").as_posix())
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    names: dict[str, object] = {}
    exec(found[1], names)
    assert isinstance(names["unet"], nn.Module)


def test_a_pipeline_that_diffusers_lacks_is_loaded_by_this_package(
    packed: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed, tmp_path, dirs_exist_ok=True)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("AudioLDMPipeline", "TangoPipeline"))
    card = ptq4adm.model_card(tmp_path, repo_id="someone/tango-w4a8")
    assert "DiffusionPipeline" not in card
    assert "diffusers stops with" not in card
    assert 'ptq4adm.load_pipeline(snapshot_download("someone/tango-w4a8"))' in card
    # without an id the example says where a path goes: put one there, and it runs
    index.write_text((packed / "model_index.json").read_text())
    found = re.search(r"```python\n(.*?)```", own_card(tmp_path), re.DOTALL)
    assert found is not None
    names: dict[str, object] = {}
    exec(found[1].replace("PATH-OR-ID-OF-THIS-MODEL", tmp_path.as_posix()), names)
    assert isinstance(names["pipe"], ptq4adm.TextToAudioPipeline)
    (tmp_path / "unet" / WEIGHTS_FILE).rename(
        tmp_path / "unet" / WEIGHTS_FILE.replace(".", ".fp16.", 1)
    )
    with pytest.raises(ConfigError, match="without a variant; save"):
        own_card(tmp_path, variant="fp16")


def own_card(folder: Path, **options: Any) -> str:
    """The card of the same folder, if its pipeline were one that diffusers lacks."""
    index = folder / "model_index.json"
    text = index.read_text()
    index.write_text(text.replace("AudioLDMPipeline", "TangoPipeline"))
    try:
        return ptq4adm.model_card(folder, **options)
    finally:
        index.write_text(text)


def test_shards_of_a_variant_are_counted_together(
    load_packed: Callable[..., nn.Module], tmp_path: Path
) -> None:
    load_packed().save_pretrained(tmp_path, max_shard_size="200KB", variant="w4a8")
    stored = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    card = ptq4adm.model_card(tmp_path, variant="w4a8")
    assert f"| this folder | {stored / 1e6:.1f} |" in card
    assert ', variant="w4a8")' in card


def test_what_is_not_a_packed_model_has_no_card(tiny_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not quantized"):
        ptq4adm.model_card(tiny_pipeline)
    with pytest.raises(MissingComponentError, match="neither model_index"):
        ptq4adm.model_card(tmp_path)


@pytest.mark.parametrize("name", ["", "a\nlicense: mit", 'a"b'])
def test_a_name_that_would_break_the_header_is_refused(packed: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="base_model"):
        ptq4adm.model_card(packed, base_model=name)
