"""Graphs compiled for a provider: written and read by the real ONNX Runtime, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from small_graphs import conv

import modelopt_tdq as tdq
from modelopt_tdq.runtime.build.report import manifest_path, sha256

CPU = ["cpu"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = conv(tmp_path / "ratio.onnx", "ratio")
    model = onnx.load(file)
    onnx.helper.set_model_props(model, {"modelopt_tdq.names": '{"y": "latent"}'})
    onnx.save(model, file)
    return file


def _feeds(file: Path) -> dict[str, Any]:
    session = tdq.OnnxRuntimeSession(file)
    random = np.random.default_rng(0)
    return {n: random.standard_normal(session.shapes[n]).astype(session.inputs[n]) for n in session.inputs}


def test_it_computes_the_same_and_says_what_it_is(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "compiled" / "graph.onnx"
    target.parent.mkdir()
    compiled = tdq.compile_graph(source, target, providers=CPU)
    assert compiled.providers == ("CPUExecutionProvider",)
    assert compiled.versions == {"onnxruntime": onnxruntime.__version__}
    assert compiled.onnx_sha256 == {"ratio.onnx": sha256(source)}
    assert sorted(path.name for path in target.parent.iterdir()) == ["graph.onnx", "graph.onnx.json"]
    feeds = _feeds(source)
    session = tdq.OnnxRuntimeSession(target, providers=CPU)
    expected, found = tdq.OnnxRuntimeSession(source)(feeds), session(feeds)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert session.metadata["modelopt_tdq.names"] == '{"y": "latent"}'


@pytest.fixture
def compiled(source: Path, tmp_path: Path) -> Path:
    tdq.compile_graph(source, tmp_path / "graph.onnx", providers=CPU)
    return tmp_path / "graph.onnx"


@pytest.mark.parametrize(
    ("entry", "value", "says"),
    [
        ("versions", {"onnxruntime": "1.2.3"}, r"compiled by onnxruntime 1\.2\.3, and here is .*onnxruntime==1\.2\.3"),
        ("versions", {"some-provider": "0.4"}, r"some-provider 0\.4, and here is none"),
        ("compute_capability", "8.9", r"GPU of compute capability 8\.9, and here is .*compile_graph"),
        ("providers", ["CUDAExecutionProvider"], r"compiled for CUDAExecutionProvider.*Use these"),
        ("files", {"graph.onnx": "0" * 64}, "changed since it was compiled"),
        ("files", {"graph.bin": "0" * 64}, "missing or was changed"),
        ("schema_version", 99, "newer version"),
        ("files", 5, "no manifest of a compiled graph"),
    ],
)
def test_what_it_was_not_compiled_for_is_refused(compiled: Path, entry: str, value: Any, says: str) -> None:
    manifest = manifest_path(compiled)
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, entry: value}))
    with pytest.raises(tdq.TdqError, match=says):
        tdq.OnnxRuntimeSession(compiled, providers=CPU)
    manifest.write_text(json.dumps(content))
    tdq.OnnxRuntimeSession(compiled, providers=CPU)


def test_compiled_code_without_a_manifest_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file from elsewhere, whose node may hold anything."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node(
        "EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context=b"code", embed_mode=1
    )
    graph = onnx.helper.make_graph([node], "g", [value], [output])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "stranger.onnx")
    known = ["CPUExecutionProvider", "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    with pytest.raises(tdq.TdqError, match=r"holds compiled code.*no manifest.*trust=True"):
        tdq.OnnxRuntimeSession(tmp_path / "stranger.onnx", providers=["cuda"])
    with pytest.raises(tdq.TdqError, match="ONNX Runtime cannot load it"):
        tdq.OnnxRuntimeSession(tmp_path / "stranger.onnx", providers=["cuda"], trust=True)


def test_an_engines_manifest_is_none_of_a_graph(source: Path) -> None:
    manifest_path(source).write_text(json.dumps({"kind": "modelopt_tdq.Engine"}))
    tdq.OnnxRuntimeSession(source)


def test_what_cannot_be_compiled(source: Path, tmp_path: Path) -> None:
    with pytest.raises(tdq.TdqError, match=r"onnxruntime-gpu"):
        tdq.compile_graph(source, tmp_path / "graph.onnx", providers=["cuda"])
    with pytest.raises(tdq.TdqError, match="Name another file"):
        tdq.compile_graph(source, source, providers=CPU)
    with pytest.raises(tdq.TdqError, match="is a file"):
        tdq.compile_graph(source, Path(source) / "graph.onnx", providers=CPU)
    broken = onnx.load(source)
    broken.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(broken, tmp_path / "broken.onnx")
    with pytest.raises(tdq.TdqError, match="ONNX Runtime cannot compile it"):
        tdq.compile_graph(tmp_path / "broken.onnx", tmp_path / "graph.onnx", providers=CPU)
    assert not (tmp_path / "graph.onnx").exists()
    assert not list(tmp_path.glob(".*"))


def test_an_older_one_stays_until_the_new_is_complete(source: Path, compiled: Path) -> None:
    before = shutil.copy(manifest_path(compiled), compiled.parent / "before.json")
    tdq.compile_graph(source, compiled, providers=CPU)
    assert Path(before).read_text() == manifest_path(compiled).read_text()
    tdq.OnnxRuntimeSession(compiled, providers=CPU)
