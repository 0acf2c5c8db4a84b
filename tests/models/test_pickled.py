"""Tensors of pickled files: mapped, nothing but tensors, and no code is run."""

from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ptq4adm.errors import (
    CheckpointError,
    MissingComponentError,
    TruncatedCheckpointError,
    UnsafeCheckpointError,
)
from ptq4adm.models.pickled import few, read_tensors, take


class Trap:
    """Pickles as a call that makes a file."""

    def __init__(self, marker: Path, call: Any = os.system) -> None:
        self.marker, self.call = marker, call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, (f"touch {self.marker}",)


class Callback:
    """A trainer's class, which these files name."""


WEIGHTS = {"a": torch.arange(4.0), "b.c": torch.ones(2, 3, dtype=torch.float16)}


def _same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == WEIGHTS.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in WEIGHTS.items()
    )


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older"])
@pytest.mark.parametrize("is_whole", [True, False], ids=["state dict", "entry"])
def test_the_state_dict_is_read(tmp_path: Path, is_zip: bool, is_whole: bool) -> None:
    path = tmp_path / "a.ckpt"
    content: Any = WEIGHTS if is_whole else {"epoch": 3, "state_dict": WEIGHTS}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    assert _same(read_tensors(path, "state_dict"))


def test_safetensors_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(WEIGHTS, tmp_path / "a.safetensors")
    assert _same(read_tensors(tmp_path / "a.safetensors", "state_dict"))


def test_weights_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(1 << 20)}, path)
    tensor = read_tensors(path)["a"]
    with path.open("r+b") as file:
        content = path.read_bytes()
        at = content.index(b"\0" * (1 << 20)) + (1 << 19)
        file.seek(at - at % 4)
        file.write(b"\xff\xff\x7f\x7f" * 4)
    # what was written into the file after it was read is seen: it was not copied
    assert tensor.max() > 1e38


def test_a_name_of_a_class_is_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": WEIGHTS, "callbacks": {Callback: {"best": 0.5}}}, path)
    assert _same(read_tensors(path, "state_dict"))


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older"])
@pytest.mark.parametrize("call", [os.system, eval, Path], ids=["system", "eval", "class"])
def test_code_is_refused_and_not_run(tmp_path: Path, is_zip: bool, call: Any) -> None:
    path, marker = tmp_path / "a.ckpt", tmp_path / "marker"
    content = {"state_dict": WEIGHTS, "hyper_parameters": Trap(marker, call)}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UnsafeCheckpointError, match="nothing of it was run"):
        read_tensors(path, "state_dict")
    assert not marker.exists()


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_an_object_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "callbacks": [Callback()]}, tmp_path / "a.ckpt")
    with pytest.raises(UnsafeCheckpointError, match="Callback"):
        read_tensors(tmp_path / "a.ckpt", "state_dict")


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps({"a": Trap(tmp_path / "marker")}, protocol=2))
    with pytest.raises(UnsafeCheckpointError, match="system"):
        read_tensors(tmp_path / "a.ckpt")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older"])
@pytest.mark.parametrize("kept", [0.9, 0.5, 0.02])
def test_a_truncated_file_is_refused(tmp_path: Path, is_zip: bool, kept: float) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.zeros(5000)}, path, _use_new_zipfile_serialization=is_zip)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(TruncatedCheckpointError, match="again"):
        read_tensors(path)


def test_a_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(TruncatedCheckpointError, match="cut short"):
        read_tensors(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with pytest.raises(MissingComponentError, match="no such file"):
        read_tensors(path)
    path.write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match="did not write it"):
        read_tensors(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="did not write it"):
        read_tensors(path)
    torch.save(torch.ones(3), path)
    with pytest.raises(CheckpointError, match="a dictionary of tensors, got Tensor"):
        read_tensors(path)
    torch.save({"state_dict": {"a": torch.ones(3), "b": 3}}, path)
    with pytest.raises(CheckpointError, match=r"nothing but tensors, got 'b \(int\)'"):
        read_tensors(path, "state_dict")
    torch.save(collections.OrderedDict(), path)
    with pytest.raises(CheckpointError, match="holds no tensor"):
        read_tensors(path)


def test_prefixes_and_messages() -> None:
    assert list(take(WEIGHTS, "b.")) == ["c"]
    assert few(["c", "a", "b", "d", "e"]) == "'a', 'b', 'c' and 2 more"
    assert few(["a"]) == "'a'"
