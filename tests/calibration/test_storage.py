"""The calibration file: round trip, digest, and everything that is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ptq4adm.calibration import Calibration, CalibrationMeta
from ptq4adm.errors import CalibrationError, OutputError
from ptq4adm.quant.observers import HistogramObserver

META = CalibrationMeta(
    fingerprint="f" * 32,
    prompts_hash="p" * 16,
    prompt_count=2,
    steps=4,
    guidance=2.5,
    seed=0,
    buckets=3,
    num_train_timesteps=1000,
)


def _observer(*buckets: int) -> HistogramObserver:
    observer = HistogramObserver(3)
    for bucket in buckets:
        observer.observe(torch.randn(50) * (bucket + 1), bucket)
    return observer


@pytest.fixture
def calibration() -> Calibration:
    return Calibration(
        META,
        {
            "conv": (_observer(0, 2).record(),),
            "shortcut": (_observer(0, 2).record(), _observer(0, 2).record()),
            "unreached": (_observer().record(),),
        },
    )


@pytest.fixture
def path(calibration: Calibration, tmp_path: Path) -> Path:
    calibration.save(tmp_path / "calibration.safetensors")
    return tmp_path / "calibration.safetensors"


def _rewrite(path: Path, **header: str) -> None:
    """Change entries of a file's header."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    save_file(load_file(path), path, metadata={**metadata, **header})


def test_a_file_gives_back_what_was_saved(calibration: Calibration, path: Path) -> None:
    back = Calibration.load(path)
    assert back.meta == calibration.meta
    assert list(back.records) == list(calibration.records)
    assert back.digest() == calibration.digest()
    for name in ("conv", "shortcut"):
        for observer in ("absmax", "percentile", "squared_error"):
            a, b = back.scales(name, observer), calibration.scales(name, observer)
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


def test_scales_have_a_row_a_segment_and_none_for_what_was_not_reached(
    calibration: Calibration,
) -> None:
    scales = calibration.scales("shortcut", "absmax")
    assert scales is not None
    assert scales.shape == (2, 3)
    assert calibration.scales("unreached", "absmax") is None
    assert calibration.scales("another", "absmax") is None


def test_buckets_know_which_were_reached(calibration: Calibration) -> None:
    assert calibration.buckets.calibrated == (True, False, True)
    assert calibration.buckets.num_train_timesteps == 1000


def test_the_digest_changes_with_any_content(calibration: Calibration) -> None:
    other_seed = Calibration(dataclasses.replace(META, seed=1), calibration.records)
    renamed = {"conv0" if n == "conv" else n: r for n, r in calibration.records.items()}
    more = {**calibration.records, "conv": (_observer(0, 1, 2).record(),)}
    digests = {
        c.digest()
        for c in (calibration, other_seed, Calibration(META, renamed), Calibration(META, more))
    }
    assert len(digests) == 4


def test_the_file_holds_no_prompt_and_can_be_read_by_others(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["meta"])
    assert set(meta) == {f.name for f in dataclasses.fields(CalibrationMeta)}
    (path.parent / "other").touch()
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode


def test_an_interrupted_save_leaves_the_old_file(
    calibration: Calibration, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def interrupted(_tensors: object, target: Path, **_: object) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("ptq4adm.calibration.files.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibration.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_unwritable_place_is_an_output_error(calibration: Calibration, path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write the calibration"):
        calibration.save(path / "below a file")


class TestRefused:
    """Files that are not a calibration of this version."""

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match="no such file"):
            Calibration.load(tmp_path / "none")

    @pytest.mark.parametrize("keep", [0, 5, 300, -1])
    def test_truncated(self, path: Path, keep: int) -> None:
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CalibrationError, match="truncated or not a calibration"):
            Calibration.load(path)

    def test_another_kind_of_file(self, path: Path) -> None:
        save_file({"weight": torch.zeros(2)}, path)
        with pytest.raises(CalibrationError, match="not a calibration"):
            Calibration.load(path)

    def test_another_version(self, path: Path) -> None:
        _rewrite(path, format_version="2")
        with pytest.raises(CalibrationError, match="format 2, this version reads 1"):
            Calibration.load(path)

    @pytest.mark.parametrize("header", [{"meta": "{}"}, {"records": "[1]"}, {"meta": "{"}])
    def test_broken_header(self, path: Path, header: dict[str, str]) -> None:
        _rewrite(path, **header)
        with pytest.raises(CalibrationError, match="broken header"):
            Calibration.load(path)

    def test_tensors_that_do_not_fit_the_header(self, path: Path) -> None:
        _rewrite(path, records='[["conv", 1]]')
        with pytest.raises(CalibrationError, match=r"counts is \[4, 3, 1024\], needs \[1, 3"):
            Calibration.load(path)

    def test_nothing_recorded(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match="holds no records"):
            Calibration(META, {}).save(tmp_path / "empty")
