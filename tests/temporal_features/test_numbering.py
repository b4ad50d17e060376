"""Values that were computed in the same way have the same number, others another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelopt_tdq.temporal_features.dataflow import watched
from modelopt_tdq.temporal_features.numbering import Number, numbered
from modelopt_tdq.temporal_features.trace import Leave, Recorder

Body = Callable[[Tensor], Tensor]
TABLE = torch.arange(4.0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.body: Body = lambda time: time

    def forward(self, timestep: Tensor) -> Tensor:
        output: Tensor = self.layer(self.body(timestep[:, None].expand(-1, 4)))
        return output


def numbers(*bodies: Body, rows: int = 2) -> list[Number]:
    """Of the layer's output, in a run for each body; the last run has other rows."""
    model = Model()
    recorder, runs = Recorder(model, None), []
    for index, body in enumerate(bodies):
        model.body = body
        time = torch.ones(rows if index + 1 == len(bodies) else 2)
        runs.append(recorder.run(lambda t=time: model(t), [("timestep", time)], time, {}))  # type: ignore[misc]
    found = watched(runs, "timestep", 1, (), [{} for _ in runs])
    leaves = [next(place for place, event in enumerate(run.events) if isinstance(event, Leave)) for run in runs]
    return [each[place] for each, place in zip(numbered(runs, found.temporal), leaves, strict=True)]


def _in_place(factor: float) -> Body:
    def body(time: Tensor) -> Tensor:
        made = time.clone()
        view = made[:, 1:]
        view.mul_(factor)
        return made

    return body


DIFFERENT: dict[str, tuple[Body, Body]] = {
    "an operator": (lambda t: t.sin(), lambda t: t.cos()),
    "a number": (lambda t: t * 2, lambda t: t * 3),
    "a whole number for a float": (lambda t: t * 2, lambda t: t * 2.0),
    "a constant": (lambda t: t + TABLE, lambda t: t + (TABLE + 1)),
    "a flag": (lambda t: t.mean(1, keepdim=True).expand(-1, 4), lambda t: t.mean(1).reshape(-1, 1).expand(-1, 4)),
    "the order": (lambda t: t.sin().cos(), lambda t: t.cos().sin()),
    "what was written through a view": (_in_place(2.0), _in_place(3.0)),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_is_computed_otherwise_has_another_number(what: str) -> None:
    one, again, other = numbers(DIFFERENT[what][0], DIFFERENT[what][0], DIFFERENT[what][1])
    assert one == again
    assert one.exact != other.exact
    assert one.alike != other.alike


ALIKE: dict[str, tuple[Body, Body]] = {
    "an index": (lambda t: t[:, 1:2].expand(-1, 4), lambda t: t[:, 2:3].expand(-1, 4)),
    "an axis": (lambda t: t + t.mean(0, keepdim=True), lambda t: t + t.mean(1, keepdim=True)),
}


@pytest.mark.parametrize("what", ALIKE)
def test_sizes_axes_and_indices_are_told_apart_in_the_exact_number_only(what: str) -> None:
    one, other = numbers(*ALIKE[what])
    assert one.alike == other.alike
    assert one.exact != other.exact


def test_what_an_earlier_run_made_keeps_its_number_and_rows_do_not_count() -> None:
    kept: list[Any] = []

    def body(time: Tensor) -> Tensor:
        if not kept:
            kept.append(torch.arange(4.0) * 0.5)
        made: Tensor = time + kept[0]
        return made

    first, second = numbers(body, body)
    assert first == second
    one, other = numbers(lambda t: t + 1, lambda t: t + 1, rows=5)
    assert one.alike == other.alike
