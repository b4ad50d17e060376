"""The commands of trt_examples/polygraphy/README.md, as they are printed there."""

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import fast_config

import modelopt_tdq as tdq
from modelopt_tdq.export import export_onnx
from modelopt_tdq.model_folder import load_model
from modelopt_tdq.trajectories import load_scheduler, noise, sample, sample_shape

pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")
pytest.importorskip("polygraphy")

EXAMPLE = Path(__file__).parents[2] / "trt_examples" / "polygraphy"
MODEL = Path(__file__).parents[2] / "trt_examples" / "ddim_cifar10" / "model"
README = (EXAMPLE / "README.md").read_text()
COMMANDS = re.findall(r"^ *(polygraphy run (?:.*\\\n)*.*)$", README, re.MULTILINE)
CODES = re.search(r"^CODES=\$\((python -c .*)\)$", README, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first step of the README makes, with a faster calibration, and a fault at the third of five steps."""
    torch.manual_seed(0)
    target = tmp_path_factory.mktemp("polygraphy")
    for script in ("data_loader.py", "compare.py"):
        shutil.copy(EXAMPLE / script, target)
    model, scheduler = load_model(MODEL), load_scheduler(MODEL)
    start = noise(2, sample_shape(model), 0)
    mtq.quantize(model, fast_config(), lambda m: sample(m, scheduler, start, 5))
    inputs = {"sample": start, "timestep": scheduler.timesteps[0]}
    export_onnx(model, target / "reference.onnx", inputs, lowering="reference")
    table = tdq.scale_table(model)
    for name, columns, factor in (("wrong_row", slice(None), 1.5), ("wrong_entry", slice(9, 10), 1.02)):
        scale = table.scale.clone()
        scale[2, columns] *= factor
        wrong = copy.deepcopy(model)
        tdq.set_scale_table(wrong, tdq.ScaleTable(table.timesteps, scale, table.names))
        export_onnx(wrong, target / f"{name}.onnx", inputs)
    (target / "wrong_entry.txt").write_text(table.names[9])
    return target


def run(command: str, folder: Path, graph: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the README in ``folder``, with another graph in the place of ratio.onnx."""
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    words = shlex.split(command.replace("\\\n", " ").replace("ratio.onnx", graph))
    if "$CODES" in words:
        assert CODES is not None
        listed = subprocess.run(
            shlex.split(CODES[1].replace("ratio.onnx", graph)),
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        at = words.index("$CODES")
        words[at : at + 1] = listed.stdout.split()
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_outputs_per_step(folder: Path) -> None:
    reference, compare = COMMANDS[:2]
    done = run(reference, folder, "")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(compare, folder, "wrong_row.onnx")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.findall(r"step (\d) \| (\w+) \| output", done.stdout) == [
        ("0", "passed"),
        ("1", "passed"),
        ("2", "FAILED"),
        ("3", "passed"),
        ("4", "passed"),
    ]


def test_codes_layer_by_layer(folder: Path) -> None:
    reference, compare = COMMANDS[2:]
    done = run(reference, folder, "wrong_entry.onnx")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(compare, folder, "wrong_entry.onnx")
    assert done.returncode == 1, done.stdout + done.stderr
    wrong = (folder / "wrong_entry.txt").read_text()
    assert re.findall(r"step (\d) \| FAILED \| (.*)/codes", done.stdout) == [("2", wrong)]
