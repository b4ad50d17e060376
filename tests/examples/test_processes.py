"""The quantize step of an example in four processes: the scales, and the saved model, of one process."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import results

import modelopt_tdq as tdq
from trt_examples.stable_diffusion.stable_diffusion import FAMILY
from trt_examples.steps import main

safetensors = pytest.importorskip("safetensors.torch")

_SCRIPT = Path(__file__).parents[2] / "trt_examples" / "stable_diffusion" / "stable_diffusion.py"

#: Little to choose, which takes the time of the recipes.
_RECIPE = """
weight_bits: 4
activation_bits: 8
algorithm: {channel_smoothing: 0.5, rounding: compensated, protect_steps: false, correction: none}
"""


def _arguments(folder: Path, name: str) -> list[str]:
    prompts, recipe = folder / "prompts.txt", folder / "recipe.yaml"
    prompts.write_text("1\n2\n3\n4\n")
    recipe.write_text(_RECIPE)
    files = ["--prompts", str(prompts), "--recipe", str(recipe), "--output", str(folder / name)]
    return ["quantize", "--tiny", "--calibration-steps", "2", *files]


def _quantized(rank: int, arguments: list[str]) -> None:
    main(FAMILY, None, arguments)


def _too_few(rank: int, arguments: list[str]) -> dict[str, str]:
    """What each process says that has too few prompts, or is to do a step that is done once."""
    said = {}
    for name, step in (("prompts", "quantize"), ("step", "export")):
        with pytest.raises(tdq.TdqError) as error:
            main(FAMILY, None, [step, *arguments[1:]])
        said[name] = str(error.value)
    return said


def _saved(folder: Path) -> dict[str, Any]:
    table = tdq.ScaleTable.load(folder / "scale_table")
    (file,) = (folder / "denoiser").glob("*.safetensors")
    weights = safetensors.load_file(file)
    scales = {name: value for name, value in weights.items() if name.endswith((".weight", "_scale_bits", "_amax"))}
    return {"times": table.timesteps, "scale": table.scale, **scales}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, diffusers_checkpoints: None) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    main(FAMILY, None, _arguments(folder, "one"))
    return folder


def _same(folder: Path, name: str) -> None:
    found, expected = _saved(folder / name), _saved(folder / "one")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(("number", "further"), [(4, []), (2, ["--shard"])], ids=["four", "two, sharded"])
def test_several_processes_save_what_one_saves(folder: Path, tmp_path: Path, number: int, further: list[str]) -> None:
    name = "".join(["several", *further])
    results(functools.partial(_quantized, arguments=[*_arguments(folder, name), *further]), number, tmp_path)
    _same(folder, name)


def test_what_cannot_be_shared_is_refused(folder: Path, tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, "few")
    (tmp_path / "prompts.txt").write_text("1\n")
    store = tmp_path / "store"
    store.mkdir()
    for said in results(functools.partial(_too_few, arguments=arguments), 2, store):
        assert "fewer than the 2 processes that share them" in said["prompts"]
        assert "only quantize runs in several processes" in said["step"]
    assert not (tmp_path / "few" / "scale_table.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--nproc-per-node", "4"),
        ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"),
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_launchers(folder: Path, launcher: tuple[str, ...]) -> None:
    name = launcher[0]
    command = [sys.executable, "-m", *launcher, str(_SCRIPT), *_arguments(folder, name)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("quantizers, ") == 1  # one process prints
    _same(folder, name)
