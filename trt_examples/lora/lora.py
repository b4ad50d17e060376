#!/usr/bin/env python3
"""Two LoRAs, one quantization setup: what is done again when an engine gets another LoRA, and what that is worth.

An INT8 engine cannot be given other weights: refitting quantized weights is refused by TensorRT's own demo, as their
codes and scales are part of the graph. So each LoRA has an engine of its own. What all share is the setup: which layers
are quantized, in which formats, and the table of scales, made once on the model without a LoRA.

Ways to the engine of a LoRA, from the most work to the least:

anew            fuse in full precision, quantize: the reference for the others
scales          fuse into the quantized model, fit the scales of its weights, calibrate the activations again. The
                engine of "table" gets the new table as its input; it is not built again
table           fuse into the quantized model, fit the scales of its weights; the table stays: no data is run
nothing         fuse into the quantized model, and forget the rest: what not to do
"""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import modelopt.torch.quantization as mtq
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.core.metrics import sqnr_db
from trt_examples.stable_diffusion.stable_diffusion import FAMILY

#: The setup that all LoRAs share. Smoothing over channels changes the weights that a LoRA is fused into.
CONFIG = tdq.make_config(channel_smoothing="none", correction="none", progress=False)
CALIBRATION, HELD_OUT = (0, 1), 2  # prompts, by number
STEPS = 8


@dataclass(frozen=True)
class Row:
    """One way for one LoRA.

    Attributes:
        lora: Its name.
        way: Of the docstring of this file.
        torch_db: SQNR of the prediction against the fused model in full precision, mean over a held-out trajectory.
        engine_db: The same of the ONNX file in ONNX Runtime, which takes the table as an input.
        seconds: Until the scales are there, without the export.
        exported: Whether a new graph is made.
    """

    lora: str
    way: str
    torch_db: float
    engine_db: float
    seconds: float
    exported: bool


def random_lora(unet: nn.Module, seed: int, size: float = 0.3) -> dict[str, Tensor]:
    """As a file holds it: rank 4, on all attention layers."""
    adapted: Any = copy.deepcopy(unet)
    adapted.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * size
    return {f"unet.{name}": value for name, value in get_peft_model_state_dict(adapted).items()}


def fused(pipeline: Any, lora: Mapping[str, Tensor]) -> Any:
    """The pipeline with the LoRA in its weights."""
    pipeline.load_lora_weights(dict(lora))
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    return pipeline


def quantize(pipeline: Any) -> Any:
    """By the shared setup."""
    calls = [FAMILY.tiny_call(number) for number in CALIBRATION]
    tdq.quantize_pipeline(pipeline, CONFIG, calls=calls, steps=STEPS, progress=False)
    return pipeline


def calibrate_scales(pipeline: Any) -> None:
    """Those of the activations again, by the pipeline's own sampling; the weights stay as they are."""

    def forward_loop(unet: nn.Module) -> None:
        pipeline.set_progress_bar_config(disable=True)
        for number in CALIBRATION:
            pipeline(**FAMILY.tiny_call(number), num_inference_steps=STEPS, output_type="latent")

    mtq.calibrate(pipeline.unet, {**CONFIG["algorithm"], "weights": "keep"}, forward_loop)


def _mean_db(denoiser: Any, full: nn.Module, steps: list[dict[str, Any]]) -> float:
    with torch.no_grad():
        found = [sqnr_db(full(**step)[0], denoiser(**step)[0]) for step in steps]
    return sum(found) / len(found)


def _engine(file: Path, unet: nn.Module, table: tdq.ScaleTable) -> tdq.EngineDenoiser:
    """The graph at ``file``, with any table of the model."""
    return tdq.EngineDenoiser(tdq.OnnxRuntimeSession(file), unet, table=tdq.engine_table(file, table))


def rows_of(name: str, lora: Mapping[str, Tensor], base: Any, folder: Path) -> list[Row]:
    """All ways for one LoRA; ``base`` is the pipeline that was quantized without one."""
    full = fused(FAMILY.tiny(), lora).unet
    steps = tdq.trajectory_inputs(base, "unet", **FAMILY.tiny_call(HELD_OUT), num_inference_steps=STEPS)
    rows = []

    def add(way: str, pipeline: Any, seconds: float, file: Path, exported: bool) -> None:
        unet = pipeline.unet
        if exported:
            tdq.export_onnx(unet, file, steps[0], table_input=True)
        engine = _engine(file, unet, tdq.scale_table(unet))
        row = (_mean_db(unet, full, steps), _mean_db(engine, full, steps))
        rows.append(Row(name, way, *row, seconds, exported))

    start = time.perf_counter()
    anew = quantize(fused(FAMILY.tiny(), lora))
    add("anew", anew, time.perf_counter() - start, folder / f"{name}_anew.onnx", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tdq.TdqWarning)  # the package warns of weights that their scales do not fit
        forgotten = fused(copy.deepcopy(base), lora)
        add("nothing", forgotten, 0.0, folder / f"{name}_nothing.onnx", True)
        start = time.perf_counter()
        reused = fused(copy.deepcopy(base), lora)
        tdq.recalibrate_weights(reused.unet)
        weights, shared = time.perf_counter() - start, folder / f"{name}.onnx"
        add("table", reused, weights, shared, True)
        start = time.perf_counter()
        calibrate_scales(reused)
    add("scales", reused, weights + time.perf_counter() - start, shared, False)
    return rows


def measured() -> list[Row]:
    """Both LoRAs, all ways."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # it tells that no text encoder has a LoRA
    base = quantize(FAMILY.tiny())
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, seed in (("A", 3), ("B", 4)):
            found += rows_of(name, random_lora(FAMILY.tiny().unet, seed), base, Path(folder))
    return found


def table_of(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| LoRA | way | SQNR torch, dB | SQNR engine, dB | seconds | new graph |", "|---|---|--:|--:|--:|---|"]
    for row in rows:
        graph = "yes" if row.exported else "no"
        numbers = f"{row.torch_db:.1f} | {row.engine_db:.1f} | {row.seconds:.1f}"
        lines.append(f"| {row.lora} | {row.way} | {numbers} | {graph} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table_of(measured()))
