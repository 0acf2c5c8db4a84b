"""The UNets whose steps a GPU benchmark times: float16 and W4A8, with constant work done ahead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq4adm.bench.gpu_shapes import TOY_MODEL
from ptq4adm.bench.shapes import TIMESTEP, ModelSpec, model_spec, spec_inputs
from ptq4adm.kernels import launch
from ptq4adm.nn.forwards import is_hoisted
from ptq4adm.nn.hoist import prepared

if TYPE_CHECKING:
    from ptq4adm.calibration import Calibration


def _toy_unet(device: str) -> nn.Module:
    """One block of each kind, for rehearsals."""
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet: nn.Module = UNet2DConditionModel(
            sample_size=4,
            in_channels=8,
            out_channels=8,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type=None,
            block_out_channels=(32,),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=1024,
            norm_num_groups=8,
        )
    return unet.requires_grad_(False).eval()


TOY_SPEC = ModelSpec(_toy_unet, (8, 4, 4), 3)


class StepModels:
    """The UNets of one model, prepared until the stack ends; float16 variants share one."""

    def __init__(
        self,
        model: str,
        device: torch.device,
        stack: ExitStack,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.device, self._stack = model, device, stack
        self._half: nn.Module | None = None
        self._calibration: Calibration | None = None
        usual = torch.float16 if device.type == "cuda" else torch.float32
        self.dtype = dtype or usual
        self.spec = TOY_SPEC if model == TOY_MODEL else model_spec(model)
        latents, conditioning = spec_inputs(self.spec, device=str(device))
        self.latents = latents.to(self.dtype).contiguous(memory_format=torch.channels_last)
        self.conditioning = {
            name: None if tensor is None else tensor.to(self.dtype)
            for name, tensor in conditioning.items()
        }
        self.timesteps = torch.tensor([TIMESTEP], device=device)

    def float_unet(self) -> nn.Module:
        """Random weights, float32."""
        torch.manual_seed(0)
        return self.spec.build(str(self.device))

    def half(self) -> nn.Module:
        """Float16 in channels_last memory; a rehearsal keeps float32, which CPUs are made for."""
        if self._half is None:
            unet = self.float_unet().to(self.dtype)
            # mypy knows no overload with memory_format alone
            unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._half = self._prepare(unet)
        return self._half

    def constant_half(self) -> tuple[nn.Module, int]:
        """A copy of `half` whose constant work is tensors, without the hooks that look them up.

        PyTorch's compiler breaks its graph at such hooks, and a break costs the float model what
        this package's has: the kept results become modules that return them.

        Returns:
            The copy, and how many modules return what was kept.
        """
        unet = self.half()
        kept: dict[str, Tensor] = {}

        def recording(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run(*args: Any, **keywords: Any) -> Tensor:
                kept[name] = forward(*args, **keywords)
                return kept[name]

            return run

        hoisted = {name: module for name, module in unet.named_modules() if is_hoisted(module)}
        forwards = {name: module.__dict__["forward"] for name, module in hoisted.items()}
        for name, module in hoisted.items():
            module.__dict__["forward"] = recording(name, forwards[name])
        try:
            with torch.no_grad():
                self.call(unet)
        finally:
            for name, module in hoisted.items():
                module.__dict__["forward"] = forwards[name]
        plain = copy.deepcopy(unet)
        for module in plain.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
            module.__dict__.pop("forward", None)
        for name, tensor in kept.items():
            parent, _, child = name.rpartition(".")
            _replace_child(plain.get_submodule(parent), child, _Kept(tensor))
        return plain, len(kept)

    def quantized(self, backend: str, *, is_static: bool) -> nn.Module:
        """W4A8 with fused blocks on a backend; static scales from one run on the very inputs."""
        from ptq4adm.config import QuantConfig
        from ptq4adm.quantization import quantize

        unet = self.float_unet()
        calibration = self._calibrated(unet) if is_static else None
        config = QuantConfig(
            scheme="w4a8",
            activation="static" if is_static else "dynamic",
            weight_observer="absmax",  # changes no speed, and needs no search
            protect_sensitive=False,  # the speed of the named bits
            backend=backend,
        )
        quantize(unet, config, calibration, progress=False)
        return self._prepare(unet.to(self.dtype))

    def _calibrated(self, unet: nn.Module) -> Calibration:
        """The scales of a float UNet; all have the same weights, so once is enough."""
        from ptq4adm.bench.one_step import calibrate_one_step

        if self._calibration is None:
            with torch.no_grad():
                self._calibration = calibrate_one_step(unet, lambda u: self.call(u, torch.float32))
        return self._calibration

    def _prepare(self, unet: nn.Module) -> nn.Module:
        """Do constant work ahead."""
        context = prepared(
            unet,
            self.timesteps,
            class_labels=self.conditioning.get("class_labels"),
            encoder_hidden_states=self.conditioning.get("encoder_hidden_states"),
        )
        self._stack.enter_context(context)
        return unet

    def call(self, unet: Callable[..., Any], dtype: torch.dtype | None = None) -> Tensor:
        """One step."""
        conditioning = self.conditioning
        latents = self.latents
        if dtype is not None:
            latents = latents.to(dtype)
            conditioning = {k: v if v is None else v.to(dtype) for k, v in conditioning.items()}
        # an element of the prepared tensor: it is known by its place, without waiting for the GPU
        result: Tensor = unet(latents, self.timesteps[0], **conditioning).sample
        return result


class _Kept(nn.Module):
    """Returns one tensor, whatever it is called with."""

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept.clone())

    def forward(self, *args: Any) -> Tensor:
        """The tensor."""
        del args
        return self.kept


def _replace_child(parent: nn.Module, name: str, child: nn.Module) -> None:
    """Replace a child; those of a `ModuleList` have numbers for names."""
    parent._modules[name] = child


def _no_attention(query: Tensor, *others: Any, **keywords: Any) -> Tensor:
    del others, keywords
    return torch.empty_like(query)


def compile_steps(model: str, is_static: bool, capability: int, multiprocessors: int) -> None:
    """Compile every kernel of one W4A8 step for a GPU, from CPU tensors, in a child process.

    Args:
        model: a name of `shapes.MODELS`.
        is_static: with static scales.
        capability: of the GPU, 10 * major + minor.
        multiprocessors: of the GPU.
    """
    torch.set_num_threads(1)
    # attention in float16 takes a CPU longer than all compilation, and nobody reads its result
    functional.scaled_dot_product_attention = _no_attention
    with (
        launch.compile_only(capability, multiprocessors),
        ExitStack() as stack,
        torch.no_grad(),
    ):
        unets = StepModels(model, torch.device("cpu"), stack, torch.float16)
        # every backend's norms, gates and attention are Triton's, and are among these
        unets.call(unets.quantized("triton", is_static=is_static))
