"""What each layer alone does to the output: estimates by backward passes, against calls with nothing else quantized."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.analysis import Analysis, LayerSensitivity, analyze
from tests.support.models import TIMES, TinyDenoiser, calls, loop, noise

WIDTH = 16


class Chain(nn.Module):
    """Eight layers behind each other, each adding to a common stream by another factor."""

    def __init__(self, detached: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.detached = detached

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = sample * (1 + timestep / max(TIMES))
        for number, layer in enumerate(self.layers):
            step = layer(torch.tanh(x)) * 0.6**number
            x = x + (step.detach() if number == self.detached else step)
        return x


class Readers(nn.Module):
    """Three equal layers that read one tensor, and a fourth that reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.readers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        for reader in self.readers[1:]:
            reader.load_state_dict(self.readers[0].state_dict())
        self.other = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = sample * (1 + timestep / max(TIMES))
        return sum(reader(x) for reader in self.readers) + 1.2 * self.other(torch.tanh(x))


class WithoutGradient(Chain):
    @torch.no_grad()
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(sample, timestep)


def _analysis(model: nn.Module, bits: int = 4, one_by_one: bool = False, **options: object) -> Analysis:
    def forward_loop(m: nn.Module) -> None:
        for step, time in enumerate(TIMES):
            m(noise(8, 32, WIDTH, seed=step), torch.tensor(time))

    config = tdq.make_config(8, bits, channel_smoothing="none", progress=False)
    return analyze(model.eval(), forward_loop, config, one_by_one=one_by_one, progress=False, **options)  # type: ignore[arg-type]


def _by_name(analysis: Analysis) -> dict[str, LayerSensitivity]:
    return {layer.name: layer for layer in analysis.sensitivity["temporal"]}


def _values(layers: dict[str, LayerSensitivity], what: str) -> Tensor:
    return torch.tensor([getattr(layers[name], what) for name in sorted(layers)])


def test_estimates_are_what_one_layer_alone_does() -> None:
    torch.manual_seed(0)
    model = Chain()
    estimated, measured = _by_name(_analysis(model)), _by_name(_analysis(model, one_by_one=True))
    assert all(layer.estimated for layer in estimated.values())
    assert not any(layer.estimated for layer in measured.values())
    # squares of normal numbers: of 8 samples and 4 vectors, and of 4 vectors
    for what, numbers in (("activation_db", 32), ("weight_db", 4)):
        ours, theirs = _values(estimated, what), _values(measured, what)
        deviation = 10 * math.log10(1 + math.sqrt(2 / numbers))
        assert (ours - theirs).square().mean().sqrt() < 1.5 * deviation
        assert torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1] > 0.9


def test_errors_of_layers_that_read_one_tensor_add_up() -> None:
    torch.manual_seed(0)
    proposals = {
        one_by_one: _analysis(Readers(), target=22.0, one_by_one=one_by_one).proposals["temporal"]
        for one_by_one in (False, True)
    }
    # alone, the fourth is the most harmful; the three together make nine times the error of one
    assert "other" not in proposals[False].layers
    assert proposals[False].reached
    assert len(proposals[False].layers) <= len(proposals[True].layers)


def test_a_layer_that_gradients_do_not_reach_is_measured() -> None:
    torch.manual_seed(0)
    model = Chain(detached=2)
    found, measured = _by_name(_analysis(model)), _by_name(_analysis(model, one_by_one=True))
    assert [layer.name for layer in found.values() if not layer.estimated] == ["layers.2"]
    assert found["layers.2"] == measured["layers.2"]


def test_a_model_without_backward_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = WithoutGradient()
    found = _analysis(model)
    assert "one by one" in caplog.text
    assert _by_name(found) == _by_name(_analysis(model, one_by_one=True))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_batch_size_changes_nothing(batch: int) -> None:
    torch.manual_seed(0)
    model = TinyDenoiser().eval()
    whole, split = (_by_name(analyze(model, loop(calls(samples=6, batch=size)), progress=False)) for size in (6, batch))
    for name, layer in whole.items():
        for what in ("activation_db", "weight_db"):
            assert getattr(split[name], what) == pytest.approx(getattr(layer, what), abs=0.05)
