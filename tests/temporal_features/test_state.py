"""What modules hold is seen to change, and put back: the same objects, with what was in them."""

from __future__ import annotations

import functools
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelopt_tdq.temporal_features.state import CachedFunctions, ModelState, tensors_inside


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("buffer", torch.ones(2))
        self.number, self.text, self.nothing = 1.0, "a", None
        self.pair = (torch.zeros(1), 2)
        self.table: dict[str, Any] = {"inner": [1, torch.zeros(1)]}
        self.queue = deque([1, 2])
        self.names = {"a"}
        self.object = SimpleNamespace(count=0, deep=SimpleNamespace(tensor=torch.zeros(1)))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Part()
        self.calls = 0


CHANGES: dict[str, Any] = {
    "number": lambda part: setattr(part, "number", 2.0),
    "nan": lambda part: setattr(part, "number", float("nan")),
    "text": lambda part: setattr(part, "text", "b"),
    "nothing": lambda part: setattr(part, "nothing", torch.ones(1)),
    "buffer": lambda part: setattr(part, "buffer", torch.ones(2)),
    "pair": lambda part: setattr(part, "pair", (torch.zeros(1), 2)),
    "table.inner.0": lambda part: part.table["inner"].__setitem__(0, 5),
    "table.inner": lambda part: part.table["inner"].append(0),
    "table.other": lambda part: part.table.update(other=1),
    "table": lambda part: part.table.clear(),
    "queue": lambda part: part.queue.append(3),
    "names": lambda part: part.names.add("b"),
    "object.count": lambda part: setattr(part.object, "count", 1),
    "object.deep.tensor": lambda part: setattr(part.object.deep, "tensor", torch.zeros(1)),
    "added": lambda part: setattr(part, "added", 1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen_by_its_name_and_undone(what: str) -> None:
    model = Whole()
    before = ModelState(model)
    assert ModelState(model).changed(before) == {}
    objects = dict(vars(model.part))
    CHANGES[what](model.part)
    changed = ModelState(model).changed(before)
    where = what if what != "nan" else "number"
    assert any(name.startswith(f"the state `{where}") and name.endswith("of module `part`") for name in changed)
    assert all(f"`{where.partition('.')[0]}" in name for name in changed)
    before.restore()
    assert ModelState(model).changed(before) == {}
    assert vars(model.part).keys() == objects.keys()
    assert all(vars(model.part)[name] is value for name, value in objects.items())


def test_a_change_in_place_is_seen_and_the_root_is_the_model() -> None:
    model = Whole()
    before = ModelState(model)
    model.part.buffer += 1
    model.calls += 1
    assert set(ModelState(model).changed(before)) == {
        "the state `buffer` of module `part`",
        "the state `calls` of the model",
    }


def test_numbers_can_be_set_where_they_are_held() -> None:
    model = Whole()
    held = ModelState(model).held
    for where in ("number", "table.inner.0", "object.count"):
        each = held[f"the state `{where}` of module `part`"]
        each.holder[each.key] = 7
    assert (model.part.number, model.part.table["inner"][0], model.part.object.count) == (7, 7, 7)
    assert held["the state `pair.1` of module `part`"].holder is None


def test_tensors_are_found_in_objects_of_any_kind() -> None:
    one, other = torch.zeros(1), torch.ones(1)
    value = SimpleNamespace(a=[one], b={"c": (other, 1)}, d=None)
    value.itself = value
    assert {id(t) for t in tensors_inside(value)} == {id(one), id(other)}
    assert tensors_inside(1.0) == []


def test_cached_functions_forget_only_what_came_since() -> None:
    class Cached(nn.Module):
        @functools.cache  # noqa: B019
        def used(self, size: int) -> Tensor:
            return torch.ones(size)

        @staticmethod
        @functools.lru_cache(4)
        def idle(size: int) -> Tensor:
            return torch.ones(size)

    model = Cached()
    model.used(1), model.idle(1)
    functions = CachedFunctions(model)
    model.used(2)
    functions.forget()
    assert model.used.cache_info().currsize == 0
    assert model.idle.cache_info().currsize == 1
