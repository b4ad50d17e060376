"""The training examples, from the command line, on a tiny model and random images."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.processes import run_fresh

from modelopt_tdq.core.table import ScaleTable

diffusers = pytest.importorskip("diffusers")
accelerate = pytest.importorskip("accelerate")

_EXAMPLES = Path(__file__).resolve().parents[2] / "trt_examples" / "ddim_cifar10"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny UNet with attention, its scheduler, and 40 random images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("examples")
    model = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    model.save_pretrained(folder / "model")
    diffusers.DDPMScheduler().save_pretrained(folder / "model" / "scheduler")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "cifar10.npz", X=pixels, y=np.arange(40) % 10, T=pixels, yt=np.arange(40) % 10)
    return folder


#: Runs commands one after the other, as `python script.py ...` does.
_RUN = """
import os, runpy, sys
os.chdir({folder!r})
for command in {commands!r}:
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
"""

_TRAINING = ("--data", "cifar10.npz", "--batch", "2")
_QAT = ("qat.py", "--model", "model", *_TRAINING, "--lr", "1e-2", "--ema", "0.5", "--out", "whole", "--steps", "4")
_PTQ = ("ptq.py", "--model", "model", "--out", "ptq", "--samples", "20", "--iterations", "2")


@pytest.fixture(scope="module")
def begun(folder: Path) -> Path:
    """The folder after one run of each example that can go on, in a process that is over: what they left is on disk."""
    commands = [[str(_EXAMPLES / script), *arguments] for script, *arguments in (_QAT, _PTQ)]
    code, printed = run_fresh(_RUN.format(folder=str(folder), commands=commands), folder, wait=400.0)
    assert code == 0, printed[-2000:]
    return folder


@pytest.fixture
def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Runs a command in this process: what it printed."""

    def command(script: str, *arguments: str) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(_EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    yield command
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_training_from_scratch_resumes(folder: Path, run: Callable[..., str]) -> None:
    arguments = ("--config", "model", *_TRAINING, "--out", "trained")

    def steps(minutes: str) -> int:
        text = run("train.py", *arguments, "--minutes", minutes)
        return int(text.split(" steps of", maxsplit=1)[0].rsplit(maxsplit=1)[-1])

    assert 0 < steps("0.03") < steps("0.06")
    assert (folder / "trained" / "diffusion_pytorch_model.safetensors").is_file()


def written(folder: Path) -> dict[Path, int]:
    """When each file of a folder was written."""
    assert folder.is_dir()
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_qat_trains_resumes_and_saves_a_table_and_samples(begun: Path, run: Callable[..., str]) -> None:
    table = ScaleTable.load(begun / "whole" / "scale_table")
    assert not bool(table.is_static.all())
    checkpoint = written(begun / "whole" / "checkpoint")
    run(*_QAT, "--resume")
    assert written(begun / "whole" / "checkpoint") == checkpoint  # nothing was left to do
    shown = run("sample.py", "--model", "model", "--quantized", "whole", "--images", "2", "--steps", "2")
    assert torch.equal(ScaleTable.load(begun / "whole" / "scale_table").scale, table.scale)
    assert "dB PSNR" in shown
    assert "EfficientNet-Lite0" in shown


def test_ptq_reconstructs_and_resumes(begun: Path, run: Callable[..., str]) -> None:
    table = ScaleTable.load(begun / "ptq" / "scale_table")
    blocks = written(begun / "ptq.blocks")
    run(*_PTQ)
    assert written(begun / "ptq.blocks") == blocks != {}
    assert torch.equal(ScaleTable.load(begun / "ptq" / "scale_table").scale, table.scale)
