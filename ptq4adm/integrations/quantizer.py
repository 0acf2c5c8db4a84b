"""`PTQ4ADMQuantizer`: what diffusers' `from_pretrained` and `save_pretrained` call.

A packed folder: the layers are put into the empty model before its weights are read, and every
tensor of a layer goes in with the dtype of the file. A float folder: the model is loaded, then
quantized in place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from ptq4adm.errors import (
    CalibrationError,
    CheckpointError,
    CheckpointShapeError,
    ConfigError,
    DependencyError,
)
from ptq4adm.integrations import register
from ptq4adm.integrations.config import PTQ4ADMConfig
from ptq4adm.models import find_adapter
from ptq4adm.nn import StorageLayer, find_step, set_backend
from ptq4adm.nn.packed import find_wrong_multiplier
from ptq4adm.packing.checkpoint import METADATA, check_names, expected_tensors
from ptq4adm.packing.description import (
    QuantState,
    build_layers,
    dequantize,
    mark_quantized,
    quantization_config,
)
from ptq4adm.quantization import quantize

__all__ = ["PTQ4ADMConfig", "PTQ4ADMQuantizer"]

_WHERE = "quantization_config"


class PTQ4ADMQuantizer(DiffusersQuantizer):
    """Reads, makes and writes quantized UNets for diffusers.

    Args:
        quantization_config: a request, or the description of a folder.
        kwargs: of diffusers; `pre_quantized` says whether the folder has a description.

    Raises:
        ConfigError: if a float folder is to be quantized by another model's description.
    """

    requires_calibration = False
    required_packages = ("accelerate",)
    # a layer's tensors keep the file's dtypes by `create_quantized_param`; this also keeps what a
    # model class itself wants in float32
    use_keep_in_fp32_modules = True

    quantization_config: PTQ4ADMConfig

    def __init__(self, quantization_config: PTQ4ADMConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if quantization_config.is_description and kwargs.get("pre_quantized") is False:
            raise ConfigError(
                "quantization_config: describes the layers of a quantized model, but this folder "
                "holds a float one; pass a PTQ4ADMConfig with the wanted fields"
            )
        # loaders of single files do not say which it is
        self.pre_quantized: bool = quantization_config.is_description
        self._stored: list[str] | None = None
        self._state: QuantState | None = None
        self._layers: dict[str, StorageLayer] = {}

    # --- loading --------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what could only fail later.

        Raises:
            DependencyError: if accelerate is missing.
            CalibrationError: if static scales are asked for without a calibration.
            ConfigError: if the model is to be split over devices.
        """
        del args
        if importlib.util.find_spec("accelerate") is None:
            raise DependencyError(
                "diffusers loads quantized models with accelerate, which is not installed; "
                "pip install accelerate, or use ptq4adm.load_pipeline"
            )
        config = self.quantization_config
        is_static = config.quant_config.activation == "static"
        if not self.pre_quantized and is_static and config.calibration is None:
            raise CalibrationError(
                "activation='static' needs a calibration, and none was given; pass "
                "PTQ4ADMConfig(calibration=FILE), or use activation='dynamic'"
            )
        _check_device_map(kwargs.get("device_map"))

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        """Remember the names of the file's tensors; changes none.

        Raises:
            CheckpointError: if they come from a pickle.
        """
        pickled = [name for name in map(str, checkpoint_files) if not name.endswith(".safetensors")]
        if self.pre_quantized and pickled:
            raise CheckpointError(
                f"{pickled[0]}: quantized models are read from safetensors only; get the folder "
                "with its .safetensors files"
            )
        self._stored = list(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: nn.Module, device_map: Any = None, **kwargs: Any
    ) -> None:
        del device_map, kwargs
        if not self.pre_quantized:
            # refused now rather than after minutes of reading
            find_adapter(model)
            return
        described = self.quantization_config.description
        # canonical order on no memory; the backend's order follows when the device is known
        self._state = build_layers(
            model, described, where=_WHERE, backend="reference", device="meta"
        )
        if self._stored is not None:
            check_names(_WHERE, expected_tensors(model), self._stored)
        self._layers = {n: m for n, m in model.named_modules() if isinstance(m, StorageLayer)}

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """Refuse what diffusers would fill with random numbers.

        Raises:
            CheckpointError: if the folder lacks a tensor.
        """
        del prefix
        if self.pre_quantized and missing_keys:
            names = expected_tensors(model)
            check_names(_WHERE, names, set(names) - set(missing_keys))
        return missing_keys

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        """Whether a tensor belongs to a replaced layer."""
        del model, param_value, state_dict, kwargs
        return param_name.rpartition(".")[0] in self._layers

    def check_quantized_param_shape(
        self, param_name: str, current_param: Tensor, loaded_param: Tensor
    ) -> bool:
        """Refuse a tensor of another size.

        Raises:
            CheckpointShapeError: naming it.
        """
        raise CheckpointShapeError(
            f"{param_name} is {list(loaded_param.shape)}, needs {list(current_param.shape)}; "
            "weights and config.json belong to different models"
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put one tensor into its layer, as the file has it: `param_value` was cast to the model's.

        Raises:
            CheckpointShapeError: if it has another dtype than the layer stores.
        """
        del model, param_value, args, kwargs
        layer = self._layers[param_name.rpartition(".")[0]]
        _set_stored(layer, param_name, state_dict[param_name], target_device)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        del kwargs
        if self.pre_quantized:
            assert self._state is not None
            _finish(model, self._state)
        else:
            config = self.quantization_config
            quantize(model, config.quant_config, config.load_calibration(), inputs=config.inputs)
        model.requires_grad_(False)
        self.quantization_config = PTQ4ADMConfig.from_dict(quantization_config(model))
        self._layers, self._stored = {}, None

    # --- saving, and what the model can do ------------------------------------------------------

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The canonical tensors, and what the file's header says.

        Raises:
            ConfigError: if a pickle is to be written, or adapters are attached.
        """
        if not safe_serialization:
            raise ConfigError(
                "safe_serialization=False: quantized models are written as safetensors only; leave "
                "the argument out"
            )
        wrapped = [name for name in state_dict if ".base_layer." in name]
        if wrapped:
            raise ConfigError(
                f"the model has adapters ({wrapped[0]!r}); save them with save_lora_adapter and "
                "remove them (unload_lora) first"
            )
        return state_dict, dict(METADATA)

    def dequantize(self, model: nn.Module) -> nn.Module:
        """Float layers in place; see `ptq4adm.dequantize`."""
        return dequantize(model)

    @property
    def is_serializable(self) -> bool:
        """True."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters are trained on it; its own weights are integers."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: the operators have fake functions."""
        return True


def _set_stored(layer: StorageLayer, path: str, value: Tensor, device: Any) -> None:
    """One tensor of the file into a layer that was made on the meta device."""
    name = path.rpartition(".")[2]
    shape, dtype = layer.stored_tensors()[name]
    if tuple(value.shape) != shape or value.dtype != dtype:
        raise CheckpointShapeError(
            f"{path} is {value.dtype} {list(value.shape)}, needs {dtype} {list(shape)}; weights "
            "and config.json belong to different models"
        )
    wrong = find_wrong_multiplier(value) if name == "w_mult" else None
    if wrong is not None:
        raise CheckpointShapeError(f"{path}: {wrong}")
    # a copy: the file is mapped, and may be replaced
    layer.register_buffer(name, value.detach().to(device, copy=True))


def _finish(model: nn.Module, state: QuantState) -> None:
    """All tensors are there: the step's device, the order of the device's backend, fused blocks."""
    step = find_step(model)
    if step is not None:
        devices = [
            b.device for m in model.modules() if isinstance(m, StorageLayer) for b in m.buffers()
        ]
        step.move(lambda tensor: tensor.to(devices[0]))
    set_backend(model, "auto")
    mark_quantized(model, state)


def _check_device_map(device_map: Any) -> None:
    if not isinstance(device_map, Mapping):
        return
    devices = sorted({str(device) for device in device_map.values()})
    if len(devices) > 1 or devices == ["disk"]:
        raise ConfigError(
            f"device_map: a quantized UNet is small and runs on one device, got {devices}; pass "
            "device_map={'': DEVICE}, or load it on the CPU and use enable_model_cpu_offload"
        )


register()
