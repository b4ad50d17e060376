"""Models that take a time for each token or frame, and layers whose batch is none: equal times are one time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import fast_config, noise
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError

TIMES = (0.0, 300.0, 900.0)


class TokenDenoiser(nn.Module):
    """Takes [B], or [B, N] as Wan 2.2 TI2V; its last layer sees two groups of tokens of each sample in its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = nn.Linear(1, 8)
        self.tokens = nn.Linear(8, 8)
        self.groups = nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = timestep.float() / 1000
        time = time.unsqueeze(1) if time.dim() == 1 else time
        h = self.tokens(sample * (1 + 9 * time.unsqueeze(2)) + self.time_embedding(time.unsqueeze(2)))
        return self.groups(h.unflatten(1, (2, -1)).flatten(0, 1)).reshape(h.shape)


def call(time: float | tuple[float, float], tokens: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two samples of six tokens."""
    times = torch.tensor(time).expand(2)
    return noise(2, 6, 8, seed=seed), times.unsqueeze(1).repeat(1, 6) if tokens else times


def quantized(tokens: bool, **fields: Any) -> nn.Module:
    def forward_loop(model: nn.Module) -> None:
        for seed, time in enumerate(TIMES):
            model(*call(time, tokens, seed))

    torch.manual_seed(0)
    config = fast_config(protect_steps=True, statistic="output", correction="static", **fields)
    return mtq.quantize(TokenDenoiser().eval(), config, forward_loop)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantized(tokens=True)


def test_calibrated_and_run_as_with_a_time_per_sample(model: nn.Module) -> None:
    other = quantized(tokens=False)
    table, expected = tdq.scale_table(model), tdq.scale_table(other)
    assert table.names == expected.names
    assert len(table.names) == 2
    assert torch.equal(table.scale, expected.scale)
    assert bool((table.scale[0] != table.scale[2]).all())
    with torch.no_grad():
        for times in (300.0, (0.0, 900.0)):
            assert torch.equal(model(*call(times, tokens=True)), other(*call(times, tokens=False)))


def test_a_sample_of_several_times_is_refused_where_they_are_not_told_apart(model: nn.Module) -> None:
    """The last layer's batch is a multiple of the samples, and its tokens are half of theirs."""
    sample, times = call(900.0, tokens=True)
    times[1, 0] = 0.0
    with pytest.raises(TdqError, match=r"groups\.input_quantizer takes an activation of shape \(4, 3, 8\)") as error:
        model(sample, times)
    assert error.value.field == "timestep"
    with torch.no_grad():
        assert bool(model(*call(300.0, tokens=True)).isfinite().all())


def test_compiled(model: nn.Module) -> None:
    folded = copy.deepcopy(model)
    mtq.fold_weight(folded)
    compiled = torch.compile(folded, backend="aot_eager", fullgraph=True)
    sample, times = call((0.0, 900.0), tokens=True)
    with torch.no_grad():
        assert torch.allclose(compiled(sample, times), folded(sample, times), atol=1e-5)
        times[1, 0] = 0.0
        with pytest.raises(RuntimeError, match="several times"):
            compiled(sample, times)


@pytest.mark.parametrize("lowering", ["reference", "ratio"])
@pytest.mark.parametrize("times", [300.0, (0.0, 900.0)])
def test_exported(model: nn.Module, lowering: Any, times: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

    sample, time = call(300.0, tokens=True, seed=5)
    tdq.export_onnx(model, tmp_path / "m.onnx", {"sample": sample, "timestep": time}, lowering=lowering)
    session = OnnxRuntimeSession(tmp_path / "m.onnx")
    sample, time = call(times, tokens=True, seed=6)
    with torch.no_grad():
        expected = model(sample, time)
    found = session({"sample": sample.numpy(), "timestep": time.numpy()})[session.outputs[0]]
    assert float((torch.from_numpy(found) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


class TokensFirst(nn.Module):
    """Its layer sees [N, B, C], as in ERNIE-Image; another, those tokens that are sent to it, as an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(8, 8)
        self.expert = nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.tokens((sample * (1 + timestep[:, None, None] / 100)).transpose(0, 1))
        return torch.cat([self.expert(h[:3].flatten(0, 1).unsqueeze(0)).reshape(h[:3].shape), h[3:]]).transpose(0, 1)


def tokens_first(times: Any) -> nn.Module:
    def forward_loop(model: nn.Module) -> None:
        for seed, time in enumerate(TIMES):
            model(noise(2, 5, 8, seed=seed), torch.tensor([time] * times))

    torch.manual_seed(0)
    return mtq.quantize(TokensFirst().eval(), fast_config(), forward_loop)


def test_equal_times_of_samples_that_cannot_be_told_apart_are_one_time() -> None:
    model, single = tokens_first(2), tokens_first(1)
    table, expected = tdq.scale_table(model), tdq.scale_table(single)
    assert len(table.names) == 2
    assert torch.equal(table.scale, expected.scale)
    sample = noise(2, 5, 8, seed=7)
    with torch.no_grad():
        for time in TIMES:
            one, two = model(sample, torch.tensor([time])), model(sample, torch.tensor([time, time]))
            assert torch.equal(one, two)
        with pytest.raises(TdqError, match=r"2 times cannot be matched with an activation of shape \(5, 2, 8\)"):
            model(sample, torch.tensor([0.0, 900.0]))


def test_a_correction_over_time_follows_equal_times() -> None:
    model = tokens_first(1)
    rows = [torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 8), torch.zeros(3, 8)]
    tdq.set_layer_correction(model, tdq.LayerCorrection(torch.tensor(TIMES), *({"tokens": row} for row in rows)))
    sample = noise(2, 5, 8, seed=7)
    with torch.no_grad():
        one, two = (model(sample, torch.tensor([300.0] * times)) for times in (1, 2))
        assert torch.equal(one, two)
        assert not torch.equal(one, model(sample, torch.tensor([900.0])))
