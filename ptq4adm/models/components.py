"""Reading and writing the parts of a pipeline folder in diffusers' layout.

Owns `model_index.json` and every component but a quantized denoiser, whose files belong to
`ptq4adm.packing.checkpoint`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptq4adm.errors import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    MissingComponentError,
)
from ptq4adm.models.correction import StepCorrection
from ptq4adm.models.mapped import load_mapped
from ptq4adm.protocols import SamplingDefaults

INDEX_FILE = "model_index.json"
# beside the components' entries: names with an underscore are passed over by diffusers
STEPS_ENTRY, GUIDANCE_ENTRY = "_default_steps", "_default_guidance_scale"
DOMAIN_ENTRY = "_prompt_domain"
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "vocoder")
# classes are looked up by name in these libraries only: a model folder cannot name code to run
_LIBRARIES = ("diffusers", "transformers")
# diffusers writes the name of a pipeline's own module for classes that live beside it
_MODULES_OF_DIFFUSERS = ("audioldm2",)
_OWN_LIBRARY = "ptq4adm"
# class of this package to its module; each has from_pretrained and save_pretrained as diffusers' do
OWN_CLASSES = {
    "BigVGAN": "ptq4adm.models.bigvgan",
    "ClapTokenEncoder": "ptq4adm.models.clap_tokens",
}
_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        CheckpointError: if the file is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as JSON ({error}); copy the model again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def component_names(pipe: Any) -> tuple[str, ...]:
    """What a pipeline consists of: as its family says, or as diffusers lists it."""
    own = getattr(pipe, "component_names", None)
    if own is not None:
        return tuple(own)
    listed = getattr(pipe, "components", None)
    return tuple(listed) if isinstance(listed, Mapping) else COMPONENTS


def read_index(folder: Path, names: Sequence[str] = COMPONENTS) -> dict[str, Any]:
    """Read `model_index.json` and check that it names every component.

    Args:
        folder: of the pipeline.
        names: its components.

    Raises:
        MissingComponentError: if the folder, the file or an entry is missing.
        CheckpointError: if an entry is not [library, class].
    """
    if not folder.is_dir():
        raise MissingComponentError(
            f"{folder}: no such folder; give the local folder of a pipeline, or 'shipped' for the "
            "packaged one"
        )
    if not (folder / INDEX_FILE).is_file():
        raise MissingComponentError(
            f"{folder}: no {INDEX_FILE}; a pipeline folder has it beside {', '.join(names)}"
        )
    index = read_json(folder / INDEX_FILE)
    missing = [name for name in names if not index.get(name)]
    if missing:
        raise MissingComponentError(
            f"{folder / INDEX_FILE}: names no {', '.join(missing)}; a text-to-audio pipeline needs "
            f"{', '.join(names)}"
        )
    for name in names:
        entry = index[name]
        if not (
            isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)
        ):
            raise CheckpointError(
                f"{folder / INDEX_FILE}: entry {name!r} must be [library, class], got {entry!r}"
            )
    return index


def component_folder(folder: Path, name: str) -> Path:
    """Folder of one component.

    Raises:
        MissingComponentError: if it does not exist.
    """
    path = folder / name
    if not path.is_dir():
        raise MissingComponentError(
            f"{folder}: component {name!r} is missing (no folder {path}); copy the whole pipeline"
        )
    return path


def load_component(folder: Path, name: str, entry: list[str], dtype: torch.dtype) -> Any:
    """Load one component from its subfolder.

    Args:
        folder: the pipeline's folder.
        name: component and subfolder.
        entry: [library, class] of `model_index.json`.
        dtype: modules are converted to it.

    Returns:
        The component; a module is in evaluation mode on the CPU, and weights that are stored in the
        dtype stay in their file.

    Raises:
        MissingComponentError: if the subfolder or its weights are missing.
        CheckpointError: if the class is unknown, or files are broken or lack tensors.
    """
    path = component_folder(folder, name)
    cls = _resolve_class(folder, name, entry)
    if not issubclass(cls, nn.Module):
        # unless told, transformers asks on the terminal whether to run a folder's code
        trusted = {"trust_remote_code": False} if entry[0] == "transformers" else {}
        try:
            return cls.from_pretrained(path, **trusted)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot load {entry[1]} ({error})") from error
    if not any(any(path.glob(pattern)) for pattern in _WEIGHT_PATTERNS):
        raise MissingComponentError(
            f"{path}: component {name!r} has no weights; copy the whole pipeline"
        )
    # imported here: this module must not load it where nothing is loaded
    from safetensors import SafetensorError

    # diffusers' other way of loading needs accelerate, and warns at every load without it
    options = {} if entry[0] == "transformers" else {"low_cpu_mem_usage": False}
    try:
        with _quiet_libraries():
            module, missing = load_mapped(cls, path, dtype), []
            if module is None:
                module, info = cls.from_pretrained(
                    path, local_files_only=True, output_loading_info=True, **options
                )
                missing = sorted(info["missing_keys"])
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot load {entry[1]} ({error}); copy the model again"
        ) from error
    if missing:
        # both libraries go on with random weights here
        raise CheckpointError(
            f"{path}: weights of {entry[1]} lack {len(missing)} tensors, such as {missing[0]!r}; "
            "the file does not belong to this config"
        )
    # Module.to: the libraries' own warns about converting after loading, which is exact here
    nn.Module.to(module, dtype=dtype).requires_grad_(False).eval()
    return module


def save_components(pipe: Any, folder: Path, *, skip: Collection[str] = ()) -> None:
    """Write the components of a pipeline and `model_index.json` into an existing folder.

    A module whose every tensor survives float16 is stored as float16: a pipeline that was loaded
    from float16 files and not changed is written as it was.

    Args:
        pipe: has the components as attributes: a pipeline of this package or of diffusers.
        folder: the target.
        skip: components that someone else writes; they still get their index entry.

    Raises:
        MissingComponentError: if the pipeline lacks one.
    """
    index: dict[str, Any] = {
        # a pipeline of diffusers is of the class that diffusers has for it
        "_class_name": getattr(pipe, "index_class", type(pipe).__name__),
        "_diffusers_version": _diffusers_version(),
    }
    for name in component_names(pipe):
        component = getattr(pipe, name, None)
        if component is None:
            raise MissingComponentError(
                f"{type(pipe).__name__} has no {name}; a pipeline to save needs it"
            )
        index[name] = _index_entry(component)
        if name not in skip:
            with _quiet_libraries():
                _storable(component).save_pretrained(folder / name)
    defaults = getattr(pipe, "defaults", None)
    if defaults is not None:
        index[STEPS_ENTRY], index[GUIDANCE_ENTRY] = defaults.steps, defaults.guidance
    domain = getattr(pipe, "prompt_domain", None)
    if domain is not None:
        index[DOMAIN_ENTRY] = domain
    correction = getattr(pipe, "correction", None)
    if isinstance(correction, StepCorrection):
        correction.save(folder)
    elif correction is not None:
        raise ConfigError(
            f"pipe.correction: got {type(correction).__name__}, which has no file format; needs a "
            "StepCorrection of ptq4adm.fit_correction, or None"
        )
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide the libraries' own progress bars: one a component, a fraction of a second each."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [
        switch
        for switch in (diffusers_logging, transformers_logging)
        if switch.is_progress_bar_enabled()
    ]
    for switch in shown:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        for switch in shown:
            switch.enable_progress_bar()


def _resolve_class(folder: Path, name: str, entry: list[str]) -> Any:
    library, class_name = entry
    if library in _MODULES_OF_DIFFUSERS:
        library = "diffusers"
    if library not in (*_LIBRARIES, _OWN_LIBRARY):
        raise CheckpointError(
            f"{folder / INDEX_FILE}: {name!r} comes from {library!r}; supported are "
            f"{', '.join(_LIBRARIES)} and {_OWN_LIBRARY}"
        )
    home = library
    if library == _OWN_LIBRARY:
        home = OWN_CLASSES.get(class_name, _OWN_LIBRARY)
    cls = getattr(importlib.import_module(home), class_name, None)
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        raise CheckpointError(
            f"{folder / INDEX_FILE}: {name!r} is a {library}.{class_name}, which the installed "
            f"{library} "
            "does not have; upgrade it"
        )
    return cls


def _index_entry(component: Any) -> list[str]:
    cls = type(component)
    return [cls.__module__.split(".")[0], cls.__name__]


def _storable(component: Any) -> Any:
    """The component, or a float16 copy of it where that loses nothing."""
    if not isinstance(component, nn.Module):
        return component
    tensors = [t for t in component.state_dict().values() if t.is_floating_point()]
    if all(t.dtype == torch.float16 for t in tensors):
        return component
    if all(torch.equal(t.to(torch.float16).to(t.dtype), t) for t in tensors):
        return nn.Module.to(copy.deepcopy(component), dtype=torch.float16)
    return component


def _diffusers_version() -> str:
    from diffusers import __version__

    return str(__version__)


def check_device(device: str | torch.device) -> None:
    """Refuse a device that does not exist here.

    Raises:
        BackendUnavailableError: naming it.
    """
    try:
        torch.empty(0, device=device)
    # torch says it with either: an assertion where it was built without CUDA
    except (RuntimeError, AssertionError) as error:
        raise BackendUnavailableError(
            f"device {str(device)!r} cannot be used here ({error}); use 'cpu'"
        ) from error


def load_unet(folder: Path, entry: list[str], dtype: torch.dtype, backend: str) -> nn.Module:
    """The UNet of a folder in diffusers' layout, float or packed."""
    config = component_folder(folder, "unet") / "config.json"
    if config.is_file() and "quantization_config" in read_json(config):
        from ptq4adm.packing.checkpoint import load_denoiser

        return load_denoiser(folder / "unet", backend=backend, dtype=dtype)
    unet: nn.Module = load_component(folder, "unet", entry, dtype)
    return unet


def read_defaults(index: dict[str, Any], otherwise: SamplingDefaults) -> SamplingDefaults:
    """Steps and guidance that an index names, or else a family's."""
    return SamplingDefaults(
        steps=int(index.get(STEPS_ENTRY, otherwise.steps)),
        guidance=float(index.get(GUIDANCE_ENTRY, otherwise.guidance)),
    )
