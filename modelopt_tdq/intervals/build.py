"""An interval source from plain data, so that a restored model builds the one that was saved."""

from __future__ import annotations

from typing import Any

import torch

from modelopt_tdq.intervals.mlp import MlpIntervals
from modelopt_tdq.intervals.source import IntervalSource
from modelopt_tdq.intervals.table import TableIntervals

__all__ = ["build_source"]


def build_source(description: dict[str, Any]) -> IntervalSource:
    """The source that ``description`` tells.

    Args:
        description: ``intervals`` ("static", "table", "mlp" or "thin"), ``timesteps`` [K], ``initial`` [K][Q],
            ``bins`` [K][Q], ``softplus``; for the MLPs ``encoding``, ``initialization``, ``dropout``, ``seed``.
    """
    timesteps = torch.tensor(description["timesteps"], dtype=torch.float32)
    initial = torch.tensor(description["initial"], dtype=torch.float32)
    kind = description["intervals"]
    if kind in ("static", "table"):
        return TableIntervals(timesteps, torch.tensor(description["bins"]), initial, description["softplus"])
    thin = kind == "thin"
    return MlpIntervals(
        timesteps,
        initial.double().log().mean(0).exp().float(),
        encoding=description["encoding"] or ("normalized" if thin else "frequency"),
        hidden=16 if thin else 64,
        layers=3 if thin else 4,
        dropout=description["dropout"],
        initialization=description["initialization"],
        generator=torch.Generator().manual_seed(description["seed"]),
    )
