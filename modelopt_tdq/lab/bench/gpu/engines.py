"""Engines of TensorRT-RTX and TensorRT on the GPU at hand: built, loaded, run, compared, timed.

Compared with ONNX Runtime on the same file: first the codes of every quantizer, then the output. A builder that turns
x / s into x · (1 / s) would show in the codes. A refusal is a row, word for word, and the next graph goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.core.metrics import sqnr_db
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.lab.bench.gpu.model import TIME, full_precision, recorded_calls, replayed
from modelopt_tdq.lab.bench.gpu.part import Asked, Row
from modelopt_tdq.lab.bench.gpu.timing import median_times
from modelopt_tdq.lab.denoising import Prediction
from modelopt_tdq.lab.trajectories import noise, sample_shape

__all__ = ["run"]

_BACKENDS = ("tensorrt_rtx", "tensorrt")
#: Compute capability that a rehearsal builds for.
_REHEARSED = "8.9"


@dataclass(frozen=True)
class _Graph:
    """An ONNX file, and what its engine is checked against.

    Attributes:
        file: Of the graph.
        model: The quantized torch model; None for full precision.
        per_sample: Whether it takes a time per sample.
    """

    file: Path
    model: nn.Module | None = None
    per_sample: bool = False


def _float16(full: nn.Module, file: Path, shape: tuple[int, ...]) -> _Graph:
    batch = torch.export.Dim("batch", min=1, max=64)
    example = (noise(2, shape, 0).half(), torch.tensor([TIME]))
    torch.onnx.export(
        Prediction(copy.deepcopy(full).half()), example, str(file), dynamo=True, verbose=False, external_data=False,
        input_names=["sample", "timestep"], output_names=["output"], dynamic_shapes=({0: batch}, None),
    )  # fmt: skip
    return _Graph(file)


def _graphs(asked: Asked, full: nn.Module) -> dict[str, Callable[[], _Graph]]:
    """What is built, by name; made when it is asked for."""
    import modelopt.torch.quantization as mtq

    import modelopt_tdq as tdq

    shape = sample_shape(full)
    forward_loop = replayed(recorded_calls(asked, full))
    made: dict[str, nn.Module] = {}

    def quantized(bins: Any) -> nn.Module:
        if str(bins) not in made:
            config = tdq.make_config(weights="max", bins=bins, progress=False)
            made[str(bins)] = mtq.quantize(copy.deepcopy(full), config, forward_loop)
        return made[str(bins)]

    def exported(name: str, bins: Any, times: Tensor, **options: Any) -> _Graph:
        model = quantized(bins)
        inputs = {"sample": noise(2, shape, 0), "timestep": times}
        file = asked.folder / f"{name}.onnx"
        tdq.export_onnx(model, file, inputs, dynamic_batch=True, **options)
        return _Graph(file, model, times.numel() > 1)

    one, two = torch.tensor([TIME]), torch.tensor([TIME, 11.0])
    graphs = {
        "static": lambda: exported("static", 1, one),
        "by time": lambda: exported("ratio", "per_step", one),
        "by time, a time per sample": lambda: exported("per_sample", "per_step", two),
        "by time, table as input": lambda: exported("table", "per_step", one, table_input=True),
        "scale gathered in front of Q": lambda: exported("gathered", "per_step", one, lowering="reference"),
    }
    if asked.rehearse:
        return {name: graphs[name] for name in ("by time, table as input",)}
    return {"float16": lambda: _float16(full, asked.folder / "float16.onnx", shape), **graphs}


def _table(graph: _Graph) -> dict[str, Any]:
    """The table's inputs of the graph by name; none where the scales are constants."""
    import onnx

    import modelopt_tdq as tdq
    from modelopt_tdq.export import engine_table
    from modelopt_tdq.runtime.sessions.table_inputs import TABLE_INPUTS

    names = {value.name for value in onnx.load(graph.file, load_external_data=False).graph.input}
    if graph.model is None or not names & set(TABLE_INPUTS):
        return {}
    return dict(engine_table(graph.file, tdq.scale_table(graph.model)))


def _build(asked: Asked, backend: str, file: Path, engine: Path) -> Any:
    import modelopt_tdq as tdq

    options: dict[str, Any] = {}
    if backend == "tensorrt_rtx":
        capability = _REHEARSED if asked.rehearse else "{}.{}".format(*torch.cuda.get_device_capability())
        options["compute_capabilities"] = [capability]
    return tdq.build_engine(file, engine, backend=backend, allow_float=True, **options)


def _reference(file: Path, table: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """ONNX Runtime on the graph."""
    from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

    session = OnnxRuntimeSession(file)
    return lambda inputs: session({**inputs, **table})


def _open(asked: Asked, file: Path, engine: Path, table: Mapping[str, Any], **options: Any) -> Any:
    """The engine's session; in a rehearsal, that of ONNX Runtime on its graph."""
    from modelopt_tdq.runtime.sessions.tensorrt import TensorRTSession

    return _reference(file, table) if asked.rehearse else TensorRTSession(engine, table=table or None, **options)


def _feeds(graph: _Graph, shape: tuple[int, ...], batch: int) -> dict[str, Tensor]:
    times = torch.tensor([TIME]) if not graph.per_sample else torch.linspace(990, 5, batch)
    return {"sample": noise(batch, shape, 4), "timestep": times}


def _codes(asked: Asked, backend: str, graph: _Graph, name: str, shape: tuple[int, ...]) -> Row:
    """Codes of every quantizer, the engine's and ONNX Runtime's, on the same input."""
    import onnx

    from modelopt_tdq.compare.layers import codes_by_quantizer, returning_codes

    file = graph.file.with_name(f"{graph.file.stem}_codes.onnx")
    onnx.save(returning_codes(onnx.load(graph.file)), file)
    engine = file.with_suffix(f".{backend}")
    _build(asked, backend, file, engine)
    table = _table(graph)
    feeds = {key: value.numpy() for key, value in _feeds(graph, shape, 2).items()}
    expected = codes_by_quantizer(_reference(file, table)(feeds).items())
    found = codes_by_quantizer(_open(asked, file, engine, table)(feeds).items())
    different = {key: float((found[key].values != expected[key].values).mean()) for key in expected}
    first = next((key for key, share in different.items() if share), None)
    return {
        "graph": name,
        "quantizers whose codes are equal": f"{sum(not share for share in different.values())} of {len(different)}",
        "first that differs": first,
        "share of its codes": 0.0 if first is None else different[first],
    }


def _run(asked: Asked, backend: str, name: str, graph: _Graph, full: nn.Module, rows: list[Row]) -> None:
    """Build, load, compare the output and time one graph; appends to ``rows`` what was found."""
    shape = sample_shape(full)
    row: Row = {"backend": backend, "graph": name}
    rows.append(row)
    engine = graph.file.with_suffix(f".{backend}")
    report = _build(asked, backend, graph.file, engine)
    row |= {"kernels": report.kernels, "engine MiB": round(engine.stat().st_size / 2**20, 2)}
    asked.keep(rows)
    table = _table(graph)
    session = _open(asked, graph.file, engine, table)
    reference = None if graph.model is None else _reference(graph.file, table)
    captured = None if asked.rehearse else _open(asked, graph.file, engine, table, cuda_graph=True)
    half = torch.float16 if graph.model is None else torch.float32
    for batch in (2,) if asked.rehearse else (1, 8, 64):
        feeds = {
            key: value.to(half) if key == "sample" else value for key, value in _feeds(graph, shape, batch).items()
        }
        there = {key: value.to(asked.device) for key, value in feeds.items()}
        found = torch.as_tensor(session(there if not asked.rehearse else feeds)["output"]).float().cpu()
        with torch.no_grad():
            expected = full(feeds["sample"].float(), feeds["timestep"]).sample
        row[f"SQNR to full precision, batch {batch}"] = round(sqnr_db(expected, found), 2)
        if reference is not None and batch <= 8:
            wanted = reference({key: value.numpy() for key, value in feeds.items()})["output"]
            row[f"SQNR to ONNX Runtime, batch {batch}"] = round(sqnr_db(torch.from_numpy(wanted), found), 2)
        if captured is not None:
            times = median_times({"plain": partial(session, there)}, repeats=50, graphs=False)
            row[f"ms, batch {batch}"] = round(times["plain"] * 1e3, 4)
            again = captured(there)["output"].float().cpu()
            row[f"same in a CUDA graph, batch {batch}"] = bool(torch.equal(again, found))
            times = median_times({"graph": partial(captured, there)}, repeats=50, graphs=False)
            row[f"ms in a CUDA graph, batch {batch}"] = round(times["graph"] * 1e3, 4)
        asked.keep(rows)
    if captured is not None:
        captured.close()
    if graph.model is not None:
        row |= _codes(asked, backend, graph, name, shape)


def _streams(asked: Asked, engine: Path, graph: _Graph, shape: tuple[int, ...]) -> Row:
    """Calls from several streams, one after another without waiting, against calls that wait."""
    session = _open(asked, graph.file, engine, {})
    feeds = [{"sample": noise(2, shape, i).cuda(), "timestep": torch.tensor([t])} for i, t in enumerate((5.0, 700.0))]
    alone = []
    for given in feeds:
        alone.append(session(given)["output"].clone())
        torch.cuda.synchronize()
    wrong = 0
    for turn in range(50):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            busy = torch.randn(2048, 2048, device="cuda")
            for _ in range(4):
                busy = busy @ busy.clamp(-1, 1)  # the input is not there yet when the engine is called
            x = feeds[turn % 2]["sample"] + 0 * busy[0, 0].nan_to_num(0, 0, 0)
            found = session({"sample": x, "timestep": feeds[turn % 2]["timestep"]})["output"] * 1
        stream.synchronize()
        wrong += not torch.equal(found, alone[turn % 2])
    return {"graph": "several streams", "calls": 50, "wrong": wrong}


def run(asked: Asked) -> list[Row]:
    """A row per backend and graph; a graph that fails leaves a row with its error."""
    rows: list[Row] = []
    full = full_precision(asked)
    makers = _graphs(asked, full)
    made: dict[str, _Graph] = {}
    for backend in _BACKENDS:
        try:
            require(backend, backend.replace("_", "-"))
        except TdqError as error:
            rows.append({"backend": backend, "error": str(error)})
            continue
        for name, make in makers.items():
            try:
                if name not in made:
                    made[name] = make()
                _run(asked, backend, name, made[name], full, rows)
            except Exception as error:  # a refusal is a result
                if not rows or rows[-1].get("graph") != name or rows[-1]["backend"] != backend:
                    rows.append({"backend": backend, "graph": name})
                rows[-1]["error"] = f"{type(error).__name__}: {error}"
                if isinstance(error, TdqError) and error.field == "compute_capabilities":
                    break  # the library does not serve this GPU, whatever the graph
            asked.keep(rows)
        if not asked.rehearse and "by time" in made:
            try:
                graph = made["by time"]
                rows.append(_streams(asked, graph.file.with_suffix(f".{backend}"), graph, sample_shape(full)))
            except Exception as error:
                rows.append(
                    {"backend": backend, "graph": "several streams", "error": f"{type(error).__name__}: {error}"}
                )
    return rows
