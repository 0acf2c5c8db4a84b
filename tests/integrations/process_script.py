"""One of several processes: calibrates and generates, and writes what it got."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState

import ptq4adm

PROMPTS = ["a dog barks", "a bell rings", "rain falls", "a door slams", "a bird sings"]
OPTIONS = {"steps": 2, "seed": 3, "batch": 2}


def main(model: str, out: str) -> None:
    """Run as rank `state.process_index`."""
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    pipe = ptq4adm.load_pipeline(model, device=state.device)
    calibration = ptq4adm.calibrate_in_processes(pipe, PROMPTS, progress=False, **OPTIONS)
    calibration.save(Path(out) / f"{state.process_index}.calibration")
    torch.save(
        ptq4adm.generate_in_processes(pipe, PROMPTS, **OPTIONS),
        Path(out) / f"{state.process_index}.pt",
    )
    if state.process_index == 1:
        pipe.unet.conv_out.bias.fill_(float("nan"))
    try:
        ptq4adm.generate_in_processes(pipe, PROMPTS, **OPTIONS)
    except ptq4adm.Ptq4admError as error:
        (Path(out) / f"{state.process_index}.error").write_text(f"{type(error).__name__}: {error}")
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
