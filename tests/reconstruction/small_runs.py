"""Tiny reconstructions, and the quantities that their tests look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from support.models import TIMES, TinyDenoiser, calls, fast_config, loop
from torch import Tensor, nn

FAST: dict[str, Any] = {
    "weight_bits": 3,
    "activation_bits": 6,
    "method": "tdq_reconstruct",
    "iterations": 150,
    "samples": 16,
    "batch_size": 8,
}


def reconstructed(
    model: nn.Module | None = None, data: Sequence[tuple[Tensor, Tensor]] | None = None, **fields: Any
) -> nn.Module:
    """A reconstructed TinyDenoiser, or ``model``."""
    torch.manual_seed(0)
    model = TinyDenoiser().eval() if model is None else model
    return mtq.quantize(model, fast_config(**{**FAST, **fields}), loop(calls(4, 4) if data is None else data))


def calibrated(**fields: Any) -> nn.Module:
    """The same model, calibrated as the reconstruction begins."""
    torch.manual_seed(0)
    config = fast_config(weight_bits=3, activation_bits=6, asymmetric="auto", **{"bins": 1, **fields})
    return mtq.quantize(TinyDenoiser().eval(), config, loop(calls(4, 4)))


def held_out() -> list[tuple[Tensor, Tensor]]:
    return calls(8, 8, TIMES, seed=77_000)


@torch.no_grad()
def last_block_error(model: nn.Module, data: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean squared error of the output of the last block, against the full-precision TinyDenoiser."""
    torch.manual_seed(0)
    reference = TinyDenoiser().eval()
    outputs: list[list[Tensor]] = [[], []]
    for found, made in zip(outputs, (model, reference), strict=True):
        handle = made.conv2.register_forward_hook(lambda m, a, output, found=found: found.append(output))
        for x, t in data:
            made(x, t)
        handle.remove()
    return float(torch.stack([(a - b).square().mean() for a, b in zip(*outputs, strict=True)]).mean())
