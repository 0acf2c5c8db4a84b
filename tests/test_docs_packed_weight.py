"""docs/packed-weight.md: its examples give what it prints, its tables and constants are true."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import torch

from ptq4adm import errors
from ptq4adm.nn import W4A8Conv2d, W8A8Conv2d
from ptq4adm.packing import checkpoint
from ptq4adm.packing.layout import BLOCK_K

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "packed-weight.md").read_text(encoding="utf-8")


def test_examples_print_what_the_page_says() -> None:
    examples = "\n".join(re.findall(r"^```pycon\n(.*?)^```", PAGE, flags=re.M | re.S))
    test = doctest.DocTestParser().get_doctest(examples, {}, "packed-weight.md", None, 0)
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert result.attempted >= 20
    assert result.failed == 0, "".join(report)


def test_exercise_is_five_lines() -> None:
    (exercise,) = re.findall(r"Five lines of numpy:\n\n```pycon\n(.*?)^```", PAGE, re.M | re.S)
    lines = [line for line in exercise.splitlines() if line.startswith(">>>")]
    assert len(lines[:-1]) == 5  # and one that compares


@pytest.mark.parametrize("layer_class", [W4A8Conv2d, W8A8Conv2d])
def test_table_of_tensors_is_what_a_layer_saves(layer_class: type) -> None:
    is_four_bits = layer_class is W4A8Conv2d
    layer = layer_class.from_float(
        torch.nn.Conv2d(70, 20, 3),
        x_scale=torch.ones(1, 1),
        group_size=BLOCK_K if is_four_bits else None,
    )
    documented = {}
    for name, dtype, shape in re.findall(r"^\| `(\w+)` \| (\w+) \| \[([^]]+)\]", PAGE, re.M):
        if name == "qweight" and (dtype == "uint8") != is_four_bits:
            continue
        sizes = {"N": 20, "Kp": 9 * 128, "S": 1, "T": 1}
        values = [re.sub(r"[A-Z]\w*", lambda m, s=sizes: str(s[m[0]]), t) for t in shape.split(",")]
        documented[name] = (dtype, [_quotient(value) for value in values])
    if not is_four_bits:
        del documented["w_mult"]
    saved = {
        name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in layer.state_dict().items()
    }
    assert saved == documented


def _quotient(text: str) -> int:
    """Value of ``a`` or ``a / b``."""
    numerator, *denominator = (int(part) for part in text.split("/"))
    return numerator // denominator[0] if denominator else numerator


def test_named_metadata_and_errors_exist() -> None:
    assert f'"quant_method": "{checkpoint.METHOD}"' in PAGE
    assert f'"format_version": {checkpoint.FORMAT_VERSION},' in PAGE
    assert checkpoint.WEIGHTS_FILE in PAGE
    for name in re.findall(r"`(\w+Error)`", PAGE):
        assert issubclass(getattr(errors, name), errors.Ptq4admError)


@pytest.mark.parametrize(
    ("file", "constant", "value"),
    [
        ("csrc/cpu/kernels.h", "kBlockK", BLOCK_K),
        ("csrc/cpu/kernels.h", "kPanel", 16),
    ],
)
def test_constants_of_the_kernels_equal_the_layout(file: str, constant: str, value: int) -> None:
    from ptq4adm.ops.prepack import PANEL_N

    source = (ROOT / file).read_text(encoding="utf-8")
    (stated,) = re.findall(rf"constexpr int64_t {constant} = (\d+);", source)
    assert int(stated) == value
    assert PANEL_N == 16
