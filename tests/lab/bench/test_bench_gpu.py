"""``modelopt-tdq bench gpu`` without a GPU: the rehearsal of every part, kernels compiled for GPUs, failures kept."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from typer.testing import CliRunner

from modelopt_tdq.cli.app import app
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.bench.gpu import command, graphs, layer_kernels, part
from modelopt_tdq.lab.bench.gpu.command import run_gpu
from modelopt_tdq.lab.bench.gpu.graphs import BY_TIME, PLUGIN, TABLE

pytest.importorskip("triton")


def test_rehearsal_of_the_kernels(tmp_path: Path) -> None:
    said = CliRunner().invoke(
        app, ["bench", "gpu", "--rehearse", "--only", "machine,lookup,products", "--output", str(tmp_path)]
    )
    assert said.exit_code == 0, said.output
    result = json.loads((tmp_path / "rehearsal.json").read_text())
    assert result["rehearsal"]
    parts = {found["part"]: found for found in result["parts"]}
    assert list(parts) == ["machine", "lookup", "products"]
    assert not [found.get("said") for found in result["parts"] if "error" in found]
    assert [row["different"] for row in parts["lookup"]["rows"]] == [0]
    assert parts["products"]["rows"][0]["largest difference from the definition"] < 1e-3  # float16 outputs
    text = (tmp_path / "rehearsal.md").read_text()
    assert "no number here says anything about a GPU" in text
    assert all(f"## {name}:" in text for name in parts)


def _rehearsed(name: str, folder: Path) -> list[part.Row]:
    """In this process, where everything is imported already."""
    kept: list[part.Row] = []
    module = importlib.import_module(f"modelopt_tdq.lab.bench.gpu.{name}")
    rows: list[part.Row] = module.run(part.Asked(True, folder, kept.extend))
    assert kept
    assert not [row["error"] for row in rows if "error" in row and row.get("backend") != "tensorrt"]
    return rows


def test_rehearsal_of_the_model(tmp_path: Path) -> None:
    rows = _rehearsed("model", tmp_path)
    right, compared = rows[0]["scales within 1e-4"].split(" of ")
    assert right == compared
    assert [row["weights folded"] for row in rows if row["what"] == "forward"] == [False, True]


def test_rehearsal_of_the_real_size(tmp_path: Path) -> None:
    rows = _rehearsed("real_size", tmp_path)
    assert sum("seconds" in row for row in rows) == 4
    assert rows[-1]["by time / ModelOpt static"] > 0


@pytest.mark.parametrize(
    "names", [(BY_TIME, TABLE, PLUGIN), pytest.param((), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_rehearsal_of_the_engines(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All graphs differ in what is exported alone; those of one trace are the quick ones."""
    pytest.importorskip("tensorrt_rtx")
    every = graphs.graphs

    def chosen(asked: part.Asked, full: Any) -> dict[str, Any]:
        return {name: make for name, make in every(asked, full).items() if not names or name in names}

    monkeypatch.setattr("modelopt_tdq.lab.bench.gpu.engines.graphs", chosen)
    engines = {row["graph"]: row for row in _rehearsed("engines", tmp_path) if "graph" in row}
    uses = ["another table", "several streams", "a whole pipeline", "run-time cache"]
    assert list(engines)[-4:] == uses
    quantized = [row for name, row in engines.items() if name not in (*uses, "float16")]
    assert len(quantized) == (len(names) or 7)
    for row in quantized:
        assert len(set(row["quantizers whose codes are equal"].split(" of "))) == 1
        assert row["kernels"] > 0
    # the stand-in is the yardstick itself
    assert engines["another table"]["SQNR to ONNX Runtime with another table"] == math.inf
    assert engines["several streams"]["wrong"] == 0
    assert engines["a whole pipeline"]["engine to quantized"] > 30
    assert set(engines["run-time cache"]) == {"backend", "graph"} | {
        f"s to the first answer, {what}" for what in ("no cache", "new cache", "cache")
    }


def test_engines_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from modelopt_tdq.lab.bench.gpu import engines

    inputs = [onnx.helper.make_tensor_value_info("sample", onnx.TensorProto.FLOAT, ["batch", 3])]
    inputs.append(onnx.helper.make_tensor_value_info("timestep", onnx.TensorProto.FLOAT, [1]))
    output = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["batch", 3])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Mul", ["sample", "timestep"], ["output"])], "g", inputs, [output]
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "ratio.onnx",
    )
    (tmp_path / "ratio.engine").write_bytes(b"its stand-in is the graph")
    (tmp_path / "alone.engine").write_bytes(b"")
    asked = part.Asked(True, tmp_path, lambda rows: None, tmp_path)
    alone, found = engines._from_elsewhere(asked, tmp_path)
    assert "no such file" in alone["error"]
    assert found["graph"] == "built elsewhere: ratio.engine"
    assert [value for name, value in found.items() if name.startswith("SQNR")] == [math.inf]
    with pytest.raises(TdqError, match=r"no \*\.engine in it"):
        list(run_gpu(tmp_path / "new", [], "test", rehearse=True, engines=tmp_path / "nothing"))


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_layer_kernels_compile(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    codes = "*i8" if capability < 90 else "*fp8e4nv"
    high = 127.0 if codes == "*i8" else 448.0
    pointers = {"x_ptr": "*fp16", "scale_ptr": "*fp32", "q_ptr": codes}
    kernels: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
        (
            layer_kernels.quantize,
            {**pointers, "count": "i32", "constant": "fp32"},
            {"low": -high, "high": high, "fixed": False, "whole": codes == "*i8", "block": 1024},
        ),
        (
            layer_kernels.quantize_rows,
            {**pointers, "columns": "i32"},
            {"high": high, "whole": codes == "*i8", "block": 1024},
        ),
        (layer_kernels.absmax, {"x_ptr": "*fp16", "largest_ptr": "*i32", "count": "i32"}, {"block": 1024}),
        (
            layer_kernels.linear,
            {
                **dict.fromkeys(("a_ptr", "b_ptr"), "*i8"),
                "out_ptr": "*fp16",
                **dict.fromkeys(("scale_ptr", "weight_scale_ptr", "bias_ptr"), "*fp32"),
                **dict.fromkeys(("m", "n", "k"), "i32"),
                "constant": "fp32",
            },
            {"fixed": False, "per_row": True, "block_m": 64, "block_n": 64, "block_k": 64, "group": 8},
        ),
    ]
    for kernel, signature, constants in kernels:
        source = triton.compiler.ASTSource(
            fn=triton.jit(kernel),
            signature={**signature, **dict.fromkeys(constants, "constexpr")},
            constexprs=constants,
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert "mma" in compiled.asm["ptx"] or kernel is not layer_kernels.linear


def _part(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    module = ModuleType("modelopt_tdq.lab.bench.gpu.machine")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_part_that_fails_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(asked: part.Asked) -> list[part.Row]:
        asked.keep([{"fact": "first"}])
        raise RuntimeError("the driver is gone")

    _part(monkeypatch, run)
    assert part.main("machine", str(tmp_path), "1") == 0
    assert json.loads((tmp_path / "machine.json").read_text()) == {
        "rows": [{"fact": "first"}],
        "error": "RuntimeError: the driver is gone",
    }


@pytest.mark.parametrize(
    ("program", "error"), [("import os; os.abort()", "status -6"), ("while True: pass", "after 2")]
)
def test_a_part_that_dies_or_hangs_ends_no_other(
    program: str, error: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = command.subprocess.run

    def run(asked_for: list[str], **options: Any) -> Any:
        if "-m" not in asked_for:  # what the platform asks the machine
            return real(asked_for, **options)
        assert asked_for[3] in ("machine", "lookup")
        return real([sys.executable, "-c", program if asked_for[3] == "machine" else "pass"], **options)

    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.setattr(command, "_LIMITS", {"machine": 1, "lookup": 60})
    lines = list(run_gpu(tmp_path, ["machine", "lookup"], "test", rehearse=True))
    assert error in lines[0]
    assert lines[1].startswith("lookup: 0 rows")
    assert "**Failed:**" in (tmp_path / "rehearsal.md").read_text()


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(TdqError, match="no such part"):
        list(run_gpu(tmp_path / "new", ["kernels"], "test", rehearse=True))
    if not torch.cuda.is_available():
        with pytest.raises(TdqError, match="torch sees no GPU"):
            list(run_gpu(tmp_path / "new", [], "test", rehearse=False))
    assert not (tmp_path / "new").exists()
