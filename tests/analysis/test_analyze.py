"""Headroom and sensitivity: do they tell a model that moves from one that does not, and find the bad layer?"""

from __future__ import annotations

import json
import math

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.analysis import analyze
from tests.support.models import TIMES, TinyDenoiser, calls, loop


class Moving(nn.Module):
    """The input of its layer grows with time by a known factor, or not at all."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.layer = nn.Linear(16, 16)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(sample * (1 + (self.factor - 1) * timestep / max(TIMES)))


def _loop(model: nn.Module) -> None:
    for i, time in enumerate(TIMES):
        model(torch.randn(32, 256, 16, generator=torch.Generator().manual_seed(i)), torch.tensor(time))


def test_headroom_tells_a_moving_model_from_one_that_does_not() -> None:
    still = analyze(Moving(1.0), _loop, tdq.make_config(8, 4, smoothing=0.0), probes=0, progress=False)
    moving = analyze(Moving(20.0), _loop, tdq.make_config(8, 4, smoothing=0.0), probes=0, progress=False)
    assert "will not help" in still.verdict
    assert "will help clearly" in moving.verdict
    # from t = 20 to t = 900, 1 + 19 t / 900 grows by 14.06
    assert moving.layers[0].spread_ratio == pytest.approx(14.06, rel=0.1)
    assert still.layers[0].spread_ratio == pytest.approx(1.0, abs=0.1)
    assert still.layers[0].loss_db < 0.5
    assert moving.layers[0].loss_db > 1.0
    # 16 uniform levels leave 0.01154 of the power of a Gaussian at best (Max 1960)
    assert still.layers[0].sqnr_db == pytest.approx(-10 * math.log10(0.01154), abs=0.3)
    json.dumps(moving.to_dict())


def test_sensitivity_finds_the_harmful_layer_and_proposes_it() -> None:
    torch.manual_seed(0)
    model = TinyDenoiser().eval()
    with torch.no_grad():
        model.mix.weight[0] *= 300  # one output channel dwarfs the others: the input of conv2 is hard to quantize
    result = analyze(model, loop(calls()), target=30.0, progress=False)
    assert model.mix.weight[0].abs().max() > 10  # untouched
    assert not any("quantizer" in name for name, _ in model.named_modules())
    assert set(result.sensitivity) == {"static", "temporal"}
    for proposal in result.proposals.values():
        assert proposal.reached
        assert min(proposal.sqnr_db) >= 30.0
    everything = analyze(model, loop(calls()), target=300.0, progress=False).proposals["static"]
    assert set(everything.layers) == {"conv1", "mix", "conv2"}
    config = tdq.make_config(progress=False)
    config["quant_cfg"] += everything.rules[:1]
    names = tdq.scale_table(mtq.quantize(model, config, loop(calls()))).names
    assert {name.partition(".")[0] for name in names} == set(everything.layers[1:])


def test_errors() -> None:
    with pytest.raises(tdq.TdqError, match="probes"):
        analyze(Moving(1.0), _loop, target=3.0, probes=0)
    with pytest.raises(tdq.TdqError, match="algorithm"):
        analyze(Moving(1.0), _loop, {"quant_cfg": [], "algorithm": "max"})
