#!/usr/bin/env python3
"""TensorRT-RTX, built and not run: kernels of every family's engine, scales over time against static scales.

Static is the same model with a table of one row. Codes: each code of the reference and of the ratio graph in ONNX
Runtime against the definition, for the values that its quantizer saw.
usage: python family_kernels.py [--models unet,dit,...] [--formats int8,fp8] [--batches 1,2,8]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import onnx
import torch
from record import write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.denoisers import DENOISERS, Denoiser, one_row, quantized_denoiser  # noqa: E402
from support.export import LOWERINGS, codes_by_definition, lowered, trace  # noqa: E402
from support.models import fast_config  # noqa: E402

import modelopt_tdq as tdq  # noqa: E402
from modelopt_tdq.export.inputs import flatten_inputs  # noqa: E402
from modelopt_tdq.lab.example_call import example_call  # noqa: E402
from modelopt_tdq.lab.reference_models import reference_model  # noqa: E402
from modelopt_tdq.lab.trajectories import noise, sample, sample_shape  # noqa: E402
from modelopt_tdq.runtime.build.report import EngineReport, float_layers  # noqa: E402

FORMATS = {"int8": 8, "fp8": (4, 3)}

#: The trained models, at several batch sizes.
BUNDLED = {"bundled UNet": "unet", "bundled DiT": "dit"}

#: Families whose attention products are quantized in rows of their own.
WITH_ATTENTION = ("stable_diffusion", "sd3", "wan")

#: A kernel that does nothing but look the row up.
_LOOKUP = "node/time/"


@dataclass(frozen=True)
class Row:
    """One engine against its static twin."""

    model: str
    number_format: str
    batch: int
    quantizers: int
    temporal: int
    layers: int
    floats: tuple[str, ...]
    skipped: dict[str, str]
    static_kernels: int
    kernels: int
    lookup_kernels: int
    codes: int
    codes_wrong: int


def measure(name: str, number_format: str, denoiser: Denoiser, folder: Path, codes: bool = True) -> Row:
    """Lower, compare and build one model."""
    model, inputs = denoiser.model, denoiser.inputs
    graph = trace(model, inputs)
    graphs = {lowering: lowered(graph, lowering, model) for lowering in LOWERINGS}
    with one_row(model) as table:
        static = lowered(graph, "ratio", model)
    compared = [(0, 0)]
    if codes:
        flat = flatten_inputs(inputs, "timestep")
        arrays = dict(zip(flat.names, flat.tensors, strict=True))
        time = torch.as_tensor(inputs["timestep"]).reshape(-1)
        compared = [codes_by_definition(g, model, arrays, time.unique().numpy()) for g in graphs.values()]
    ratio_engine, static_engine = _build(graphs["ratio"].proto, folder), _build(static.proto, folder)
    return Row(
        model=name,
        number_format=number_format,
        batch=len(next(v for v in inputs.values() if isinstance(v, torch.Tensor) and v.dim() > 1)),
        quantizers=len(table.names),
        temporal=int((~table.is_static).sum()),
        layers=len(ratio_engine.quantized),
        floats=(*float_layers(ratio_engine), *float_layers(static_engine)),
        skipped=dict(graphs["ratio"].context.skipped),
        static_kernels=static_engine.kernels,
        kernels=ratio_engine.kernels,
        lookup_kernels=sum(
            layer.is_kernel and bool(layer.onnx_nodes) and all(n.startswith(_LOOKUP) for n in layer.onnx_nodes)
            for layer in ratio_engine.layers
        ),
        codes=sum(count for count, _ in compared),
        codes_wrong=sum(wrong for _, wrong in compared),
    )


def _build(proto: onnx.ModelProto, folder: Path) -> EngineReport:
    onnx.save(proto, folder / "model.onnx")
    return tdq.build_engine(folder / "model.onnx", folder / "model.engine", compute_capabilities=("8.9",))


def _bundled(name: str, bits: Any, batches: list[int]) -> list[Denoiser]:
    chosen = reference_model(name)
    model, scheduler = chosen.load_model(), chosen.load_scheduler()
    start = noise(2, sample_shape(model), 0)
    config = fast_config(weight_bits=bits, activation_bits=bits)
    mtq.quantize(model, config, lambda m: sample(m, scheduler, start, 4))
    time = {"timestep": torch.tensor([500.0])}
    return [Denoiser(model, {**example_call(model, batch), **time}) for batch in batches]


def rows(models: list[str], formats: list[str], batches: list[int], folder: Path) -> list[Row]:
    """All of them, printed as they come."""
    found = []
    for name in models:
        for number_format in formats:
            bits = FORMATS[number_format]
            if name in BUNDLED:
                todo = [(name, d) for d in _bundled(BUNDLED[name], bits, batches)]
            else:
                todo = [(name, quantized_denoiser(name, bits))]
                if name in WITH_ATTENTION:
                    products = quantized_denoiser(name, bits, attention=True)
                    todo.append((f"{name}, q k v of attention too", products))
            for title, denoiser in todo:
                found.append(measure(title, number_format, denoiser, folder, codes=name not in BUNDLED))
                print(found[-1], flush=True)
    return found


def table(found: list[Row]) -> str:
    """As Markdown."""
    lines = [
        "Built for SM 8.9, not run. Layers: convolutions and products with two quantized operands.",
        "",
        "| model | format | batch | quantizers, temporal | layers | in float | kernels static | over time | ratio "
        "| lookup alone | codes compared | wrong |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found:
        compared = f"{row.codes:,} | {row.codes_wrong}" if row.codes else "- | -"
        lines.append(
            f"| {row.model} | {row.number_format} | {row.batch} | {row.quantizers}, {row.temporal} | {row.layers} "
            f"| {len(row.floats)} | {row.static_kernels} | {row.kernels} | {row.kernels / row.static_kernels:.3f} "
            f"| {row.lookup_kernels} | {compared} |"
        )
    reasons: dict[str, list[str]] = {}
    for row in found:
        for name, reason in row.skipped.items():
            reasons.setdefault(reason, []).append(f"{row.model}: {name}")
    for reason, names in reasons.items():
        lines += ["", f"Quantizers without a layer in low precision, {reason}: {len(names)}, the first {names[0]}."]
    return "\n".join(lines)


def main() -> None:
    """Run, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join([*DENOISERS, *BUNDLED]))
    parser.add_argument("--formats", default="int8,fp8")
    parser.add_argument("--batches", default="1,2,8", help="of the bundled models")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        batches = [int(batch) for batch in arguments.batches.split(",")]
        found = rows(arguments.models.split(","), arguments.formats.split(","), batches, Path(folder))
    write("family_kernels", {"rows": [asdict(row) for row in found]}, table(found))


if __name__ == "__main__":
    main()
