"""What in a call belongs to its samples: found by running it, whatever the sizes look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import TIMES, TinyDenoiser, at, calls, fast_config, loop, noise, quantized
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.timestep import deliver_timestep

_Function = Callable[[Tensor, Tensor], Tensor]


class Shared(nn.Module):
    """A layer, and something of a table that all samples share."""

    def __init__(self, function: _Function) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, sample: Tensor, timestep: Tensor, table: Tensor) -> Tensor:
        return self.function(self.layer(sample), table)


#: By what it does with the table: a row of it, a sum of it, a broadcast.
_USES: dict[str, _Function] = {
    "first row": lambda x, table: x * table[0],
    "last row": lambda x, table: x * table[-1],
    "sum of rows": lambda x, table: x * table.sum(0),
    "mean": lambda x, table: x * table.mean(),
}


def _replayed(model: nn.Module, data: list[dict[str, Any]], samples: int = 8) -> tuple[Replay, list[tuple[Any, Any]]]:
    """Outputs of the calls as they were made, and as they are made again; one row per sample, sorted."""
    model = model.eval()
    replay = Replay(model, deliver_timestep(model, "timestep"), samples)
    with torch.no_grad(), replay.recording(model):
        made = [model(**call) for call in data]
    replay.agree()
    times = sorted({float(call["timestep"].flatten()[0]) for call in data})
    pairs = []
    with torch.no_grad():
        for row, time in enumerate(times):
            own = [y for call, y in zip(data, made, strict=True) if float(call["timestep"].flatten()[0]) == time]
            again = [model(**batch.call) for batch in replay.batches(times) if batch.row == row]
            pairs.append(tuple(torch.cat(ys).flatten(1).sort(0).values for ys in (own, again)))
    return replay, pairs


@pytest.mark.parametrize("use", _USES)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_shared_table_as_large_as_the_batch_is_not_taken_apart(use: str, batch: int) -> None:
    torch.manual_seed(0)
    data = [
        {"sample": noise(batch, 4, seed=seed), "timestep": torch.tensor([time]), "table": noise(batch, 4, seed=9) + 2}
        for seed, time in enumerate((1.0, 1.0, 5.0))
    ]
    _, pairs = _replayed(Shared(_USES[use]), data)
    for made, again in pairs:
        torch.testing.assert_close(again, made, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_tensor_without_a_batch_that_changes_is_replayed_with_its_own_call(batch: int) -> None:
    torch.manual_seed(0)
    data = [
        {"sample": noise(batch, 4, seed=seed), "timestep": torch.tensor([5.0]), "table": torch.full((7,), float(seed))}
        for seed in range(4)
    ]
    replay, ((made, again),) = _replayed(Shared(lambda x, table: x + table.sum()), data)
    # one call takes samples with equal tables only: the largest group of them
    assert len(again) == batch
    assert all(any(torch.allclose(row, other, rtol=1e-5, atol=1e-5) for other in made) for row in again)
    assert replay._axis is not None
    assert replay._axis.shared == {"table"}


def test_a_model_whose_samples_depend_on_each_other_is_replayed_in_whole_calls() -> None:
    torch.manual_seed(0)
    data = [
        {"sample": noise(3, 4, seed=seed), "timestep": torch.tensor([5.0]), "table": torch.ones(1)} for seed in range(4)
    ]
    model = Shared(lambda x, table: x - x.mean(0)).eval()
    replay = Replay(model, deliver_timestep(model, "timestep"), 2)
    with torch.no_grad(), replay.recording(model):
        made = [model(**call) for call in data]
    replay.agree()
    with torch.no_grad():
        again = [model(**batch.call) for batch in replay.batches([5.0])]
    assert len(again) == 2
    assert all(any(torch.equal(y, other) for other in made) for y in again)


@pytest.mark.parametrize("table", [(1, 4), (2, 4), (3, 1, 4)], ids=str)
@pytest.mark.parametrize("method", [{}, {"statistic": "output"}, {"protect_steps": False}], ids=str)
def test_calibration_takes_shared_tensors(table: tuple[int, ...], method: dict[str, Any]) -> None:
    """Position tables of HunyuanDiT, OmniGen, Cosmos: a leading 1 is no batch."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample: Tensor, timestep: Tensor, table: Tensor) -> Tensor:
            return self.layer(sample) * table.sum(0)

    torch.manual_seed(0)
    shared = noise(*table)

    def run(model: nn.Module) -> None:
        for seed, time in enumerate((1.0, 500.0, 999.0)):
            model(noise(2, 3, 4, seed=seed), torch.tensor([time, time]), shared)

    config = tdq.make_config(8, 8, high_precision=(), progress=False, **method)
    model = mtq.quantize(Model().eval(), config, run)
    assert tdq.scale_table(model).timesteps.tolist() == [1.0, 500.0, 999.0]


class Noisy(TinyDenoiser):
    """Draws random numbers, counts its calls, and keeps a mean of what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.drawn: list[float] = []

    def forward(self, sample: Tensor, timestep: Any, context: Tensor | None = None) -> Tensor:
        self.count += 1
        self.drawn.append(float(torch.rand(())))
        return super().forward(sample, timestep, context)


def test_trying_a_call_leaves_no_trace() -> None:
    seen: dict[bool, tuple[int, list[float], Any]] = {}
    for protect in (False, True):
        torch.manual_seed(0)
        model = Noisy().eval()
        mtq.quantize(model, {**fast_config(), "algorithm": None})
        torch.manual_seed(1)
        mtq.calibrate(model, {**fast_config()["algorithm"], "protect_steps": protect}, loop(calls()))
        table = tdq.scale_table(model)
        seen[protect] = model.count, model.drawn[: len(calls())], table
        expected = quantized(protect_steps=False)
        if not protect:
            torch.testing.assert_close(table.scale, tdq.scale_table(expected).scale, rtol=0, atol=0)
    assert seen[False][0] == len(calls())
    assert seen[False][1] == seen[True][1]


def test_a_time_per_sample_stays_one_and_a_time_for_all_stays_that() -> None:
    model = quantized()
    for time in (torch.tensor([20.0, 20.0]), torch.tensor([20.0]), torch.tensor(20.0)):
        replay = Replay(model, deliver_timestep(model, "timestep"), 4)
        with torch.no_grad(), full_precision(model), replay.recording(model):
            for seed in range(2):
                model(noise(2, 3, 8, 8, seed=seed), time)
        replay.agree()
        (batch,) = replay.batches([20.0])
        assert len(batch.call["sample"]) == 4
        found = batch.call["timestep"]
        assert found.tolist() == ([20.0] * 4 if time.numel() == 2 else time.tolist())


def test_parts_that_are_tried_have_their_own_times() -> None:
    model = quantized()
    with at(model, TIMES[0]):
        assert torch.equal(model(noise(1, 3, 8, 8), TIMES[1]), model(noise(1, 3, 8, 8), TIMES[1]))
