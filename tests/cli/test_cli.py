import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from support.models import FAMILIES
from typer.testing import CliRunner

import modelopt_tdq as tdq
from modelopt_tdq.cli import app
from modelopt_tdq.lab.model_folder import describe_inputs, load_quantized, make_inputs, save_quantized

diffusers = pytest.importorskip("diffusers")

COMMANDS = ("demo", "analyze", "quantize", "export", "twin", "table", "build", "compare", "report", "doctor")
SMALL = {
    "sample_size": 8,
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 8,
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The message of a command that the user called wrongly: one line, exit status 2, no traceback."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as diffusers saves a pipeline: ``unet/`` and ``scheduler/``."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    diffusers.UNet2DModel(**SMALL).save_pretrained(folder / "unet")
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def quantized(pipeline: Path) -> Path:
    folder = pipeline / "quantized"
    result = run(
        "quantize", "--model", pipeline, "--subfolder", "unet", "--output", folder, "--samples", 2, "--steps", 3
    )
    assert result.exit_code == 0, result.output
    assert "follow 3 times" in result.output
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_help_lists_all_commands() -> None:
    output = run("--help").output
    assert all(command in output for command in COMMANDS)
    assert tdq.__version__ in run("--version").output


def test_quantized_folder(quantized: Path) -> None:
    description = json.loads((quantized / "quantization.json").read_text())
    assert description["recipe"] == "int8"
    assert description["calibration"] == {"scheduler": "DDIMScheduler", "samples": 2, "steps": 3, "seed": 0}
    assert description["inputs"]["sample"] == {"shape": [2, 3, 8, 8], "dtype": "float32"}
    table = tdq.ScaleTable.load(quantized / "scale_table")
    found = load_quantized(quantized)
    assert torch.equal(tdq.scale_table(found.model).scale, table.scale)
    assert len(table) == 3


@pytest.mark.parametrize("maintenance", ["naive", "cache", "auto"])
def test_temporal_features_are_maintained(pipeline: Path, tmp_path: Path, maintenance: str) -> None:
    recipe = tmp_path / "fast.yaml"
    fast = "{method: tdq_temporal, statistic: max, weights: max, iterations: 3}"
    recipe.write_text(f"weight_bits: 4\nactivation_bits: 4\nalgorithm: {fast}\n")
    call = ("quantize", "--model", pipeline, "--subfolder", "unet", "--output", tmp_path / "q", "--recipe", recipe)
    result = run(*call, "--samples", 1, "--steps", 2, "--maintenance", maintenance)
    assert result.exit_code == 0, result.output
    found = load_quantized(tmp_path / "q")
    assert found.description["maintenance"] == maintenance
    if maintenance == "naive":
        assert not (tmp_path / "q" / "feature_table.safetensors").exists()
        return
    table = tdq.FeatureTable.load(tmp_path / "q" / "feature_table")
    strategies = {strategy for rows in table.metadata["strategy"].values() for strategy in rows}
    assert strategies <= ({"tib", "cache", "naive"} if maintenance == "auto" else {maintenance})
    assert set(tdq.feature_table(found.model).features) == set(table.features)
    assert f"{len(table.features)} temporal features at 2 times will take" in result.output
    assert str(tdq.temporal_report(found.model)) in result.output


def test_recipes_that_learn_leave_the_features_alone(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("weight_bits: 8\nactivation_bits: 8\nalgorithm: {method: tdq_qat}\n")
    arguments = ["quantize", "--output", tmp_path / "q", "--recipe", tmp_path / "r.yaml"]
    assert "tdq_qat" in refused(*arguments, "--maintenance", "tib")


def test_export_and_compare(quantized: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("polygraphy")
    file = tmp_path / "model.onnx"
    result = run("export", quantized, "--output", file, "--batch", 1)
    assert result.exit_code == 0, result.output
    assert " 0 skipped" in result.output
    model = onnx.load(file)
    assert [i.name for i in model.graph.input] == ["sample", "timestep"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    backends = ("--backend", "torch", "--backend", "onnxruntime")
    page = tmp_path / "report" / "compare.html"
    result = run("compare", quantized, "--onnx", file, "--steps", 2, *backends, "--report", page)
    assert result.exit_code == 0, result.output
    assert "passed" in result.output
    assert "Allowed: " in result.output
    assert 'src="data:image/svg+xml;base64,' in page.read_text()


def test_plugin_twin_and_table_input(quantized: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("polygraphy")
    files = {name: tmp_path / f"{name}.onnx" for name in ("plugin", "table", "plugin_twin")}
    opened = ("--table-input", "--dynamic-axis", "sample:2=height", "--pack-weights", "cast")
    for name, options in (("plugin", ("--lowering", "plugin")), ("table", opened)):
        result = run("export", quantized, "--output", files[name], "--batch", 1, *options)
        assert result.exit_code == 0, result.output
    assert "TdqScaleLookup" in {node.op_type for node in onnx.load(files["plugin"]).graph.node}
    sample, *others = onnx.load(files["table"]).graph.input
    assert {"tdq_table", "tdq_edges"} < {value.name for value in others}
    assert sample.type.tensor_type.shape.dim[2].dim_param == "height"
    assert "bytes of codes" in result.output

    result = run("twin", files["plugin"])
    assert result.exit_code == 0, result.output
    assert "TdqScaleLookup" not in {node.op_type for node in onnx.load(files["plugin_twin"]).graph.node}
    assert "no node TdqScaleLookup" in refused("twin", files["table"])
    assert "the graph itself" in refused("twin", files["plugin"], "--output", files["plugin"])
    result = run("compare", quantized, "--onnx", files["plugin"], "--steps", 1, "--backend", "onnxruntime")
    assert result.exit_code == 0, result.output
    assert "plugin-free twin was run" in result.output


def test_compare_fails_on_another_models_export(quantized: Path, pipeline: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("polygraphy")
    found = load_quantized(quantized)
    table = tdq.scale_table(found.model)
    tdq.set_scale_table(found.model, tdq.ScaleTable(table.timesteps, table.scale.flip(0) * 1.5, table.names))
    file = tmp_path / "other.onnx"
    tdq.export_onnx(found.model, file, make_inputs(found.inputs, 1))
    result = run("compare", quantized, "--onnx", file, "--steps", 1, "--backend", "onnxruntime")
    assert result.exit_code == 1
    assert f"First faulty layer: {table.names[0].partition('.')[0]}" in result.output


def test_calibration_script(pipeline: Path, tmp_path: Path) -> None:
    script = tmp_path / "calibrate.py"
    script.write_text(
        "import torch\n"
        "def forward_loop(model):\n"
        "    for t in (900.0, 400.0):\n"
        "        model(torch.randn(3, 3, 8, 8), torch.full((3,), t))\n"
    )
    folder = tmp_path / "quantized"
    result = run(
        "quantize", "--model", pipeline / "unet", "--output", folder, "--calibration-script", f"{script}:forward_loop"
    )
    assert result.exit_code == 0, result.output
    assert tdq.ScaleTable.load(folder / "scale_table").timesteps.tolist() == [400.0, 900.0]
    assert load_quantized(folder).inputs["timestep"] == {"shape": [3], "dtype": "float32"}


def test_recipe_from_a_file(pipeline: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    call = ("quantize", "--model", pipeline, "--subfolder", "unet", "--output", tmp_path / "q", "--recipe", recipe)
    recipe.write_text("weight_bits: 8\nactivation_bits: 6\nalgorithm: {statistic: guess}\n")
    assert "statistic" in refused(*call)
    assert not (tmp_path / "q").exists()
    recipe.write_text("weight_bits: 8\nactivation_bits: 6\nalgorithm: {statistic: max, bins: 1}\n")
    result = run(*call, "--samples", 1, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "0 of them follow" in result.output
    table = tdq.ScaleTable.load(tmp_path / "q" / "scale_table")
    assert set(table.metadata["num_bits"].values()) == {6}


def test_analyze(pipeline: Path, tmp_path: Path) -> None:
    result = run(
        *("analyze", "--model", pipeline, "--subfolder", "unet", "--samples", 2, "--steps", 3),
        *("--probes", 1, "--target", 30, "--output", tmp_path),
    )
    assert result.exit_code == 0, result.output
    assert "Headroom" in result.output
    assert "Sensitivity" in result.output
    assert "in high precision" in result.output
    saved = json.loads((tmp_path / "analysis.json").read_text())
    assert " ".join(result.output.split()).count(saved["verdict"].split(":")[0]) == 1
    assert (tmp_path / "sqnr.png").read_bytes()[:4] == b"\x89PNG"


def test_class_conditional_model_is_calibrated_on_its_classes(tmp_path: Path) -> None:
    diffusers.UNet2DModel(**SMALL, num_class_embeds=4).save_pretrained(tmp_path / "unet")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    arguments = ["--model", tmp_path, "--subfolder", "unet", "--samples", 2, "--steps", 4]
    result = run("quantize", *arguments, "--output", tmp_path / "q")
    assert result.exit_code == 0, result.output
    assert set(json.loads((tmp_path / "q" / "quantization.json").read_text())["inputs"]) >= {"sample", "class_labels"}


def test_text_conditional_model_asks_for_a_script(tmp_path: Path) -> None:
    FAMILIES["unet_condition"].make().save_pretrained(tmp_path / "unet")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    message = refused("quantize", "--model", tmp_path, "--subfolder", "unet", "--output", tmp_path / "q")
    assert "--calibration-script" in message


def test_model_without_a_scheduler_asks_for_one(pipeline: Path, tmp_path: Path) -> None:
    assert "scheduler" in refused("quantize", "--model", pipeline / "unet", "--output", tmp_path / "q")


def _script(text: str) -> Callable[[Path], list[object]]:
    def arguments(folder: Path) -> list[object]:
        (folder / "script.py").write_text(text)
        return ["quantize", "--output", folder / "q", "--calibration-script", f"{folder}/script.py:loop"]

    return arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda f: ["quantize", "--output", f / "q", "--recipe", "int9"], "recipe"),
        (lambda f: ["quantize", "--output", f / "q", "--model", f], "config.json"),
        (lambda f: ["quantize", "--output", f / "q", "--calibration-script", "nothing"], "file.py:function"),
        (lambda f: ["quantize", "--output", f / "q", "--calibration-script", "gone.py:loop"], "no such file"),
        (_script("other = 1"), "no such function"),
        (lambda f: ["export", f], "quantization.json"),
        (lambda f: ["export", f, "--dynamic-axis", "height"], "INPUT:AXIS=NAME"),
        (lambda f: ["compare", f], "quantization.json"),
        (lambda f: ["compare", f, "--report", f], "it is a folder"),
        (lambda f: ["twin", f / "gone.onnx"], "no such file"),
        (lambda f: ["build", f / "gone.onnx"], "no such file"),
        (lambda f: ["build", f / "gone.onnx", "--dynamic-size", "batch=1,2"], "NAME=MIN,LIKELY,MAX"),
        (lambda f: ["build", f / "gone.onnx", "--backend", "cuda"], "backend"),
        (lambda f: ["build", f / "gone.onnx", "--version-compatible"], "version_compatible"),
        (lambda f: ["build", f / "gone.onnx", "--plugin", "aot"], "plugins"),
        (lambda f: ["build", f / "gone.onnx", "--print-trtexec"], "no such file"),
        (lambda f: ["report", f / "results.json"], "no such file"),
        (lambda f: ["demo", "--output", f / "d", "--recipes", "int8,w9a9"], "recipes"),
        (lambda f: ["demo", "--output", f / "d", "--maintenance", "some"], "maintenance"),
        (lambda f: ["quantize", "--output", f / "q", "--maintenance", "some"], "none, naive, tib, cache, auto"),
    ],
)
def test_mistakes_are_one_clear_line(arguments: Any, message: str, tmp_path: Path) -> None:
    assert message in refused(*arguments(tmp_path))
    assert not (tmp_path / "q").exists()


def test_a_folder_with_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "no quantization.json" in refused("quantize", "--output", tmp_path)
    model = diffusers.UNet2DModel(**SMALL)
    with pytest.raises(tdq.TdqError, match="no quantization"):
        save_quantized(model, tmp_path, {}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_quantized_model_is_not_quantized_again(quantized: Path, tmp_path: Path) -> None:
    assert "quantized already" in refused("quantize", "--model", quantized, "--output", tmp_path / "q")


def test_doctor() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    assert "Backends" in result.output
    assert json.loads(run("doctor", "--json").output)["ok"]


def test_inputs_are_remembered_by_shape() -> None:
    class Model(torch.nn.Module):
        def forward(self, sample: Any, timestep: Any, extra: Any = None, flag: bool = True) -> Any:
            return sample

    extra = {"time_ids": torch.ones(4, 2, dtype=torch.int64), "scale": torch.ones(1)}
    inputs = describe_inputs(Model(), (torch.ones(4, 3), torch.tensor(5)), {"extra": extra, "flag": False})
    made = make_inputs(json.loads(json.dumps(inputs)), batch=2)
    assert made["sample"].shape == (2, 3)
    assert made["timestep"].shape == ()
    assert made["extra"]["time_ids"].shape == (2, 2)
    assert made["extra"]["time_ids"].dtype == torch.int64
    assert made["extra"]["scale"].shape == (1,)
    assert made["flag"] is False


@pytest.mark.parametrize("offload", ["sequential", "group"])
def test_offloaded_models_are_quantized_alike(quantized: Path, pipeline: Path, tmp_path: Path, offload: str) -> None:
    arguments = ("--model", pipeline, "--subfolder", "unet", "--samples", 2, "--steps", 3, "--offload", offload)
    result = run("quantize", *arguments, "--device", "cpu", "--output", tmp_path / "q")
    assert result.exit_code == 0, result.output
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            load_quantized(tmp_path / "q").model.state_dict().values(),
            load_quantized(quantized).model.state_dict().values(),
            strict=True,
        )
    )


def test_a_model_in_bfloat16(pipeline: Path, tmp_path: Path) -> None:
    arguments = ("--model", pipeline, "--subfolder", "unet", "--samples", 2, "--steps", 3, "--dtype", "bf16")
    assert run("quantize", *arguments, "--output", tmp_path / "q").exit_code == 0
    inputs = json.loads((tmp_path / "q" / "quantization.json").read_text())["inputs"]
    assert inputs["sample"]["dtype"] == "bfloat16"
    assert run("export", tmp_path / "q", "--output", tmp_path / "m.onnx").exit_code == 0
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "--output", "q", "--device", "cuda"), "device = 'cuda': .*Use --device cpu"),
        (
            ("quantize", "--output", "q", "--device", "tpu"),
            "device = 'tpu': no such device.*Use cpu, cuda, cuda:1 or auto",
        ),
        (("quantize", "--output", "q", "--dtype", "float8"), "dtype = 'float8': no such type.*Use fp32, bf16, fp16"),
        (("quantize", "--output", "q", "--offload", "disk"), "offload = 'disk': no such offload"),
        (("quantize", "--output", "q", "--model", "./q"), "model = './q': no such folder"),
        (("quantize", "--output", "q", "--model", "a/b/c"), "model = 'a/b/c': no such folder"),
        (("analyze", "--device", "cuda:3"), "device = 'cuda:3': "),
        (("analyze", "--output", __file__), "output = .* is a file.*Name a folder"),
        (("export", "q", "--output", "."), "output = '.': it is a folder.*Name a file"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_cannot_be_used_is_told_before_the_work(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, refused(*arguments))
    assert not list(tmp_path.iterdir())
