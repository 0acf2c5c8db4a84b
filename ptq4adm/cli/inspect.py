"""`ptq4adm inspect`: what is in a pipeline folder."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq4adm.cli.options import add_output_options, model_folder, print_result
from ptq4adm.models.components import component_folder, read_index, read_json

if TYPE_CHECKING:
    from torch import nn

_MB = 1e6


def add_command(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "inspect",
        help="show what a model folder holds",
        description="Read a pipeline folder completely and show schemes, sizes and scales.",
    )
    parser.add_argument("model", metavar="MODEL", help="pipeline folder, or 'shipped'")
    parser.add_argument("--layers", action="store_true", help="one line a layer")
    add_output_options(parser)
    parser.set_defaults(run=run, parser=parser, when_interrupted="nothing was changed")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    folder = model_folder(args.model)
    result = inspect_folder(folder)
    text = _format(result, with_layers=args.layers)
    if not args.layers:
        result["unet"].pop("layers", None)
    print_result(args, result, text)
    return 0


def inspect_folder(folder: Path) -> dict[str, Any]:
    """Describe a pipeline folder.

    Raises:
        MissingComponentError: if the folder or a component is missing.
        CheckpointError: if a quantized UNet's files are broken.
    """
    index = read_index(folder)
    components = {
        name: {
            "class": ".".join(index[name]),
            "bytes_on_disk": sum(
                f.stat().st_size for f in component_folder(folder, name).rglob("*") if f.is_file()
            ),
        }
        # a pipeline may have more than this package needs
        for name in sorted(name for name, entry in index.items() if isinstance(entry, list))
    }
    config = read_json(component_folder(folder, "unet") / "config.json")
    quantization = config.get("quantization_config")
    unet: dict[str, Any] = {"is_quantized": quantization is not None}
    if quantization is not None:
        from ptq4adm.packing.checkpoint import load_denoiser

        # the reference backend keeps the canonical order: nothing is rearranged to be looked at
        denoiser = load_denoiser(folder / "unet", backend="reference")
        unet |= _describe_quantized(denoiser, quantization)
    return {"folder": str(folder), "components": components, "unet": unet}


def _describe_quantized(denoiser: nn.Module, quantization: dict[str, Any]) -> dict[str, Any]:
    from ptq4adm.nn import resident_bytes
    from ptq4adm.nn.replace import scheme_of

    layers = []
    parameters = 0
    for name, module in denoiser.named_modules():
        scheme = scheme_of(module)
        if scheme is not None:
            layers.append(_describe_layer(name, module, scheme.value))
            parameters += layers[-1]["parameters"]
        else:
            parameters += sum(p.numel() for p in module.parameters(recurse=False))
    return {
        "format_version": quantization["format_version"],
        "config": quantization["config"],
        "calibration": quantization["calibration"],
        "buckets": quantization["buckets"],
        "parameters": parameters,
        "bytes_float32": 4 * parameters,
        "bytes_float16": 2 * parameters,
        "bytes_resident": resident_bytes(denoiser),
        "schemes": dict(Counter(layer["scheme"] for layer in layers)),
        "layers": layers,
    }


def _describe_layer(name: str, module: nn.Module, scheme: str) -> dict[str, Any]:
    from ptq4adm.nn import QuantizedLayer

    tensors = {key: tensor for key, tensor in module.state_dict().items() if tensor is not None}
    shape = list(module.dequantize().weight.shape)  # type: ignore[operator]
    bias = tensors.get("bias")
    count = 1
    for size in shape:
        count *= size
    layer: dict[str, Any] = {
        "name": name,
        "scheme": scheme,
        "class": type(module).__name__,
        "shape": shape,
        "parameters": count + (0 if bias is None else bias.numel()),
        "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "activation": "float",
    }
    if scheme in ("w4a8", "w8a8"):
        layer["activation"] = "static" if "x_scale" in tensors else "dynamic"
        assert isinstance(module, QuantizedLayer)
        layer["segments"] = list(module.layout.segments)
    for key in ("w_scale", "x_scale"):
        if key in tensors:
            values = tensors[key].float()
            layer[key] = {
                "shape": list(values.shape),
                "min": values.min().item(),
                "median": values.median().item(),
                "max": values.max().item(),
            }
    return layer


def _format(result: dict[str, Any], *, with_layers: bool) -> str:
    unet = result["unet"]
    lines = [result["folder"]]
    for name, component in result["components"].items():
        lines.append(
            f"  {name:<13}{component['bytes_on_disk'] / _MB:9.2f} MB  {component['class']}"
        )
    if not unet["is_quantized"]:
        lines.append("UNet: not quantized; see `ptq4adm quantize`")
        return "\n".join(lines)
    schemes = ", ".join(f"{count} {scheme}" for scheme, count in sorted(unet["schemes"].items()))
    saving = 100.0 * (1.0 - unet["bytes_resident"] / unet["bytes_float16"])
    lines += [
        f"UNet: format version {unet['format_version']}, "
        f"{sum(unet['schemes'].values())} layers: {schemes}",
        f"  {unet['parameters'] / 1e6:.2f} M parameters: {unet['bytes_float32'] / _MB:.2f} MB in "
        f"float32, {unet['bytes_float16'] / _MB:.2f} MB in float16, "
        f"{unet['bytes_resident'] / _MB:.2f} MB as stored ({saving:.1f} % less than float16)",
        f"  activations: {_format_activations(unet)}",
    ]
    if with_layers:
        lines += ["", *_format_layers(unet["layers"])]
    return "\n".join(lines)


def _format_activations(unet: dict[str, Any]) -> str:
    buckets = unet["buckets"]
    if buckets is None:
        return "dynamic scales, no calibration"
    seen, total = sum(buckets["calibrated"]), len(buckets["calibrated"])
    return (
        f"static scales, {seen} of {total} timestep buckets calibrated over "
        f"{buckets['num_train_timesteps']} timesteps, calibration {unet['calibration']}"
    )


def _format_layers(layers: list[dict[str, Any]]) -> list[str]:
    rows = [("layer", "scheme", "weight", "kB", "activation", "w_scale median", "x_scale min..max")]
    for layer in layers:
        w_scale, x_scale = layer.get("w_scale"), layer.get("x_scale")
        segments = layer.get("segments", [])
        activation = layer["activation"]
        if len(segments) > 1:
            activation += " " + "+".join(map(str, segments))
        rows.append(
            (
                layer["name"],
                layer["scheme"],
                "x".join(map(str, layer["shape"])),
                f"{layer['bytes'] / 1e3:.1f}",
                activation,
                "" if w_scale is None else f"{w_scale['median']:.3g}",
                "" if x_scale is None else f"{x_scale['min']:.3g}..{x_scale['max']:.3g}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
