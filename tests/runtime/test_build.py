import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import modelopt_tdq as tdq
from modelopt_tdq.runtime.build.onnx_model import read_onnx
from modelopt_tdq.runtime.build.report import (
    FloatLayersError,
    float_layers,
    manifest_path,
    require_low_precision,
    sha256,
)

pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx")

from small_graphs import CHANNELS, FP8, INT8, Graph, conv


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("code", [INT8, FP8], ids=["int8", "fp8"])
def test_the_ratio_lowering_keeps_the_low_precision_kernel(tmp_path: Path, code: np.dtype) -> None:
    static = tdq.build_engine(conv(tmp_path / "static.onnx", "static", code=code), tmp_path / "static.engine")
    ratio = tdq.build_engine(conv(tmp_path / "ratio.onnx", "ratio", code=code), tmp_path / "ratio.engine")
    require_low_precision(static)
    require_low_precision(ratio)
    assert static.kernels == 3
    assert ratio.kernels == 4  # one more in the whole engine: time to row
    (kernel,) = [layer for layer in ratio.layers if layer.low_precision]
    expected = "FP8" if code == FP8 else "Int8"
    assert kernel.kind == "correlation"
    assert kernel.inputs == (expected,)
    assert kernel.outputs == ("Float",)
    assert "conv" in kernel.onnx_nodes
    (layer,) = ratio.precisions
    assert (layer.operator, layer.type, layer.kernel) == ("Conv", expected.upper(), kernel.name)
    assert ratio.compute_capabilities == ("8.9", "12.0")


def test_a_layer_that_runs_in_float_fails_the_build(tmp_path: Path) -> None:
    model, engine = conv(tmp_path / "gather.onnx", "gather"), tmp_path / "gather.engine"
    engine.write_text("the engine of yesterday")
    with pytest.raises(tdq.TdqError, match=r'\[.conv.\].*run in float.*lowering="ratio".*allow_float=True') as caught:
        tdq.build_engine(model, engine)
    assert engine.read_text() == "the engine of yesterday"
    assert files(tmp_path) == {"gather.onnx", "gather.engine", "gather.engine.log"}
    assert isinstance(caught.value, FloatLayersError)
    assert [layer.type for layer in caught.value.report.precisions] == ["float"]
    log = (tmp_path / "gather.engine.log").read_text()
    assert str(tmp_path / "gather.engine.log") in str(caught.value)
    assert re.search(r"conv +│ Conv +│ float", log)  # the table
    report = tdq.build_engine(model, engine, allow_float=True)
    assert files(tmp_path) == {"gather.onnx", "gather.engine", "gather.engine.json"}
    assert report.quantized == {"conv": "Conv"}
    assert not report.low_precision("conv")
    assert float_layers(tdq.EngineReport.load(engine)) == ("conv",)
    with pytest.raises(FloatLayersError):
        require_low_precision(report)


def test_a_crash_of_the_builder_is_an_error_that_keeps_the_log(tmp_path: Path) -> None:
    model = conv(tmp_path / "gather0d.onnx", "gather0d")
    engine = tmp_path / "model.engine"
    engine.write_text("the engine of yesterday")
    with pytest.raises(tdq.TdqError, match="the builder crashed") as caught:
        tdq.build_engine(model, engine)
    log = tmp_path / "model.engine.log"
    assert str(log) in str(caught.value)
    assert "VERBOSE" in log.read_text()
    assert engine.read_text() == "the engine of yesterday"
    assert files(tmp_path) == {"gather0d.onnx", "model.engine", "model.engine.log"}


def test_the_manifest_describes_the_engine_and_is_checked_when_read(tmp_path: Path) -> None:
    model, engine = conv(tmp_path / "model.onnx", "ratio"), tmp_path / "model.engine"
    report = tdq.build_engine(model, engine, compute_capabilities=["8.6"], log_path=tmp_path / "build.log")
    assert files(tmp_path) == {"model.onnx", "model.engine", "model.engine.json", "build.log"}
    assert "Layers:" in (tmp_path / "build.log").read_text()
    content = json.loads(manifest_path(engine).read_text())
    assert content["engine_sha256"] == sha256(engine)
    assert content["onnx_sha256"] == {"model.onnx": sha256(model)}
    assert content["compute_capabilities"] == ["8.6"]
    assert content["backend"] == "tensorrt_rtx"
    assert content["backend_version"] == report.backend_version
    assert content["kernels"] == report.kernels == 4
    assert tdq.EngineReport.load(engine) == report
    engine.write_bytes(engine.read_bytes() + b"x")
    with pytest.raises(tdq.TdqError, match="checksum"):
        tdq.EngineReport.load(engine)
    manifest_path(engine).write_text(json.dumps(content | {"schema_version": 99}))
    with pytest.raises(tdq.TdqError, match="newer"):
        tdq.EngineReport.load(engine)
    manifest_path(engine).write_text("{}")
    with pytest.raises(tdq.TdqError, match="no manifest"):
        tdq.EngineReport.load(engine)


def test_open_dimensions(tmp_path: Path) -> None:
    model, engine = conv(tmp_path / "model.onnx", "ratio", batch="batch"), tmp_path / "model.engine"
    require_low_precision(tdq.build_engine(model, engine))
    log = tmp_path / "build.log"
    require_low_precision(tdq.build_engine(model, engine, dynamic_sizes={"batch": (1, 4, 9)}, log_path=log))
    assert f"MaxShape: [9,{CHANNELS},8,8]" in log.read_text()
    for sizes, message in (({"height": (1, 2, 3)}, "Its open dimensions: batch"), ({"batch": (4, 2, 8)}, "ascending")):
        with pytest.raises(tdq.TdqError, match=message):
            tdq.build_engine(model, engine, dynamic_sizes=sizes)
    graph = Graph({"x": ["batch", "tokens"]})
    graph.save(tmp_path / "tokens.onnx", graph.add("Sigmoid", "x"), ["batch", "tokens"])
    with pytest.raises(tdq.TdqError, match="leaves its dimension 'tokens' open"):
        tdq.build_engine(tmp_path / "tokens.onnx", engine)


@pytest.mark.parametrize(
    ("code", "target", "message"),
    [
        (FP8, ["8.9", "8.6"], "'8.6'.*no FP8 kernels.*quantize to INT8"),
        (INT8, ["7.5"], "'7.5'.*no INT8 kernels.*Build for 8.0"),
        (INT8, ["9.9"], "no such target.*Use 7.5, 8.0"),
        (INT8, "8.9", "not a list"),
        (INT8, [], "not a list"),
        (INT8, ["8.9", "8.9"], "not a list of different"),
        (INT8, [8.9], "not a list"),
    ],
)
def test_targets_that_cannot_be_used(tmp_path: Path, code: np.dtype, target: list[str], message: str) -> None:
    model = conv(tmp_path / "model.onnx", "static", code=code)
    with pytest.raises(tdq.TdqError, match=message):
        tdq.build_engine(model, tmp_path / "model.engine", compute_capabilities=target)
    assert files(tmp_path) == {"model.onnx"}


def test_what_else_cannot_be_built(tmp_path: Path) -> None:
    model, engine = conv(tmp_path / "model.onnx", "static"), tmp_path / "model.engine"
    with pytest.raises(tdq.TdqError, match=r"not a known backend\. Use one of tensorrt_rtx, tensorrt"):
        tdq.build_engine(model, engine, backend="trt")
    with pytest.raises(tdq.TdqError, match="no such file"):
        tdq.build_engine(tmp_path / "missing.onnx", engine)
    with pytest.raises(tdq.TdqError, match="is a file"):
        tdq.build_engine(model, model / "model.engine")
    with pytest.raises(tdq.TdqError, match="builds for the GPU of this machine only"):
        tdq.build_engine(model, engine, backend="tensorrt", compute_capabilities=["8.6"])
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(tdq.TdqError, match=r"[Nn]o.* ONNX model"):
        tdq.build_engine(tmp_path / "text.onnx", engine)


def test_the_parser_says_which_node_it_refuses(tmp_path: Path) -> None:
    graph = Graph({"x": [1, 4]})
    model = graph.save(tmp_path / "det.onnx", graph.add("Unique", graph.add("Sigmoid", "x"), name="odd"), ["n"])
    with pytest.raises(tdq.TdqError, match="parser refuses it: Unique odd") as caught:
        tdq.build_engine(model, tmp_path / "det.engine")
    assert caught.value.field == "onnx_path"
    assert files(tmp_path) == {"det.onnx", "det.engine.log"}


def test_an_error_names_the_inputs_whose_numbers_decide_sizes(tmp_path: Path) -> None:
    graph = Graph({"x": [4, 3], "mask": [4], "unmasked": [4]})
    places = graph.add("Transpose", graph.add("NonZero", graph.add("Sigmoid", "mask")), perm=[1, 0])
    sizes = graph.add("NonZero", graph.add("Shape", "unmasked"))
    chosen = graph.add("Add", graph.add("GatherND", "x", places), graph.add("Cast", sizes, to=1))
    model = graph.save(tmp_path / "model.onnx", chosen, ["n", 3])
    assert read_onnx(model).sized_by == ("mask",)
    with pytest.raises(tdq.TdqError, match=r"refuses it: NonZero.*the numbers of mask.*with constants=\['mask'\]"):
        tdq.build_engine(model, tmp_path / "model.engine")


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_without_tensorrt_the_error_names_the_extra(tmp_path: Path) -> None:
    model = conv(tmp_path / "model.onnx", "static")
    with pytest.raises(tdq.MissingExtraError, match=r"modelopt-tdq\[tensorrt\]"):
        tdq.build_engine(model, tmp_path / "model.engine", backend="tensorrt")
    assert files(tmp_path) == {"model.onnx"}


def test_an_old_tensorrt_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library"
    library.mkdir()
    (library / "tensorrt.py").write_text("__version__ = '10.12.0.36'\n")
    monkeypatch.setenv("PYTHONPATH", str(library))
    model = conv(tmp_path / "model.onnx", "static")
    with pytest.raises(tdq.TdqError, match=r"'10.12.0.36': too old. Install TensorRT 10.13 or later"):
        tdq.build_engine(model, tmp_path / "model.engine", backend="tensorrt")
    assert files(tmp_path) == {"model.onnx", "library"}
