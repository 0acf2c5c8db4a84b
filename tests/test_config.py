"""QuantConfig: what it accepts, and that it survives JSON."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest

from ptq4adm.config import QuantConfig, Scheme
from ptq4adm.errors import ConfigError


def test_json_round_trip_keeps_every_field_and_the_order_of_overrides() -> None:
    config = QuantConfig(
        scheme="w8a8",
        overrides={"z.*": "float", "a.*": "w8"},
        activation="dynamic",
        activation_observer="percentile",
        percentile=99.9,
        group_size=64,
        backend="reference",
        rounding="gptq",
    )
    back = QuantConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert list(back.overrides) == ["z.*", "a.*"]
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(back) == hash(config)


def test_enum_members_are_stored_as_their_names() -> None:
    config = QuantConfig(scheme=Scheme.W8A8, overrides={"x": Scheme.FLOAT})
    assert config.to_dict()["scheme"] == "w8a8"
    assert json.dumps(config.to_dict()["overrides"]) == '{"x": "float"}'


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scheme", "w3a8", "needs one of w4a8, w8a8, w8, float"),
        ("overrides", {"conv*": "int4"}, r"overrides\['conv\*'\]: got 'int4'"),
        ("overrides", {"": "float"}, "non-empty string"),
        ("overrides", ["conv*"], "expected a mapping"),
        ("weight_observer", "mse", "squared_error, absmax"),
        ("activation", "none", "static, dynamic"),
        ("activation_observer", "ema", "absmax, percentile, squared_error"),
        ("percentile", 0.9999, "50 to 100"),
        ("percentile", float("nan"), "50 to 100"),
        ("percentile", "99", "expected a number"),
        ("group_size", 128, "None, 64"),
        ("group_size", True, "None, 64"),
        ("backend", 3, "expected a name"),
        ("rounding", "adaround", "needs one of nearest, gptq, reconstruct"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(
    field: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**{field: value})


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown field 'bits'"):
        QuantConfig.from_dict({"bits": 4})


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().scheme = "w8a8"  # type: ignore[misc]
