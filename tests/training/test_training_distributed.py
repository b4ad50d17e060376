"""Two gloo processes with half a batch each learn what one process learns with all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.processes import results
from test_qat import adam, batch, qat
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import modelopt_tdq as tdq

_STEPS = 3


def _learn(model: nn.Module, whole: nn.Module, rank: int | None) -> dict[str, Tensor]:
    optimizer = adam(whole)
    for step in range(_STEPS):
        x, time, target = batch(step)
        part = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
        loss = (model(x[part], time[part]) - target[part]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in whole.named_parameters()}


def _process(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = qat(dropout=0.0)
    learned = _learn(DistributedDataParallel(model), model, rank)
    return {"learned": learned, "scale": tdq.scale_table(model.eval()).scale}


def test_two_processes_learn_as_one(tmp_path: Path) -> None:
    first, second = results(_process, 2, tmp_path)
    model = qat(dropout=0.0)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    expected = _learn(model, model, None)
    assert torch.equal(first["scale"], second["scale"])
    moved = 0
    for name, value in expected.items():
        assert torch.equal(first["learned"][name], second["learned"][name]), name
        # LSQ's gradient factor counts the elements of a sample, so halves of a batch change nothing but roundings;
        # Adam turns a rounding of a vanishing gradient into a step, hence the bound on the bulk
        close = torch.isclose(first["learned"][name], value, rtol=1e-3, atol=1e-4)
        assert float(close.float().mean()) > 0.97, name
        moved += int(not torch.equal(value, start[name]))
    assert moved == len(expected)
