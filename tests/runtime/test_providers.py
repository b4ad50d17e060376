"""Execution providers of ONNX Runtime: their options, and what is said where they are not there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnxruntime
import pytest
import torch
from support.models import SMALL_UNET, fast_config

import modelopt_tdq as tdq
from modelopt_tdq.runtime.sessions.providers import PROVIDERS, add_providers, profile_options


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With batch and sizes open."""
    torch.manual_seed(0)
    model = SMALL_UNET.make().eval()

    def forward_loop(quantized: Any) -> None:
        with torch.no_grad():
            for time in (900, 100):
                quantized(**SMALL_UNET.inputs(2, torch.tensor(time), 0))

    mtq.quantize(model, fast_config(), forward_loop)
    call = SMALL_UNET.inputs(2, torch.tensor([900, 100]), 1)
    path = tmp_path_factory.mktemp("providers") / "m.onnx"
    return tdq.export_onnx(model, path, call, dynamic_batch=True).path


def test_the_ranges_of_open_sizes_become_options(exported: Path) -> None:
    facts = tdq.OnnxRuntimeSession(exported).shapes
    assert not isinstance(facts["sample"][0], int)
    found = profile_options(PROVIDERS["tensorrt_rtx"], exported)
    assert found == {
        "nv_profile_min_shapes": "sample:1x3x8x8,timestep:1",
        "nv_profile_opt_shapes": "sample:2x3x8x8,timestep:2",
        "nv_profile_max_shapes": "sample:16x3x8x8,timestep:16",
    }
    batch = str(facts["sample"][0])
    found = profile_options(PROVIDERS["tensorrt"], exported, {batch: (2, 4, 8)})
    assert found["trt_profile_max_shapes"] == "sample:8x3x8x8,timestep:8"
    assert profile_options(PROVIDERS["cpu"], exported) == {}
    with pytest.raises(tdq.TdqError, match="no open dimension of this name"):
        profile_options(PROVIDERS["tensorrt"], exported, {"height": (1, 2, 3)})


class _Runtime:
    """Records what it is asked for."""

    def __init__(self, *names: str, devices: tuple[Any, ...] = ()) -> None:
        self.names, self.devices, self.entries, self.libraries = list(names), list(devices), {}, []

    def get_available_providers(self) -> list[str]:
        return self.names

    def get_ep_devices(self) -> list[Any]:
        return self.devices

    def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
        self.libraries.append((devices, options))

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


def test_the_cpu_computes_nothing_that_it_is_not_asked_for(exported: Path) -> None:
    runtime = _Runtime("CUDAExecutionProvider", "CPUExecutionProvider")
    assert add_providers(runtime, runtime, ["cuda"], exported) == [("CUDAExecutionProvider", {})]
    assert runtime.entries == {"session.disable_cpu_ep_fallback": "1"}
    runtime = _Runtime("CUDAExecutionProvider", "CPUExecutionProvider")
    with_cpu = add_providers(runtime, runtime, [("CUDAExecutionProvider", {"device_id": 1}), "cpu"], exported)
    assert with_cpu == [("CUDAExecutionProvider", {"device_id": "1"}), ("CPUExecutionProvider", {})]
    assert runtime.entries == {}


def test_options_of_the_user_precede_those_of_the_package(exported: Path) -> None:
    runtime = _Runtime("TensorrtExecutionProvider")
    [(name, found)] = add_providers(
        runtime, runtime, [("tensorrt", {"trt_profile_opt_shapes": "sample:4x3x8x8"})], exported
    )
    assert name == "TensorrtExecutionProvider"
    assert found["trt_int8_enable"] == "1"
    assert found["trt_profile_opt_shapes"] == "sample:4x3x8x8"
    assert found["trt_profile_max_shapes"] == "sample:16x3x8x8,timestep:16"


def test_a_library_gets_its_devices_and_the_profile(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx = PROVIDERS["tensorrt_rtx"]
    mine, other = SimpleNamespace(ep_name=rtx.name), SimpleNamespace(ep_name="CPUExecutionProvider")
    runtime = _Runtime("CPUExecutionProvider", devices=(other, mine))
    monkeypatch.setitem(__import__("sys").modules, str(rtx.package), SimpleNamespace(__spec__=object()))
    assert add_providers(runtime, runtime, ["tensorrt_rtx"], exported) == []
    [(devices, options)] = runtime.libraries
    assert devices == [mine]
    assert options["nv_profile_min_shapes"] == "sample:1x3x8x8,timestep:1"
    assert runtime.entries == {"session.disable_cpu_ep_fallback": "1"}


def test_the_cpu_by_any_name_gives_the_same(exported: Path) -> None:
    feeds = {"sample": np.ones((2, 3, 8, 8), np.float32), "timestep": np.array([900, 100])}
    found = [
        tdq.OnnxRuntimeSession(exported, providers=chosen)
        for chosen in (["cpu"], ["CPUExecutionProvider"], [("cpu", {})])
    ]
    assert all(session.providers == ["CPUExecutionProvider"] for session in found)
    first, *others = (session(feeds)[session.outputs[0]] for session in found)
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("chosen", "says", "cure"),
    [
        (["metal"], "no such provider", "cpu, cuda, tensorrt, tensorrt_rtx"),
        ("cuda", "not a list", "Pass some of cpu"),
        ([], "not a list", "Pass some of cpu"),
        (["cuda"], "ONNX Runtime has", "onnxruntime-gpu"),
        (["tensorrt", "cpu"], "ONNX Runtime has", "onnxruntime-gpu tensorrt"),
    ],
)
def test_a_provider_that_is_not_there_is_named_with_what_to_install(
    exported: Path, chosen: Any, says: str, cure: str
) -> None:
    known = onnxruntime.get_available_providers()
    if any(PROVIDERS[name].name in known for name in chosen if name in PROVIDERS and name != "cpu"):
        pytest.skip("it is there")
    with pytest.raises(tdq.TdqError, match=says) as error:
        tdq.OnnxRuntimeSession(exported, providers=chosen)
    assert error.value.field == "providers"
    assert cure in str(error.value)


def test_the_provider_of_tensorrt_rtx_says_why_it_does_not_run(exported: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("it may run here")
    with pytest.raises(tdq.TdqError, match=r"not installed|cannot be loaded|no GPU that it serves"):
        tdq.open_session(exported, "onnxruntime", providers=["tensorrt_rtx"])


def test_a_pipeline_takes_the_providers_of_its_session(exported: Path) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline = DDIMPipeline(SMALL_UNET.make().eval(), DDIMScheduler())
    tdq.swap_denoiser(pipeline, exported, providers=["cpu"], num_threads=1)
    assert pipeline.unet.session.providers == ["CPUExecutionProvider"]
    with pytest.raises(tdq.TdqError, match="no such provider"):
        tdq.swap_denoiser(pipeline, exported, providers=["metal"])
    with pytest.raises(tdq.TdqError, match="open already, without providers"):
        tdq.swap_denoiser(pipeline, pipeline.unet.session, providers=["cpu"])


def test_lowered_graphs_have_what_the_provider_of_tensorrt_rtx_asks_for(exported: Path) -> None:
    """Its rules: scales of Q and DQ are constants, zero points zero; else it computes them in floating point."""
    import onnx

    graph = onnx.load(exported).graph
    constants = {initializer.name: onnx.numpy_helper.to_array(initializer) for initializer in graph.initializer}
    constants |= {
        node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant"
    }
    found = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert found
    for node in found:
        assert node.input[1] in constants
        assert len(node.input) < 3 or not constants[node.input[2]].any()
