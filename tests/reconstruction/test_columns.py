"""Only the intervals of a block are learned: gradients and moments reach nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_runs import reconstructed
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq.intervals.build import build_source
from modelopt_tdq.intervals.source import IntervalSource
from modelopt_tdq.reconstruction import reconstruct
from modelopt_tdq.reconstruction.columns import block_columns
from modelopt_tdq.training.learned import learned_intervals

_TIMES = [0.0, 250.0, 500.0, 750.0, 999.0]


def _source(intervals: str, softplus: bool = False) -> IntervalSource:
    generator = torch.Generator().manual_seed(3)
    bins = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0], [1, 2, 1, 0], [1, 3, 1, 0], [1, 4, 2, 0]])
    source = build_source(
        {
            "intervals": intervals,
            "timesteps": _TIMES,
            "initial": (0.01 + torch.rand(5, 4, generator=generator)).tolist(),
            "bins": (bins if intervals == "table" else torch.zeros_like(bins)).tolist(),
            "softplus": softplus,
            "encoding": None,
            "initialization": "he",
            "dropout": 0.0,
            "seed": 0,
        }
    )
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01 * torch.rand(parameter.shape, generator=generator))
    return source.eval()


@pytest.mark.parametrize(
    ("intervals", "softplus"), [("mlp", False), ("thin", False), ("table", False), ("table", True), ("static", False)]
)
def test_a_block_learns_its_columns_alone(intervals: str, softplus: bool) -> None:
    source = _source(intervals, softplus)
    time = torch.tensor([0.0, 400.0, 990.0])
    before = source(time).detach()
    part = block_columns(source, [1, 3], 4)
    torch.testing.assert_close(part.intervals(time)[:, [1, 3]].detach(), before[:, [1, 3]], rtol=2e-7, atol=0)
    optimizer = torch.optim.Adam(list(part.values.values()), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        part.intervals(time).sum().backward()
        optimizer.step()
    assert torch.equal(source(time), before)  # nothing reaches the source before the end of the block
    learned = part.intervals(time).detach()
    part.commit()
    after = source(time).detach()
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert (after[:, [1, 3]] < before[:, [1, 3]]).all()
    assert torch.equal(after[:, [1, 3]], learned[:, [1, 3]])


def test_gradients_reach_the_rows_of_the_batch_alone() -> None:
    source = _source("table")
    part = block_columns(source, [1], 4)
    part.intervals(torch.tensor([250.0, 750.0])).sum().backward()
    gradient = part.values["values"].grad
    assert gradient is not None
    assert [bool(g != 0) for g in gradient] == [False, True, False, True, False]


@pytest.mark.parametrize("intervals", ["mlp", "thin", "table", "static"])
def test_what_is_read_is_written_back_exactly(intervals: str) -> None:
    source = _source(intervals)
    state = {name: value.clone() for name, value in source.state_dict().items()}
    part = block_columns(source, [0, 2], 4)
    kept = part.read()
    with torch.no_grad():
        for value in part.values.values():
            value.add_(0.5)
    part.commit()
    part.write(kept)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("intervals", ["mlp", "table"])
def test_blocks_before_and_after_keep_their_intervals(intervals: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a whole run: while one block learns, the tables of the others do not move by a bit."""
    tables: list[dict[str, Any]] = []
    models: list[nn.Module] = []
    call = reconstruct._Run.__call__

    def watched(self: Any, *args: Any) -> Any:
        models.append(self._model)
        tables.append({n: q._scale.clone() for n, q in tdq.temporal_quantizers(self._model).items()})
        result = call(self, *args)
        tables.append({n: q._scale.clone() for n, q in tdq.temporal_quantizers(self._model).items()})
        own = set(self._parts.quantizers)
        assert own
        for name, value in tables[-2].items():
            assert torch.equal(value, tables[-1][name]) == (name not in own or not result.kept)
        return result

    monkeypatch.setattr(reconstruct._Run, "__call__", watched)
    model = reconstructed(intervals=intervals, iterations=80)
    assert len(tables) == 6
    assert any(block.kept for block in tdq.reconstruction_report(model))
    assert learned_intervals(model) is learned_intervals(models[0])
