"""The README.md of a saved model: what it is, how it is loaded, its measured sizes.

Text only: nothing is uploaded, and nothing is asked of a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq4adm.errors import ConfigError, MissingComponentError
from ptq4adm.models.components import INDEX_FILE
from ptq4adm.packing.checkpoint import CONFIG_FILE, empty_model, read_config
from ptq4adm.packing.description import check_version
from ptq4adm.packing.weight_files import find_weight_files

__all__ = ["model_card"]

_DENOISER = "unet"
_PLACEHOLDER = "PATH-OR-ID-OF-THIS-MODEL"


@dataclass(frozen=True)
class _Facts:
    """What the text says of the files.

    Attributes:
        model: class of the denoiser.
        pipeline: class of the pipeline, or None for a bare denoiser.
        described: its `quantization_config`.
        parameters: of the float denoiser.
        stored: bytes of the denoiser's weight files.
    """

    model: str
    pipeline: str | None
    described: dict[str, Any]
    parameters: int
    stored: int


def model_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    license_name: str | None = None,
    variant: str | None = None,
) -> str:
    """Write a model card for a folder of `ptq4adm.save_pipeline` or `save_pretrained`.

    Args:
        folder: of a pipeline, or of a quantized UNet alone.
        repo_id: the name that the examples load; None for a placeholder.
        base_model: id of the float model, for the hub's links.
        license_name: the base model's; the hub's short name of it.
        variant: of the weights' file names.

    Returns:
        Markdown with the hub's header, to be written as README.md into the folder.

    Raises:
        MissingComponentError: if the folder holds neither, or its weights are missing.
        CheckpointError: if its UNet is not quantized by this package.
        ConfigError: if a name would break the header, or a variant is named of a pipeline that
            only this package loads.
    """
    facts = _read(Path(folder), variant)
    names = {"repo_id": repo_id, "base_model": base_model, "license_name": license_name}
    for field, name in names.items():
        if name is not None and (not name.strip() or any(c in name for c in "\n\r:#\"'")):
            raise ConfigError(f"{field}: got {name!r}, needs a plain name without quotes or colons")
    parts = [
        _header(base_model, license_name),
        _introduction(facts, base_model),
        _usage(facts, repo_id, variant),
        _table(facts),
    ]
    return "\n".join(parts)


def _read(folder: Path, variant: str | None) -> _Facts:
    is_pipeline = (folder / INDEX_FILE).is_file()
    home = folder / _DENOISER if is_pipeline else folder
    if not (home / CONFIG_FILE).is_file():
        raise MissingComponentError(
            f"{folder}: neither {INDEX_FILE} with a {_DENOISER}, nor {CONFIG_FILE}; give the "
            "folder that save_pipeline or save_pretrained wrote"
        )
    config = read_config(home / CONFIG_FILE)
    described = config.pop("quantization_config", None)
    check_version(str(home / CONFIG_FILE), described)
    model = empty_model(home, config)
    pipeline = read_config(folder / INDEX_FILE).get("_class_name") if is_pipeline else None
    return _Facts(
        model=type(model).__name__,
        pipeline=pipeline,
        described=described,
        parameters=sum(p.numel() for p in model.parameters()),
        stored=sum(path.stat().st_size for path in find_weight_files(home, variant)),
    )


def _header(base_model: str | None, license_name: str | None) -> str:
    lines = ["---", "library_name: diffusers", "pipeline_tag: text-to-audio"]
    if license_name is not None:
        lines.append(f"license: {license_name}")
    if base_model is not None:
        lines += [f"base_model: {base_model}", "base_model_relation: quantized"]
    return "\n".join([*lines, "tags:", "- ptq4adm", "- quantized", "- text-to-audio", "---", ""])


def _introduction(facts: _Facts, base_model: str | None) -> str:
    config, schemes = facts.described["config"], facts.described["schemes"]
    counts = ", ".join(f"{len(names)} {scheme}" for scheme, names in sorted(schemes.items()))
    buckets = facts.described["buckets"]
    scales = "measured at every call"
    if buckets is not None:
        scales = f"calibrated, one for each of {len(buckets['calibrated'])} timestep buckets"
    return (
        f"# {base_model or facts.pipeline or facts.model}, quantized with ptq4adm\n\n"
        f"The `{facts.model}` of this text-to-audio model is quantized to {config['scheme']}: "
        f"layers by scheme: {counts}. Activation scales are {scales}. The other components are "
        "as they were.\n"
    )


def _usage(facts: _Facts, name: str | None, variant: str | None) -> str:
    import diffusers

    why = (
        "`import ptq4adm` must come before the model is loaded: without it, diffusers stops with "
        "`Unknown quantization type, got ptq4adm`.\n\n"
    )
    if facts.pipeline is not None and not hasattr(diffusers, facts.pipeline):
        why, example = "", _own_example(facts.pipeline, name, variant)
    else:
        example = _diffusers_example(facts, name, variant)
    return (
        f"## Use\n\n{why}```sh\npip install ptq4adm accelerate\n```\n\n"
        f"```python\n{example}```\n\n"
        "Another dtype is chosen with `dtype=`; the scales of packed layers stay float32.\n"
    )


def _own_example(pipeline: str, name: str | None, variant: str | None) -> str:
    """How a pipeline is loaded that diffusers does not have."""
    if variant is not None:
        raise ConfigError(
            f"variant {variant!r}: diffusers has no {pipeline}, and ptq4adm.load_pipeline reads "
            "files without a variant; save the model without one"
        )
    if name is None:
        return f'import ptq4adm\n\npipe = ptq4adm.load_pipeline("{_PLACEHOLDER}")\n'
    return (
        "import ptq4adm\nfrom huggingface_hub import snapshot_download\n\n"
        f'pipe = ptq4adm.load_pipeline(snapshot_download("{name}"))\n'
    )


def _diffusers_example(facts: _Facts, name: str | None, variant: str | None) -> str:
    kind, variable = "DiffusionPipeline", "pipe"
    if facts.pipeline is None:
        kind, variable = facts.model, "unet"
    place = f'"{name or _PLACEHOLDER}"' + ("" if variant is None else f', variant="{variant}"')
    return (
        "import ptq4adm  # makes diffusers know the format\n"
        f"from diffusers import {kind}\n\n{variable} = {kind}.from_pretrained({place})\n"
    )


def _table(facts: _Facts) -> str:
    half, single = 2 * facts.parameters, 4 * facts.parameters
    return (
        "## Size\n\n"
        f"{facts.model}, {facts.parameters / 1e6:.1f} million parameters:\n\n"
        "| stored as | MB | of float16 |\n| --- | --- | --- |\n"
        f"| float32 | {single / 1e6:.1f} | 2.000 |\n"
        f"| float16 | {half / 1e6:.1f} | 1.000 |\n"
        f"| this folder | {facts.stored / 1e6:.1f} | {facts.stored / half:.3f} |\n\n"
        "The last row is the size of the files; the others are computed from the number of "
        "parameters.\n"
    )
