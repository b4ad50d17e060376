"""What only TensorRT is asked for: checked before a build, and passed on by the process that builds."""

from __future__ import annotations

import _ctypes
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

import modelopt_tdq as tdq
from modelopt_tdq.runtime.build.trtexec import trtexec_command
from modelopt_tdq.runtime.build.worker import BuildError, describe_layers

pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx")

from small_graphs import Graph, conv

#: Any library: it registers no plugin.
LIBRARY = _ctypes.__file__


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "library"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("stand_in_builder.py"), folder / "tensorrt.py")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def record(library: Path) -> list[str]:
    return (library / "record.txt").read_text().splitlines()


def lookup(path: Path) -> Path:
    """A graph with a node of the plugin."""
    graph = Graph({"timestep": [1]})
    table, times = graph.constant([[1.0], [2.0]], "float32"), graph.constant([0.0, 1.0], "float32")
    outputs = ["s", "ratio"]
    node = onnx.helper.make_node(
        "TdqScaleLookup",
        ["timestep", table, times],
        outputs,
        name="time/lookup",
        domain="trt.plugins",
        plugin_namespace="tdq",
        plugin_version="1",
    )
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1]) for name in outputs]
    proto = onnx.helper.make_graph([node], "graph", graph.inputs, values, graph.initializers)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("trt.plugins", 1)]
    onnx.save(onnx.helper.make_model(proto, opset_imports=opsets, ir_version=10), path)
    return path


def test_options_reach_the_builder(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    model = conv(tmp_path / "model.onnx", "ratio", batch="batch")
    report = tdq.build_engine(
        model,
        tmp_path / "model.engine",
        backend="tensorrt",
        version_compatible=True,
        hardware_compatibility="ampere_plus",
    )
    assert record(library) == [
        "network 2",
        "flag VERSION_COMPATIBLE",
        "flag EXCLUDE_LEAN_RUNTIME",  # no host code in the engine
        "hardware_compatibility_level AMPERE_PLUS",
    ]
    assert report.version_compatible
    assert report.hardware_compatibility == "ampere_plus"
    assert report.compute_capabilities == ("8.9",)
    assert report.backend_version == "11.4.0.106"
    assert tdq.EngineReport.load(tmp_path / "model.engine") == report


@pytest.mark.parametrize("content", [None, b"times of this GPU", b"foreign", b"damaged"])
def test_timing_cache(library: Path, tmp_path: Path, content: bytes | None, recwarn: Any) -> None:
    model, cache = conv(tmp_path / "model.onnx", "ratio"), tmp_path / "times.cache"
    if content is not None:
        cache.write_bytes(content)
    tdq.build_engine(model, tmp_path / "model.engine", backend="tensorrt", timing_cache=cache)
    assert cache.read_bytes() == b"times of this GPU"
    offered = [line.removeprefix("timing cache ") for line in record(library) if line.startswith("timing cache")]
    own = content == b"times of this GPU"
    assert offered[-1] == ("times of this GPU False" if own else "empty False")
    warned = [str(each.message) for each in recwarn if "timing cache" in str(each.message)]
    assert bool(warned) == (content in (b"foreign", b"damaged"))
    assert {file.name for file in tmp_path.iterdir()} == {
        "library",
        "model.onnx",
        "model.engine",
        "model.engine.json",
        "times.cache",
    }


def test_layers_of_an_engine_that_does_not_load_here() -> None:
    logger = SimpleNamespace(layers="", errors=["no lean runtime"])
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda engine: None)
    library = SimpleNamespace(Runtime=lambda logger: runtime, __name__="tensorrt")
    warnings: list[str] = []
    assert describe_layers(library, logger, b"", True, warnings) == ""
    assert "all types are unknown" in warnings[0]
    with pytest.raises(BuildError, match="does not tell its layers: no lean runtime"):
        describe_layers(library, logger, b"", False, warnings)


def test_a_failed_build_leaves_the_timing_cache_alone(library: Path, tmp_path: Path) -> None:
    model, cache = conv(tmp_path / "model.onnx", "gather"), tmp_path / "times.cache"
    cache.write_bytes(b"older")
    with pytest.raises(tdq.TdqError, match="run in float"):
        tdq.build_engine(model, tmp_path / "model.engine", backend="tensorrt", timing_cache=cache)
    assert cache.read_bytes() == b"older"


def test_the_python_plugin_is_registered(library: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    if find_spec("tensorrt_bindings") is None:
        pytest.skip("NVIDIA's plugin package is in the wheel tensorrt-cu13-bindings")
    (library / "plugin_package.txt").write_text(str(Path(__file__).parents[1] / "plugin"))
    model = conv(tmp_path / "model.onnx", "ratio")
    log = tmp_path / "build.log"
    report = tdq.build_engine(model, tmp_path / "m.engine", backend="tensorrt", plugins=["aot"], log_path=log)
    assert record(library) == ["network 10"]  # strongly typed, ahead-of-time Python plugins
    assert report.plugins == ()


def test_plugins_that_are_not_there(library: Path, tmp_path: Path) -> None:
    model, engine = lookup(tmp_path / "plugin.onnx"), tmp_path / "plugin.engine"
    for arguments, message in (
        ({}, r"plugins = \['tdq::TdqScaleLookup'\].*not given. Pass plugins=\['aot'\].*C\+\+ library"),
        ({"plugins": [LIBRARY]}, "none registers tdq::TdqScaleLookup, version 1"),
        ({"plugins": ["gone.so"]}, "no such file. Build it as modelopt_tdq/plugin/README.md says"),
        ({"plugins": [model]}, "cannot be loaded"),
        ({"plugins": ["aot", LIBRARY]}, "both forms of the plugin"),
        ({"plugins": LIBRARY}, "not a list"),
        ({"plugins": ["aot"]}, "without its module of Python plugins"),
    ):
        with pytest.raises(tdq.TdqError, match=message):
            tdq.build_engine(model, engine, backend="tensorrt", **arguments)
    assert not engine.exists()
    with pytest.raises(tdq.TdqError, match=r"TensorRT-RTX takes none.*lowering='ratio'.*backend='tensorrt'"):
        tdq.build_engine(model, engine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"version_compatible": True}, "in the release that built it, in no other.*backend='tensorrt'"),
        ({"hardware_compatibility": "ampere_plus"}, "Name them in compute_capabilities"),
        ({"timing_cache": "times.cache"}, "there the cache does nothing but need a GPU"),
        ({"plugins": ["aot"]}, "TensorRT-RTX has no Python plugins.*lowering='ratio'"),
        ({"hardware_compatibility": "all"}, "no such level. Use one of none, same_compute_capability, ampere_plus"),
        ({"backend": "tensorrt", "timing_cache": f"{__file__}/times.cache"}, "is a file. Name a file elsewhere"),
    ],
)
def test_what_a_backend_cannot_do(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    model = conv(tmp_path / "model.onnx", "static")
    with pytest.raises(tdq.TdqError, match=message):
        tdq.build_engine(model, tmp_path / "model.engine", **arguments)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx"}


def test_trtexec(tmp_path: Path) -> None:
    graph = Graph({"sample": ["batch", 4, "height", 8], "timestep": [1]})
    model = graph.save(tmp_path / "m x.onnx", graph.add("Sigmoid", "sample"), ["batch", 4, "height", 8])
    sizes = {"height": (8, 16, 32)}
    command = trtexec_command(
        model,
        "m.engine",
        dynamic_sizes=sizes,
        version_compatible=True,
        hardware_compatibility="same_compute_capability",
        timing_cache="times.cache",
        plugins=[LIBRARY],
    )
    assert command == [
        "trtexec",
        f"--onnx={model}",
        "--saveEngine=m.engine",
        "--minShapes=sample:1x4x8x8",
        "--optShapes=sample:2x4x16x8",
        "--maxShapes=sample:16x4x32x8",
        "--stronglyTyped",
        "--timingCacheFile=times.cache",
        "--versionCompatible",
        "--excludeLeanRuntime",
        "--hardwareCompatibilityLevel=sameComputeCapability",
        f"--staticPlugins={LIBRARY}",
        "--profilingVerbosity=detailed",
        "--skipInference",
    ]
    assert shlex.split(shlex.join(command)) == command
    own = trtexec_command(model, "m.engine", backend="tensorrt_rtx", dynamic_sizes=sizes)
    assert own[0] == "tensorrt_rtx"
    assert "--computeCapabilities=89,120" in own
    assert "--stronglyTyped" not in own
    dynamic = tmp_path / "libvc.so"
    dynamic.write_bytes(b"\0getCreators\0")
    assert f"--dynamicPlugins={dynamic}" in trtexec_command(model, "m", dynamic_sizes=sizes, plugins=[dynamic])
    with pytest.raises(tdq.TdqError, match=r"loads plugins from \.so files only"):
        trtexec_command(model, "m.engine", dynamic_sizes=sizes, plugins=["aot"])
    with pytest.raises(tdq.TdqError, match="'height' open"):
        trtexec_command(model, "m.engine")
    with pytest.raises(tdq.TdqError, match="in no other"):
        trtexec_command(model, "m.engine", backend="tensorrt_rtx", dynamic_sizes=sizes, version_compatible=True)
