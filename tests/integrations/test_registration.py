"""Either package may be imported first, and neither imports the other."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ptq4adm.integrations import on_import, register
from ptq4adm.integrations.on_import import call_after_import

LOAD = """
from diffusers import UNet2DConditionModel
unet = UNet2DConditionModel.from_pretrained(sys.argv[1], subfolder="unet")
assert type(unet.hf_quantizer).__name__ == "PTQ4ADMQuantizer", unet.hf_quantizer
"""
ORDERS = {
    "the config first": "import sys; from ptq4adm import PTQ4ADMConfig" + LOAD,
    "ptq4adm first": "import sys, ptq4adm; assert 'diffusers' not in sys.modules" + LOAD,
    "diffusers first": "import sys; from diffusers import UNet2DConditionModel; import ptq4adm"
    + LOAD,
}


@pytest.fixture(scope="module")
def runs(packed: Path) -> dict[str, str]:
    """What went wrong in a process of each order; they run side by side."""
    started = {
        name: subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(packed)], stderr=subprocess.PIPE, text=True
        )
        for name, code in ORDERS.items()
    }
    errors = {name: process.communicate(timeout=240)[1] for name, process in started.items()}
    return {name: errors[name] if started[name].returncode else "" for name in started}


@pytest.mark.parametrize("name", ORDERS)
def test_a_packed_folder_loads_in_either_order(runs: dict[str, str], name: str) -> None:
    assert runs[name] == ""


def test_without_the_package_diffusers_refuses_and_says_why(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "ptq4adm")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "ptq4adm")
    with pytest.raises(ValueError, match="Unknown quantization type, got ptq4adm"):
        UNet2DConditionModel.from_pretrained(packed, subfolder="unet")
    register()
    UNet2DConditionModel.from_pretrained(packed, subfolder="unet")


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module that can be imported and was not."""
    (tmp_path / "ptq4adm_late_module.py").write_text("VALUE = __loader__\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "ptq4adm_late_module", raising=False)
    return "ptq4adm_late_module"


def test_the_call_comes_after_the_module_ran_and_its_loader_is_the_real_one(late: str) -> None:
    seen: list[object] = []
    call_after_import(late, lambda: seen.append(sys.modules[late].VALUE))
    assert seen == []
    module = importlib.import_module(late)
    assert seen == [module.__loader__]
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__
    assert type(module.__loader__).__module__ != on_import.__name__


def test_an_imported_module_is_called_for_at_once_and_again_when_reloaded(late: str) -> None:
    module = importlib.import_module(late)
    seen: list[ModuleType] = []
    call_after_import(late, lambda: seen.append(sys.modules[late]))
    assert seen == [module]
    importlib.reload(module)
    assert seen == [module, module]


def test_two_waiters_for_one_module_are_both_called(late: str) -> None:
    seen: list[str] = []
    call_after_import(late, lambda: seen.append("first"))
    call_after_import(late, lambda: seen.append("second"))
    importlib.import_module(late)
    assert sorted(seen) == ["first", "second"]


def test_a_module_that_does_not_exist_is_still_missing(late: str) -> None:
    call_after_import(f"{late}_absent", lambda: pytest.fail("called"))
    with pytest.raises(ModuleNotFoundError, match="absent"):
        importlib.import_module(f"{late}_absent")


def test_a_broken_registry_does_not_break_the_import_of_diffusers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers.quantizers import auto

    from ptq4adm import integrations

    monkeypatch.delattr(auto, "AUTO_QUANTIZER_MAPPING")
    integrations._register_quietly()
    assert "diffusers does not know the method 'ptq4adm'" in caplog.text
