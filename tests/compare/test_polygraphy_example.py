"""The commands of trt_examples/polygraphy/README.md, as they are printed there, run in this process.

Over fewer steps: Polygraphy keeps the codes of each in a file of text.
"""

import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import onnx
import pytest
import torch
from support.export import lowered, trace
from support.models import SMALL_UNET, fast_config

import modelopt_tdq as tdq
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.trajectories import load_scheduler, noise, sample, sample_shape

pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")
pytest.importorskip("polygraphy")

import diffusers
from polygraphy.logger import G_LOGGER
from polygraphy.tools import main as polygraphy

EXAMPLE = Path(__file__).parents[2] / "trt_examples" / "polygraphy"
BLOCKS = re.findall(r"```bash\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
COMMANDS = re.findall(r"^ *((?:polygraphy run|python) (?:.*\\\n)*.*)$", "".join(BLOCKS), re.MULTILINE)
GRAPHS, REFERENCE, OUTPUTS, LAYERS, *TABLE = COMMANDS

STEPS = range(5)
#: A step of these, counted from the noise, its time, and the row of the table that belongs to it.
STEP, TIME, ROW = 1, 600, 3


@dataclass
class Example:
    """A folder with the scripts of the example, and the graphs that its README has made."""

    folder: Path
    model: torch.nn.Module
    graph: Any

    def lowered(
        self, factor: float, columns: Any = slice(None), lowering: str = "ratio", table_input: bool = False
    ) -> onnx.ModelProto:
        """A graph with wrong scales in one row."""
        table = tdq.scale_table(self.model)
        wrong = torch.ones_like(table.scale)
        wrong[ROW, columns] = factor
        offset = None if table.offset is None else table.offset * wrong  # zero keeps its code
        tdq.set_scale_table(self.model, tdq.ScaleTable(table.timesteps, table.scale * wrong, table.names, offset))
        try:
            return lowered(self.graph, lowering, self.model, table_input=table_input).proto
        finally:
            tdq.set_scale_table(self.model, table)


def make(folder: Path, source: Path, config: dict[str, Any]) -> Example:
    """What the first step of the README makes, with a faster calibration."""
    constants = {"MODEL = bundled_model()": f"MODEL = {str(source)!r}", "STEPS = 20": f"STEPS = {len(STEPS)}"}
    for script in EXAMPLE.glob("*.py"):
        text = script.read_text()
        for before, after in constants.items():
            assert script.name != "data_loader.py" or f"\n{before}\n" in text
            text = text.replace(before, after)
        (folder / script.name).write_text(text)
    model, scheduler = load_model(source), load_scheduler(source)
    start = noise(1, sample_shape(model), 0)
    mtq.quantize(model, config, lambda m: sample(m, scheduler, start, len(STEPS)))
    example = Example(folder, model, trace(model, {"sample": start, "timestep": scheduler.timesteps[0]}))
    onnx.save(example.lowered(1.0, lowering="reference"), folder / "reference.onnx")
    return example


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Polygraphy is as loud as before."""
    with G_LOGGER.verbosity():
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command of the README: its exit status, and what it printed."""

    def command(line: str, example: Example) -> tuple[int, str]:
        monkeypatch.chdir(example.folder)
        for script in example.folder.glob("*.py"):  # a process of its own would not know them
            monkeypatch.delitem(sys.modules, script.stem, raising=False)
        program, *words = shlex.split(line.replace("\\\n", " "))
        status = 0
        if program == "polygraphy":
            status = polygraphy(words)
        else:
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(words[0], run_name="__main__")
        return status, capsys.readouterr().out

    return command


def failed(printed: str) -> set[tuple[int, str]]:
    return {(int(step), name) for step, name in re.findall(r"step (\d+), time [\d.]+ \| FAILED \| (\S+):", printed)}


def first_fault(printed: str) -> list[str]:
    return re.findall(r"FIRST FAULTY LAYER: (.*)$", printed, re.MULTILINE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    SMALL_UNET.make().save_pretrained(folder)
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def int8(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Example:
    return make(tmp_path_factory.mktemp("int8"), tiny, fast_config())


def test_outputs_and_layers(int8: Example, run: Any) -> None:
    example, folder = int8, int8.folder
    assert run(REFERENCE.replace("reference_codes", "reference"), example)[0] == 0
    onnx.save(example.lowered(1.5), folder / "ratio.onnx")
    status, printed = run(OUTPUTS, example)
    assert status == 1
    assert printed.count("Allowed: ") == 1
    assert failed(printed) == {(STEP, "output")}
    assert re.findall(r"step (\d+), time [\d.]+ \| \w+ \| output", printed) == [str(step) for step in STEPS]

    names = tdq.scale_table(example.model).names
    onnx.save(example.lowered(1.01, 9), folder / "ratio.onnx")
    run(GRAPHS, example)
    assert run(REFERENCE, example)[0] == 0
    status, printed = run(LAYERS, example)
    assert status == 1
    assert first_fault(printed) == [f"{names[9]}, step {STEP}, time {TIME}"]
    assert {step for step, _ in failed(printed)} == {STEP}
    assert re.findall(rf"step (\d+), time [\d.]+ \| {len(names)} layers, 0 faulty", printed) == [
        str(s) for s in STEPS if s != STEP
    ]


@pytest.mark.parametrize(
    "fields", [{"weight_bits": (4, 3), "activation_bits": (4, 3)}, {"asymmetric": True}], ids=["fp8", "offset"]
)
def test_layers_of_other_number_formats(tiny: Path, tmp_path: Path, run: Any, fields: dict[str, Any]) -> None:
    example = make(tmp_path, tiny, fast_config(**fields))
    names = tdq.scale_table(example.model).names
    for factor, status, expected in ((1.0, 0, []), (0.5, 1, [f"{names[-1]}, step {STEP}, time {TIME}"])):
        onnx.save(example.lowered(factor, len(names) - 1), tmp_path / "ratio.onnx")
        run(GRAPHS, example)
        if factor == 1.0:
            assert run(REFERENCE, example)[0] == 0
        found, printed = run(LAYERS, example)
        assert found == status, printed
        assert len(re.findall(r"\| output: .* dB, rounding\)", printed)) == len(STEPS)
        assert first_fault(printed) == expected


def test_a_table_that_is_an_input(int8: Example, run: Any) -> None:
    example, folder = int8, int8.folder
    onnx.save(example.lowered(1.0), folder / "ratio.onnx")
    run(GRAPHS, example)
    assert run(REFERENCE, example)[0] == 0
    onnx.save(example.lowered(1.0, table_input=True), folder / "table.onnx")
    table = tdq.scale_table(example.model)
    scale = table.scale.clone()
    for factor in (1.0, 1.05):
        scale[ROW, 1] = table.scale[ROW, 1] * factor
        tdq.ScaleTable(table.timesteps, scale, table.names).save(folder / "int8" / "scale_table")
        (graphs, outputs, layers) = TABLE
        run(graphs, example)
        assert run(outputs, example)[0] == 0
        status, printed = run(layers, example)
        assert status == (factor != 1.0), printed
        assert first_fault(printed) == ([] if factor == 1.0 else [f"{table.names[1]}, step {STEP}, time {TIME}"])
