"""The table's file: what is written is read, and nothing else is."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptq4adm.bench import shapes
from ptq4adm.dispatch import (
    KINDS,
    DispatchTable,
    LayerKey,
    Times,
    describe_table,
    find_table,
    load_table,
    save_table,
    table_path,
)
from ptq4adm.errors import DispatchTableError, OutputError

DEVICE = "Test GPU 1"
RUN = {"date": "2026-01-02 03:04", "commit": "abc", "torch": "t", "triton": "u", "cuda": "v",
       "driver": "w"}  # fmt: skip
KEY = LayerKey("conv3x3", 4, 320, 2880)
TABLE = DispatchTable(
    DEVICE,
    (RUN,),
    {
        KEY: {
            128: Times(0, 9.5, {"cuda": 4.0}, {"cuda": 6.0}, {"triton": "wrong"}),
            8192: Times(0, None, {"cuda": 30.0, "triton": 31.5}),
        },
        LayerKey("linear", 8, 64, 72): {18: Times(0, 1.0)},
    },
)


def test_a_table_reads_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    save_table(path, TABLE)
    table = load_table(path)
    assert table.to_dict() == TABLE.to_dict()
    assert table.layers == TABLE.layers
    assert table.source == str(path)
    assert (len(table.layers), table.entries) == (2, 3)
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


def test_kinds_are_those_of_the_benchmarks() -> None:
    assert set(KINDS) == set(shapes.KINDS)


def test_the_plain_form_of_a_layer_is_preferred_to_the_upsampling_one() -> None:
    up = LayerKey("conv3x3-upsample", 4, 320, 2880)
    plain_times, up_times = {1: Times(0, 1.0)}, {1: Times(0, 2.0)}
    both = DispatchTable(DEVICE, (RUN,), {up: up_times, KEY: plain_times})
    assert both.find(KEY) == plain_times
    assert DispatchTable(DEVICE, (RUN,), {up: up_times}).find(KEY) == up_times
    assert both.find(LayerKey("conv1x1", 4, 320, 2880)) == {}


def _set(*path: str | int, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = value

    return change


def _drop(*path: str | int) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        del content[path[-1]]

    return change


ROW = ("layers", 0, "rows", 0)
BROKEN: dict[str, tuple[Callable[[Any], None], str]] = {
    "another format": (_set("format", value="x"), "this file is no dispatch table"),
    "a newer version": (_set("version", value=2), "table version 2, this version .* reads 1"),
    "a version that is true": (_set("version", value=True), "table version True"),
    "no version": (_drop("version"), "table version None"),
    "no device": (_drop("device"), "the table lacks 'device'"),
    "an empty device": (_set("device", value=""), "device is empty"),
    "an unknown field": (_set("tile", value=1), "the table holds 'tile'"),
    "no list": (_set("layers", value={}), "layers = {}, needs a list"),
    "a run that lacks a column": (_drop("runs", 0, "commit"), r"runs\[0\] lacks 'commit'"),
    "a run with a number": (_set("runs", 0, "torch", value=2), r"runs\[0\].torch = 2, needs text"),
    "an unknown kind": (_set("layers", 0, "kind", value="conv5x5"), "kind = 'conv5x5'"),
    "other bits": (_set("layers", 0, "bits", value=2), "bits = 2, needs 4 or 8"),
    "bits as a float": (_set("layers", 0, "bits", value=4.0), "bits = 4.0, needs 4 or 8"),
    "no N": (_set("layers", 0, "N", value=0), r"layers\[0\].N = 0"),
    "no rows": (_set("layers", 0, "rows", value=[]), r"layers\[0\].rows is empty"),
    "M as text": (_set(*ROW, "M", value="128"), r"rows\[0\].M = '128'"),
    "M twice": (_set(*ROW, "M", value=8192), r"M = 8192 stands twice"),
    "no such run": (_set(*ROW, "run", value=1), "run = 1, needs an index of the 1 runs"),
    "a row that lacks a field": (_drop(*ROW, "failed"), "lacks 'failed'"),
    "a time of 0": (_set(*ROW, "product_us", "cuda", value=0), "cuda = 0, needs microseconds"),
    "a negative time": (_set(*ROW, "float16_us", value=-1.0), "float16_us = -1.0"),
    "a time that is true": (_set(*ROW, "layer_us", "cuda", value=True), "cuda = True"),
    "an unknown backend": (_set(*ROW, "product_us", "gpu", value=1.0), "names backend 'gpu'"),
    "times that are no object": (_set(*ROW, "product_us", value=[1]), "needs an object"),
    "a failure without a reason": (_set(*ROW, "failed", "triton", value=None), "needs text"),
    "a time of what failed": (_set(*ROW, "product_us", "triton", value=1.0), "triton has a time"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_whatever_is_wrong_is_named(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    content = copy.deepcopy(TABLE.to_dict())
    change(content)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DispatchTableError, match=message) as caught:
        load_table(path)
    assert str(path) in str(caught.value)


def test_a_layer_stands_once(tmp_path: Path) -> None:
    content = TABLE.to_dict()
    content["layers"].append(content["layers"][1])
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DispatchTableError, match=r"layers\[2\] w8a8 linear 64x72 stands twice"):
        load_table(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": NaN}'])
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(DispatchTableError, match=r"not JSON|no dispatch table"):
        load_table(path)


def test_a_truncated_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    save_table(path, TABLE)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DispatchTableError, match="cut short"):
        load_table(path)
    with pytest.raises(DispatchTableError, match="cannot be read"):
        load_table(tmp_path / "none.json")


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    save_table(path, TABLE)
    first = load_table(path)
    assert load_table(path) is first
    save_table(path, DispatchTable("another GPU", (RUN,), TABLE.layers))
    assert load_table(path).device == "another GPU"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another place"):
        save_table(tmp_path / "file" / "table.json", TABLE)


# --- where tables lie ---------------------------------------------------------------------------


def test_the_file_of_a_device_is_named_after_it() -> None:
    assert table_path("NVIDIA H100 80GB HBM3").name == "nvidia_h100_80gb_hbm3.json"
    assert table_path("NVIDIA H100 80GB HBM3").parent.parent.name == "dispatch"


def test_the_package_ships_no_table_that_nobody_measured() -> None:
    assert list(table_path("x").parent.glob("*.json")) == []


def test_the_variable_names_a_file_or_a_folder_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PTQ4ADM_DISPATCH", raising=False)
    assert find_table(DEVICE) is None
    save_table(table_path(DEVICE, tmp_path), TABLE)
    for place in (tmp_path, table_path(DEVICE, tmp_path)):
        monkeypatch.setenv("PTQ4ADM_DISPATCH", str(place))
        found = find_table(DEVICE)
        assert found is not None
        assert found.entries == 3
        said = describe_table(DEVICE)
        assert re.search(r"test_gpu_1.json: 2 layers, 3 entries of Test GPU 1, newest run", said)
    monkeypatch.setenv("PTQ4ADM_DISPATCH", str(tmp_path))
    assert find_table("Test GPU 2") is None
    assert describe_table("Test GPU 2") == "no table for Test GPU 2: auto takes triton"
    monkeypatch.setenv("PTQ4ADM_DISPATCH", "off")
    assert find_table(DEVICE) is None
    assert "PTQ4ADM_DISPATCH=off" in describe_table(DEVICE)


def test_a_variable_that_names_nothing_or_another_device_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTQ4ADM_DISPATCH", str(tmp_path / "none"))
    with pytest.raises(DispatchTableError, match="there is no such file or folder"):
        find_table(DEVICE)
    path = tmp_path / "table.json"
    save_table(path, TABLE)
    monkeypatch.setenv("PTQ4ADM_DISPATCH", str(path))
    with pytest.raises(DispatchTableError, match="measured on 'Test GPU 1', the model is on 'Te"):
        find_table("Test GPU 2")
