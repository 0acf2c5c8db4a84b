"""`PTQ4ADMConfig`: what diffusers asks of it, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ptq4adm import Calibration, PTQ4ADMConfig, QuantConfig
from ptq4adm.errors import CheckpointError, CheckpointVersionError, ConfigError

FIELDS: dict[str, Any] = {
    "scheme": "w8a8",
    "overrides": {"mid_block.*": "float"},
    "weight_observer": "absmax",
    "activation": "dynamic",
    "activation_observer": "percentile",
    "percentile": 99.0,
    "protect_sensitive": False,
    "group_size": None,
    "backend": "reference",
    "rounding": "gptq",
}


@pytest.fixture
def described(packed: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((packed / "unet" / "config.json").read_text())
    entry: dict[str, Any] = config["quantization_config"]
    return entry


def test_the_method_is_a_string_with_a_value() -> None:
    # the line that reports the method to the hub reads `.value`; the dictionaries read the string
    method = PTQ4ADMConfig().quant_method
    assert method == method.value == "ptq4adm"
    assert isinstance(method, str)


def test_it_has_all_fields_of_the_package_s_own_config() -> None:
    config = PTQ4ADMConfig(**FIELDS)
    assert config.quant_config == QuantConfig(**FIELDS)
    assert config.quant_config.to_dict().keys() == FIELDS.keys()


def test_to_dict_is_safe_for_json_and_comes_back(described: dict[str, Any]) -> None:
    for config in (
        PTQ4ADMConfig(),
        PTQ4ADMConfig(**FIELDS),
        PTQ4ADMConfig.from_dict(described),
        PTQ4ADMConfig(activation="static", calibration=Path("here/calibration.safetensors")),
    ):
        values = json.loads(json.dumps(config.to_dict(), sort_keys=True))
        again = PTQ4ADMConfig.from_dict(values)
        assert again == config
        assert again.to_dict() == dict(config) == values
        assert values["format_version"] == 1
        assert copy.deepcopy(config) == config


def test_a_description_is_what_the_folder_holds(described: dict[str, Any]) -> None:
    config = PTQ4ADMConfig.from_dict(described)
    assert config.is_description
    assert config.to_dict() == config.description == described
    assert not PTQ4ADMConfig().is_description
    with pytest.raises(ConfigError, match="a request names no layers"):
        _ = PTQ4ADMConfig().description


def test_neither_prompts_nor_paths_are_in_it(described: dict[str, Any]) -> None:
    # diffusers sends a short config to the hub with every download
    assert "a dog barks" not in json.dumps(described)
    static = PTQ4ADMConfig(activation="static", calibration="a/path/of/mine.safetensors")
    assert "mine" not in json.dumps(static.to_dict())
    assert "mine" not in repr(static)


def test_repr_shows_what_is_not_the_default(described: dict[str, Any]) -> None:
    assert "weight_observer" not in repr(PTQ4ADMConfig())
    assert '"weight_observer": "absmax"' in repr(PTQ4ADMConfig(weight_observer="absmax"))
    text = repr(PTQ4ADMConfig.from_dict(described))
    assert '"w4a8":' in text
    assert "to_q" not in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheem": "w8a8"}, "unknown field 'scheem'; known are scheme, overrides"),
        ({"scheme": "w2a2"}, "scheme: got 'w2a2'"),
        ({"config": {"bits": 4}}, "unknown field 'bits'"),
        ({"config": 4}, "'config' must be a mapping"),
    ],
)
def test_an_unknown_field_or_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PTQ4ADMConfig.from_dict({"quant_method": "ptq4adm", **values})
    if "config" not in values:
        with pytest.raises(ConfigError, match=message):
            PTQ4ADMConfig(**values)


def test_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match="got a list"):
        PTQ4ADMConfig.from_dict([1])  # type: ignore[arg-type]


def test_what_a_later_version_adds_beside_is_passed_over(described: dict[str, Any]) -> None:
    config = PTQ4ADMConfig.from_dict({**described, "colour": "blue"})
    assert config.quant_config == PTQ4ADMConfig.from_dict(described).quant_config


@pytest.mark.parametrize("key", ["format_version", "quant_method"])
def test_another_format_or_method_is_refused(described: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointVersionError, match=r"upgrade ptq4adm|its own package"):
        PTQ4ADMConfig.from_dict({**described, key: "2"})


@pytest.mark.parametrize("key", ["config", "segments", "buckets"])
def test_a_description_that_lacks_an_entry_is_refused(described: dict[str, Any], key: str) -> None:
    del described[key]
    with pytest.raises(CheckpointError, match=f"lacks '{key}'"):
        PTQ4ADMConfig.from_dict(described)


def test_unused_keywords_come_back_and_known_ones_are_taken() -> None:
    config, unused = PTQ4ADMConfig.from_dict(
        {"scheme": "w8a8"}, return_unused_kwargs=True, backend="reference", colour="blue"
    )
    assert unused == {"colour": "blue"}
    assert (config.quant_config.scheme, config.quant_config.backend) == ("w8a8", "reference")


def test_a_description_is_not_changed(described: dict[str, Any]) -> None:
    config = PTQ4ADMConfig.from_dict(described)
    assert config.update(colour="blue") == {"colour": "blue"}
    for change in (config.update, lambda **new: PTQ4ADMConfig.from_dict(described, **new)):
        with pytest.raises(ConfigError, match=r"scheme: .* cannot be changed"):
            change(scheme="w8a8")


def test_a_calibration_that_nothing_reads_is_refused(tiny_calibration: Path) -> None:
    with pytest.raises(ConfigError, match="activation='static'"):
        PTQ4ADMConfig(calibration=tiny_calibration)
    static = PTQ4ADMConfig(activation="static", calibration=tiny_calibration)
    loaded = static.load_calibration()
    assert isinstance(loaded, Calibration)
    held = PTQ4ADMConfig(activation="static", calibration=loaded)
    assert held.load_calibration() is loaded


def test_it_holds_no_value_of_torch() -> None:
    # `torch.dtype` in to_dict is what breaks the json.dumps of every load
    flat = json.dumps(PTQ4ADMConfig(**FIELDS).to_dict())
    assert "torch" not in flat
    assert not any(isinstance(v, torch.dtype) for v in PTQ4ADMConfig().to_dict().values())
