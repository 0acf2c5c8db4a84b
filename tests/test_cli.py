"""The command line: what each command prints and writes, and exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import ptq4adm
from ptq4adm.cli import main
from ptq4adm.cli.doctor import self_test
from ptq4adm.cli.generate import file_name
from ptq4adm.rounding import LayerTask, Replay
from ptq4adm.rounding.methods import ROUNDERS

PROMPTS = ["a dog barks", "rain on a roof"]


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("# two of them\n\n" + "\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def packed(
    tiny_pipeline: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("packed") / "w4a8"
    arguments = ["-o", str(out), "--prompts", str(prompts_file), "--steps", "2", "--quiet"]
    assert main(["quantize", str(tiny_pipeline), *arguments]) == 0
    return out


def _read(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


# --- quantize -----------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_writes_nothing(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    overrides = ["--override", "*.conv_shortcut=w8a8", "--override", "*.attn2.*=float"]
    code = main(["quantize", str(tiny_pipeline), "-o", str(out), "--dry-run", *overrides])
    table = capsys.readouterr().out
    assert code == 0
    assert not out.exists()
    rows = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert " float " in rows["conv_in"]
    assert "override '*.conv_shortcut'" in rows["up_blocks.0.resnets.0.conv_shortcut"]
    assert " float " in rows["mid_block.attentions.0.transformer_blocks.0.attn2.to_q"]
    assert "% less" in table


def test_dry_run_as_json(tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(tiny_pipeline), "--dry-run", "--json", "--bits", "w8a8"]) == 0
    plan = _read(capsys)
    assert plan["config"]["scheme"] == "w8a8"
    assert plan["bytes_after"] < plan["bytes_before"]


def test_quantize_writes_a_pipeline_that_load_pipeline_reads(packed: Path) -> None:
    pipe = ptq4adm.load_pipeline(packed)
    assert any(isinstance(m, ptq4adm.W4A8Conv2d) for m in pipe.unet.modules())
    assert pipe(PROMPTS[0], steps=2).shape == (1, 10240)


def test_quantize_reuses_a_calibration_and_reports_in_json(
    tiny_pipeline: Path,
    prompts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = tmp_path / "calibration.safetensors"
    first = ["-o", str(tmp_path / "a"), "--prompts", str(prompts_file), "--steps", "2"]
    assert main(["quantize", str(tiny_pipeline), *first, "--save-calibration", str(kept)]) == 0
    printed = capsys.readouterr()
    assert "calibrating on 2 prompts, 2 steps each: about" in printed.err
    assert "% less" in printed.out
    second = ["-o", str(tmp_path / "b"), "--calibration", str(kept), "--bits", "w8a8", "--json"]
    assert main(["quantize", str(tiny_pipeline), *second]) == 0
    result = _read(capsys)
    assert result["calibration"] == ptq4adm.Calibration.load(kept).digest()
    assert result["layers"]["w8a8"] > 10
    assert Path(result["output"]) == tmp_path / "b"


def test_quantize_rounds_by_inputs_that_it_records_or_is_given(
    tiny_pipeline: Path,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replayed = []

    def keep_plain(_: object, tasks: list[LayerTask], replay: Replay, **__: object) -> object:
        replayed.append(replay.inputs)
        return {task.name: task.start for task in tasks}

    monkeypatch.setitem(ROUNDERS, "gptq", keep_plain)
    calibration, inputs = tmp_path / "calibration", tmp_path / "inputs"
    run = ["quantize", str(tiny_pipeline), "--quiet", "--weight-observer", "absmax"]
    first = [*run, "--prompts", str(prompts_file), "--steps", "2", "--rounding", "gptq"]
    kept = ["--save-calibration", str(calibration), "--inputs", str(inputs)]
    assert main([*first, "-o", str(tmp_path / "a"), *kept]) == 0
    again = ["--calibration", str(calibration), "--inputs", str(inputs), "--rounding", "gptq"]
    assert main([*run, "-o", str(tmp_path / "b"), *again]) == 0
    folders = [tmp_path / name / "unet" for name in "ab"]
    texts = [(folder / "config.json").read_text() for folder in folders]
    assert json.loads(texts[0])["quantization_config"]["config"]["rounding"] == "gptq"
    assert texts[0] == texts[1]
    first_inputs, second_inputs = replayed
    assert len(first_inputs.pairs) == 4  # two prompts, two steps: fewer than 256
    assert torch.equal(first_inputs.sample, second_inputs.sample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounding", "gptq", "--activation", "dynamic"], "use --activation static"),
        (["--rounding", "gptq", "--calibration", "FILE"], "give --inputs"),
        (["--inputs", "FILE"], "give --strategy"),
    ],
)
def test_quantize_says_what_a_rounding_lacks(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "model", "-o", "out", *options]) == 2
    assert message in capsys.readouterr().err


def test_quantize_dynamic_needs_no_calibration(tiny_pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["-o", str(out), "--activation", "dynamic", "--group-size", "64"]
    assert main(["quantize", str(tiny_pipeline), *arguments]) == 0
    config = json.loads((out / "unet" / "config.json").read_text())["quantization_config"]
    assert config["buckets"] is None
    assert config["config"]["group_size"] == 64


def test_overwrite_replaces_and_its_absence_refuses(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    arguments = ["quantize", str(tiny_pipeline), "-o", str(out), "--activation", "dynamic"]
    assert main(arguments) == 1
    assert "not empty" in capsys.readouterr().err
    assert (out / "precious.txt").exists()
    assert main([*arguments, "--overwrite"]) == 0
    assert not (out / "precious.txt").exists()


# --- generate -----------------------------------------------------------------------------------


def test_generate_twice_with_one_seed_gives_identical_files(packed: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.wav", "b.wav", "c.wav")]
    for file, seed in zip(files, ("7", "7", "8"), strict=True):
        arguments = ["-o", str(file), "--prompt", PROMPTS[0], "--steps", "2", "--seed", seed]
        assert main(["generate", str(packed), *arguments]) == 0
    first, again, other = (file.read_bytes() for file in files)
    assert first == again
    assert first != other
    info = soundfile.info(files[0])
    assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
    assert info.frames == 10240


def test_generate_writes_a_folder_and_a_sample_does_not_depend_on_the_batch(
    packed: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for batch in ("1", "2"):
        arguments = ["--prompts", str(prompts_file), "--steps", "2", "--seed", "3"]
        folder = ["-o", str(tmp_path / batch), "--batch", batch, "--json"]
        assert main(["generate", str(packed), *arguments, *folder]) == 0
    last = json.loads(capsys.readouterr().out.split("\n}\n")[1] + "\n}")
    assert [clip["seed"] for clip in last["clips"]] == [3, 4]
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == ["00-a-dog-barks.wav", "01-rain-on-a-roof.wav"]
    for name in names:
        one, two = (soundfile.read(tmp_path / batch / name)[0] for batch in ("1", "2"))
        assert np.abs(one - two).max() <= 2 / 32768


def test_generate_reads_a_float_model_and_cuts_to_seconds(
    tiny_pipeline: Path, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "a.wav"
    arguments = ["-o", str(file), "--prompt", "x", "--steps", "1", "--seconds", "0.3"]
    assert main(["generate", str(tiny_pipeline), *arguments]) == 0
    assert soundfile.info(file).frames == 4800


def test_several_clips_need_a_folder(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-o", str(tmp_path / "a.wav"), "--prompt", "x", "--prompt", "y"]
    assert main(["generate", str(packed), *arguments]) == 2
    assert "one file cannot hold 2 clips" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A dog, barking!", "03-a-dog-barking.wav"),
        ("../../etc/passwd", "03-etc-passwd.wav"),
        ("狗叫", "03-clip.wav"),
        ("word " * 40, "03-word-word-word-word-word-word-word-word.wav"),
    ],
)
def test_file_names_are_safe(prompt: str, name: str) -> None:
    assert file_name(3, prompt) == name


# --- inspect, doctor ----------------------------------------------------------------------------


def test_inspect_shows_schemes_sizes_and_calibration(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(packed), "--layers"]) == 0
    text = capsys.readouterr().out
    assert "static scales, 2 of 2 timestep buckets calibrated over 1000 timesteps" in text
    line = next(x for x in text.splitlines() if x.startswith("up_blocks.0.resnets.0.conv_shortcut"))
    assert "w8a8" in line
    assert "static 128+128" in line


def test_inspect_passes_over_a_component_that_is_none(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(packed, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"safety_checker": [None, None]}))
    assert main(["inspect", str(folder), "--json"]) == 0
    assert "safety_checker" not in json.loads(capsys.readouterr().out)["components"]


def test_inspect_json_agrees_with_the_loaded_model(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ptq4adm.nn import resident_bytes

    assert main(["inspect", str(packed), "--json", "--layers"]) == 0
    unet = _read(capsys)["unet"]
    pipe = ptq4adm.load_pipeline(packed, backend="reference")
    assert unet["bytes_resident"] == resident_bytes(pipe.unet)
    assert len(unet["layers"]) == sum(unet["schemes"].values())
    by_name = {layer["name"]: layer for layer in unet["layers"]}
    assert by_name["conv_in"]["scheme"] == "float"
    assert by_name["up_blocks.0.resnets.0.conv_shortcut"]["x_scale"]["shape"] == [2, 2]
    conv = by_name["up_blocks.0.resnets.0.conv1"]
    assert conv["shape"] == [128, 256, 3, 3]
    assert conv["parameters"] == 128 * 256 * 9 + 128
    assert conv["w_scale"]["min"] > 0


def test_inspect_by_a_table_shows_backends_and_what_float16_would_cost(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ptq4adm.dispatch import DispatchTable, LayerKey, Times, save_table

    run = dict.fromkeys(("date", "commit", "torch", "triton", "cuda", "driver"), "x")
    times = {"cuda": 2.0, "triton": 3.0}
    key = LayerKey("conv3x3", 4, 64, 64 * 9)  # of M 128
    table = DispatchTable("Test GPU 1", (run,), {key: {100: Times(0, 1.5, times, times)}})
    path = tmp_path / "table.json"
    save_table(path, table)
    assert main(["inspect", str(packed), "--json", "--layers", "--table", str(path)]) == 0
    unet = _read(capsys)["unet"]
    convs = [x for x in unet["layers"] if x["shape"] == [64, 64, 3, 3]]
    strided = [x for x in convs if "downsamplers" in x["name"]]
    convs = [x for x in convs if x not in strided]
    assert convs
    assert {x["backend_reason"] for x in strided} == {
        "the table has no w4a8 conv3x3-stride2 64x576"
    }
    assert {x["backend"] for x in convs} == {"cuda"}
    assert {x["backend_reason"] for x in convs} == {"cuda 2 us, triton 3 us at M 100"}
    assert {x["rows"] for x in convs} == {128}
    assert unet["backends"]["cuda"] == len(convs)
    would = unet["float_where_faster"]
    assert would["layers"] == len(convs)
    float16 = len(convs) * (2 * 64 * (64 * 9 + 1) - 64 * 64 * 9 // 2)
    assert would["bytes_resident"] == unet["bytes_resident"] + float16
    assert main(["inspect", str(packed), "--layers", "--table", str(path)]) == 0
    text = capsys.readouterr().out
    assert f"would run {len(convs)} of them in float16" in text
    assert "backend auto on Test GPU 1: " in text
    assert "cuda (cuda 2 us, triton 3 us at M 100)" in text
    path.write_text("{")
    assert main(["inspect", str(packed), "--table", str(path)]) == 1
    assert "not JSON" in capsys.readouterr().err
    assert main(["inspect", str(packed)]) == 0
    assert "backend auto on cpu: " in capsys.readouterr().out


def test_inspect_counts_every_parameter(
    packed: Path, tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(packed), "--json"]) == 0
    unet = _read(capsys)["unet"]
    float_unet = ptq4adm.load_pipeline(tiny_pipeline).unet
    assert unet["parameters"] == sum(p.numel() for p in float_unet.parameters())
    assert "layers" not in unet


def test_inspect_of_a_float_model_says_so(
    tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tiny_pipeline)]) == 0
    assert "not quantized" in capsys.readouterr().out


def test_doctor_reports_backends_and_their_self_test(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "audioldm-tiny").mkdir()
    (tmp_path / "audioldm-tiny" / "model_index.json").write_text("{}")
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    assert main(["doctor", "--json"]) == 0
    report = _read(capsys)
    backends = {backend["name"]: backend for backend in report["backends"]}
    assert backends["reference"]["self_test"] == "exact"
    assert not backends["cuda"]["is_available"]
    assert backends["cuda"]["detail"]
    assert report["packages"]["torch"]
    assert main(["doctor"]) == 0
    assert "all well" in capsys.readouterr().out


def test_doctor_fails_on_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ptq4adm import ops

    right = ops.conv2d
    monkeypatch.setattr(ops, "conv2d", lambda *a, **k: right(*a, **k) + 1)
    assert "w4a8_conv2d differs" in self_test("reference")
    assert main(["doctor"]) == 1
    assert "something is wrong" in capsys.readouterr().out


# --- usage, exit codes, interruption ------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["quantize", "model"],
        ["quantize", "model", "-o", "out", "--bits", "w2a2"],
        ["quantize", "model", "-o", "out", "--override", "conv"],
        ["generate", "model", "--prompt", "x"],
        ["generate", "model", "-o", "a.wav", "--prompt", "x", "--steps", "0"],
        ["generate", "model", "-o", "a.wav", "--prompt", "x", "--batch", "many"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_exits_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert "usage: ptq4adm" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["quantize"], ["generate"], ["inspect"], ["doctor"]])
def test_help_and_version_exit_with_0(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--help"]) == 0
    assert "--help" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ptq4adm {ptq4adm.__version__}\n"


def test_shipped_is_the_default_model(
    monkeypatch: pytest.MonkeyPatch, tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ptq4adm.cli.options.shipped_pipeline_path", lambda: tiny_pipeline)
    assert main(["quantize", "--dry-run", "--json"]) == 0
    assert _read(capsys)["rows"]
    assert main(["inspect", "shipped", "--json"]) == 0
    assert _read(capsys)["folder"] == str(tiny_pipeline)


def test_the_package_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "ptq4adm", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"ptq4adm {ptq4adm.__version__}\n"
