"""Which wrong entry of the scale table is caught by the comparison, and by which part of it.

    python seeded_faults.py int8

One scale, of one quantizer at one time, is changed in the lowered graph of the model in the folder (from
``modelopt-tdq quantize``; batch 1; a sampling trajectory of 20 steps). The graph is run at the step of that time as
``modelopt-tdq compare`` and the scripts of trt_examples/polygraphy do: whole, its output against the quantization
noise; and with the reference's codes in every layer, their codes against rounding.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import record
import torch

import modelopt_tdq as tdq
from modelopt_tdq.compare import StepComparator, given_codes, returning_codes, with_given_codes
from modelopt_tdq.export.onnx_export import MarkerGraph, lower, marker_graph
from modelopt_tdq.export.read import read_quantization
from modelopt_tdq.lab.model_folder import load_quantized
from modelopt_tdq.lab.reference_models import bundled_model
from modelopt_tdq.lab.trajectories import load_scheduler, noise, sample, sample_shape
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

STEPS, SEED = 20, 7
CHANGES = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Fault:
    """The scale of one quantizer in one row is wrong by a share ``change``."""

    row: int
    column: int
    change: float


def trajectory(model: Any) -> list[tuple[dict[str, Any], Any]]:
    """Feeds and prediction of every step, in full precision."""
    calls: list[tuple[dict[str, Any], Any]] = []

    def visit(time: torch.Tensor, x: torch.Tensor, prediction: torch.Tensor) -> None:
        calls.append(({"sample": x.numpy(), "timestep": time.numpy()}, prediction.numpy()))

    with full_precision(model):
        sample(model, load_scheduler(bundled_model()), noise(1, sample_shape(model), SEED), STEPS, visit)
    return calls


def lowered(graph: MarkerGraph, lowering: str, model: Any) -> onnx.ModelProto:
    """With the present scales of the model."""
    copy = replace(graph, model=ir.from_proto(ir.to_proto(graph.model)), spec=read_quantization(model))
    lower(copy, lowering)
    return ir.to_proto(copy.model)


def with_fault(graph: MarkerGraph, model: Any, fault: Fault) -> onnx.ModelProto:
    """The lowered graph with a wrong scale; the model keeps its own."""
    table = tdq.scale_table(model)
    scale = table.scale.clone()
    scale[fault.row, fault.column] *= 1 + fault.change
    tdq.set_scale_table(model, tdq.ScaleTable(table.timesteps, scale, table.names, table.offset))
    try:
        return lowered(graph, "ratio", model)
    finally:
        tdq.set_scale_table(model, table)


def main() -> None:
    torch.manual_seed(0)
    model = load_quantized(sys.argv[1]).model
    table = tdq.scale_table(model)
    calls = trajectory(model)
    inputs = {name: torch.from_numpy(np.asarray(value)) for name, value in calls[0][0].items()}
    graph = marker_graph(model, inputs, dynamic_batch=False)
    reference = lowered(graph, "reference", model)
    session = OnnxRuntimeSession(returning_codes(reference))
    expected = [session(feeds) for feeds, _ in calls]
    predictions = [prediction for _, prediction in calls]
    whole, by_layer = StepComparator(predictions), StepComparator(predictions, given=True)

    def judge(proto: onnx.ModelProto, step: int) -> tuple[bool, list[str]]:
        """Whether the output passes; the layers that fail, in order."""
        results = OnnxRuntimeSession(proto)(calls[step][0])
        answers = OnnxRuntimeSession(with_given_codes(proto, reference))(
            {**calls[step][0], **given_codes(expected[step])}
        )
        verdict = by_layer(expected[step], answers)
        layers = sorted((n for n in verdict if not verdict[n]), key=lambda n: n == "output")
        return bool(whole.output_at(step, expected[step], results)), layers

    sound = lowered(graph, "ratio", model)
    for step in range(STEPS):
        passed, faulty = judge(sound, step)
        if not passed or faulty:
            raise SystemExit(f"step {step} of the graph without a fault fails: {faulty}")
    follow = [q for q in range(len(table.names)) if not bool((table.scale[:, q] == table.scale[0, q]).all())]
    rows, records = [], []
    for column in (follow[0], follow[len(follow) // 2], follow[-1]):
        for row in (len(table) - 1, len(table) // 2, 0):
            time = float(table.timesteps[row])
            step = next(k for k, (feeds, _) in enumerate(calls) if float(feeds["timestep"]) == time)
            found = []
            for change in CHANGES:
                for sign in (1, -1):
                    if sign * change == -1:
                        continue  # no scale
                    passed, faulty = judge(with_fault(graph, model, Fault(row, column, sign * change)), step)
                    first = faulty[0] if faulty else ""
                    found.append({"change": sign * change, "output": not passed, "first": first})
            name = table.names[column]
            records.append({"quantizer": name, "time": time, "found": found})
            rows.append(_row(name, time, found))
            print(rows[-1], flush=True)
    head = "| quantizer | time | caught by codes from | and named right | caught by the output from |"
    rows[:0] = [head, "|---|--:|--:|--:|--:|"]
    record.write("seeded_faults", {"faults": records}, "\n".join(rows))


def _row(name: str, time: float, found: list[dict[str, Any]]) -> str:
    """From which change on, in both directions and all larger ones, a fault is caught."""

    def smallest(caught: Any) -> str:
        missed = [abs(f["change"]) for f in found if not caught(f)]
        above = [change for change in CHANGES if change > max(missed, default=0.0)]
        return f"{above[0]:.2%}" if above else "not at 2x"

    caught = [f for f in found if f["first"]]
    right = sum(f["first"] == name for f in caught)
    by_codes, by_output = smallest(lambda f: f["first"]), smallest(lambda f: f["output"])
    return (
        f"| {name.removesuffix('.input_quantizer')} | {time:g} | {by_codes} | {right} of {len(caught)} | {by_output} |"
    )


if __name__ == "__main__":
    main()
