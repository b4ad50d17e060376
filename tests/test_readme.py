"""What the README says is what there is: its commands parse, its names exist, CI runs its test command."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

import modelopt_tdq as tdq
from modelopt_tdq.cli import app
from modelopt_tdq.lab.bench.zoo.present import summary

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BASH = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]


def test_ci_runs_the_test_command() -> None:
    (tests,) = [line for line in BASH if "pytest" in line]
    install = tests.split("activate && ")[1]
    ci = (ROOT / ".ci/run").read_text().replace("--quiet ", "")
    assert install in ci


@pytest.mark.parametrize("line", [line for line in BASH if "modelopt-tdq " in line])
def test_commands_parse(line: str) -> None:
    words = shlex.split(line.partition("#")[0].partition("modelopt-tdq")[2])
    command = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context(command.name, words, resilient_parsing=True)
    assert not context.args


def test_public_names_exist() -> None:
    names = set(re.findall(r"tdq\.([A-Za-z_][A-Za-z_0-9]*)", README)) | set(re.findall(r"`(TDQ_[A-Z0-9_]+)`", README))
    assert {"export_onnx", "build_engine", "TDQ_W3A3_CFG", "scale_table", "analyze"} <= names
    for name in names:
        assert hasattr(tdq, name), name


def test_fields_of_the_algorithm_exist() -> None:
    table = README.split("The algorithm's fields:")[1].split("It composes")[0]
    fields = re.findall(r"`([a-z_]+)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    assert set(fields) <= set(tdq.TdqCalibConfig.model_fields)
    assert len(fields) >= 10


def test_the_training_loop_runs() -> None:
    """The block under "Train the scales", as it stands, on a tiny model."""
    import modelopt.torch.quantization as mtq
    import torch
    from support.models import FAMILIES

    block = README.split("## Train the scales")[1].split("```python")[1].split("```")[0]
    family = FAMILIES["unet"]
    unet = family.make()
    x = family.inputs(2, torch.tensor(0.0), 0)["sample"]
    names = {
        "unet": unet,
        "forward_loop": family.forward_loop(),
        "batches": [(x, torch.tensor([10.0, 900.0]), torch.zeros_like(x))] * 3,
        "tdq": tdq,
        "mtq": mtq,
        "torch": torch,
        "F": torch.nn.functional,
    }
    before = {name: value.detach().clone() for name, value in unet.named_parameters()}
    exec(block, names)
    assert not bool(names["table"].is_static.all())  # type: ignore[attr-defined]
    assert not torch.equal(unet.conv_in.weight, before["conv_in.weight"])


def test_choices_of_the_learning_algorithm_exist() -> None:
    section = README.split("## Train the scales")[1].split("\n## ")[0]
    table = "".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
    for intervals in re.findall(r"`([a-z_]+)`", table)[1:]:  # the heading first
        tdq.make_config(4, 4, method="tdq_qat", intervals=intervals)
    for scheme in re.findall(r"`([a-z]+)`", section.split("`scheme` is ")[1].split(";")[0]):
        tdq.make_config(4, 4, method="tdq_qat", scheme=scheme)


def test_the_matrix_of_diffusers_classes() -> None:
    results = json.loads((ROOT / "benchmarks/results/zoo.json").read_text())
    assert " ".join(summary(results["runs"]).split()) in " ".join(README.split())


def test_the_figures_of_the_converged_model() -> None:
    rows = json.loads((ROOT / "benchmarks/results/converged_model.json").read_text())["rows"]
    said = " ".join(README.split())
    for scales, text in (("static-margin", "static scales"), ("time-margin", "scales over time")):
        (row,) = [row for row in rows if row["scales"] == scales and row["quantized"] == 255 - 8]
        mean = sum(row["sqnr_db"]) / len(row["sqnr_db"])
        assert f"{text} {mean:.1f} / {min(row['sqnr_db']):.1f} dB" in said
        assert f"{row['psnr_db']:.1f}" in said
    (row,) = [row for row in rows if row["scales"] == "time-margin" and row["quantized"] == 255]
    mean = sum(row["sqnr_db"]) / len(row["sqnr_db"])
    assert f"With every layer quantized, scales over time reach {mean:.1f} / {min(row['sqnr_db']):.1f} dB" in said
