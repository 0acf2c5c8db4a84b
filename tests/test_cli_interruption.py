"""Commands that are interrupted, or whose reader leaves: nothing half-written, a way to go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptq4adm.cli import main

# as in a terminal: a shell's background jobs, and so all they start, ignore the signal
RUN = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from ptq4adm.cli import main; sys.exit(main())"
)


def test_an_interruption_while_saving_leaves_nothing(
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    room = sys.modules["ptq4adm.quantization"]
    with monkeypatch.context() as patch:
        patch.setattr(room, "save_denoiser", interrupt)
        arguments = ["quantize", str(tiny_pipeline), "-o", str(tmp_path / "out")]
        assert main([*arguments, "--activation", "dynamic"]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*arguments, "--activation", "dynamic"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_termination_while_saving_leaves_nothing(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    room = sys.modules["ptq4adm.quantization"]
    monkeypatch.setattr(room, "save_denoiser", lambda *_: signal.raise_signal(signal.SIGTERM))
    arguments = ["quantize", str(tiny_pipeline), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--activation", "dynamic"]) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is handler


def test_control_c_while_calibrating_can_be_resumed(
    tiny_pipeline: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts_file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts_file.write_text("a dog barks\nrain on a roof\n", encoding="utf-8")
    out, cache = tmp_path / "out", tmp_path / "cache"
    arguments = ["quantize", str(tiny_pipeline), "-o", str(out), "--cache", str(cache), "--json"]
    arguments += ["--prompts", str(prompts_file), "--batch", "1", "--steps", "60"]
    command = [sys.executable, "-c", RUN, *arguments, "--threads", "1"]
    long = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
    try:
        # the first prompt is kept in the cache: the second is being run
        while not list(cache.glob("*.safetensors")) and long.poll() is None:
            time.sleep(0.02)
        long.send_signal(signal.SIGINT)
        _, messages = long.communicate()
    finally:
        long.kill()
    assert long.returncode == 130
    last = messages.decode().strip().splitlines()[-1]
    assert last.startswith("ptq4adm: interrupted; nothing was written")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["layers"]
    assert (out / "unet" / "config.json").is_file()


def test_a_reader_that_leaves_is_not_an_accident(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["inspect", str(tiny_pipeline)]) == 1
    assert capsys.readouterr().err == ""
