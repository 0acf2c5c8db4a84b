"""CDPAM: the encoder against its description, and a pickle that gets nothing but tensors."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ptq4adm.errors import (
    CheckpointError,
    DependencyError,
    MissingComponentError,
    UnsafeCheckpointError,
)
from ptq4adm.evaluation.cdpam import cdpam_network, read_old_pickle
from ptq4adm.evaluation.embeddings import load_embedding


def _tensors() -> dict[str, Tensor]:
    found = {"model_dist.net.weight": torch.zeros(3)}
    inputs, width = 1, 64
    for i in range(16):
        width = width * 2 if (i + 1) % 4 == 0 else width
        encoder, norm = f"base_encoder.encoder.{i}", f"base_encoder.ebatch.{i}"
        found[f"{encoder}.weight"] = torch.randn(width, inputs, 15) * (2 / (15 * inputs)) ** 0.5
        found[f"{encoder}.bias"] = torch.randn(width)
        for part in ("weight", "running_var"):
            found[f"{norm}.{part}"] = torch.rand(width) + 0.5
        for part in ("bias", "running_mean"):
            found[f"{norm}.{part}"] = torch.randn(width)
        found[f"{norm}.num_batches_tracked"] = torch.tensor(1)
        inputs = width
    return found


@pytest.mark.parametrize("samples", [1, 501])
def test_the_encoder_is_its_description(samples: int) -> None:
    w, x = _tensors(), torch.randn(2, samples)
    y = x[:, None]
    for i in range(16):
        encoder, norm = f"base_encoder.encoder.{i}", f"base_encoder.ebatch.{i}"
        y = functional.conv1d(y, w[f"{encoder}.weight"], w[f"{encoder}.bias"], padding=7)
        parts = ("running_mean", "running_var", "weight", "bias")
        mean, variance, scale, shift = (w[f"{norm}.{p}"][:, None] for p in parts)
        y = (y - mean) / torch.sqrt(variance + 1e-5) * scale + shift
        y = torch.where(y > 0, y, 0.1 * y)
        y = y[:, :, ::2] if (i + 1) % 4 == 0 else y
    with torch.no_grad():
        found = cdpam_network(w)(x)
    np.testing.assert_allclose(found, y.mean(2), rtol=1e-3, atol=1e-3)


def test_old_pickles_are_read_and_only_tensors_of_them(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    state = {"base_encoder.a": torch.randn(3, 4), "steps": torch.tensor(7)}
    torch.save({"state": state, "epoch": 3}, path, _use_new_zipfile_serialization=False)
    found = read_old_pickle(path.read_bytes(), "state")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    with pytest.raises(CheckpointError, match="no state dict under 'model'"):
        read_old_pickle(path.read_bytes(), "model")
    for cut in (0, 10, 200, len(path.read_bytes()) - 4):
        with pytest.raises(CheckpointError):
            read_old_pickle(path.read_bytes()[:cut], "state")


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, legacy: bool) -> None:
    touched, path = tmp_path / "touched", tmp_path / "bad.pth"
    content = {"state": {"a": torch.zeros(2), "b": _Touch(touched)}}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeCheckpointError, match="nothing of it was run"):
        read_old_pickle(path.read_bytes(), "state")
    with pytest.raises(CheckpointError):
        read_old_pickle(pickle.dumps(_Touch(touched)), "state")
    assert not touched.exists()


def test_missing_and_other_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingComponentError, match="wheel of cdpam"):
        load_embedding("cdpam", tmp_path)
    (tmp_path / "CDPAM_trained").mkdir()
    (tmp_path / "CDPAM_trained" / "scratchJNDdefault_best_model.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"needs 453c8b6edee1a94f of cdpam 0\.0\.6"):
        load_embedding("cdpam", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DependencyError, match=r"pip install --no-deps cdpam==0\.0\.6"):
        load_embedding("cdpam")
