"""Imports go one way: every room imports only from the rooms before it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# room -> rooms it may import from; a room without a line is an error
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "prompts": {"errors"},
    "protocols": {"errors"},
    "config": {"errors"},
    "packing.layout": {"errors"},
    "kernels": {"errors"},
    "dispatch": {"errors"},
    "ops": {"errors", "packing.layout", "kernels", "dispatch", "_cpu", "_cuda"},
    "quant": {"errors", "config", "packing.layout", "ops"},
    "packing.folders": {"errors"},
    "calibration.files": {"errors", "packing.folders"},
    "calibration": {"errors", "protocols", "config", "quant", "calibration.files"},
    "nn": {"errors", "config", "quant", "packing.layout", "dispatch", "ops"},
    "rounding": {"errors", "config", "packing.layout", "ops", "quant", "calibration"},
    "packing.weight_files": {"errors"},
    "packing.portions": {"nn"},
    "packing.description": {"errors", "config", "nn"},
    "packing.checkpoint": {
        "errors", "config", "nn", "packing.layout", "packing.description", "packing.portions",
        "packing.weight_files",
    },
    "packing": {"packing.layout"},
    "models": {
        "errors", "protocols", "config", "nn", "packing.layout", "packing.description",
        "packing.checkpoint",
    },
    "floating": {"dispatch", "nn", "models"},
    "calibrating": {
        "errors", "protocols", "config", "packing.checkpoint", "calibration", "nn", "models",
    },
    "balancing": {"errors", "calibrating", "calibration", "nn", "rounding"},
    "correcting": {"errors", "calibration", "packing.checkpoint", "models"},
    "replacing": {"config", "calibration", "nn", "quant", "rounding"},
    "quantization": {
        "errors", "protocols", "config", "packing.layout", "packing.description",
        "packing.checkpoint", "packing.folders", "quant", "calibration", "calibrating", "nn", "ops",
        "models", "replacing", "rounding",
    },
    "sensitivity": {
        "errors", "protocols", "config", "calibration", "calibration.files", "nn", "replacing",
        "rounding", "models", "quantization",
    },
    "integrations": {
        "errors", "config", "calibration", "calibrating", "nn", "packing.description",
        "packing.checkpoint", "packing.weight_files", "models", "quantization",
    },
    "evaluation": {"errors", "calibration.files", "models"},
    "report": {
        "errors", "config", "prompts", "quant", "calibration", "calibration.files", "calibrating",
        "sensitivity", "nn", "models", "quantization", "evaluation",
    },
    "assets": set(),
    "bench": {
        "errors", "protocols", "config", "packing.layout", "quant", "calibration", "nn", "ops",
        "models", "quantization", "kernels", "dispatch",
    },
}  # fmt: skip
# the top of the house may import every room below it
TOP = {"__main__", "cli", "ptq4adm"}


def _room(parts: tuple[str, ...]) -> str:
    """Room of a dotted path below ``ptq4adm``: the longest known prefix, or the first name."""
    for length in (2, 1):
        name = ".".join(parts[:length])
        if len(parts) >= length and name in ALLOWED:
            return name
    return parts[0] if parts else "ptq4adm"


def _sources() -> list[tuple[Path, tuple[str, ...]]]:
    found = []
    for base, prefix in ((ROOT / "ptq4adm", ()), (ROOT / "kernels", ("kernels",))):
        for path in sorted(base.rglob("*.py")):
            parts = prefix + path.relative_to(base).with_suffix("").parts
            found.append((path, parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def _imports(tree: ast.AST) -> list[tuple[int, tuple[str, ...]]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, *rest = name.split(".")
            if head == "ptq4adm":
                found.append((node.lineno, tuple(rest)))
    return found


@pytest.mark.parametrize(
    ("path", "parts"), _sources(), ids=lambda v: v.name if isinstance(v, Path) else ""
)
def test_imports_go_one_way(path: Path, parts: tuple[str, ...]) -> None:
    room = _room(parts)
    for line, target in _imports(ast.parse(path.read_text())):
        other = _room(target)
        if room in TOP or room == other:
            continue
        assert room in ALLOWED, f"{path}: room {room!r} has no line in tests/test_layering.py"
        if other == "ptq4adm":
            # `from ptq4adm import __version__`: the root holds names only
            continue
        assert other in ALLOWED[room], f"{path}:{line}: {room} must not import {other}"


def test_only_ops_and_bench_import_compiled_code() -> None:
    users = {
        _room(parts)
        for path, parts in _sources()
        for _, target in _imports(ast.parse(path.read_text()))
        if _room(target) in {"kernels", "_cpu", "_cuda"}
    }
    # bench plans, compiles and measures tiles itself
    assert users <= {"ops", "kernels", "bench"}


def test_csrc_includes_no_torch_header() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert sources
    for path in sources:
        text = path.read_text()
        assert "torch/" not in text, f"{path} includes torch"
        assert "ATen" not in text, f"{path} includes torch"
