"""A comparison part by part: one session at a time, weights outside of the graphs, and what is found stays found."""

from __future__ import annotations

import gc
import weakref
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console
from support.models import FAMILIES, TinyDenoiser, quantized

import modelopt_tdq as tdq

pytest.importorskip("onnxruntime")
pytest.importorskip("polygraphy")

from modelopt_tdq.compare import COMPARED, ComparedBackend, ModelComparison, compare_model, render
from modelopt_tdq.compare.graph_files import graph_of
from modelopt_tdq.export import export_onnx
from modelopt_tdq.runtime.build.onnx_model import read_onnx
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

DATA = FAMILIES["plain"].data()[:2]


@pytest.fixture(scope="module")
def model() -> TinyDenoiser:
    return quantized()


@pytest.fixture(scope="module")
def graphs(model: TinyDenoiser, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    files = {"reference_path": folder / "reference.onnx", "lowered_path": folder / "ratio.onnx"}
    export_onnx(model, files["lowered_path"], DATA[0], reference_path=files["reference_path"])
    return files


def with_backend(monkeypatch: pytest.MonkeyPatch, open_: Any, layers: bool = True) -> list[str]:
    kinds = {**COMPARED, "another": ComparedBackend(open_, layers=layers)}
    monkeypatch.setattr("modelopt_tdq.compare.model.COMPARED", kinds)
    return ["torch", "another", "onnxruntime"]


def text(comparison: ModelComparison) -> str:
    console = Console(file=StringIO(), width=160)
    console.print(render(comparison))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_one_session_at_a_time(model: TinyDenoiser, graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    alive: weakref.WeakSet[OnnxRuntimeSession] = weakref.WeakSet()

    class Watched(OnnxRuntimeSession):
        def __init__(self, *args: Any, **options: Any) -> None:
            gc.collect()
            opened.append(len(alive))
            super().__init__(*args, **options)
            alive.add(self)

    monkeypatch.setattr("modelopt_tdq.compare.parts.OnnxRuntimeSession", Watched)
    backends = with_backend(monkeypatch, Watched)
    assert compare_model(model, DATA, backends=backends, progress=False, **graphs).passed
    assert opened == [0] * 4  # outputs of the reference and the other, codes of both
    assert not alive


class TestFailures:
    def test_a_backend_that_cannot_open_the_graph(
        self, model: TinyDenoiser, graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: Path) -> Any:
            raise ValueError("a graph of this size")

        backends = with_backend(monkeypatch, refuse)
        comparison = compare_model(model, DATA, backends=backends, progress=False, **graphs)
        assert [(failure.backend, failure.part) for failure in comparison.failures] == [
            ("another", "outputs"),
            ("another", "layers"),
        ]
        assert not comparison.passed
        assert [(step.backend, step.step) for step in comparison.steps] == [
            (backend, step) for step in range(2) for backend in ("torch", "onnxruntime")
        ]
        assert comparison.compared_codes["torch"] == comparison.compared_codes["onnxruntime"] > 0
        assert comparison.compared_codes["another"] == 0
        found = text(comparison)
        assert "another: the outputs were not compared: ValueError: a graph of this size" in found
        assert found.rstrip().endswith("FAILED")
        with pytest.raises(ValueError, match="a graph of this size"):
            compare_model(model, DATA, backends=["another"], progress=False, **graphs)

    def test_layers_after_outputs(
        self, model: TinyDenoiser, graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[Path] = []

        def once(path: Path) -> OnnxRuntimeSession:
            calls.append(path)
            if len(calls) > 1:
                raise tdq.TdqError("model", path.name, "too large", "Buy memory")
            return OnnxRuntimeSession(path)

        comparison = compare_model(model, DATA, backends=with_backend(monkeypatch, once), progress=False, **graphs)
        assert [str(failure) for failure in comparison.failures] == [
            "another: the layers were not compared: model = 'layers.onnx': too large. Buy memory."
        ]
        assert len(comparison.steps) == 6
        assert all(step.difference for step in comparison.steps)
        assert comparison.compared_codes["onnxruntime"] > 0

    def test_codes_of_the_reference(
        self, model: TinyDenoiser, graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(graph: onnx.ModelProto) -> Any:
            raise MemoryError("no more")

        monkeypatch.setattr("modelopt_tdq.compare.parts.returning_codes", fail)
        comparison = compare_model(model, DATA, backends=["torch"], progress=False, **graphs)
        assert [str(failure) for failure in comparison.failures] == [
            "reference: the layers were not compared: MemoryError: no more"
        ]
        assert len(comparison.steps) == 2


def content(file: Path) -> onnx.ModelProto:
    graph = onnx.load(file)
    for tensor in graph.graph.initializer:
        tensor.ClearField("data_location")
    return graph


@pytest.mark.parametrize("apart", [False, True])
def test_the_graph_of_a_file_leaves_the_weights_outside(
    model: TinyDenoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    monkeypatch.setattr("modelopt_tdq.compare.graph_files.STAYS_IN_GRAPH", 256)
    monkeypatch.setattr("modelopt_tdq.export.onnx_file.STAYS_IN_GRAPH", 256)
    if apart:
        monkeypatch.setattr("modelopt_tdq.export.onnx_file.EXTERNAL_DATA_ABOVE", 0)
    source, folder = tmp_path / "source", tmp_path / "folder"
    folder.mkdir()
    file = export_onnx(model, source / "m.onnx", DATA[0]).path
    graph = graph_of(file, folder)
    outside = [tensor for tensor in graph.graph.initializer if tensor.external_data]
    assert len(outside) > 2
    assert not any(tensor.raw_data for tensor in outside)
    onnx.save(graph, folder / "cut.onnx")
    assert content(folder / "cut.onnx") == content(file)
    feed = {name: tensor.numpy() for name, tensor in DATA[0].items()}
    expected = OnnxRuntimeSession(file)(feed)
    np.testing.assert_array_equal(OnnxRuntimeSession(folder / "cut.onnx")(feed)["output"], expected["output"])


@pytest.mark.parametrize("given", [False, True])
def test_weights_outside_change_nothing(
    model: TinyDenoiser, graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    expected = compare_model(model, DATA, backends=["torch", "onnxruntime"], progress=False, **graphs)
    for module in ("compare.graph_files", "export.onnx_file"):
        monkeypatch.setattr(f"modelopt_tdq.{module}.STAYS_IN_GRAPH", 256)
    files = graphs if given else {}
    found = compare_model(model, DATA, backends=["torch", "onnxruntime"], progress=False, **files)
    assert found == expected
    assert found.passed


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "weights/../../secret"])
def test_a_graph_cannot_have_files_read_outside_of_its_folder(
    graphs: dict[str, Path], tmp_path: Path, location: str
) -> None:
    """Neither when it is compared nor when it is built."""
    graph = onnx.load(graphs["lowered_path"])
    folder, own = tmp_path / "downloaded", tmp_path / "own"
    folder.mkdir()
    own.mkdir()
    (tmp_path / "secret").write_bytes(b"1234")
    for weight in graph.graph.initializer[:1]:
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
    (folder / "m.onnx").write_bytes(graph.SerializeToString())
    for read in (lambda: graph_of(folder / "m.onnx", own), lambda: read_onnx(folder / "m.onnx")):
        with pytest.raises(tdq.TdqError, match="outside of its folder"):
            read()
    assert not list(own.glob("*weights0"))
