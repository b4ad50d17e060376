"""One linear layer at the sizes of real models: what it costs that its scale depends on time, and what rivals cost.

Five ways to the same product: bf16; INT8 with a constant scale; INT8 with the scale that the lookup left in memory
(this package); INT8 with a scale found at run time in the whole tensor, and in each row (dynamic quantization, as
torchao and others do it). The kernels are ``layer_kernels``, in Triton, the same for all; TensorRT has its own. FP8
likewise, where its product is cuBLAS's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from modelopt_tdq.errors import require
from modelopt_tdq.lab.bench.gpu import layer_kernels
from modelopt_tdq.lab.bench.gpu.part import Asked, Row
from modelopt_tdq.lab.bench.gpu.timing import median_times

__all__ = ["run"]

#: Model, layer, tokens of a batch of two (guidance) or one, width in, width out.
_LAYERS = (
    ("SD 1.5", "attention 64x64", 8192, 320, 320),
    ("SD 1.5", "feed-forward 32x32", 2048, 640, 5120),
    ("SDXL", "attention 64x64", 8192, 640, 640),
    ("SDXL", "feed-forward 32x32", 2048, 1280, 10240),
    ("Flux", "attention", 4608, 3072, 3072),
    ("Flux", "feed-forward out", 4608, 12288, 3072),
)
_SMALL = (("rehearsal", "small", 40, 32, 48),)

#: (block_m, block_n, block_k, group, warps, stages), tried for each layer with the constant scale.
_TILES = (
    (128, 128, 128, 8, 8, 3),
    (128, 256, 64, 8, 8, 3),
    (64, 128, 128, 8, 4, 4),
    (128, 128, 64, 8, 4, 4),
    (64, 64, 128, 8, 4, 4),
)
_BLOCK = 1024


@dataclass
class _Layer:
    """Tensors of one layer on the device; x [M, K] fp16, codes of the weights [N, K] int8."""

    x: Tensor
    weight: Tensor
    codes: Tensor
    weight_scale: Tensor
    bias: Tensor
    scale: Tensor
    constant: float

    @classmethod
    def make(cls, m: int, k: int, n: int, device: str) -> _Layer:
        generator = torch.Generator().manual_seed(m + n + k)
        x = torch.randn(m, k, generator=generator).to(device).half()
        weight = (torch.randn(n, k, generator=generator) / k**0.5).to(device)
        weight_scale = weight.abs().amax(1) / 127
        codes = (weight / weight_scale[:, None]).round().to(torch.int8)
        scale = x.float().abs().max().reshape(1) / 127
        return cls(x, weight, codes, weight_scale, torch.randn(n, device=device), scale, float(scale))


class _Kernels:
    """Launches of ``layer_kernels``."""

    def __init__(self) -> None:
        triton = require("triton", "plugin")
        self._quantize, self._rows = triton.jit(layer_kernels.quantize), triton.jit(layer_kernels.quantize_rows)
        self._absmax, self._linear = triton.jit(layer_kernels.absmax), triton.jit(layer_kernels.linear)
        self._power = triton.next_power_of_2

    def quantize(self, layer: _Layer, q: Tensor, scale: Tensor | None, high: float, whole: bool) -> None:
        """Codes of x; with the layer's constant where ``scale`` is None."""
        count = layer.x.numel()
        low = -128.0 if whole else -high
        self._quantize[(-(-count // _BLOCK),)](
            layer.x, layer.scale if scale is None else scale, q, count, layer.constant, low, high, scale is None, whole,
            _BLOCK,
        )  # fmt: skip

    def quantize_rows(self, layer: _Layer, q: Tensor, scale: Tensor, high: float, whole: bool) -> None:
        """Codes of x, and the scale [M] of each row."""
        rows, columns = layer.x.shape
        self._rows[(rows,)](layer.x, scale, q, columns, high, whole, self._power(columns))

    def measure(self, layer: _Layer, scale: Tensor, high: float) -> None:
        """The scale of the whole tensor at run time, into ``scale`` [1]."""
        scale.zero_()
        count = layer.x.numel()
        self._absmax[(-(-count // 8192),)](layer.x, scale.view(torch.int32), count, 8192)
        scale.div_(high)

    def linear(self, layer: _Layer, q: Tensor, out: Tensor, scale: Tensor | None, tile: tuple[int, ...]) -> None:
        """The product; ``scale`` None: the constant; [1]: one number; [M]: one per row."""
        (m, k), n = layer.x.shape, len(layer.codes)
        block_m, block_n, block_k, group, warps, stages = tile
        per_row = scale is not None and scale.numel() > 1
        self._linear[(-(-m // block_m) * -(-n // block_n),)](
            q, layer.codes, out, layer.scale if scale is None else scale, layer.weight_scale, layer.bias, m, n, k,
            layer.constant, scale is None, per_row, block_m, block_n, block_k, group,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


def _int8_ways(kernels: _Kernels, layer: _Layer, tile: tuple[int, ...]) -> dict[str, Callable[[], Tensor]]:
    """Each call returns the layer's output [M, N]."""
    q = torch.empty_like(layer.x, dtype=torch.int8)
    out = torch.empty(len(layer.x), len(layer.codes), dtype=torch.float16, device=layer.x.device)
    found, of_rows = torch.empty_like(layer.scale), torch.empty(len(layer.x), device=layer.x.device)

    def static() -> Tensor:
        kernels.quantize(layer, q, None, 127.0, True)
        kernels.linear(layer, q, out, None, tile)
        return out

    def by_time() -> Tensor:
        kernels.quantize(layer, q, layer.scale, 127.0, True)
        kernels.linear(layer, q, out, layer.scale, tile)
        return out

    def dynamic() -> Tensor:
        kernels.measure(layer, found, 127.0)
        kernels.quantize(layer, q, found, 127.0, True)
        kernels.linear(layer, q, out, found, tile)
        return out

    def dynamic_rows() -> Tensor:
        kernels.quantize_rows(layer, q, of_rows, 127.0, True)
        kernels.linear(layer, q, out, of_rows, tile)
        return out

    return {"static": static, "by time": by_time, "dynamic": dynamic, "dynamic per token": dynamic_rows}


def _fp8_ways(kernels: _Kernels, layer: _Layer) -> dict[str, Callable[[], Tensor]]:
    """The same in FP8 (E4M3), the product by cuBLAS, which reads the scale from memory in any case."""
    q = torch.empty_like(layer.x, dtype=torch.float8_e4m3fn)
    weight_scale = layer.weight.abs().max().reshape(1) / 448
    codes = (layer.weight / weight_scale).to(torch.float8_e4m3fn)
    bias, found = layer.bias.half(), torch.empty_like(layer.scale)
    scale = layer.scale * 127 / 448
    fixed = _Layer(**{**vars(layer), "scale": scale, "constant": float(scale)})

    def product(of_x: Tensor) -> Tensor:
        y: Tensor = torch._scaled_mm(q, codes.t(), of_x, weight_scale, bias=bias, out_dtype=torch.float16)
        return y

    def static() -> Tensor:
        kernels.quantize(fixed, q, None, 448.0, False)
        return product(scale)

    def by_time() -> Tensor:
        kernels.quantize(fixed, q, scale, 448.0, False)
        return product(scale)

    def dynamic() -> Tensor:
        kernels.measure(layer, found, 448.0)
        kernels.quantize(layer, q, found, 448.0, False)
        return product(found)

    return {"static": static, "by time": by_time, "dynamic": dynamic}


def _difference(found: Tensor, layer: _Layer) -> float:
    """Largest difference from the definition in float64, relative to the largest output."""
    with torch.no_grad():
        codes = (layer.x.float() / layer.scale).round().clamp(-128, 127)
        y = codes.double() @ layer.codes.double().t() * layer.scale.double() * layer.weight_scale.double()
        y = y + layer.bias.double()
    return float((found.double() - y).abs().max() / y.abs().max())


def _best_tile(kernels: _Kernels, layer: _Layer, asked: Asked) -> tuple[int, ...]:
    if asked.rehearse:
        return (16, 16, 32, 2, 1, 1)
    q = torch.zeros_like(layer.x, dtype=torch.int8)
    out = torch.empty(len(layer.x), len(layer.codes), dtype=torch.float16, device=layer.x.device)

    def multiply(tile: tuple[int, ...]) -> Callable[[], object]:
        return lambda: kernels.linear(layer, q, out, None, tile)

    times = median_times({str(i): multiply(tile) for i, tile in enumerate(_TILES)}, repeats=5)
    return _TILES[int(min(times, key=lambda i: times[i]))]


def run(asked: Asked) -> list[Row]:
    """A row per layer: microseconds of each way, and INT8's and FP8's ratios to their static form."""
    kernels = _Kernels()
    rows: list[Row] = []
    for model, name, m, k, n in _SMALL if asked.rehearse else _LAYERS:
        layer = _Layer.make(m, k, n, asked.device)
        tile = _best_tile(kernels, layer, asked)
        ways: dict[str, Callable[[], Any]] = {f"INT8 {w}": call for w, call in _int8_ways(kernels, layer, tile).items()}
        differences = {way: _difference(ways[way](), layer) for way in ("INT8 static", "INT8 by time", "INT8 dynamic")}
        x, weight, bias = (tensor.bfloat16() for tensor in (layer.x, layer.weight, layer.bias))
        ways["bf16"] = lambda x=x, weight=weight, bias=bias: F.linear(x, weight, bias)  # type: ignore[misc]
        if not asked.rehearse and torch.cuda.get_device_capability() >= (8, 9):
            ways |= {f"FP8 {way}": call for way, call in _fp8_ways(kernels, layer).items()}
        times = median_times(ways, repeats=2 if asked.rehearse else 30)
        row: Row = {"model": model, "layer": name, "M": m, "K": k, "N": n, "tile": list(tile)}
        row["largest difference from the definition"] = max(differences.values())
        row |= {f"{way} us": round(value * 1e6, 2) for way, value in times.items()}
        for kind in ("INT8", "FP8"):
            for way in ("by time", "dynamic", "dynamic per token"):
                if f"{kind} {way}" in times:
                    row[f"{kind} {way} / static"] = round(times[f"{kind} {way}"] / times[f"{kind} static"], 3)
        row["INT8 by time / bf16"] = round(times["INT8 by time"] / times["bf16"], 3)
        rows.append(row)
        asked.keep(rows)
    return rows
