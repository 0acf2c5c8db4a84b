"""Measured tiles of backend ``cuda``: one file a GPU beside Triton's, one reader, one writer.

``configs/cuda-<device>.json``, written by ``ptq4adm tune --backend cuda``::

    {"format": "ptq4adm cuda tiles", "version": 1, "device": "nvidia_h100_80gb_hbm3",
     "tiles": {"w4a8_conv2d-n320-k2880":
                {"8192": {"family": "sm80", "block_m": 128, "block_n": 64, "split_k": 1}}}}

Products are of one class if kernel, gating, groups, N and K are the same; convolutions whose
activations can come as boxes (``cuda_boxes.py``) are a class of their own, ``-boxes``, as the
others cannot have the tiles of ``sm90a``. A class has a tile for each M that was measured.

A file that cannot be read in full is an error that names it, whatever product asked: the next best
tile in its place would be a slower product that nobody notices.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ptq4adm.errors import ConfigError
from ptq4adm.kernels import tuning
from ptq4adm.kernels.tuning import BLOCK_K, Problem

FORMAT, VERSION = "ptq4adm cuda tiles", 1
# families of kernels: for every product on every GPU, and for some on compute capability 9.0
SM80, SM90A = "sm80", "sm90a"
FAMILIES = (SM80, SM90A)
_CLASS = re.compile(
    r"w[48]a8_(?:gemm|conv2d(-boxes)?)(-geglu)?(-grouped)?-n[1-9]\d*-k(?P<K>[1-9]\d*)"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CudaTile:
    """How a product is cut into blocks.

    Attributes:
        block_m: rows (pixels) of a tile.
        block_n: output channels of a tile.
        split_k: blocks that share the k of one tile.
        family: ``sm80``, or ``sm90a`` for compute capability 9.0: warpgroup products, and
            activations in boxes.
    """

    block_m: int
    block_n: int
    split_k: int = 1
    family: str = SM80


def class_name(problem: Problem) -> str:
    """Return the name of the products that differ in M and GPU only."""
    name = tuning.class_name(problem)
    if problem.box is None:
        return name
    return name.replace("conv2d", "conv2d-boxes", 1)


def config_file(device: str, folder: Path | None = None) -> Path:
    """Return the file of a GPU's measured tiles, which may not exist.

    Args:
        device: the GPU's name in names of files.
        folder: of the files; None for the one in use.
    """
    return (folder or tuning.CONFIGS) / f"cuda-{device}.json"


@cache
def find(problem: Problem) -> CudaTile | None:
    """Return the measured tile of a product's class for the nearest M; None if there is none.

    Raises:
        ConfigError: if the GPU's file is not what it should be.
    """
    path = config_file(problem.device)
    tiles = load(path, problem.device)
    if not tiles and problem.capability:
        _tell_untuned(problem.device, path)
    measured = tiles.get(class_name(problem), {})
    nearest = tuning.nearest_m(measured, problem.M)
    return None if nearest is None else measured[nearest]


@cache
def load(path: Path, device: str) -> dict[str, dict[int, CudaTile]]:
    """Read a GPU's tiles by class and M; none if there is no file.

    Args:
        path: the file.
        device: the GPU whose name it must hold.

    Raises:
        ConfigError: if it is not a file of tiles of this version and GPU, in every entry.
    """
    if not path.exists():
        return {}
    try:
        return _parse(json.loads(path.read_text()), device)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: {error}; delete it, or measure again: ptq4adm tune --backend cuda --fresh"
        ) from error


def save(path: Path, device: str, tiles: dict[str, dict[int, CudaTile]]) -> None:
    """Write a GPU's tiles, atomically; they are looked up anew from then on."""
    entries = {
        name: {str(m): {"family": by_m[m].family} | asdict(by_m[m]) for m in sorted(by_m)}
        for name, by_m in sorted(tiles.items())
    }
    content = {"format": FORMAT, "version": VERSION, "device": device, "tiles": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
    forget()


def forget() -> None:
    """Read files anew when they are asked for next."""
    load.cache_clear()
    find.cache_clear()


@cache
def _tell_untuned(device: str, path: Path) -> None:
    _log.warning(
        "no measured tiles of backend cuda for %s (%s): counted ones are used; "
        "`ptq4adm tune --backend cuda` measures them",
        device,
        path.name,
    )


# --- the reader: every value is checked, and errors say where it stands -------------------------


def _parse(content: Any, device: str) -> dict[str, dict[int, CudaTile]]:
    """Return the tiles of a file's content; ValueError says what is wrong."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not a file of measured tiles: expected the format {FORMAT!r}")
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise ValueError(f"version {version!r}: expected {VERSION}")
    if version > VERSION:
        raise ValueError(
            f"version {version} is newer than this ptq4adm reads ({VERSION}): upgrade it"
        )
    if content.get("device") != device:
        raise ValueError(f"tiles of device {content.get('device')!r}, expected {device!r}")
    tiles = content.get("tiles")
    if not isinstance(tiles, dict):
        raise ValueError(f"tiles = {tiles!r}: expected an object of products")
    return {name: _parse_class(name, by_m) for name, by_m in tiles.items()}


def _parse_class(name: str, by_m: Any) -> dict[int, CudaTile]:
    match = _CLASS.fullmatch(name)
    if match is None:
        raise ValueError(f"product {name!r}: expected such as 'w4a8_conv2d-geglu-n320-k2880'")
    if not isinstance(by_m, dict) or not by_m:
        raise ValueError(f"{name}: expected an object of tiles by M")
    steps = int(match["K"]) // BLOCK_K
    found = {}
    for m, fields in by_m.items():
        if not re.fullmatch(r"[1-9]\d*", m):
            raise ValueError(f"{name}: M = {m!r}, expected a positive number")
        found[int(m)] = _parse_tile(f"{name}, M {m}", fields, steps)
    return found


def _parse_tile(where: str, fields: Any, steps: int) -> CudaTile:
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a tile, got {fields!r}")
    sizes = {"block_m", "block_n", "split_k"}
    if not sizes <= set(fields) <= sizes | {"family"}:
        names = ", ".join(sorted(sizes | {"family"}))
        raise ValueError(f"{where}: expected {names}; got {', '.join(sorted(fields)) or 'nothing'}")
    for name in sorted(sizes):
        if type(fields[name]) is not int or fields[name] < 1:
            raise ValueError(f"{where}: {name} = {fields[name]!r}, expected a positive number")
    if fields["split_k"] > steps:
        raise ValueError(
            f"{where}: split_k = {fields['split_k']}, but there are {steps} steps of {BLOCK_K} k"
        )
    family = fields.get("family", SM80)
    if family not in FAMILIES:
        raise ValueError(f"{where}: family {family!r}, expected one of {', '.join(FAMILIES)}")
    return CudaTile(**fields)
