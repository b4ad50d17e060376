"""The graphs that are built for a GPU: the bundled model in full precision and quantized, each lowering of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.lab.bench.gpu.model import TIME, recorded_calls, replayed
from modelopt_tdq.lab.bench.gpu.part import Asked
from modelopt_tdq.lab.denoising import Prediction
from modelopt_tdq.lab.trajectories import noise, sample_shape

__all__ = ["BY_TIME", "PLUGIN", "TABLE", "Graph", "graphs"]

#: Names of graphs that others than the loop over all of them use.
BY_TIME, TABLE, PLUGIN = "by time", "by time, table as input", "by time, looked up by the plugin"


@dataclass(frozen=True)
class Graph:
    """An ONNX file, and what its engine is checked against.

    Attributes:
        file: Of the graph.
        model: The quantized torch model; None for full precision.
        per_sample: Whether it takes a time per sample.
        plugins: As of :func:`~modelopt_tdq.build_engine`.
    """

    file: Path
    model: nn.Module | None = None
    per_sample: bool = False
    plugins: tuple[str, ...] = ()

    def feeds(self, shape: tuple[int, ...], batch: int) -> dict[str, Tensor]:
        """Inputs of a call with samples of this shape."""
        times = torch.tensor([TIME]) if not self.per_sample else torch.linspace(990, 5, batch)
        return {"sample": noise(batch, shape, 4), "timestep": times}


def _float16(full: nn.Module, file: Path, shape: tuple[int, ...]) -> Graph:
    batch = torch.export.Dim("batch", min=1, max=64)
    example = (noise(2, shape, 0).half(), torch.tensor([TIME]))
    torch.onnx.export(
        Prediction(copy.deepcopy(full).half()), example, str(file), dynamo=True, verbose=False, external_data=False,
        input_names=["sample", "timestep"], output_names=["output"], dynamic_shapes=({0: batch}, None),
    )  # fmt: skip
    return Graph(file)


def graphs(asked: Asked, full: nn.Module) -> dict[str, Callable[[], Graph]]:
    """What is built, by name; made when it is asked for."""
    import modelopt.torch.quantization as mtq

    import modelopt_tdq as tdq
    from modelopt_tdq.export.onnx_export import MarkerGraph, lower, marker_graph
    from modelopt_tdq.export.onnx_file import write_onnx

    shape = sample_shape(full)
    forward_loop = replayed(recorded_calls(asked, full))
    made: dict[str, nn.Module] = {}
    traced: dict[str, MarkerGraph] = {}

    def quantized(bins: Any, correction: str) -> nn.Module:
        key = f"{bins} {correction}"
        if key not in made:
            config = tdq.make_config(weights="max", bins=bins, correction=correction, progress=False)
            made[key] = mtq.quantize(copy.deepcopy(full), config, forward_loop)
        return made[key]

    def exported(name: str, times: Tensor, bins: Any = "per_step", correction: str = "none", **options: Any) -> Graph:
        model = quantized(bins, correction)
        key = f"{bins} {correction} {times.tolist()}"
        if key not in traced:  # which is what an export takes its time for
            inputs = {"sample": noise(2, shape, 0), "timestep": times}
            traced[key] = marker_graph(model, inputs, dynamic_batch=True)
        graph = replace(traced[key], model=traced[key].model.clone())
        lowering = options.pop("lowering", "ratio")
        lower(graph, lowering, **options)
        file = asked.folder / f"{name}.onnx"
        write_onnx(graph.model, file)
        return Graph(file, model, times.numel() > 1, ("aot",) if lowering == "plugin" else ())

    one, two = torch.tensor([TIME]), torch.tensor([TIME, 11.0])
    return {
        "float16": lambda: _float16(full, asked.folder / "float16.onnx", shape),
        "static": lambda: exported("static", one, bins=1),
        BY_TIME: lambda: exported("ratio", one),
        "by time, corrected": lambda: exported("corrected", one, correction="per_step"),
        "by time, a time per sample": lambda: exported("per_sample", two),
        TABLE: lambda: exported("table", one, table_input=True),
        PLUGIN: lambda: exported("plugin", one, lowering="plugin"),
        "scale gathered in front of Q": lambda: exported("gathered", one, lowering="reference"),
    }
