#!/usr/bin/env python3
"""One part of real_size.py, in a process of its own: CPU seconds and peak memory of one thing at real size.

usage: python real_size_parts.py PART MODEL FOLDER
The last line that it prints is a JSON object. Parts that need a quantized model find it in FOLDER, where the parts
``static``, ``scales`` and ``constant`` have left it.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import logging
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq.compare import compare_model
from modelopt_tdq.lab.bench.gpu.model import static_config
from modelopt_tdq.model.call import tensor_leaves, walk

TIMES = (981.0, 661.0, 341.0, 21.0)
LONG = tuple(float(50 * step + 1) for step in range(20, 0, -1))
SAMPLES = 4
_GIB = 2**30

#: Without all that takes more than one run of the data; weights by their largest magnitude, as ModelOpt's default.
SCALES = {
    "weights": "max",
    "rounding": "nearest",
    "correction": "none",
    "channel_smoothing": "none",
    "asymmetric": False,
    "margin": 0,
    "protect_steps": False,
    "progress": False,
}


@dataclass(frozen=True)
class Architecture:
    """A published architecture, at random weights.

    Attributes:
        kind: Class of diffusers.
        config: Its arguments.
        dtype: Of the weights.
        text: Tokens and width of the text.
        inputs: Batch size to further arguments of its forward.
    """

    kind: str
    config: dict[str, Any]
    dtype: torch.dtype
    text: tuple[int, int]
    inputs: Callable[[int], dict[str, Any]] = lambda batch: {}


def _sdxl_inputs(batch: int) -> dict[str, Any]:
    ids = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]).repeat(batch, 1)
    return {"added_cond_kwargs": {"text_embeds": torch.randn(batch, 1280), "time_ids": ids}}


ARCHITECTURES = {
    "tiny": Architecture(  # to rehearse
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 8,
        },
        torch.float32,
        (5, 16),
    ),
    "sd15": Architecture(
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        torch.float32,
        (77, 768),
    ),
    "pixart": Architecture(
        "PixArtTransformer2DModel",
        {"sample_size": 32, "caption_channels": 4096},
        torch.float32,
        (120, 4096),
    ),
    "sdxl": Architecture(
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        torch.bfloat16,
        (77, 2048),
        _sdxl_inputs,
    ),
}


class Work:
    """What the parts share: a model, its calls, a folder for what they leave behind."""

    def __init__(self, name: str, folder: Path) -> None:
        self.about, self.folder, self.times = ARCHITECTURES[name], folder, TIMES
        self.result: dict[str, Any] = {}

    def model(self) -> nn.Module:
        """The architecture at random weights; never held in another dtype."""
        import diffusers

        torch.manual_seed(0)
        torch.set_default_dtype(self.about.dtype)
        try:
            model: nn.Module = getattr(diffusers, self.about.kind)(**self.about.config)
        finally:
            torch.set_default_dtype(torch.float32)
        self.result["parameters"] = sum(p.numel() for p in model.parameters())
        self.result["weights_gib"] = sum(p.numel() * p.element_size() for p in model.parameters()) / _GIB
        return model.eval()

    def call(self, size: int, at: float, batch: int = SAMPLES) -> dict[str, Any]:
        """Arguments of a call on latents of ``size`` x ``size``."""
        tokens, width = self.about.text
        call = {
            "timestep": torch.full((batch,), at),
            "encoder_hidden_states": torch.randn(batch, tokens, width),
            **self.about.inputs(batch),
        }
        first = "hidden_states" if "PixArt" in self.about.kind else "sample"
        call = {first: torch.randn(batch, 4, size, size) * (0.5 + at / 1000), **call}
        cast: dict[str, Any] = walk(call, lambda _, value: value.to(self.about.dtype))
        return cast

    def forward_loop(self, model: nn.Module) -> None:
        """One run of the data: each time, four samples on latents of 8 x 8."""
        torch.manual_seed(1)
        with torch.no_grad():
            for at in self.times:
                model(**self.call(8, at))

    @contextmanager
    def measured(self, name: str) -> Any:
        """CPU seconds, and GiB above what the process had before: at most, and left behind."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, start = _memory("VmRSS"), time.process_time()
        yield
        self.result[f"{name}_s"] = time.process_time() - start
        self.result[f"{name}_peak_gib"] = _memory("VmHWM") - before
        self.result[f"{name}_process_gib"] = _memory("VmHWM")

    def quantized(self, name: str) -> nn.Module:
        """As the part ``name`` has left it."""
        model = self.model()
        mto.restore(model, self.folder / f"{name}.pt")
        return model.eval()


def _memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def _quantize(work: Work, config: dict[str, Any], keep: str | None = None) -> None:
    model = work.model()
    with work.measured("pass"):
        work.forward_loop(model)
    with work.measured("quantize"):
        mtq.quantize(model, config, work.forward_loop)
    if keep:
        mto.save(model, work.folder / f"{keep}.pt")


def static(work: Work) -> None:
    """ModelOpt's max."""
    _quantize(work, static_config(tdq.make_config(8, 8, **SCALES)), "static")


def scales(work: Work) -> None:
    """Scales over time alone."""
    _quantize(work, tdq.make_config(8, 8, **SCALES), "scales")


def constant(work: Work) -> None:
    """One scale for all times, by this package: what a graph without a lookup costs."""
    _quantize(work, tdq.make_config(8, 8, **{**SCALES, "bins": 1}), "constant")


def protected(work: Work) -> None:
    """Scales over time, each step protected."""
    _quantize(work, tdq.make_config(8, 8, **{**SCALES, "protect_steps": True}))


def static_long(work: Work) -> None:
    """ModelOpt's max over twenty steps, as people calibrate: what is done once counts less."""
    work.times = LONG
    _quantize(work, static_config(tdq.make_config(8, 8, **SCALES)))


def scales_long(work: Work) -> None:
    """Scales over time alone, over twenty steps."""
    work.times = LONG
    _quantize(work, tdq.make_config(8, 8, **SCALES))


def protected_long(work: Work) -> None:
    """Scales over time, each step protected, over twenty steps."""
    work.times = LONG
    _quantize(work, tdq.make_config(8, 8, **{**SCALES, "protect_steps": True}))


def corrected(work: Work) -> None:
    """Scales over time and corrections: what their fit adds."""
    _quantize(work, tdq.make_config(8, 8, **{**SCALES, "correction": "per_step"}))


def recipe(work: Work) -> None:
    """The recipe as it is shipped."""
    config = tdq.recipe("int8")
    config["algorithm"] |= {"progress": False}
    _quantize(work, config)


def restore(work: Work) -> None:
    """Of a saved model."""
    model = work.model()
    with work.measured("restore"):
        mto.restore(model, work.folder / "scales.pt")


def forward(work: Work) -> None:
    """The fake-quantized forward, ours and ModelOpt's by turns; weights folded and not."""
    models = {name: work.quantized(name) for name in ("static", "scales")}
    for folded in (False, True):
        seconds: dict[str, list[float]] = {name: [] for name in models}
        if folded:
            for model in models.values():
                mtq.fold_weight(model)
        call = work.call(8, 400.0)
        for repetition, name in itertools.product(range(6), models):
            with torch.no_grad():
                start = time.process_time()
                models[name](**call)
            if repetition:
                seconds[name].append(time.process_time() - start)
        for name, values in seconds.items():
            work.result[f"{name}{'_folded' if folded else ''}_s"] = statistics.median(values)


def export_float(work: Work) -> None:
    """torch's own export of the model in full precision."""
    model, call = work.model(), work.call(8, 500.0, 1)
    with work.measured("export"), torch.no_grad():
        program = torch.onnx.export(model, (), kwargs=call, dynamo=True, verbose=False)
        program.save(work.folder / "float.onnx", external_data=True)


def export(work: Work) -> None:
    """Ours, of the quantized model."""
    model, call = work.quantized("scales"), work.call(8, 500.0, 1)
    with work.measured("export"):
        report = tdq.export_onnx(model, work.folder / "scales.onnx", call)
    work.result["skipped"] = len(report.skipped)
    tdq.export_onnx(model, work.folder / "reference.onnx", call, lowering="reference")


def export_openvino(work: Work) -> None:
    """The graphs that the part ``openvino`` runs, at latents of 8 x 8 and 32 x 32."""
    for name, size in itertools.product(("constant", "scales"), (8, 32)):
        tdq.export_onnx(work.quantized(name), work.folder / f"{name}_{size}.onnx", work.call(size, 500.0, 1))


def openvino(work: Work) -> None:
    """Graphs with scales over time and with constant ones, by turns, on one thread."""
    from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession

    for size in (8, 32):
        sessions = {n: OpenVinoSession(work.folder / f"{n}_{size}.onnx", num_threads=1) for n in ("constant", "scales")}
        call = tensor_leaves(work.call(size, 500.0, 1))
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for repetition, name in itertools.product(range(9), sessions):
            start = time.process_time()
            sessions[name]({key: call[key] for key in sessions[name].inputs})
            if repetition >= 2:
                seconds[name].append(time.process_time() - start)
        for name, values in seconds.items():
            work.result[f"{name}_{size}_s"] = statistics.median(values)
        pairs = zip(seconds["scales"], seconds["constant"], strict=True)
        work.result[f"ratio_{size}"] = statistics.median(a / b for a, b in pairs)


def session(work: Work) -> None:
    """Each session that a comparison opens, by itself: the largest."""
    import gc

    import onnx

    from modelopt_tdq.compare.graph_files import graph_of
    from modelopt_tdq.compare.layers import returning_codes
    from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession
    from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession

    codes = work.folder / "codes.onnx"
    onnx.save(returning_codes(graph_of(work.folder / "reference.onnx", work.folder)), str(codes))
    call = {name: value.numpy() for name, value in tensor_leaves(work.call(8, 500.0, 1)).items()}
    for name, kind, file in (
        ("reference", OnnxRuntimeSession, work.folder / "reference.onnx"),
        ("lowered", OnnxRuntimeSession, work.folder / "scales.onnx"),
        ("codes", OnnxRuntimeSession, codes),
        ("openvino", OpenVinoSession, work.folder / "scales.onnx"),
    ):
        with work.measured(name):
            opened = kind(file)
            opened({key: call[key] for key in opened.inputs})
        del opened
        gc.collect()
    names = ("reference", "lowered", "codes", "openvino")
    work.result["session_gib"] = max(work.result[f"{name}_process_gib"] for name in names)


def deployed(work: Work) -> None:
    """OpenVINO opens the exported graph and runs it once."""
    from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession

    with work.measured("open"):
        session = OpenVinoSession(work.folder / "scales.onnx", num_threads=1)
    call = tensor_leaves(work.call(8, 500.0, 1))
    with work.measured("run"):
        [output] = session({name: call[name] for name in session.inputs}).values()
    work.result["finite"] = bool(torch.isfinite(torch.as_tensor(output)).all())


def compare(work: Work) -> None:
    """torch, the reference and the lowered graph, outputs and codes of every layer, at two times."""
    model = work.quantized("scales")
    calls = [work.call(8, at, 1) for at in TIMES[::2]]
    files = {"reference_path": work.folder / "reference.onnx", "lowered_path": work.folder / "scales.onnx"}
    with work.measured("compare"):
        found = compare_model(model, calls, progress=False, **files)
    work.result["layers"] = len(found.layers)


def analyze(work: Work) -> None:
    """Headroom and sensitivity with three probes, in forwards of the model on the same samples."""
    model = work.model()
    with work.measured("pass"):
        work.forward_loop(model)
    module = importlib.import_module("modelopt_tdq.analysis.analyze")  # the function hides its module
    original = module.sensitivities

    def sensitivities(*given: Any) -> Any:
        start = time.process_time()
        found = original(*given)
        work.result["sensitivity_s"] = time.process_time() - start
        return found

    module.sensitivities = sensitivities  # type: ignore[attr-defined]
    with work.measured("analyze"):
        tdq.analyze(model, work.forward_loop, probes=3, progress=False)


def kernels(work: Work) -> None:
    """TensorRT-RTX engines, built and not run."""
    for name in ("constant", "scales"):
        report = tdq.build_engine(work.folder / f"{name}_8.onnx", work.folder / f"{name}.engine")
        work.result[f"{name}_kernels"] = report.kernels


PARTS = {
    part.__name__: part
    for part in (
        static, scales, constant, protected, static_long, scales_long, protected_long, corrected, recipe, restore,
        forward, export_float, export, deployed, session, compare, analyze, export_openvino, openvino, kernels,
    )
}  # fmt: skip


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("model", choices=ARCHITECTURES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    work = Work(arguments.model, arguments.folder)
    PARTS[arguments.part](work)
    print(json.dumps(work.result), flush=True)


if __name__ == "__main__":
    main()
