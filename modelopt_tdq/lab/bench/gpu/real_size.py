"""A UNet of Stable Diffusion 1.5's size with random weights in fp16: what calibration and forward cost at real size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from modelopt_tdq.lab.bench.gpu.model import forward_times, static_config, timed_quantize
from modelopt_tdq.lab.bench.gpu.part import Asked, Row

__all__ = ["run"]

_TIMES = (951.0, 651.0, 351.0, 51.0)
_GIB = 2**30


def _model(asked: Asked) -> nn.Module:
    """The default configuration of diffusers' class is that of SD 1.x, but for the width of the text."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    kind: Any = UNet2DConditionModel
    with torch.device(asked.device):
        if asked.rehearse:
            blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
            model: nn.Module = kind(
                sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
                cross_attention_dim=16, mid_block_type=None, **blocks,
            )  # fmt: skip
        else:
            model = kind(sample_size=64, cross_attention_dim=768, attention_head_dim=8).half()
    return model.eval()


def _calls(asked: Asked, batch: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    size, width, dtype = (8, 16, torch.float32) if asked.rehearse else (64, 768, torch.float16)
    made = []
    for time in _TIMES[:2] if asked.rehearse else _TIMES:
        x = torch.randn(batch, 4, size, size, generator=generator).to(asked.device, dtype)
        text = torch.randn(batch, 77, width, generator=generator).to(asked.device, dtype)
        made.append((x, torch.tensor([time], device=asked.device), text))
    return made


def _run_all(calls: list[tuple[torch.Tensor, ...]], model: nn.Module) -> None:
    with torch.no_grad():
        for call in calls:
            model(*call)


def _peak() -> float:
    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / _GIB
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)


def run(asked: Asked) -> list[Row]:
    """Rows for calibration (seconds, peak GiB, ratio to ModelOpt's), then for the forward."""
    import modelopt.torch.quantization as mtq

    import modelopt_tdq as tdq

    rows: list[Row] = []
    full = _model(asked)
    calls: Any = _calls(asked, 2)
    loop: Callable[[nn.Module], None] = partial(_run_all, calls)
    config = tdq.make_config(weights="max", protect_steps=False, progress=False)
    warm, _ = timed_quantize(full, static_config(config), partial(_run_all, calls[:1]))
    _run_all(calls[:1], warm)  # ModelOpt's CUDA extension, cuDNN's choices
    del warm
    _peak()
    models: dict[str, nn.Module] = {"full precision": full}
    seconds: dict[str, float] = {}
    ways = {
        "ModelOpt static": static_config(config),
        "by time": config,
        "by time, steps protected": tdq.make_config(weights="max", progress=False),
        "by time, everything by default": tdq.make_config(progress=False),
    }
    for name, chosen in ways.items():
        quantized, seconds[name] = timed_quantize(full, chosen, loop)
        row: Row = {"what": f"calibration: {name}", "seconds": round(seconds[name], 2), "peak GiB": _peak()}
        row["/ ModelOpt static"] = round(seconds[name] / seconds["ModelOpt static"], 2)
        rows.append(row)
        asked.keep(rows)
        if name in ("ModelOpt static", "by time"):
            models[name] = quantized
    for name in ("ModelOpt static", "by time"):
        mtq.fold_weight(models[name])
    for batch in (2,) if asked.rehearse else (2, 8):
        call = _calls(asked, batch)[0]
        forwards: dict[str, Callable[[], object]] = {n: partial(_run_all, [call], m) for n, m in models.items()}
        forward_times(asked, forwards, {"batch": batch, "weights folded": True}, rows, repeats=10)
    return rows
