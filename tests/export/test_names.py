"""Names that the program around an engine addresses: facts of demoDiffusion, mappings, and what still finds its way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import pytest
import torch
from support.models import TinyDenoiser, calls, fast_config, noise, quantized
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.compare import compare_model
from modelopt_tdq.export.conventions import PROGRAMS
from modelopt_tdq.export.names import as_passed, names_of
from modelopt_tdq.pipeline.engine_denoiser import EngineDenoiser
from modelopt_tdq.runtime.build.report import require_low_precision

#: Inputs, in NVIDIA/TensorRT 11.1's demo/Diffusion, of what a pipeline of diffusers passes; the output; shape and dtype
#: of the time for two samples in halves.
FACTS: dict[str, tuple[dict[str, str], str, tuple[int, ...], torch.dtype]] = {
    "sd": (
        {"sample": "sample", "timestep": "timestep", "encoder_hidden_states": "encoder_hidden_states"},
        "latent",
        (1,),
        torch.float16,
    ),
    "sdxl": (
        {
            "sample": "sample",
            "timestep": "timestep",
            "encoder_hidden_states": "encoder_hidden_states",
            "added_cond_kwargs.text_embeds": "text_embeds",
            "added_cond_kwargs.time_ids": "time_ids",
        },
        "latent",
        (1,),
        torch.float16,
    ),
    "sd3.5": (
        {
            name: name
            for name in (
                "hidden_states",
                "encoder_hidden_states",
                "pooled_projections",
                "timestep",
                "block_controlnet_hidden_states",
            )
        },
        "latent",
        (2,),
        torch.float32,
    ),
    "flux": (
        {
            name: name
            for name in (
                "hidden_states",
                "encoder_hidden_states",
                "pooled_projections",
                "timestep",
                "img_ids",
                "txt_ids",
                "guidance",
            )
        },
        "latent",
        (2,),
        torch.float16,
    ),
    "wan": (
        {name: name for name in ("hidden_states", "timestep", "encoder_hidden_states")},
        "denoised_latents",
        (1,),
        torch.int64,
    ),
}


@pytest.mark.parametrize("family", FACTS)
@pytest.mark.parametrize("time", [torch.tensor(500.0), torch.tensor([500.0]), torch.tensor([500.0, 500.0]), 500])
def test_facts_of_demo_diffusion(family: str, time: Any) -> None:
    inputs, output, shape, dtype = FACTS[family]
    new = names_of("demo-diffusion", inputs, ["output"]).names
    assert {own: new.get(own, own) for own in inputs} == inputs
    assert new["output"] == output
    given: dict[str, Any] = {}
    for own in inputs:
        mapping, _, name = own.rpartition(".")
        target = given.setdefault(mapping, {}) if mapping else given
        target[name] = time if own == "timestep" else torch.zeros(2, 4, dtype=torch.float16)
    passed = as_passed("demo-diffusion", given, "timestep")
    assert passed["timestep"].shape == shape
    assert passed["timestep"].dtype == dtype
    assert bool((passed["timestep"] == 500).all())
    assert {name: value for name, value in passed.items() if name != "timestep"}.keys() == given.keys() - {"timestep"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_two_kinds_of_model_have_the_same_inputs(program: str) -> None:
    kinds = [frozenset(set(each.inputs) - set(each.optional) - set(each.zeros)) for each in PROGRAMS[program]]
    assert len(set(kinds)) == len(kinds)
    assert len({each.of for each in PROGRAMS[program]}) == len(kinds)


def test_what_the_program_always_passes_is_added() -> None:
    """Residuals of a ControlNet, which demoDiffusion has as zeros where there is none."""
    given: dict[str, Any] = {
        name: torch.zeros(2, 4, 16, 8, dtype=torch.float16)
        for name in ("hidden_states", "encoder_hidden_states", "pooled_projections")
    }
    config = SimpleNamespace(patch_size=2, num_attention_heads=3, attention_head_dim=4)
    passed = as_passed("demo-diffusion", {**given, "timestep": torch.tensor(5.0)}, "timestep", config)
    residuals = passed["block_controlnet_hidden_states"]
    assert residuals.shape == (19, 2, 8 * 4, 12)
    assert residuals.dtype == torch.float16
    assert not residuals.any()
    own = as_passed("demo-diffusion", {**passed, "block_controlnet_hidden_states": residuals + 1}, "timestep", config)
    assert bool(own["block_controlnet_hidden_states"].all())
    # the example of ModelOpt, whose inputs are filled by their order, does not pass them
    example = names_of("diffusion-trt", [*given, "timestep"], ["output"])
    assert example.order == (*given, "timestep")
    assert example.names == {"output": "sample"}


def test_what_fits_no_program_is_refused_with_what_is_missing() -> None:
    with pytest.raises(TdqError, match=r"no such preset.*demo-diffusion"):
        names_of("demo", ["sample"], ["output"])
    with pytest.raises(TdqError, match=r"the U-Net of SDXL: it lacks added_cond_kwargs.time_ids"):
        names_of(
            "demo-diffusion",
            ["sample", "timestep", "encoder_hidden_states", "added_cond_kwargs.text_embeds"],
            ["output"],
        )
    with pytest.raises(TdqError, match=r"has context besides"):
        names_of("demo-diffusion", ["sample", "timestep", "encoder_hidden_states", "context"], ["output"])
    sample = {name: torch.zeros(2, 4) for name in ("sample", "encoder_hidden_states")}
    with pytest.raises(TdqError, match=r"passes the U-Net of Stable Diffusion one time"):
        as_passed("demo-diffusion", {**sample, "timestep": torch.tensor([1.0, 2.0])}, "timestep")


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ({"latent": "x"}, "no input or output of the graph"),
        ({"sample": "x", "timestep": "x"}, "two tensors"),
        ({"sample": "timestep"}, "two tensors"),
        ({"sample": ""}, "no name for"),
    ],
)
def test_a_mapping_that_cannot_be(names: dict[str, str], problem: str) -> None:
    with pytest.raises(TdqError, match=problem):
        names_of(names, ["sample", "timestep"], ["output"])


class Conditioned(TinyDenoiser):
    """As a pipeline of SDXL calls its denoiser."""

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: dict[str, Tensor]
    ) -> Tensor:
        pooled = added_cond_kwargs["text_embeds"] + added_cond_kwargs["time_ids"]
        return super().forward(sample, timestep, encoder_hidden_states.mean(1) + pooled)


def _call(time: float, batch: int = 2) -> dict[str, Any]:
    return {
        "sample": noise(batch, 3, 8, 8, seed=int(time)),
        "timestep": torch.tensor(time),
        "encoder_hidden_states": noise(batch, 5, 8, seed=1),
        "added_cond_kwargs": {"text_embeds": noise(batch, 8, seed=2), "time_ids": noise(batch, 8, seed=3)},
    }


@pytest.fixture(scope="module")
def conditioned() -> nn.Module:
    torch.manual_seed(0)

    def run(model: nn.Module) -> None:
        for time in (900.0, 600.0, 300.0, 20.0):
            model(**_call(time))

    return mtq.quantize(Conditioned().eval(), fast_config(), run)


@pytest.fixture(scope="module")
def exported(conditioned: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    axes = {"sample": {2: "height", 3: "width"}}
    file = tmp_path_factory.mktemp("names") / "unet.onnx"
    call = dict(reversed(_call(600.0).items()))  # the order of the inputs is the program's all the same
    tdq.export_onnx(conditioned, file, call, names="demo-diffusion", dynamic_batch=True, dynamic_axes=axes)
    return file


def _sizes(value: onnx.ValueInfoProto) -> list[Any]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def test_the_file_has_the_programs_names_and_axes(exported: Path) -> None:
    graph = onnx.load(exported).graph
    order = ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    assert [value.name for value in graph.input] == order
    assert {value.name: _sizes(value) for value in graph.input} == {
        "sample": ["2B", 3, "H", "W"],
        "timestep": [1],
        "encoder_hidden_states": ["2B", 5, 8],
        "text_embeds": ["2B", 8],
        "time_ids": ["2B", 8],
    }
    assert {value.name: _sizes(value) for value in graph.output} == {"latent": ["2B", 3, "H", "W"]}


def _feeds(call: dict[str, Any]) -> dict[str, Any]:
    pooled = call["added_cond_kwargs"]
    return {**{k: v for k, v in call.items() if k != "added_cond_kwargs"}, **pooled, "timestep": [call["timestep"]]}


def test_it_computes_what_torch_does(exported: Path, conditioned: nn.Module) -> None:
    session = tdq.OnnxRuntimeSession(exported)
    for time, batch in ((600.0, 2), (20.0, 4), (455.0, 6)):
        call = _call(time, batch)
        with torch.no_grad():
            expected = conditioned(**call)
        found = session({name: np.asarray(value) for name, value in _feeds(call).items()})
        torch.testing.assert_close(torch.as_tensor(found["latent"]), expected, rtol=1e-4, atol=1e-5)


def test_a_swapped_denoiser_and_a_comparison_know_them(exported: Path, conditioned: nn.Module) -> None:
    call = _call(300.0)
    pipeline = SimpleNamespace(unet=conditioned, components={"unet": conditioned})
    tdq.swap_denoiser(pipeline, exported)
    with torch.no_grad():
        expected = conditioned(**call)
        found = pipeline.unet(**call)[0]
    assert isinstance(pipeline.unet, EngineDenoiser)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    as_exported = {**call, "timestep": call["timestep"].reshape(1)}
    compared = compare_model(
        conditioned, [as_exported], backends=("torch", "onnxruntime"), lowered_path=exported, progress=False
    )
    assert not compared.faults
    assert compared.compared_codes["onnxruntime"] > 0


def test_tensorrt_rtx_builds_it_under_those_names(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    sizes = {"2B": (2, 2, 4), "H": (8, 8, 8), "W": (8, 8, 8)}
    report = tdq.build_engine(exported, tmp_path / "unet.engine", dynamic_sizes=sizes, compute_capabilities=("8.9",))
    require_low_precision(report)


def test_a_name_that_a_value_inside_has_makes_it_move(tmp_path: Path) -> None:
    model = quantized()
    plain, renamed = tmp_path / "plain.onnx", tmp_path / "renamed.onnx"
    inputs = dict(zip(("sample", "timestep"), calls()[0], strict=True))
    tdq.export_onnx(model, plain, inputs)
    inside = onnx.load(plain).graph.node[3].output[0]
    tdq.export_onnx(model, renamed, inputs, names={"output": inside, "sample": "x"})
    graph = onnx.load(renamed).graph
    assert [value.name for value in graph.output] == [inside]
    found = tdq.OnnxRuntimeSession(renamed)({"x": inputs["sample"], "timestep": inputs["timestep"]})
    expected = tdq.OnnxRuntimeSession(plain)(inputs)
    np.testing.assert_array_equal(found[inside], expected["output"])
