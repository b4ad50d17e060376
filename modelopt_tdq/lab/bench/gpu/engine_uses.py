"""What an engine is used for: tables that are exchanged, several streams, a whole pipeline, the run-time cache.

In a rehearsal, ONNX Runtime on the graph stands for the engine's session.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.core.metrics import sqnr_db
from modelopt_tdq.lab.bench.gpu.graphs import BY_TIME, TABLE, Graph
from modelopt_tdq.lab.bench.gpu.part import Asked, Row
from modelopt_tdq.lab.reference_models import bundled_model
from modelopt_tdq.lab.trajectories import load_scheduler, noise, sample_shape

__all__ = ["opened", "reference", "shapes", "table_of", "twin", "uses"]


def table_of(graph: Graph) -> dict[str, Any]:
    """The table's inputs of the graph by name; none where the scales are constants."""
    import modelopt_tdq as tdq
    from modelopt_tdq.export import engine_table
    from modelopt_tdq.runtime.sessions.table_inputs import TABLE_INPUTS

    if graph.model is None or not {name for name, _ in shapes(graph)} & set(TABLE_INPUTS):
        return {}
    return dict(engine_table(graph.file, tdq.scale_table(graph.model)))


def shapes(graph: Graph) -> Iterable[tuple[str, tuple[int | str, ...]]]:
    """Inputs of the file; an open size is a name."""
    from modelopt_tdq.runtime.build.onnx_model import read_onnx

    return read_onnx(graph.file).inputs.items()


def twin(graph: Graph) -> Path:
    """The graph without its plugin, which gives the same numbers."""
    from modelopt_tdq.runtime.twin import write_twin

    return write_twin(graph.file, graph.file.with_name(f"{graph.file.stem}_twin.onnx"))


class _Reference:
    """ONNX Runtime on a graph, which can stand for an engine's session."""

    def __init__(self, graph: Graph, table: Mapping[str, Any]) -> None:
        from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

        self._session = OnnxRuntimeSession(twin(graph) if graph.plugins else graph.file)
        self._file, self._table = graph.file, dict(table)
        self.metadata, self.outputs = self._session.metadata, self._session.outputs
        self.inputs = {name: dtype for name, dtype in self._session.inputs.items() if name not in table}
        self.shapes = {name: shape for name, shape in self._session.shapes.items() if name not in table}

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return self._session({**inputs, **self._table})

    def set_table(self, table: Any) -> None:
        """As of an engine."""
        from modelopt_tdq.export import engine_table

        self._table = dict(engine_table(self._file, table))

    def close(self) -> None:
        """As of an engine."""


def reference(graph: Graph, table: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """ONNX Runtime on the graph, of one with the plugin on its twin."""
    return _Reference(graph, table)


def opened(asked: Asked, graph: Graph, engine: Path, table: Mapping[str, Any], **options: Any) -> Any:
    """The engine's session; in a rehearsal, its stand-in."""
    from modelopt_tdq.runtime.sessions.tensorrt import TensorRTSession

    return _Reference(graph, table) if asked.rehearse else TensorRTSession(engine, table=table or None, **options)


def _scaled(table: Any, factor: float) -> Any:
    """A table with other scales."""
    import modelopt_tdq as tdq

    return tdq.ScaleTable(table.timesteps, table.scale * factor, table.names, table.offset, metadata=table.metadata)


def _other_table(asked: Asked, engine: Path, graph: Graph, full: nn.Module) -> Row:
    """The engine with another table, and with its own again, against ONNX Runtime with these."""
    import modelopt_tdq as tdq

    own: Any = tdq.scale_table(graph.model)  # type: ignore[arg-type]
    session, yardstick = opened(asked, graph, engine, table_of(graph)), _Reference(graph, table_of(graph))
    feeds = {name: value.numpy() for name, value in graph.feeds(sample_shape(full), 2).items()}
    row: Row = {}
    for what, table in (("another table", _scaled(own, 2.0)), ("its own again", own)):
        session.set_table(table)
        yardstick.set_table(table)
        found, expected = (torch.as_tensor(each(feeds)["output"]).cpu() for each in (session, yardstick))
        row[f"SQNR to ONNX Runtime with {what}"] = round(sqnr_db(expected, found), 2)
    session.close()
    return row


def _streams(asked: Asked, engine: Path, graph: Graph, full: nn.Module) -> Row:
    """Calls from several streams, one after another without waiting, against calls that wait."""
    session, shape = opened(asked, graph, engine, {}), sample_shape(full)
    feeds = [
        {"sample": noise(2, shape, number).to(asked.device), "timestep": torch.tensor([at])}
        for number, at in enumerate((5.0, 700.0))
    ]
    alone = []
    for given in feeds:
        alone.append(torch.as_tensor(session(given)["output"]).clone())
        _wait(asked)
    calls, wrong = 4 if asked.rehearse else 50, 0
    for turn in range(calls):
        stream: Any = None if asked.rehearse else torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            busy = torch.randn(64 if asked.rehearse else 2048, 64 if asked.rehearse else 2048, device=asked.device)
            for _ in range(4):
                busy = busy @ busy.clamp(-1, 1)  # the input is not there yet when the engine is called
            x = feeds[turn % 2]["sample"] + 0 * busy[0, 0].nan_to_num(0, 0, 0)
            found = torch.as_tensor(session({"sample": x, "timestep": feeds[turn % 2]["timestep"]})["output"]) * 1
        if stream is not None:
            stream.synchronize()
        wrong += not torch.equal(found, alone[turn % 2])
    session.close()
    return {"calls": calls, "wrong": wrong}


def _wait(asked: Asked) -> None:
    if not asked.rehearse:
        torch.cuda.synchronize()


def _images(pipeline: Any, steps: int) -> tuple[Tensor, float]:
    """Of one seed, and the seconds that they took."""
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    images = pipeline(batch_size=2, num_inference_steps=steps, generator=generator, output_type="np").images
    return torch.from_numpy(images), time.perf_counter() - start


def _pipeline(asked: Asked, engine: Path, graph: Graph, full: nn.Module) -> Row:
    """A whole pipeline of diffusers on the engine, against the same in torch, quantized and not."""
    from diffusers import DDIMPipeline

    import modelopt_tdq as tdq

    steps = 2 if asked.rehearse else 20
    made: Any = DDIMPipeline
    found: dict[str, tuple[Tensor, float]] = {}
    for name, model in (("full", full), ("quantized", graph.model)):
        pipeline = made(unet=model, scheduler=load_scheduler(bundled_model()))
        pipeline.set_progress_bar_config(disable=True)
        found[name] = _images(pipeline.to(asked.device), steps)
    tdq.swap_denoiser(pipeline, opened(asked, graph, engine, {}))
    _images(pipeline, steps)  # the first call of an engine compiles its kernels
    found["engine"] = _images(pipeline, steps)
    return {
        "steps": steps,
        "SQNR of the images, quantized to full precision": round(sqnr_db(found["full"][0], found["quantized"][0]), 2),
        "engine to quantized": round(sqnr_db(found["quantized"][0], found["engine"][0]), 2),
        "s in torch, quantized": round(found["quantized"][1], 3),
        "s on the engine": round(found["engine"][1], 3),
    }


def _cache(asked: Asked, engine: Path, graph: Graph, full: nn.Module) -> Row:
    """Seconds from the file to the first answer: without the run-time cache, with a new one, with that one again."""
    feeds = graph.feeds(sample_shape(full), 2)
    kept = engine.with_name(f"{engine.name}.cache")
    row: Row = {}
    for what, cache in (("no cache", False), ("new cache", kept), ("cache", kept)):
        start = time.perf_counter()
        session = opened(asked, graph, engine, {}, **({} if asked.rehearse else {"runtime_cache": cache}))
        session(feeds)
        _wait(asked)
        row[f"s to the first answer, {what}"] = round(time.perf_counter() - start, 3)
        session.close()
    return row


#: What is done with the engine of a graph, and which backends have it.
_USES: tuple[tuple[str, str, Callable[[Asked, Path, Graph, nn.Module], Row], tuple[str, ...]], ...] = (
    ("another table", TABLE, _other_table, ("tensorrt_rtx", "tensorrt")),
    ("several streams", BY_TIME, _streams, ("tensorrt_rtx", "tensorrt")),
    ("a whole pipeline", BY_TIME, _pipeline, ("tensorrt_rtx", "tensorrt")),
    ("run-time cache", BY_TIME, _cache, ("tensorrt_rtx",)),
)


def uses(asked: Asked, backend: str, made: Mapping[str, Graph], full: nn.Module) -> list[Row]:
    """A row per use of the engines that were built; one that fails leaves its error.

    Args:
        asked: Of the part.
        backend: That built the engines.
        made: Graphs by name; their engines lie beside them.
        full: The model in full precision.
    """
    rows: list[Row] = []
    for what, name, use, backends in _USES:
        graph = made.get(name)
        engine = None if graph is None else graph.file.with_suffix(f".{backend}")
        if backend not in backends or graph is None or engine is None or not engine.is_file():
            continue
        row: Row = {"backend": backend, "graph": what}
        rows.append(row)
        try:
            row |= use(asked, engine, graph, full)
        except Exception as error:  # a refusal is a result
            row["error"] = f"{type(error).__name__}: {error}"
    return rows
