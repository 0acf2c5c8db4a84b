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

    from ptq4adm.dispatch import Choice
    from ptq4adm.nn import QuantizedLayer

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
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="show what backend auto takes by this table of measured times (`ptq4adm dispatch`) on "
        "its device, which need not be here; without it, what auto takes on this machine",
    )
    add_output_options(parser)
    parser.set_defaults(run=run, parser=parser, when_interrupted="nothing was changed")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    folder = model_folder(args.model)
    result = inspect_folder(folder, args.table)
    text = _format(result, with_layers=args.layers)
    if not args.layers:
        result["unet"].pop("layers", None)
    print_result(args, result, text)
    return 0


def inspect_folder(folder: Path, table: Path | None = None) -> dict[str, Any]:
    """Describe a pipeline folder.

    Args:
        folder: of the pipeline.
        table: measured times by which backends are chosen; None for this machine's own choice.

    Raises:
        DispatchTableError: if the table is wrong.
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
        # a pipeline may have more than this package needs; diffusers writes [null, null] for none
        for name, entry in sorted(index.items())
        if isinstance(entry, list) and all(entry)
    }
    config = read_json(component_folder(folder, "unet") / "config.json")
    quantization = config.get("quantization_config")
    unet: dict[str, Any] = {"is_quantized": quantization is not None}
    if quantization is not None:
        from ptq4adm.packing.checkpoint import load_denoiser

        chooser = _Chooser(table)
        # the reference backend keeps the canonical order: nothing is rearranged to be looked at
        denoiser = load_denoiser(folder / "unet", backend="reference")
        unet |= _describe_quantized(denoiser, quantization, chooser)
    return {"folder": str(folder), "components": components, "unet": unet}


class _Chooser:
    """What backend auto takes for each layer: by a table, or on this machine.

    Args:
        path: of the table; None for this machine.
    """

    def __init__(self, path: Path | None) -> None:
        import torch

        from ptq4adm.dispatch import load_table
        from ptq4adm.ops import device_name

        self.table = None if path is None else load_table(path)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        here = device_name(self.device) or self.device
        self.name = here if self.table is None else self.table.device

    def choose(self, layer: QuantizedLayer) -> Choice:
        """The backend of one layer, and why."""
        from ptq4adm import dispatch, ops

        if self.table is None:
            return ops.choose_backend("auto", self.device, key=layer.key, rows=layer.rows)
        both = dispatch.GPU_BACKENDS
        return dispatch.choose_backend(self.table, layer.key, rows=layer.rows, candidates=both)

    def describe_float(self, denoiser: nn.Module, resident: int) -> dict[str, int] | None:
        """Layers that `use_float_where_faster` would run in float16, and the bytes it would cost.

        None without a table.
        """
        from ptq4adm.nn.floating import float_units

        if self.table is None:
            return None
        units = float_units(denoiser, self.table, lambda layer: self.choose(layer).backend)
        names = [name for unit in units if unit.is_float for name in unit.layers]
        for name in names:
            layer: Any = denoiser.get_submodule(name)
            bias = 0 if layer.bias is None else layer.bias.numel()
            resident += 2 * (layer.out_features * layer.layout.k + bias) - layer.qweight.nbytes
        return {"layers": len(names), "bytes_resident": resident}


def _describe_quantized(
    denoiser: nn.Module, quantization: dict[str, Any], chooser: _Chooser
) -> dict[str, Any]:
    from ptq4adm.nn import resident_bytes
    from ptq4adm.nn.replace import scheme_of

    layers = []
    parameters = 0
    for name, module in denoiser.named_modules():
        scheme = scheme_of(module)
        if scheme is not None:
            layers.append(_describe_layer(name, module, scheme.value, chooser))
            parameters += layers[-1]["parameters"]
        else:
            parameters += sum(p.numel() for p in module.parameters(recurse=False))
    resident = resident_bytes(denoiser)
    return {
        "format_version": quantization["format_version"],
        "config": quantization["config"],
        "calibration": quantization["calibration"],
        "buckets": quantization["buckets"],
        "parameters": parameters,
        "bytes_float32": 4 * parameters,
        "bytes_float16": 2 * parameters,
        "bytes_resident": resident,
        "float_where_faster": chooser.describe_float(denoiser, resident),
        "schemes": dict(Counter(layer["scheme"] for layer in layers)),
        "backends_on": chooser.name,
        "backends": dict(Counter(x["backend"] for x in layers if "backend" in x)),
        "layers": layers,
    }


def _describe_layer(name: str, module: nn.Module, scheme: str, chooser: _Chooser) -> dict[str, Any]:
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
        choice = chooser.choose(module)
        layer["rows"] = module.rows
        layer["backend"], layer["backend_reason"] = choice.backend, choice.reason
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
    backends = ", ".join(f"{count} {name}" for name, count in sorted(unet["backends"].items()))
    if backends:
        lines.append(f"  backend auto on {unet['backends_on']}: {backends}")
    float_faster = unet["float_where_faster"]
    if float_faster is not None:
        lines.append(
            f"  use_float_where_faster would run {float_faster['layers']} of them in float16: "
            f"{float_faster['bytes_resident'] / _MB:.2f} MB resident"
        )
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
    rows = [
        (
            "layer",
            "scheme",
            "weight",
            "kB",
            "activation",
            "w_scale median",
            "x_scale min..max",
            "backend auto",
        )
    ]
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
                _format_backend(layer),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _format_backend(layer: dict[str, Any]) -> str:
    """Like ``cuda (cuda 31 us, triton 35 us at M 8192)``."""
    if "backend" not in layer:
        return ""
    reason = layer["backend_reason"]
    return str(layer["backend"]) + (f" ({reason})" if reason else "")
