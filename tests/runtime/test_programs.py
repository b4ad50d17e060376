"""Files for NVIDIA's programs: tiny models of every family against the facts, and the printed command lines."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import onnx
import pytest
import torch
from click.testing import Result
from support.denoisers import quantized_denoiser
from support.models import fast_config, noise
from support.slow import slow_but
from typer.testing import CliRunner

import modelopt_tdq as tdq
from modelopt_tdq.cli import app
from modelopt_tdq.core.metrics import sqnr_db
from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.conventions import PROGRAMS
from modelopt_tdq.export.names import as_passed, opens_batch
from modelopt_tdq.lab.model_folder import describe_inputs, save_quantized
from modelopt_tdq.model.call import tensor_leaves
from modelopt_tdq.runtime.build import programs
from modelopt_tdq.runtime.build.onnx_model import read_onnx
from modelopt_tdq.runtime.build.polygraphy_convert import polygraphy_command
from modelopt_tdq.runtime.build.report import require_low_precision
from modelopt_tdq.runtime.build.shape_profile import shape_profile
from modelopt_tdq.runtime.build.trtexec import trtexec_command

HALF, FLOAT, LONG = "FLOAT16", "FLOAT", "INT64"

#: Inputs, in their order.
UNET = ("sample", "timestep", "encoder_hidden_states")
FLUX = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance")


@dataclass(frozen=True)
class Facts:
    """What ``get_input_names``, ``get_dynamic_axes``, ``get_sample_input`` and ``get_input_profile`` say.

    Of demo/Diffusion in NVIDIA/TensorRT 11.1, for the sizes of the tiny models: inputs in order, shape and dtype;
    smallest, most likely and largest batch of the profile, with guidance where the model takes it.
    """

    inputs: dict[str, tuple[list[Any], str]]
    output: dict[str, list[Any]]
    batch: tuple[int, int, int] = (2, 2, 8)
    options: dict[str, Any] = field(default_factory=dict)
    loads: str = "engine/{}.trtVERSION.plan"


def _image(batch: str) -> list[Any]:
    return [batch, 4, 8, 8]


FACTS = {
    "stable_diffusion": Facts(
        {"sample": (_image("2B"), HALF), "timestep": ([1], HALF), "encoder_hidden_states": (["2B", 5, 16], HALF)},
        {"latent": _image("2B")},
        loads="engine/unet.trtVERSION.plan",
    ),
    "sdxl": Facts(
        {
            "sample": (_image("2B"), HALF),
            "timestep": ([1], HALF),
            "encoder_hidden_states": (["2B", 5, 16], HALF),
            "text_embeds": (["2B", 16], HALF),
            "time_ids": (["2B", 6], HALF),
        },
        {"latent": _image("2B")},
        loads="engine/unetxl.trtVERSION.plan",
    ),
    "sd3": Facts(
        {
            "hidden_states": (_image("2B"), HALF),
            "encoder_hidden_states": (["2B", 5, 16], HALF),
            "pooled_projections": (["2B", 16], HALF),
            "timestep": (["2B"], FLOAT),
            "block_controlnet_hidden_states": ([19, "2B", 16, 16], HALF),
        },
        {"latent": _image("2B")},
        loads="--custom-engine-paths=transformer:",
    ),
    "flux": Facts(
        {
            "hidden_states": (["B", 16, 4], HALF),
            "encoder_hidden_states": (["B", 5, 16], HALF),
            "pooled_projections": (["B", 16], HALF),
            "timestep": (["B"], HALF),
            "img_ids": ([16, 3], FLOAT),
            "txt_ids": ([5, 3], FLOAT),
            "guidance": (["B"], FLOAT),
        },
        {"latent": ["B", 16, 4]},
        batch=(1, 1, 4),
        loads="--custom-engine-paths=transformer:",
    ),
    "wan": Facts(
        {
            "hidden_states": ([1, 16, 2, 2, 2], HALF),
            "timestep": ([1], LONG),
            "encoder_hidden_states": ([1, 5, 16], HALF),
        },
        {"denoised_latents": [1, 16, 2, 2, 2]},
        loads="--custom-engine-paths=transformer:",
    ),
}


@dataclass(frozen=True)
class Exported:
    family: str
    model: Any
    inputs: dict[str, Any]
    file: Path

    @property
    def facts(self) -> Facts:
        return FACTS[self.family]

    @property
    def profile(self) -> dict[str, list[list[int]]]:
        """The program's, of this file."""
        shapes = {name: shape for name, (shape, _) in self.facts.inputs.items()}
        open_ones = {name: shape for name, shape in shapes.items() if {"2B", "B"} & set(shape)}
        return {
            name: [[self.facts.batch[which] if isinstance(size, str) else size for size in shape] for which in range(3)]
            for name, shape in open_ones.items()
        }


def _twice(value: Any) -> Any:
    """A batch of one as a batch of two."""
    return torch.cat([value, value]) if isinstance(value, torch.Tensor) and value.dim() and len(value) == 1 else value


@pytest.fixture(scope="module", params=slow_but(FACTS, "sd3"))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    denoiser = quantized_denoiser(request.param, dtype=torch.float16)
    file = tmp_path_factory.mktemp(request.param) / "model.onnx"
    inputs = denoiser.inputs
    opens = opens_batch("demo-diffusion", tensor_leaves(inputs))
    if opens:
        inputs = {name: _twice(value) for name, value in inputs.items()}
    tdq.export_onnx(denoiser.model, file, inputs, names="demo-diffusion", dynamic_batch=opens)
    passed = as_passed("demo-diffusion", inputs, "timestep", denoiser.model.config)
    return Exported(request.param, denoiser.model, dict(passed), file)


def _described(values: Any) -> dict[str, tuple[list[Any], str]]:
    return {
        value.name: (
            [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim],
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type),
        )
        for value in values
    }


def test_names_order_axes_and_dtypes_are_the_programs(exported: Exported) -> None:
    graph = onnx.load(exported.file).graph
    found = _described(graph.input)
    assert found == exported.facts.inputs
    assert list(found) == list(exported.facts.inputs)
    assert _described(graph.output) == {name: (shape, HALF) for name, shape in exported.facts.output.items()}
    # the scales of half-precision models stay float32: QuantizeLinear and its like see no other
    scales = {node.input[1] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    types = {each.name: each.data_type for each in graph.initializer if each.name in scales}
    assert set(types.values()) == {onnx.TensorProto.FLOAT}


def test_the_profile_is_the_programs(exported: Exported) -> None:
    convention, place = programs.place_of("demo-diffusion", exported.file)
    facts = read_onnx(exported.file)
    assert shape_profile(facts, programs.sizes_of(place, facts)) == exported.profile
    assert set(place.sizes) <= {size for axes in convention.axes.values() for size in axes.values()}


def test_it_computes_what_torch_does(exported: Exported) -> None:
    with torch.no_grad():
        expected = exported.model(**exported.inputs)[0]
    feeds = {name.rpartition(".")[2]: value.numpy() for name, value in tensor_leaves(exported.inputs).items()}
    (found,) = tdq.OnnxRuntimeSession(exported.file)(feeds).values()
    assert found.dtype.name == "float16"
    assert sqnr_db(expected.float(), torch.from_numpy(found).float()) > 30


def test_a_swapped_denoiser_takes_the_calls_of_the_pipeline(exported: Exported) -> None:
    """Without what only the program passes, whose zeros it adds."""
    engine = tdq.EngineDenoiser(tdq.OnnxRuntimeSession(exported.file), exported.model)
    call = {name: value for name, value in exported.inputs.items() if name != "block_controlnet_hidden_states"}
    with torch.no_grad():
        expected, found = exported.model(**call)[0], engine(**call)[0]
    assert sqnr_db(expected.float(), found.float()) > 30


def test_polygraphy_reads_the_command_and_builds_it(exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("polygraphy")
    from polygraphy.tools.args import TrtConfigArgs
    from polygraphy.tools.convert.convert import Convert

    engine = tmp_path / "model.plan"
    lines = list(programs.engine_lines("demo-diffusion", exported.file, engine))
    (line,) = [line for line in lines if line.startswith("  polygraphy")]
    words = shlex.split(line)
    tool = Convert()
    arguments = tool.setup_parser().parse_args(words[2:])
    tool.parse(arguments)
    assert arguments.strongly_typed
    assert arguments.convert_to == "trt"
    profiles = [
        {n: list(map(list, shapes)) for n, shapes in each.items()}
        for each in tool.arg_groups[TrtConfigArgs].profile_dicts
    ]
    assert profiles == ([exported.profile] if exported.profile else [])
    # Polygraphy's own program, on the TensorRT that builds without a GPU
    done = subprocess.run(
        [sys.executable, "-c", "from polygraphy.tools import main; main()", *words[1:]],
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert engine.stat().st_size > 100_000


def test_tensorrt_rtx_builds_it_with_every_layer_in_low_precision(exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    facts = read_onnx(exported.file)
    sizes = programs.sizes_of(programs.place_of("demo-diffusion", exported.file)[1], facts)
    report = tdq.build_engine(exported.file, tmp_path / "m.engine", dynamic_sizes=sizes, compute_capabilities=("8.9",))
    require_low_precision(report)
    assert len(report.quantized) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "program", "dtype", "expected"),
    [
        (
            "flux",
            "rtx-demo",
            torch.bfloat16,
            dict.fromkeys(FLUX[:4], "BFLOAT16") | dict.fromkeys(FLUX[4:], FLOAT) | {"latent": "BFLOAT16"},
        ),
        ("flux", "diffusion-trt", torch.bfloat16, None),
        (
            "wan",
            "demo-diffusion",
            torch.bfloat16,
            {
                "hidden_states": "BFLOAT16",
                "timestep": LONG,
                "encoder_hidden_states": "BFLOAT16",
                "denoised_latents": "BFLOAT16",
            },
        ),
        ("sdxl", "diffusion-trt", torch.float16, dict.fromkeys((*UNET, "text_embeds", "time_ids", "latent"), HALF)),
        ("sd3", "diffusion-trt", torch.float16, dict.fromkeys((*FLUX[:4], "sample"), HALF)),
    ],
)
def test_the_other_programs_and_bfloat16(
    family: str, program: str, dtype: torch.dtype, expected: dict[str, str] | None, tmp_path: Path
) -> None:
    """Types of utils/model_registry.py of TensorRT-RTX's demo; order of diffusion_trt.py; built by TensorRT-RTX."""
    pytest.importorskip("tensorrt_rtx")
    denoiser = quantized_denoiser(family, dtype=dtype)
    file = tdq.export_onnx(denoiser.model, tmp_path / "m.onnx", denoiser.inputs, names=program).path
    graph = onnx.load(file).graph
    found = {name: kind for name, (_, kind) in _described([*graph.input, *graph.output]).items()}
    if expected is not None:
        assert list(found.items()) == list(expected.items())
    convention, _ = programs.place_of(program, file)
    assert list(found) == [*convention.inputs.values(), convention.output]
    require_low_precision(tdq.build_engine(file, tmp_path / "m.engine", compute_capabilities=("8.9",)))


def test_where_the_files_go(exported: Exported, tmp_path: Path) -> None:
    lines = "\n".join(programs.engine_lines("demo-diffusion", exported.file, tmp_path / "m.plan"))
    assert exported.facts.loads in lines
    assert shlex.join(trtexec_command(exported.file, tmp_path / "m.plan", dynamic_sizes=_sizes(exported))) in lines
    if exported.family in ("stable_diffusion", "sdxl"):
        assert f"copy {exported.file} to onnx/unet" in "\n".join(programs.onnx_lines("demo-diffusion", exported.file))
    else:
        (option,) = [x for x in programs.onnx_lines("demo-diffusion", exported.file) if "custom-onnx-paths" in x][:1]
        assert option.endswith(f"--custom-onnx-paths=transformer:{exported.file}")


def _sizes(exported: Exported) -> dict[str, tuple[int, int, int]]:
    return programs.sizes_of(programs.place_of("demo-diffusion", exported.file)[1], read_onnx(exported.file))


def _graph(file: Path, *names: str, batch: int | str = 2, open_size: str | None = None) -> Path:
    """A graph with these inputs, [batch, 4, 8, 8] each."""
    shape = [batch, 4, 8, open_size or 8]
    inputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in names]
    output = onnx.helper.make_tensor_value_info("latent", onnx.TensorProto.FLOAT, shape)
    node = onnx.helper.make_node("Identity", [names[0]], ["latent"])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", inputs, [output])), file)
    return file


def test_every_denoiser_of_a_program_has_its_place() -> None:
    assert set(programs.SOURCES) == set(PROGRAMS) == set(programs.PLACES)
    for program, conventions in PROGRAMS.items():
        assert [convention.of for convention in conventions] == list(programs.PLACES[program])
        for convention in conventions:
            place = programs.PLACES[program][convention.of]
            assert place.onnx or place.onnx_option
            named = {size for axes in convention.axes.values() for size in axes.values()}
            assert set(place.sizes) <= named
            assert all(low <= likely <= high for low, likely, high in place.sizes.values())


def test_open_images_have_the_ranges_of_the_program(tmp_path: Path) -> None:
    file = _graph(tmp_path / "m.onnx", *UNET, batch="2B", open_size="W")
    place = programs.place_of("demo-diffusion", file)[1]
    # get_input_profile of UNetModel, 512 by 512, --build-dynamic-shape: images of 256 to 1360 pixels, likely 504
    assert programs.sizes_of(place, read_onnx(file)) == {"2B": (2, 2, 8), "W": (256 // 8, 504 // 8, 1360 // 8)}
    assert programs.sizes_of(place, read_onnx(file), {"W": (8, 8, 8)})["W"] == (8, 8, 8)


def test_a_fixed_batch_is_told_to_the_program(tmp_path: Path) -> None:
    (line,) = [
        x for x in programs.onnx_lines("demo-diffusion", _graph(tmp_path / "m.onnx", *UNET, batch=4)) if "python" in x
    ]
    assert line.strip() == "python demo_txt2img.py PROMPT --version 1.4 --build-static-batch --batch-size 2"
    lines = "\n".join(programs.onnx_lines("demo-diffusion", _graph(tmp_path / "open.onnx", *UNET, batch="2B")))
    assert "--build-static-batch" not in lines


def test_the_demo_of_tensorrt_rtx(tmp_path: Path) -> None:
    file = _graph(tmp_path / "m.onnx", *FLUX, batch="B")
    lines = "\n".join(programs.engine_lines("rtx-demo", file, tmp_path / "m.engine"))
    assert "env POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy convert" in lines
    assert "or tensorrt_rtx --onnx=" in lines
    assert "engines only that it has built" in lines
    assert "demo_cache/shared/onnx/flux_transformer/fp8" in "\n".join(programs.onnx_lines("rtx-demo", file))


def test_the_example_of_modelopt(tmp_path: Path) -> None:
    file = _graph(tmp_path / "m.onnx", *UNET, "text_embeds", "time_ids", batch="batch_size")
    lines = "\n".join(programs.engine_lines("diffusion-trt", file, tmp_path / "m.plan"))
    assert f"--onnx-load-path {file} --trt-engine-load-path {tmp_path / 'm.plan'}" in lines
    assert "--maxShapes=sample:16x4x8x8" in lines


@pytest.mark.parametrize(
    ("program", "names", "says"),
    [
        ("demo", UNET, "no such program.*demo-diffusion, diffusion-trt, rtx-demo"),
        ("rtx-demo", UNET, "no denoiser with the inputs.*names='rtx-demo'"),
        ("rtx-demo", FLUX[:-1], "no denoiser with the inputs"),
        ("demo-diffusion", (*UNET, "mask"), "encoder_hidden_states, mask, sample"),
    ],
)
def test_what_a_program_does_not_serve(tmp_path: Path, program: str, names: tuple[str, ...], says: str) -> None:
    with pytest.raises(TdqError, match=says):
        programs.place_of(program, _graph(tmp_path / "m.onnx", *names))


@pytest.fixture(scope="module")
def quantized_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `modelopt-tdq quantize` writes it, calibrated with single images."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=16, mid_block_type=None, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).eval()  # fmt: skip
    calls = [(noise(1, 4, 8, 8), torch.tensor(float(time)), noise(1, 5, 16)) for time in (900, 100)]

    def forward_loop(quantized: Any) -> None:
        for call in calls:
            quantized(*call)

    mtq.quantize(model, fast_config(), forward_loop)
    folder = tmp_path_factory.mktemp("quantized") / "unet"
    return save_quantized(model, folder, describe_inputs(model, calls[0], {}), {})


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_line(quantized_folder: Path, tmp_path: Path, diffusers_checkpoints: None) -> None:
    file = tmp_path / "unet.onnx"
    done = run("export", quantized_folder, "--output", file, "--for", "demo-diffusion", "--dtype", "fp16")
    assert done.exit_code == 0, done.output
    assert (
        f"copy {file} to onnx/unet.opt/model.onnx, then\n  python demo_txt2img.py PROMPT --version 1.4" in done.stdout
    )
    assert f"modelopt-tdq build {file} --for demo-diffusion" in done.stdout
    graph = onnx.load(file).graph
    assert _described(graph.input)["sample"] == (["2B", 4, 8, 8], HALF)
    printed = run("build", file, "--for", "demo-diffusion", "--print-trtexec")
    assert printed.stdout.splitlines() == list(
        programs.engine_lines("demo-diffusion", file, file.with_suffix(".engine"))
    )
    own = run("build", file, "--for", "demo-diffusion", "--print-trtexec", "--dynamic-size", "2B=1,1,1")
    assert "--maxShapes=sample:1x4x8x8" in own.stdout
    for wrong, says in (
        (("--for", "demo-diffusion", "--names", "output=x"), "gives the names"),
        (("--for", "rtx-demo"), "serves no denoiser with these inputs"),
        (("--for", "comfy"), "no such preset"),
    ):
        refused = run("export", quantized_folder, "--output", tmp_path / "no.onnx", *wrong)
        assert refused.exit_code == 2
        assert says in refused.stderr
    assert not (tmp_path / "no.onnx").exists()


def test_a_path_that_the_program_would_split(tmp_path: Path) -> None:
    folder = tmp_path / "a,b"
    folder.mkdir()
    with pytest.raises(TdqError, match="splits its paths"):
        list(programs.onnx_lines("demo-diffusion", _graph(folder / "m.onnx", *FLUX)))


def test_polygraphy_of_an_unknown_builder(tmp_path: Path) -> None:
    with pytest.raises(TdqError, match="no such builder"):
        polygraphy_command(_graph(tmp_path / "m.onnx", *UNET), "e", backend="onnx")  # type: ignore[arg-type]
