"""Activations whose samples cannot be told apart: one time for all, and NaN where times differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from support.models import TIMES, fast_config, noise
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession


class TokensFirst(nn.Module):
    """As Ernie-Image: the input of a layer is [5, B, 8], and 5 is no multiple of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = (sample * (1 + timestep.reshape(-1, 1, 1) / 100)).transpose(0, 1)
        return self.last(torch.nn.functional.silu(self.first(h))).transpose(0, 1)


def call(time: float, seed: int) -> dict[str, Any]:
    return {"sample": noise(2, 5, 8, seed=seed), "timestep": torch.full((2,), time)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    calls = [call(time, index) for index, time in enumerate(TIMES)]
    return mtq.quantize(TokensFirst().eval(), fast_config(high_precision=()), lambda m: [m(**c) for c in calls])


@pytest.mark.parametrize("lowering", ["ratio", "reference"])
def test_one_time_for_all(model: nn.Module, lowering: Any, tmp_path: Path) -> None:
    tdq.export_onnx(model, tmp_path / "m.onnx", call(TIMES[0], 5), lowering=lowering)
    session = OnnxRuntimeSession(tmp_path / "m.onnx")
    assert session.shapes["timestep"] == (2,)
    for time in TIMES:
        given = call(time, 7)
        with torch.no_grad():
            expected = model(**given)
        found = session(given)["output"]
        assert torch.allclose(torch.from_numpy(found), expected, atol=1e-4)
    given["timestep"] = torch.tensor([TIMES[0], TIMES[1]])
    assert np.isnan(session(given)["output"]).all()


def test_times_that_differ_are_refused_at_once(model: nn.Module, tmp_path: Path) -> None:
    given = {**call(TIMES[0], 5), "timestep": torch.tensor([TIMES[0], TIMES[1]])}
    with pytest.raises(tdq.TdqError, match="2 times cannot be matched"):
        tdq.export_onnx(model, tmp_path / "m.onnx", given)
