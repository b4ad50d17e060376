"""What is held between forward and backward: no gradients of weights; less, block by block, if there is too much."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.analysis import Analysis, analyze, graph
from modelopt_tdq.model.full_precision import full_precision
from tests.support.live_bytes import LiveBytes
from tests.support.models import TIMES, noise

_analyze: Any = importlib.import_module("modelopt_tdq.analysis.analyze")  # the function hides its module

WIDTH = 16


class Stream(NamedTuple):
    """What the blocks of a model hand on."""

    x: Tensor
    earlier: tuple[Tensor, ...]


class Block(nn.Module):
    """Two layers; takes and returns tensors inside of other things, as blocks of U-Nets do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, stream: Stream, *, options: dict[str, Any]) -> Stream:
        h = self.first(stream.x + options["shift"])
        for _ in range(8):
            h = torch.tanh(h)
        h = self.second(h)
        return Stream(stream.x + h, (*stream.earlier[-1:], h))


class Blocks(nn.Module):
    """Repeated blocks between two layers."""

    def __init__(self, width: int = WIDTH, blocks: int = 3) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        stream = Stream(self.into(sample) * (1 + timestep / max(TIMES)), ())
        for block in self.blocks:
            stream = block(stream, options={"shift": timestep / max(TIMES), "flag": True})
        return self.out(stream.x + sum(stream.earlier))


def _loop(width: int, rows: int, samples: int = 4) -> Callable[[nn.Module], None]:
    def forward_loop(model: nn.Module) -> None:
        for step, time in enumerate(TIMES):
            model(noise(samples, rows, width, seed=step), torch.tensor(time))

    return forward_loop


def _analysis(model: nn.Module, width: int = WIDTH, rows: int = 8) -> Analysis:
    config = tdq.make_config(8, 8, channel_smoothing="none", correction="none", weights="max", progress=False)
    return analyze(model.eval(), _loop(width, rows), config, progress=False)


def test_blocks_that_run_again_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Blocks()
    whole = _analysis(model)
    entered = []
    monkeypatch.setattr(graph, "_saved_bytes", lambda *_: 2**60)
    original = graph._checkpointed
    monkeypatch.setattr(graph, "_checkpointed", lambda *given: entered.append(1) or original(*given))
    by_blocks = _analysis(model)
    assert len(entered) == 3 * 3  # blocks and times
    assert by_blocks.sensitivity == whole.sensitivity
    assert all(layer.estimated for layer in by_blocks.sensitivity["temporal"])


def test_large_activations_are_noticed_and_bounded() -> None:
    model, call = Blocks(), {"sample": noise(4, 1000, WIDTH), "timestep": torch.tensor(1.0)}
    model.requires_grad_(False)
    one = 4 * 1000 * WIDTH * 4
    # what tanh gives, which its backward needs
    assert graph._saved_bytes(model, call, 2**40) >= 24 * one
    assert graph._saved_bytes(model, call, one) <= 2 * one
    assert not graph.is_too_large(model, call)
    assert not graph.is_too_large(model, None)


def test_recomputed_blocks_hold_less() -> None:
    model = Blocks(blocks=12).requires_grad_(False)
    mtq.quantize(model, {"quant_cfg": tdq.TDQ_CONFIG["quant_cfg"], "algorithm": None})
    peaks, gradients = [], []
    for holding in (nullcontext(), graph.recomputed_blocks(model)):
        sample = noise(4, 500, WIDTH).requires_grad_()
        with LiveBytes() as live, full_precision(model), holding:
            model(sample, torch.tensor(500.0)).square().sum().backward()
        peaks.append(live.most)
        gradients.append(sample.grad)
    assert peaks[1] < 0.6 * peaks[0]
    assert torch.equal(gradients[0], gradients[1])
    assert not any("forward" in vars(module) for module in model.blocks)


def test_no_copies_of_weights_and_no_gradients_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Blocks(width=256)
    original, peaks = _analyze.sensitivities, []

    def watched(*given: Any) -> Any:
        assert {p.data_ptr() for p in given[0].model.parameters()} == {p.data_ptr() for p in model.parameters()}
        with LiveBytes() as live:
            found = original(*given)
        peaks.append(live.most)
        return found

    monkeypatch.setattr(_analyze, "sensitivities", watched)
    _analysis(model, width=256, rows=1)
    assert peaks[0] < 2 * model.out.weight.nbytes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
