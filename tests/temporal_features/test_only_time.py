"""What depends on the time and on something that is no tensor of the call: numbers, sizes, what earlier calls left."""

from __future__ import annotations

import copy
import functools
import gc
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import fast_config, noise
from support.slow import slow_but
from temporal_models import CASES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import modelopt_tdq as tdq

Body = Callable[["Net", Tensor, Tensor, dict[str, Any]], Tensor]


class Net(nn.Module):
    """A time MLP, a head whose output is added to all tokens, and a last layer; ``body`` makes what the head takes."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.time, self.head, self.other, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.register_buffer("state", torch.ones(4))
        self.kept: Any = None
        self.count = 0
        self.cache: dict[int, Tensor] = {}
        self.history: list[Tensor] = []
        self.body = body

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        strength: float = 1.0,
        number: int = 2,
        flag: bool = False,
        mode: Literal["a", "b"] = "a",
        text: str = "x",
        extra: Any = None,
        options: dict[str, Any] | None = None,
    ) -> Tensor:
        time = torch.as_tensor(timestep).to(sample).reshape(-1, 1) / 1000
        hidden = self.time(torch.cat([time, time.square(), time.sin(), time.cos()], 1))
        given = {"strength": strength, "number": number, "flag": flag, "mode": mode, "text": text}
        made = self.body(self, hidden, sample, {**given, "extra": extra, "options": options or {}})
        output: Tensor = self.last(torch.nn.functional.silu(sample + made[:, None]))
        return output


@dataclass(frozen=True)
class Holder:
    tensor: Tensor
    factor: float = 2.0


def found(body: Body, times: int | None = None, **given: Any) -> tuple[Net, tdq.TemporalBlock]:
    torch.manual_seed(0)
    model = Net(body).eval()
    return model, tdq.find_temporal_block(model, {**call(), **given}, times=times)


def call(seed: int = 0, tokens: int = 8, time: float = 600.0, batch: int = 2) -> dict[str, Any]:
    return {"sample": noise(batch, tokens, 4, seed=seed), "timestep": torch.tensor(time)}


# what the head takes besides the time


def _in_a_buffer(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    made = net.head(hidden * net.state)
    net.state.copy_(sample.abs().mean())
    return made


def _in_a_part_of_a_buffer(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    made = net.head(hidden * net.state)
    net.state[1] = sample.abs().mean()
    return made


def _in_another_buffer(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    made = net.head(hidden * net.state)
    net.state = sample.abs().mean()[None].expand(4)
    return made


def _of_an_earlier_time(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    made = net.head(hidden * net.state)
    net.state.copy_(hidden[0])
    return made


def _in_an_attribute(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    made = net.head(hidden if net.kept is None else hidden + net.kept.mean())
    net.kept = sample
    return made


def _that_only_calls_of_its_sizes_take(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    made = net.head(hidden if net.kept is None else hidden * (1 + (net.kept * sample).mean(1)))
    net.kept = sample.clone()
    return made


def _of_the_first_sample(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    if net.kept is None:
        net.kept = sample.mean()
    return net.head(hidden * net.kept)


def _of_the_first_time(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    if net.kept is None:
        net.kept = hidden[:1]
    return net.head(net.kept.expand(len(hidden), 4)) + net.other(hidden)


def _of_the_first_size(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    if net.kept is None:
        net.kept = sample.shape[1]
    return net.head(hidden * net.kept)


def _in_a_counter(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    net.count += 1
    return net.head(hidden * net.count)


def _every_third_call(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    net.count += 1
    return net.head(hidden if net.count % 3 == 0 else -hidden)


def _in_a_list(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    net.history.append(sample.mean())
    return net.head(hidden * len(net.history))


def _read_into_a_number(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    made = net.head(hidden * net.count)
    net.count = float(sample.mean())  # type: ignore[assignment]
    return made


STATE, KEPT, COUNT = (f"the state `{name}` of the model" for name in ("state", "kept", "count"))
SIZE = "the size of `sample`"

#: By what it is: what makes the features, and what the head depends on.
REFUSED: dict[str, tuple[Body, tuple[str, ...], dict[str, Any]]] = {
    "a float": (lambda n, h, x, a: n.head(h * a["strength"]), ("strength",), {}),
    "a float that was given": (lambda n, h, x, a: n.head(h * a["strength"]), ("strength",), {"strength": 0.5}),
    "a float that decides": (lambda n, h, x, a: n.head(2 * h if a["strength"] > 1 else h), ("strength",), {}),
    "a float that switches off": (lambda n, h, x, a: n.head(h if a["strength"] else -h), ("strength",), {}),
    "a float in a tensor": (lambda n, h, x, a: n.head(h * torch.tensor(a["strength"])), ("strength",), {}),
    "an integer": (lambda n, h, x, a: n.head(h / a["number"]), ("number",), {}),
    "an index": (lambda n, h, x, a: n.head(h[:, a["number"], None].expand(-1, 4)), ("number",), {}),
    "a flag": (lambda n, h, x, a: n.head(-h if a["flag"] else h), ("flag",), {}),
    "a literal": (lambda n, h, x, a: n.head(h if a["mode"] == "a" else -h), ("mode",), {}),
    "a text": (lambda n, h, x, a: n.head(h if a["text"] == "x" else -h), ("text",), {}),
    "a number in a mapping": (
        lambda n, h, x, a: n.head(h * a["options"]["scale"]),
        ("options.scale",),
        {"options": {"scale": 0.5}},
    ),
    "a number in an object": (
        lambda n, h, x, a: n.head(h * a["extra"].factor),
        ("extra.factor",),
        {"extra": Holder(noise(2))},
    ),
    "a tensor in an object": (
        lambda n, h, x, a: n.head(h * a["extra"].tensor.mean()),
        ("extra",),
        {"extra": Holder(noise(2))},
    ),
    "two things": (lambda n, h, x, a: n.head(h * a["strength"] * len(x)), (SIZE, "strength"), {}),
    "the tokens": (lambda n, h, x, a: n.head(h * (x.shape[-2] / 4)), (SIZE,), {}),
    "all elements": (lambda n, h, x, a: n.head(h * x.numel()), (SIZE,), {}),
    "the batch": (lambda n, h, x, a: n.head(h * len(x)), (SIZE,), {}),
    "a size in a tensor": (lambda n, h, x, a: n.head(h * torch.ones(x.shape[1]).sum()), (SIZE,), {}),
    "the first size": (_of_the_first_size, (SIZE,), {}),
    "a buffer": (_in_a_buffer, (STATE,), {}),
    "a part of a buffer": (_in_a_part_of_a_buffer, (STATE,), {}),
    "another buffer": (_in_another_buffer, (STATE,), {}),
    "an earlier time": (_of_an_earlier_time, (STATE,), {}),
    "an attribute": (_in_an_attribute, (KEPT,), {}),
    "an attribute of the same sizes": (_that_only_calls_of_its_sizes_take, ("sample", KEPT), {}),
    "the first sample": (_of_the_first_sample, ("sample", KEPT), {}),
    "a counter": (_in_a_counter, (COUNT,), {}),
    "every third call": (_every_third_call, (COUNT,), {}),
    "a list": (_in_a_list, ("the state `history` of the model",), {}),
    "a number that was read": (_read_into_a_number, (COUNT,), {}),
    "chance": (lambda n, h, x, a: n.head(h * random.random()), ("something outside of the model",), {}),
}


#: Of each way to depend on more one, with several times in one run.
SEVERAL = (
    "a float",
    "a number in an object",
    "a size in a tensor",
    "a buffer",
    "an earlier time",
    "an attribute",
    "the first sample",
    "a counter",
    "chance",
)


@pytest.mark.parametrize(
    ("what", "times"), slow_but(product(REFUSED, [None, 3]), *product(REFUSED, [None]), *product(SEVERAL, [3]))
)
def test_a_layer_that_depends_on_more_than_the_time_is_refused_by_its_name(what: str, times: int | None) -> None:
    body, expected, given = REFUSED[what]
    _, block = found(body, times, **given)
    assert list(block.features) == ["time"]
    assert block.superseded() == {}
    assert set(block.depends["head"]) == set(expected)
    assert {"head": block.depends["head"]}.items() >= block.refused.items()
    with pytest.raises(tdq.TdqError, match=r"head.*its output depends on .* as well as on the time") as error:
        block.only(["head"])
    assert all(each in error.value.problem for each in expected)


def test_a_time_that_the_model_has_kept_is_not_the_time_of_the_call() -> None:
    _, block = found(_of_the_first_time)
    assert list(block.features) == ["time", "other"]
    assert block.depends["head"] == (KEPT,)


@pytest.mark.parametrize("flag", [False, True])
def test_layers_that_only_a_flag_calls_are_left_to_the_model(flag: bool) -> None:
    _, block = found(lambda n, h, x, a: n.head(n.other(h) if a["flag"] else h), flag=flag)
    assert list(block.features) == ["time"]
    assert block.refused == {"head": ("flag",), "other": ("flag",)}


def test_a_layer_that_only_a_flag_gives_the_sample_to_is_left_to_the_model() -> None:
    def body(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
        made: Tensor = net.head(hidden)
        return made + net.head(sample.mean(1)) if given["flag"] else made

    _, block = found(body)
    assert list(block.features) == ["time"]
    assert block.depends["head"] == ("sample",)


def test_a_model_of_which_nothing_is_left_has_no_block() -> None:
    class Scaled(Net):
        def forward(self, sample: Tensor, timestep: Tensor, strength: float = 1.0) -> Tensor:  # type: ignore[override]
            return sample + self.time(strength * timestep.reshape(-1, 1).expand(-1, 4))[:, None]  # type: ignore[no-any-return]

    model = Scaled(lambda n, h, x, a: h).eval()
    with pytest.raises(tdq.TdqError, match=r"no temporal block.*`time`, for one, also depends on strength"):
        tdq.find_temporal_block(model, call())


# what is still found


def _stashed(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    net.kept = hidden
    made: Tensor = net.head(net.kept)
    return made


def _positions_of_the_first_call(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    if net.kept is None:
        net.kept = torch.arange(4.0) / 10
    made: Tensor = net.head(hidden + net.kept)
    return made


def _positions_by_size(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
    tokens = sample.shape[1]
    if tokens not in net.cache:
        net.cache[tokens] = torch.linspace(0, 1, tokens)
    sample += net.cache[tokens][:, None]
    made: Tensor = net.head(hidden)
    return made


FOUND: dict[str, Body] = {
    "nothing else": lambda n, h, x, a: n.head(h),
    "numbers for the sample": lambda n, h, x, a: n.head(h) * a["strength"] * x.numel(),
    "rows for each token": lambda n, h, x, a: n.head(h.repeat_interleave(x.shape[1], 0))[:: x.shape[1]],
    "an attribute of this call": _stashed,
    "positions of the first call": _positions_of_the_first_call,
    "positions by size": _positions_by_size,
}


@pytest.mark.parametrize("times", [None, 3])
@pytest.mark.parametrize("what", FOUND)
def test_what_depends_on_the_time_alone_is_found(what: str, times: int | None) -> None:
    model, block = found(FOUND[what], times)
    assert list(block.features) == ["head"]
    assert list(block.superseded()) == ["time"]
    assert block.refused == {}
    model(**call())
    block = tdq.find_temporal_block(model, call(tokens=6), times=times)  # what the first call kept is there
    assert list(block.features) == ["head"]


def test_a_flag_may_choose_between_two_features() -> None:
    def body(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
        both = net.head(hidden), net.other(hidden)
        return both[given["flag"]]

    _, block = found(body)
    assert list(block.features) == ["head", "other"]
    assert list(block.superseded()) == ["time"]


@pytest.mark.parametrize("name", slow_but(CASES, "unet with classes", "dit", "pixart with sizes", "cogvideox"))
def test_on_real_models_nothing_is_refused(name: str) -> None:
    case = CASES[name]
    block = tdq.find_temporal_block(case.model(), case.arguments)
    assert block.refused == {}
    assert len(block.features) == case.number
    assert "return_dict" in block.proof.tried
    assert any(".shape[2]" in each or ".shape[1]" in each for each in block.proof.tried)


# the model afterwards


@pytest.mark.parametrize("needs_data", [False, True])
@pytest.mark.parametrize(
    "what", ["a buffer", "a part of a buffer", "another buffer", "an attribute", "a counter", "a list"]
)
def test_the_model_holds_what_it_held(what: str, needs_data: bool) -> None:
    inner = REFUSED[what][0]

    def body(net: Net, hidden: Tensor, sample: Tensor, given: dict[str, Any]) -> Tensor:
        made = inner(net, hidden, sample, given)
        if needs_data:
            float(sample.mean())
        net.added = sample  # type: ignore[assignment]
        return made

    torch.manual_seed(0)
    model = Net(body).eval()
    buffer = model.state
    tdq.find_temporal_block(model, call())
    assert model.state is buffer
    assert model.state.tolist() == [1.0] * 4
    assert (model.kept, model.count, model.cache, model.history) == (None, 0, {}, [])
    assert not hasattr(model, "added")
    model(**call())


def test_no_tensor_without_data_stays_in_a_cached_function() -> None:
    class Cached(Net):
        @functools.cache  # noqa: B019
        def positions(self, tokens: int) -> Tensor:
            return torch.linspace(0, 1, tokens)[:, None]

    model = Cached(lambda n, h, x, a: n.head(h) + n.positions(x.shape[1]).mean()).eval()  # type: ignore[attr-defined]
    expected = model(**call(tokens=16))
    model.positions.cache_clear()
    assert list(tdq.find_temporal_block(model, call()).features) == ["head"]
    assert torch.equal(model(**call(tokens=16)), expected)
    gc.collect()
    assert not any(isinstance(each, FakeTensor) for each in vars(model).values())


# maintained


def config(method: str, **fields: Any) -> dict[str, Any]:
    maintained = {"maintenance": "cache", "cache_bits": 32} if method == "tdq_temporal" else {}
    fast = {"statistic": "max", "weights": "max", "protect_steps": False, "progress": False}
    return {**fast_config(high_precision=()), "algorithm": {"method": method, **fast, **maintained, **fields}}


TIMES = (900.0, 600.0, 300.0)


def _set(model: nn.Module, state: float) -> None:
    """Let the model hold what earlier calls might have left."""
    model.state.fill_(state)  # type: ignore[operator,union-attr]
    model.kept, model.count, model.history = None, int(state), [torch.ones(())] * int(state)  # type: ignore[assignment]


def maintained(body: Body, other: dict[str, Any], state: float, **fields: Any) -> tuple[Net, nn.Module]:
    """In full precision and quantized; calibrated with the numbers, sizes and states of its defaults, and others."""
    torch.manual_seed(0)
    base = Net(body).eval()

    def forward_loop(model: nn.Module) -> None:
        for index, time in enumerate(TIMES):
            _set(model, 1.0)
            model(**call(index, time=time))
            _set(model, state)
            model(**{**call(index), **other, "timestep": torch.tensor(time)})

    return base, mtq.quantize(copy.deepcopy(base), config("tdq_temporal", **fields), forward_loop)


def sqnr(base: nn.Module, model: nn.Module, state: float, arguments: dict[str, Any]) -> float:
    for each in (base, model):
        _set(each, state)
    reference, output = base(**arguments), model(**arguments)
    return float(10 * torch.log10(reference.square().sum() / (output - reference).square().sum()))


#: Another number, size or state than in the first call of the calibration.
OTHER: dict[str, tuple[dict[str, Any], float]] = {
    "a float": ({"strength": 4.0}, 1.0),
    "an integer": ({"number": 1}, 1.0),
    "a flag": ({"flag": True}, 1.0),
    "a literal": ({"mode": "b"}, 1.0),
    "a text": ({"text": "y"}, 1.0),
    "the tokens": (call(tokens=32), 1.0),
    "the batch": (call(batch=6), 1.0),
    "a buffer": ({}, 4.0),
    "a counter": ({}, 4.0),
    "a list": ({}, 4.0),
}


@pytest.mark.parametrize("what", OTHER)
@torch.no_grad()
def test_a_maintained_model_is_right_with_other_numbers_sizes_and_states(what: str) -> None:
    body, expected, _ = REFUSED[what]
    other, state = OTHER[what]
    base, model = maintained(body, other, state)
    assert list(tdq.feature_table(model).features) == ["time"]
    assert sqnr(base, model, 1.0, call(seed=9)) > 20.0
    arguments = {**call(seed=9), **other}
    assert sqnr(base, model, state, arguments) > 20.0
    layers = copy.deepcopy(model)
    tdq.remove_features(layers)
    assert math.isinf(sqnr(layers, model, state, arguments))  # bit for bit what the layers themselves compute
    report = tdq.temporal_report(model)
    assert report.refused == {"head": expected}
    reason = expected[0] if " " in expected[0] else f"`{expected[0]}`"
    assert f"head is no temporal feature: besides the time it depends on {reason}." in str(report)
