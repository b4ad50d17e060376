"""The one definition of how arguments are nested, and of the names in them."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modelopt_tdq import TdqError
from modelopt_tdq.model.call import cloned, layer_input, plain_leaves, tensor_leaves, walk


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass(frozen=True)
class Condition:
    image: Any
    scale: float = 1.0


_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.builds(torch.full, st.tuples(st.integers(1, 3), st.integers(1, 2)), st.integers(0, 9)),
)
_NESTED = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(Pair, inner, inner),
        st.builds(Condition, inner),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=12,
)
_CALLS = st.dictionaries(st.sampled_from(["sample", "extra", "more"]), _NESTED, min_size=1)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Condition):
        return _same(dataclasses.astuple(one), dataclasses.astuple(other))
    return bool(one == other)


@given(_CALLS)
def test_the_same_nesting_comes_out(call: dict[str, Any]) -> None:
    assert _same(walk(call, lambda name, leaf: leaf), call)
    assert _same(cloned(call), call)


@given(_CALLS)
def test_every_leaf_has_a_name_of_its_own_by_which_it_can_be_replaced(call: dict[str, Any]) -> None:
    names: list[str] = []
    walk(call, lambda name, leaf: names.append(name))
    assert len(names) == len(set(names))
    tensors = tensor_leaves(call)
    others = {name: tensor + 1 for name, tensor in tensors.items()}
    replaced = walk(call, others.get)
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensor_leaves(replaced).items())
    assert tensors.keys() == others.keys() == tensor_leaves(replaced).keys()
    assert not tensors.keys() & plain_leaves(call).keys()


def test_names_of_what_diffusers_passes() -> None:
    call = {
        "sample": torch.zeros(1),
        "added_cond_kwargs": {"text_embeds": torch.zeros(1), "image_embeds": [torch.zeros(1), torch.zeros(1)]},
        "down_block_additional_residuals": (torch.zeros(1), torch.zeros(1)),
        "condition": Condition(torch.zeros(1)),
        "output": UNet2DOutput(sample=torch.zeros(1)),
    }
    assert list(tensor_leaves(call)) == [
        "sample",
        "added_cond_kwargs.text_embeds",
        "added_cond_kwargs.image_embeds.0",
        "added_cond_kwargs.image_embeds.1",
        "down_block_additional_residuals.0",
        "down_block_additional_residuals.1",
        "condition.image",
        "output.sample",
    ]
    assert plain_leaves(call) == {"condition.scale": 1.0}
    again = walk(call, lambda name, leaf: leaf)
    assert type(again["output"]) is UNet2DOutput
    assert type(again["condition"]) is Condition


def test_a_layer_takes_its_input_by_position_or_by_keyword() -> None:
    x = torch.ones(2)
    assert layer_input((x,), {}) is x
    assert layer_input((), {"scale": 1.0, "input": x}) is x
    with pytest.raises(TdqError, match="without a tensor"):
        layer_input((1,), {"module": nn.Linear(1, 1)})
