"""Engines of TensorRT-RTX and TensorRT on the GPU at hand: built, loaded, run, compared, timed.

Compared with ONNX Runtime on the same file: first the codes of every quantizer, then the output. A builder that turns
x / s into x · (1 / s) would show in the codes. A refusal is a row, word for word, and the next graph goes on.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelopt_tdq.core.metrics import sqnr_db
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.lab.bench.gpu.engine_uses import opened, reference, shapes, table_of, twin, uses
from modelopt_tdq.lab.bench.gpu.graphs import PLUGIN, Graph, graphs
from modelopt_tdq.lab.bench.gpu.model import full_precision
from modelopt_tdq.lab.bench.gpu.part import Asked, Row
from modelopt_tdq.lab.bench.gpu.timing import median_times
from modelopt_tdq.lab.trajectories import noise, sample_shape

__all__ = ["run"]

_BACKENDS = ("tensorrt_rtx", "tensorrt")
#: Compute capability that a rehearsal builds for.
_REHEARSED = "8.9"


def _build(asked: Asked, backend: str, graph: Graph, engine: Path) -> Any:
    import modelopt_tdq as tdq

    file = graph.file
    if asked.rehearse and graph.plugins:  # which the builder that needs no GPU does not know
        file = twin(graph)
    options: dict[str, Any] = {"plugins": graph.plugins} if graph.plugins and not asked.rehearse else {}
    if backend == "tensorrt_rtx":
        capability = _REHEARSED if asked.rehearse else "{}.{}".format(*torch.cuda.get_device_capability())
        options["compute_capabilities"] = [capability]
    return tdq.build_engine(file, engine, backend=backend, allow_float=True, **options)


def _codes(asked: Asked, backend: str, graph: Graph, name: str, shape: tuple[int, ...]) -> Row:
    """Codes of every quantizer, the engine's and ONNX Runtime's, on the same input."""
    import onnx

    from modelopt_tdq.compare.layers import codes_by_quantizer, returning_codes

    file = graph.file.with_name(f"{graph.file.stem}_codes.onnx")
    onnx.save(returning_codes(onnx.load(graph.file)), file)
    told = replace(graph, file=file)
    engine = file.with_suffix(f".{backend}")
    _build(asked, backend, told, engine)
    table = table_of(graph)
    feeds = {key: value.numpy() for key, value in graph.feeds(shape, 2).items()}
    expected = codes_by_quantizer(reference(told, table)(feeds).items())
    found = codes_by_quantizer(opened(asked, told, engine, table)(feeds).items())
    different = {key: float((found[key].values != expected[key].values).mean()) for key in expected}
    first = next((key for key, share in different.items() if share), None)
    return {
        "graph": name,
        "quantizers whose codes are equal": f"{sum(not share for share in different.values())} of {len(different)}",
        "first that differs": first,
        "share of its codes": 0.0 if first is None else different[first],
    }


def _run(asked: Asked, backend: str, name: str, graph: Graph, full: nn.Module, rows: list[Row]) -> None:
    """Build, load, compare the output and time one graph; appends to ``rows`` what was found."""
    shape = sample_shape(full)
    row: Row = {"backend": backend, "graph": name}
    rows.append(row)
    engine = graph.file.with_suffix(f".{backend}")
    report = _build(asked, backend, graph, engine)
    row |= {"kernels": report.kernels, "engine MiB": round(engine.stat().st_size / 2**20, 2)}
    asked.keep(rows)
    if graph.model is not None:
        row |= _codes(asked, backend, graph, name, shape)
        asked.keep(rows)
    table = table_of(graph)
    session = opened(asked, graph, engine, table)
    yardstick = None if graph.model is None else reference(graph, table)
    captured = None if asked.rehearse else opened(asked, graph, engine, table, cuda_graph=True)
    half = torch.float16 if graph.model is None else torch.float32
    for batch in (2,) if asked.rehearse else (1, 8, 64):
        feeds = {key: value.to(half) if key == "sample" else value for key, value in graph.feeds(shape, batch).items()}
        there = {key: value.to(asked.device) for key, value in feeds.items()}
        found = torch.as_tensor(session(there if not asked.rehearse else feeds)["output"]).float().cpu()
        with torch.no_grad():
            expected = full(feeds["sample"].float(), feeds["timestep"]).sample
        row[f"SQNR to full precision, batch {batch}"] = round(sqnr_db(expected, found), 2)
        if yardstick is not None and batch <= 8:
            wanted = yardstick({key: value.numpy() for key, value in feeds.items()})["output"]
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


def _from_elsewhere(asked: Asked, folder: Path) -> list[Row]:
    """Engines that another machine has built, with their ONNX files beside them: loaded, run and compared."""
    rows: list[Row] = []
    for engine in sorted(folder.glob("*.engine")):
        row: Row = {"graph": f"built elsewhere: {engine.name}"}
        rows.append(row)
        try:
            graph = Graph(engine.with_suffix(".onnx"))
            session, yardstick = opened(asked, graph, engine, {}), reference(graph, {})
            sizes = {name: [size if isinstance(size, int) else 2 for size in shape] for name, shape in shapes(graph)}
            feeds = {name: noise(size[0], tuple(size[1:]), 0).numpy() for name, size in sizes.items()}
            feeds |= {name: 401.0 + 0 * value for name, value in feeds.items() if value.ndim < 2}
            expected, found = yardstick(feeds), session(feeds)
            row |= {
                f"SQNR to ONNX Runtime, {name}": round(
                    sqnr_db(torch.as_tensor(value).float(), torch.as_tensor(found[name]).float().cpu()), 2
                )
                for name, value in expected.items()
            }
        except Exception as error:  # a refusal is a result
            row["error"] = f"{type(error).__name__}: {error}"
    return rows


def run(asked: Asked) -> list[Row]:
    """A row per backend and graph, and per use of its engines; what fails leaves a row with its error."""
    rows: list[Row] = []
    full = full_precision(asked)
    makers = graphs(asked, full)
    made: dict[str, Graph] = {}
    for backend in _BACKENDS:
        try:
            require(backend, backend.replace("_", "-"))
        except TdqError as error:
            rows.append({"backend": backend, "error": str(error)})
            continue
        for name, make in makers.items():
            if name == PLUGIN and backend == "tensorrt_rtx" and not asked.rehearse:
                continue  # it has no such plugins
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
        rows += uses(asked, backend, made, full)
        asked.keep(rows)
    if asked.engines is not None:
        rows += _from_elsewhere(asked, asked.engines)
    return rows
