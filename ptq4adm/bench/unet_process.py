"""One variant of a UNet inside its own process: made, run, weighed."""

from __future__ import annotations

import ctypes
import gc
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq4adm.bench.macs import count_macs
from ptq4adm.bench.peers.open_vino import compiled_request
from ptq4adm.bench.peers.signal_stack import own_signal_stack
from ptq4adm.bench.process import AVX2, NATIVE, kernel_isa
from ptq4adm.bench.shapes import TIMESTEP, model_spec, step_inputs
from ptq4adm.bench.unet import DYNAMIC, FLOAT, OPENVINO_FLOAT, OPENVINO_INT8, STATIC
from ptq4adm.errors import BenchmarkError
from ptq4adm.nn.hoist import prepared
from ptq4adm.ops import cpu
from ptq4adm.ops.machine import sample_instructions, sampler_missing

MB = 1e6
_CALIBRATION_SEEDS = (1, 2)


@dataclass
class _Open:
    """The variant that this process holds.

    Attributes:
        step: runs one step and returns float32 [2, C, H, W].
        was_peak_reset: whether the peak memory excludes the making of the model.
    """

    step: Callable[[], Tensor]
    was_peak_reset: bool


_open: list[_Open] = []


def open_unet(
    model: str, variant: str, *, bits: int, threads: int, isa: str, folder: str
) -> dict[str, Any]:
    """Make one variant.

    Args:
        model: a name of `shapes.MODELS`.
        variant: a name of `unet.TOLERANCES`.
        bits: 4 or 8, of this package's weights.
        threads: of the steps.
        isa: one of `process.ISAS`, for this package's kernels; the environment of the process
            holds for the others.
        folder: where `convert_unet` put OpenVINO's files.

    Returns:
        ``weights_mb``, ``build_s``, ``variant_isa`` and ``macs``, multiply-adds with weights by
        backend (None for OpenVINO's).

    Raises:
        BenchmarkError: if this package's kernels were seen to run other instructions than allowed.
    """
    torch.set_num_threads(threads)
    if isa != NATIVE:
        cpu.limit_isa(kernel_isa(isa))
    started = time.perf_counter()
    if variant in (OPENVINO_FLOAT, OPENVINO_INT8):
        step, weights = _openvino_step(model, _ir_path(folder, model, variant), threads)
    elif variant == FLOAT:
        unet = _float_unet(model)
        # mypy knows no overload with memory_format alone
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        weights = 4 * sum(p.numel() for p in unet.parameters())
        step = _TorchStep(unet, model, is_hoisted=True)
    else:
        step, weights = _own_step(model, variant, bits)
    build_s = time.perf_counter() - started
    step()
    torch.set_num_threads(1)  # OpenMP's waiting threads would be sampled as well
    executed = "?" if sampler_missing() else sample_instructions(step).isa()
    torch.set_num_threads(threads)
    if isa == AVX2 and variant in (STATIC, DYNAMIC) and "avx512" in executed:
        raise BenchmarkError(
            f"{variant} of {model} ran {executed} although isa is {isa}: a kernel does not ask "
            "ptq4adm.ops.cpu.limit_isa what 'auto' means"
        )
    macs = None if variant in (OPENVINO_FLOAT, OPENVINO_INT8) else count_macs(step)
    _open[:] = [_Open(step, _reset_peak())]
    return {
        "weights_mb": round(weights / MB, 1),
        "build_s": round(build_s, 1),
        "variant_isa": executed,
        "macs": macs,
    }


def save_step(path: str) -> None:
    """Run one step and save its output with `torch.save`."""
    torch.save(_opened().step().clone(), path)


def time_step() -> float:
    """Seconds of one step."""
    step = _opened().step
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def memory() -> dict[str, Any]:
    """Resident memory of this process, libraries included, in 10^6 bytes.

    Returns:
        ``peak_mb`` since the steps began, ``resident_mb`` now, ``anonymous_mb`` of it without pages
        of files (a mapped weight file can be dropped and read again), ``peak_of``: what the peak
        saw.
    """
    status = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    return {
        "peak_mb": _megabytes(status["VmHWM"]),
        "resident_mb": _megabytes(status["VmRSS"]),
        "anonymous_mb": _megabytes(status["RssAnon"]),
        "peak_of": "steps" if _opened().was_peak_reset else "build and steps",
    }


def convert_unet(model: str, is_int8: bool, threads: int, folder: str) -> None:
    """Write the OpenVINO files of a UNet, unless they are there.

    Int8 is NNCF's post-training quantization with the settings that OpenVINO's own notebooks use
    for diffusion UNets, calibrated on random inputs: that is enough for its speed.
    """
    import openvino

    torch.set_num_threads(threads)
    float_path = _ir_path(folder, model, OPENVINO_FLOAT)
    if not float_path.with_suffix(".bin").exists():
        float_path.parent.mkdir(parents=True, exist_ok=True)
        _save_ir(_converted(model), float_path)
    if is_int8 and not _ir_path(folder, model, OPENVINO_INT8).with_suffix(".bin").exists():
        float_model = openvino.Core().read_model(float_path)
        with own_signal_stack():  # it compiles and runs models of its own
            quantized = _quantized(float_model, [_arrays(model, s) for s in _CALIBRATION_SEEDS])
        _save_ir(quantized, _ir_path(folder, model, OPENVINO_INT8))


# --- variants -----------------------------------------------------------------------------------


def _float_unet(model: str) -> nn.Module:
    torch.manual_seed(0)
    return model_spec(model).build("cpu")


class _TorchStep:
    """One step of a UNet in PyTorch, float or quantized.

    Args:
        unet: the model.
        model: its name.
        is_hoisted: whether constant work (projections of the timestep, keys and values of the text)
            is done once before: this package's pipelines do so, and float32 is given the same.
    """

    def __init__(self, unet: nn.Module, model: str, *, is_hoisted: bool) -> None:
        latents, self.conditioning = step_inputs(model)
        self.unet = unet
        self.latents = latents.contiguous(memory_format=torch.channels_last)
        self._hoisting = ExitStack()  # held: what was prepared lasts as long as the step
        if is_hoisted:
            context = prepared(
                unet,
                torch.tensor([TIMESTEP]),
                class_labels=self.conditioning.get("class_labels"),
                encoder_hidden_states=self.conditioning["encoder_hidden_states"],
            )
            self._hoisting.enter_context(context)

    def __call__(self) -> Tensor:
        with torch.inference_mode():
            result: Tensor = self.unet(self.latents, TIMESTEP, **self.conditioning).sample
        return result


def _own_step(model: str, variant: str, bits: int) -> tuple[_TorchStep, int]:
    from ptq4adm.bench.one_step import calibrate_one_step
    from ptq4adm.config import QuantConfig
    from ptq4adm.nn import resident_bytes
    from ptq4adm.quantization import quantize

    unet = _float_unet(model)
    calibration = None
    if variant == STATIC:
        calibration = calibrate_one_step(unet, lambda u: _TorchStep(u, model, is_hoisted=False)())
    config = QuantConfig(
        scheme=f"w{bits}a8",
        activation="dynamic" if variant == DYNAMIC else "static",
        weight_observer="absmax",  # changes no speed, and needs no search
        protect_sensitive=False,  # the speed of the named bits
        backend="cpu",
    )
    quantize(unet, config, calibration, progress=False)
    return _TorchStep(unet, model, is_hoisted=True), resident_bytes(unet)


class _Positional(nn.Module):
    """A UNet with tensors for arguments, as converters want it."""

    def __init__(self, unet: nn.Module, name: str) -> None:
        super().__init__()
        self.unet, self.name = unet, name

    def forward(self, latents: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        arguments: dict[str, Tensor | None] = {"encoder_hidden_states": None}
        arguments[self.name] = condition
        result: Tensor = self.unet(latents, timestep, **arguments, return_dict=False)[0]
        return result


def _example(model: str, seed: int = 0) -> tuple[tuple[Tensor, Tensor, Tensor], str]:
    """Latents, timestep and the conditioning tensor, with the latter's name."""
    latents, conditioning = step_inputs(model, seed=seed)
    ((name, condition),) = ((k, v) for k, v in conditioning.items() if v is not None)
    return (latents, torch.tensor(TIMESTEP), condition), name


def _arrays(model: str, seed: int = 0) -> list[Any]:
    return [tensor.numpy() for tensor in _example(model, seed)[0]]


def _converted(model: str) -> Any:
    import openvino

    example, name = _example(model)
    wrapped = _Positional(_float_unet(model), name)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sizes that tracing fixes are those that are run
        return openvino.convert_model(
            wrapped, example_input=example, input=[list(t.shape) for t in example]
        )


def _quantized(float_model: Any, inputs: list[Any]) -> Any:
    import nncf

    smoothing = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)  # off
    return nncf.quantize(
        float_model,
        nncf.Dataset(inputs),
        subset_size=len(inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smoothing),
    )


def _save_ir(model: Any, path: Path) -> None:
    import openvino

    partial = path.with_name("partial-" + path.name)
    # compression to float16 would make it another model than the float32 one
    openvino.save_model(model, partial, compress_to_fp16=False)
    partial.rename(path)
    partial.with_suffix(".bin").rename(path.with_suffix(".bin"))


def _ir_path(folder: str, model: str, variant: str) -> Path:
    return Path(folder) / f"{model}-{variant}.xml"


def _openvino_step(model: str, path: Path, threads: int) -> tuple[Callable[[], Tensor], int]:
    import openvino

    request = compiled_request(path, threads)
    for i, array in enumerate(_arrays(model)):
        request.set_input_tensor(i, openvino.Tensor(array))

    def step() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return step, path.with_suffix(".bin").stat().st_size


# --- memory -------------------------------------------------------------------------------------


def _opened() -> _Open:
    if not _open:
        raise BenchmarkError("no UNet is open in this process; ask open_unet first")
    return _open[0]


def _megabytes(kib: str) -> float:
    """10^6 bytes of an entry such as ``1024 kB``."""
    return round(int(kib.split()[0]) * 1024 / MB, 1)


def _reset_peak() -> bool:
    """Give memory of the build back and start the peak anew; False where the system cannot."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident size
    except OSError:
        return False
    return True
