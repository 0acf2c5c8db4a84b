"""The package list, the import guard and what an import costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]


def test_pyproject_lists_every_package_folder() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    folders = {
        ".".join(("ptq4adm", *p.parent.relative_to(ROOT / "ptq4adm").parts))
        for p in (ROOT / "ptq4adm").rglob("__init__.py")
    }
    folders |= {
        ".".join(("ptq4adm", "kernels", *p.parent.relative_to(ROOT / "kernels").parts))
        for p in (ROOT / "kernels").rglob("__init__.py")
    }
    assert listed == folders


def test_constraints_satisfy_the_ranges_of_pyproject() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[name.lower()] = version
    wanted = project["dependencies"] + [
        r for extra in project["optional-dependencies"].values() for r in extra
    ]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name.lower() in pins:
            assert requirement.specifier.contains(pins[requirement.name.lower()]), text


def test_kernels_folder_is_empty_under_its_bare_name() -> None:
    """So that transformers, which looks for a package of that name, works in the checkout."""
    code = "import diffusers.loaders.peft, transformers.modeling_utils, kernels; kernels.{}"
    for name, fails in (("__version__", False), ("launch", True)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(name)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode != 0) == fails, done.stderr
        assert ("package 'ptq4adm.kernels'; run `pip install -e .`" in done.stderr) == fails
    done = subprocess.run(
        [sys.executable, "-c", "import kernels.launch"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No module named 'kernels.launch'" in done.stderr


@pytest.mark.parametrize("heavy", ["diffusers", "transformers", "matplotlib", "soundfile"])
def test_import_is_light(heavy: str) -> None:
    code = f"import sys, ptq4adm; sys.exit({heavy!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0, f"import ptq4adm imports {heavy}"


def test_no_public_name_is_a_room() -> None:
    # importing a submodule binds it to the package under its name, over what stood there
    import ptq4adm

    rooms = {p.stem for p in (ROOT / "ptq4adm").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert rooms.isdisjoint(ptq4adm.__all__)
    assert callable(ptq4adm.quantize)
