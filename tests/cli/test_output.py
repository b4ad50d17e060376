"""--quiet and --json, before and behind a command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from support.models import SMALL_UNET
from typer.testing import CliRunner

import modelopt_tdq as tdq
from modelopt_tdq.cli import app
from modelopt_tdq.cli.output import Output, shown

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    SMALL_UNET.make().save_pretrained(folder)
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    return folder


def test_a_pipeline_of_commands_in_json(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = tdq.make_config(8, 8, weights="max", protect_steps=False, progress=False, correction="none")
    monkeypatch.setattr(tdq, "recipe", lambda name: quick)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> dict[str, object]:
        found = CliRunner().invoke(app, [*words, "--json"])
        assert found.exit_code == 0, found.output
        return dict(json.loads(found.stdout))

    done = run("quantize", "--model", str(model), "--output", "int8", "--samples", "1", "--steps", "2")
    assert done["output"] == "int8"
    assert done["times"] == [0.0, 500.0]
    done = run("export", done["output"], "--output", "ratio.onnx")
    assert (done["path"], done["lowering"], done["skipped"]) == ("ratio.onnx", "ratio", [])
    done = run("compare", "int8", "--onnx", "ratio.onnx", "--steps", "1", "--backend", "onnxruntime", "--no-layers")
    assert done["passed"] is True
    assert [step["backend"] for step in done["outputs"]] == ["onnxruntime"]


@pytest.mark.parametrize("words", [["--quiet", "doctor"], ["doctor", "--quiet"]])
def test_quiet_says_nothing(words: list[str]) -> None:
    found = CliRunner().invoke(app, words)
    assert (found.exit_code, found.output) == (0, "")


@pytest.mark.parametrize("flag", ["--quiet", "--json"])
def test_errors_are_said_all_the_same(flag: str) -> None:
    found = CliRunner().invoke(app, ["export", "no-such-folder", "--output", "m.onnx", flag])
    assert found.exit_code == 2
    assert found.stdout == ""
    assert "no-such-folder" in found.stderr


def test_bars_are_left_out_and_warnings_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm import tqdm

    with shown(Output(True, False, sys.stdout)):
        typer.echo("gone")
        for _ in tqdm(range(3)):
            pass
        print("Warning: kept", file=sys.stderr)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "kept" in printed.err
    assert "it/s" not in printed.err
