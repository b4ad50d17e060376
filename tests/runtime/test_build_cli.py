"""``modelopt-tdq build``: what it prints, and when it fails."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from modelopt_tdq.cli import app

pytest.importorskip("onnx")

from small_graphs import conv


def build(model: Path, *arguments: object) -> Result:
    command = ["build", str(model), "--compute-capability", "8.9", *map(str, arguments)]
    return CliRunner().invoke(app, command, env={"COLUMNS": "160"})


def test_compact_when_all_is_well(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = conv(tmp_path / "ratio.onnx", "ratio")
    done = build(model)
    assert done.exit_code == 0, done.output
    assert "INT8" in done.output
    assert "1 Conv" in done.output
    assert "conv_myl0" not in done.output
    assert "4 kernels, 1 of 1 quantized layers in low precision, 0 in float (tensorrt_rtx" in done.output
    assert "conv_myl0" in build(model, "--layers").output


def test_float_fails_and_shows_where(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = conv(tmp_path / "gather.onnx", "gather")
    done = build(model)
    assert done.exit_code == 2
    assert "conv_myl0" in done.stdout  # the table
    assert "run in float" in done.stderr
    assert "--allow-float" in done.stderr
    assert not (tmp_path / "gather.engine").exists()
    allowed = build(model, "--allow-float")
    assert allowed.exit_code == 0, allowed.output
    assert "conv_myl0" in allowed.stdout
    assert "0 of 1 quantized layers in low precision, 1 in float" in allowed.stdout
    assert (tmp_path / "gather.engine").exists()


def test_commands_of_other_tools(tmp_path: Path) -> None:
    model = conv(tmp_path / "ratio.onnx", "ratio", batch="batch")
    sizes = ("--dynamic-size", "batch=1,4,9")
    done = build(model, "--print-trtexec", *sizes, "--output", tmp_path / "my engine")
    (line,) = done.stdout.splitlines()
    assert shlex.split(line)[:3] == ["tensorrt_rtx", f"--onnx={model}", f"--saveEngine={tmp_path / 'my engine'}"]
    assert "--maxShapes=x:9x32x8x8" in line
    arguments = ["build", str(model), "--print-trtexec", "--backend", "tensorrt", "--timing-cache", "t.cache"]
    (line,) = CliRunner().invoke(app, arguments).stdout.splitlines()
    assert line.startswith("trtexec --onnx=")
    assert "--timingCacheFile=t.cache" in line
    assert {file.name for file in tmp_path.iterdir()} == {"ratio.onnx"}
