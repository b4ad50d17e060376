"""The training examples, from the command line, on a tiny model and random images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modelopt_tdq.core.table import ScaleTable

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

_EXAMPLES = Path(__file__).resolve().parents[2] / "trt_examples" / "ddim_cifar10"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny UNet with attention, its scheduler, and 40 random images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("examples")
    model = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    model.save_pretrained(folder / "model")
    diffusers.DDPMScheduler().save_pretrained(folder / "model" / "scheduler")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "cifar10.npz", X=pixels, y=np.arange(40) % 10, T=pixels, yt=np.arange(40) % 10)
    return folder


#: Runs commands one after the other, as `python script.py ...` does, but imports torch and ModelOpt once.
_RUN = """
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    print("-- end --")
"""


def run(folder: Path, *commands: tuple[str, ...]) -> list[str]:
    """What each command prints; all in a process of their own."""
    every = json.dumps([[str(_EXAMPLES / script), *arguments] for script, *arguments in commands])
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    command = [sys.executable, "-c", _RUN, every]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split("-- end --\n")[:-1]


def test_training_from_scratch_resumes(folder: Path) -> None:
    arguments = ("--config", "model", "--data", "cifar10.npz", "--out", "trained", "--batch", "2")
    first, second = run(folder, *[("train.py", *arguments, "--minutes", minutes) for minutes in ("0.03", "0.06")])

    def steps(text: str) -> int:
        return int(text.split(" steps of", maxsplit=1)[0].rsplit(maxsplit=1)[-1])

    assert 0 < steps(first) < steps(second)
    assert (folder / "trained" / "diffusion_pytorch_model.safetensors").is_file()


def test_qat_trains_resumes_and_saves_a_table_and_samples(folder: Path) -> None:
    arguments = ("--model", "model", "--data", "cifar10.npz", "--batch", "2", "--lr", "1e-2", "--ema", "0.5")
    run(folder, ("qat.py", *arguments, "--out", "whole", "--steps", "4"))
    table = ScaleTable.load(folder / "whole" / "scale_table")
    assert not bool(table.is_static.all())
    _, shown = run(
        folder,
        ("qat.py", *arguments, "--out", "whole", "--steps", "4", "--resume"),  # nothing left to do
        ("sample.py", "--model", "model", "--quantized", "whole", "--images", "2", "--steps", "2"),
    )
    assert torch.equal(ScaleTable.load(folder / "whole" / "scale_table").scale, table.scale)
    assert "dB PSNR" in shown
    assert "EfficientNet-Lite0" in shown


def test_ptq_reconstructs_and_resumes(folder: Path) -> None:
    arguments = ("--model", "model", "--out", "ptq", "--samples", "20", "--iterations", "2")
    run(folder, ("ptq.py", *arguments))
    table = ScaleTable.load(folder / "ptq" / "scale_table")
    run(folder, ("ptq.py", *arguments))  # in a new process: what it goes on with is on disk
    assert torch.equal(ScaleTable.load(folder / "ptq" / "scale_table").scale, table.scale)
