"""One training loop for every model: wall-clock budget, annealed rate, checkpoints.

The learning rate warms up and then falls along a cosine of the time *spent*, so a run
ends annealed however fast the machine is. A run that was stopped goes on where its last
checkpoint left it.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

Losses = dict[str, torch.Tensor]


@dataclasses.dataclass
class Budget:
    """How one run is paced.

    Attributes:
        minutes: wall-clock length, summed over restarts.
        learning_rate: peak of the schedule.
        warmup_steps: steps of linear warm-up.
        weight_decay: of AdamW; applies to tensors of two or more dimensions only.
        ema_decay: of the averaged weights; 0 keeps no average.
        grad_clip: largest norm of the gradient.
        save_every_s: seconds between checkpoints.
    """

    minutes: float
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.0
    grad_clip: float = 1.0
    save_every_s: float = 60.0


class Trainer:
    """Trains one module within a budget.

    Args:
        model: holds every trained parameter.
        budget: pace of the run.
        folder: takes ``checkpoint.pt`` and ``curve.jsonl``.
        device: where the model is.
    """

    def __init__(self, model: nn.Module, budget: Budget, folder: Path, device: str = "cpu"):
        self.model, self.budget, self.folder, self.device = model, budget, Path(folder), device
        self.folder.mkdir(parents=True, exist_ok=True)
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for p in parameters if p.dim() >= 2],
                "weight_decay": budget.weight_decay,
            },
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=budget.learning_rate, betas=(0.9, 0.99), fused=True
        )
        self.average = [p.detach().clone() for p in parameters] if budget.ema_decay else []
        self.parameters = parameters
        self.step, self.spent_s = 0, 0.0
        self._resume()

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        return min(1.0, self.spent_s / (60.0 * self.budget.minutes))

    def run(self, compute_losses: Callable[[], Losses]) -> None:
        """Train until the budget is spent.

        Args:
            compute_losses: gives named losses of a fresh batch; the entry "loss" is minimised.
        """
        last_save = last_log = time.monotonic()
        sums: dict[str, float] = {}
        count = 0
        while self.progress < 1.0:
            start = time.monotonic()
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate()
            losses = compute_losses()
            self.optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.budget.grad_clip)
            if torch.isfinite(norm):
                self.optimizer.step()
            self._update_average()
            self.step += 1
            now = time.monotonic()
            self.spent_s += now - start
            for name, value in {**losses, "grad_norm": norm}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
            count += 1
            if now - last_log > 20 or self.progress >= 1.0:
                self._log({name: total / count for name, total in sums.items()})
                last_log, sums, count = now, {}, 0
            if now - last_save > self.budget.save_every_s:
                self.save()
                last_save = now
        self.save()

    def copy_average(self) -> None:
        """Put the averaged weights into the model (for good; call after `run`)."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=False):
                parameter.copy_(average)

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "spent_s": self.spent_s,
        }
        partial = self.folder / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.folder / "checkpoint.pt")

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)
        self.step, self.spent_s = state["step"], state["spent_s"]
        print(f"resumed {path} at step {self.step}, {self.spent_s / 60:.1f} minutes", flush=True)

    def _learning_rate(self) -> float:
        warmup = min(1.0, (self.step + 1) / self.budget.warmup_steps)
        return (
            self.budget.learning_rate
            * warmup
            * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * self.progress)))
        )

    def _update_average(self) -> None:
        if not self.average:
            return
        decay = min(self.budget.ema_decay, (1.0 + self.step) / (10.0 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1.0 - decay)

    def _log(self, means: dict[str, float]) -> None:
        row = {
            "step": self.step,
            "minutes": round(self.spent_s / 60, 2),
            "lr": self._learning_rate(),
        }
        row.update({name: round(value, 5) for name, value in means.items()})
        with (self.folder / "curve.jsonl").open("a", encoding="utf-8") as curve:
            curve.write(json.dumps(row) + "\n")
        print(f"{self.folder.name} {json.dumps(row)}", flush=True)


def load_average(folder: Path, model: nn.Module) -> int:
    """Load the averaged weights of a running or finished training into ``model``.

    Returns:
        The step of the checkpoint.
    """
    state = torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter, average in zip(parameters, state["average"], strict=False):
            parameter.copy_(average)
    return state["step"]


def forward_dtype(device: str, wanted: bool = True) -> torch.autocast:
    """Autocast to bfloat16 where it is wanted."""
    return torch.autocast(
        "cuda" if device.startswith("cuda") else "cpu", dtype=torch.bfloat16, enabled=wanted
    )
