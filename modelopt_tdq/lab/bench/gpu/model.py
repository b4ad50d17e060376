"""The bundled model on the GPU: calibrated there as on the CPU; its fake-quantized forward against ModelOpt's own."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.core.metrics import sqnr_db
from modelopt_tdq.lab.bench.gpu.part import Asked, Row
from modelopt_tdq.lab.bench.gpu.timing import median_times
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.reference_models import bundled_model
from modelopt_tdq.lab.trajectories import load_scheduler, noise, sample, sample_shape

__all__ = [
    "TIME",
    "forward_times",
    "full_precision",
    "recorded_calls",
    "replayed",
    "run",
    "static_config",
    "timed_quantize",
]

#: A time between two rows, of the middle of the process.
TIME = 401.0


def full_precision(asked: Asked) -> nn.Module:
    """The bundled model; in a rehearsal a tiny one of the same kind."""
    if not asked.rehearse:
        return load_model(bundled_model())
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    tiny: Any = UNet2DModel
    model: nn.Module = tiny(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, add_attention=False,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    return model.eval()


def recorded_calls(asked: Asked, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Inputs and times of full-precision trajectories on the CPU: the same data for every device."""
    calls: list[tuple[Tensor, Tensor]] = []
    samples, steps = (1, 2) if asked.rehearse else (8, 20)
    with torch.no_grad():
        start = noise(samples, sample_shape(model), 0)
        sample(model, load_scheduler(bundled_model()), start, steps, lambda t, x, _: calls.append((x, t)))
    return calls


def replayed(calls: list[tuple[Tensor, Tensor]]) -> Callable[[nn.Module], None]:
    """A ``forward_loop`` over these calls, on the device of the model."""

    def forward_loop(model: nn.Module) -> None:
        device = next(model.parameters()).device
        for x, t in calls:
            model(x.to(device), t.to(device))

    return forward_loop


def _answer(model: Callable[..., Any], x: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x, t).sample
    return y


def static_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same layers and formats with one scale each, by ModelOpt's own calibration."""
    return {**copy.deepcopy(config), "algorithm": "max"}


def timed_quantize(
    model: nn.Module, config: dict[str, Any], forward_loop: Callable[[nn.Module], None]
) -> tuple[nn.Module, float]:
    """The quantized copy of ``model``, and the seconds that it took."""
    import modelopt.torch.quantization as mtq

    copied = copy.deepcopy(model)
    start = time.perf_counter()
    quantized: nn.Module = mtq.quantize(copied, config, forward_loop)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return quantized, time.perf_counter() - start


def _calibrated(
    asked: Asked, full: nn.Module, calls: list[tuple[Tensor, Tensor]], rows: list[Row]
) -> tuple[nn.Module, nn.Module]:
    """The model calibrated on the device, by ModelOpt and by time; appends what differs from the CPU's calibration."""
    import modelopt_tdq as tdq

    # a row that is protected or not by a hair would hide what the devices differ in
    config = tdq.make_config(weights="max", protect_steps=False, progress=False)
    there = copy.deepcopy(full).to(asked.device)
    warm, _ = timed_quantize(there, static_config(config), replayed(calls[:1]))
    replayed(calls[:1])(warm)  # ModelOpt compiles its CUDA extension for a minute when a quantizer first quantizes
    static, static_seconds = timed_quantize(there, static_config(config), replayed(calls))
    by_time, seconds = timed_quantize(there, config, replayed(calls))
    _, protected_seconds = timed_quantize(there, tdq.make_config(weights="max", progress=False), replayed(calls))
    on_cpu, cpu_seconds = timed_quantize(full, config, replayed(calls))
    found, expected = tdq.scale_table(by_time), tdq.scale_table(on_cpu)
    difference = (found.scale.cpu() - expected.scale).abs() / expected.scale
    decibels = []
    for x, t in calls:
        reference = _answer(full, x, t)
        here = _answer(by_time, x.to(asked.device), t.to(asked.device)).cpu()
        decibels.append((sqnr_db(reference, here), sqnr_db(reference, _answer(on_cpu, x, t))))
    rows.append(
        {
            "what": "calibration there and on the CPU",
            "quantizers": expected.scale.shape[1],
            "rows": expected.scale.shape[0],
            "largest relative difference of a scale": float(difference.max()),
            "scales within 1e-4": f"{int((difference < 1e-4).sum())} of {difference.numel()}",
            "SQNR there, mean dB": round(sum(a for a, _ in decibels) / len(decibels), 3),
            "SQNR on the CPU, mean dB": round(sum(b for _, b in decibels) / len(decibels), 3),
        }
    )
    rows.append(
        {
            "what": "calibration, seconds",
            "ModelOpt static": round(static_seconds, 2),
            "by time": round(seconds, 2),
            "by time, steps protected": round(protected_seconds, 2),
            "by time on the CPU": round(cpu_seconds, 2),
        }
    )
    return static, by_time


def forward_times(
    asked: Asked, calls: Mapping[str, Callable[[], object]], about: Row, rows: list[Row], repeats: int = 20
) -> None:
    """Milliseconds of a forward, launched by Python and as a CUDA graph; ratio to ModelOpt's static quantizers.

    Args:
        asked: Of the part.
        calls: One forward each, "by time" and "ModelOpt static" among them.
        about: What the rows begin with.
        rows: Appended to.
        repeats: Of every call.
    """
    for graphs in (False,) if asked.rehearse else (False, True):
        row: Row = {"what": "forward as a CUDA graph" if graphs else "forward", **about}
        try:
            times = median_times(calls, repeats=2 if asked.rehearse else repeats, graphs=graphs, inner=1)
            row |= {f"{name} ms": round(value * 1e3, 3) for name, value in times.items()}
            row["by time / ModelOpt static"] = round(times["by time"] / times["ModelOpt static"], 3)
        except RuntimeError as error:  # a call that waits for the GPU cannot be captured
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
        asked.keep(rows)


def _forward_times(asked: Asked, models: dict[str, nn.Module], rows: list[Row], folded: bool) -> None:
    t = torch.tensor([TIME], device=asked.device)
    for batch in (2,) if asked.rehearse else (1, 8, 64):
        x = noise(batch, sample_shape(models["full precision"]), 1).to(asked.device)
        calls = {name: partial(_answer, m, x, t) for name, m in models.items()}
        forward_times(asked, calls, {"batch": batch, "weights folded": folded}, rows)


def _several_at_once(asked: Asked, model: nn.Module) -> Row:
    """A time per sample, and calls on several streams, give what single calls give."""
    x = noise(4, sample_shape(model), 2).to(asked.device)
    times = torch.tensor([11.0, 301.0, 640.0, 999.0], device=asked.device)
    single = [_answer(model, x[i : i + 1], times[i : i + 1]) for i in range(4)]
    together = _answer(model, x, times)
    row: Row = {"what": "a time per sample against single calls", "SQNR dB": sqnr_db(torch.cat(single), together)}
    if not asked.rehearse:
        streams = [torch.cuda.Stream() for _ in range(4)]  # type: ignore[no-untyped-call]
        found = []
        torch.cuda.synchronize()
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append(_answer(model, x[i : i + 1], times[i : i + 1]))
        torch.cuda.synchronize()
        row["equal on four streams"] = all(torch.equal(a, b) for a, b in zip(found, single, strict=True))
    if torch.cuda.device_count() > 1:
        spread = nn.DataParallel(model, [0, 1])
        row["SQNR of DataParallel dB"] = sqnr_db(together, spread(x, times).sample)
    return row


def _compiled(model: nn.Module, asked: Asked) -> Row:
    """``torch.compile``: how long, how fast, how far from eager."""
    x = noise(8, sample_shape(model), 3).to(asked.device)
    t = torch.tensor([TIME], device=asked.device)
    expected = _answer(model, x, t)
    compiled = torch.compile(model)
    start = time.perf_counter()
    found = _answer(compiled, x, t)
    seconds = time.perf_counter() - start
    calls = {"eager": lambda: _answer(model, x, t), "compiled": lambda: _answer(compiled, x, t)}
    times = median_times(calls, repeats=20, graphs=False)
    facts = {f"{name} ms": round(value * 1e3, 3) for name, value in times.items()}
    quality = sqnr_db(expected, found)
    return {"batch": 8, "first call s": round(seconds, 1), "SQNR to eager dB": round(quality, 2), **facts}


def run(asked: Asked) -> list[Row]:
    """Rows for calibration, forward, several calls at once, and ``torch.compile``."""
    import modelopt.torch.quantization as mtq

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[Row] = []
    full = full_precision(asked)
    calls = recorded_calls(asked, full)
    static, quantized = _calibrated(asked, full, calls, rows)
    asked.keep(rows)
    rows.append(_several_at_once(asked, quantized))
    asked.keep(rows)
    models = {"full precision": full.to(asked.device), "ModelOpt static": static, "by time": quantized}
    _forward_times(asked, models, rows, folded=False)
    for name in ("ModelOpt static", "by time"):
        mtq.fold_weight(models[name])
    _forward_times(asked, models, rows, folded=True)
    if not asked.rehearse:
        for what, model in (("torch.compile of ModelOpt static", static), ("torch.compile by time", quantized)):
            try:
                rows.append({"what": what, **_compiled(model, asked)})
            except Exception as error:  # compilers fail in many ways, and ModelOpt's own quantizers with them
                rows.append({"what": what, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
            asked.keep(rows)
    return rows
