"""Calibration on samples whose tokens have times of their own: each is evidence for the row of its time."""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import fast_config, noise
from support.token_models import TIMES, Frames, Tokens, different, quantized, sample
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError

CALLS = [(Tokens, seed) for seed in range(4)]


def _mixed(model: nn.Module) -> None:
    for kind, seed in CALLS:
        model(sample(kind, seed=seed), different(kind, seed=seed))


def _regrouped(model: nn.Module) -> None:
    """The same tokens, those of one time in a call."""
    for kind, seed in CALLS:
        x, times = sample(kind, seed=seed), different(kind, seed=seed)
        for time in times.unique().tolist():
            model(x[times == time].unsqueeze(0), torch.tensor([time]))


@pytest.mark.parametrize(
    "fields", [{}, {"statistic": "mse", "asymmetric": True}, {"statistic": "percentile"}, {"channel_smoothing": 0.5}]
)
def test_rows_are_those_of_calls_with_one_time(fields: Any) -> None:
    table, expected = (tdq.scale_table(quantized(Tokens, loop, **fields)) for loop in (_mixed, _regrouped))
    assert table.names == expected.names
    assert table.timesteps.tolist() == list(TIMES)
    torch.testing.assert_close(table.scale, expected.scale, rtol=1e-5, atol=0)
    assert bool((table.scale[0] < table.scale[-1]).any())
    if "channel_smoothing" not in fields:  # what the first layer reads is the same bit for bit
        first = list(table.names).index("first.input_quantizer")
        assert torch.equal(table.scale[:, first], expected.scale[:, first])


def test_frames() -> None:
    """A frame of each time is as good as a video: all are drawn from one distribution."""

    def mixed(model: nn.Module) -> None:
        for seed in range(3):
            model(sample(Frames, seed=seed), different(Frames, seed=seed, among=(0.0, 900.0)))

    model = quantized(Frames, mixed)
    table = tdq.scale_table(model)
    assert table.timesteps.tolist() == [0.0, 900.0]
    column = list(table.names).index("volume.input_quantizer")
    largest = [0.0, 0.0]
    for seed in range(3):
        x, times = sample(Frames, seed=seed), different(Frames, seed=seed, among=(0.0, 900.0))
        for row, time in enumerate((0.0, 900.0)):
            frames = x.transpose(1, 2)[times == time] * (0.1 + 3 * torch.tensor(time) / 1000)
            largest[row] = max(largest[row], float(frames.abs().max()))
    torch.testing.assert_close(table.scale[:, column], torch.tensor(largest) / 127)


class _WithText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(8, 8)
        self.text = nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        h = self.tokens(sample * (0.1 + timestep.reshape(timestep.shape[0], -1, 1) / 1000))
        return h + self.text(text).mean(1, keepdim=True)


def _with_text(model: nn.Module) -> None:
    for seed in range(3):
        model(sample(Tokens, seed=seed), different(Tokens, seed=seed), noise(2, 3, 8, seed=seed))


def test_tokens_of_a_text_have_no_time_of_their_own() -> None:
    with pytest.raises(TdqError, match=r"text\.input_quantizer takes an activation of shape \(2, 3, 8\)") as error:
        mtq.quantize(_WithText().eval(), fast_config(), _with_text)
    assert '"temporal" patterns that do not match it' in str(error.value)
    model = mtq.quantize(_WithText().eval(), fast_config(temporal=["tokens*"]), _with_text)
    table = tdq.scale_table(model)
    column = table.scale[:, list(table.names).index("text.input_quantizer")]
    largest = max(float(noise(2, 3, 8, seed=seed).abs().max()) for seed in range(3))
    torch.testing.assert_close(column, torch.full((len(table.timesteps),), largest / 127))
    with torch.no_grad():
        assert bool(model(sample(Tokens), different(Tokens), noise(2, 3, 8)).isfinite().all())


def test_what_runs_samples_again_wants_some_of_one_time() -> None:
    with pytest.raises(TdqError, match="several times each") as error:
        quantized(Tokens, _mixed, correction="per_step")
    assert error.value.field == "forward_loop"

    def some(model: nn.Module) -> None:
        _mixed(model)
        for seed, time in enumerate(TIMES):
            model(sample(Tokens, seed=seed), torch.full((2, 5), time))

    model = quantized(Tokens, some, correction="per_step", protect_steps=True, statistic="output")
    assert tdq.layer_correction(model) is not None
    with torch.no_grad():
        assert bool(model(sample(Tokens), different(Tokens)).isfinite().all())


@pytest.mark.parametrize("method", ["tdq_qat", "tdq_temporal"])
def test_what_knows_one_time_per_sample_says_so(method: str) -> None:
    class Embedded(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Linear(1, 8)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            time = self.embedding(timestep.reshape(timestep.shape[0], -1, 1) / 1000)
            return super().forward(sample + time, timestep)

    def one_time(model: nn.Module) -> None:
        for seed, time in enumerate(TIMES):
            model(sample(Tokens, seed=seed), torch.full((2,), time))

    config = fast_config(method=method, **({"intervals": "table"} if method == "tdq_qat" else {}))
    model = mtq.quantize(Embedded().eval(), config, one_time)
    if method == "tdq_temporal" and tdq.feature_table(model) is None:
        pytest.skip("no feature of this model")
    model.train(method == "tdq_qat")
    with pytest.raises(TdqError, match="a sample has several times, 0 to 900; calibrated scales"):
        model(sample(Tokens), different(Tokens))
    assert bool(model(sample(Tokens), torch.full((2, 5), 300.0)).isfinite().all())
