"""The hard cases: in-place operators, views, values read into Python, layers that run twice, odd forms of the time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from support.models import FAMILIES, SMALL_UNET, fast_config, noise
from support.unchanged import picture, same
from temporal_models import CASES, UNET
from torch import Tensor, nn

from modelopt_tdq import Feature, FeatureTable, TdqError, TemporalBlock, find_temporal_block
from modelopt_tdq.model.timestep import find_timestep
from modelopt_tdq.temporal_features.runtime import install_features

TIMES = (20.0, 437.0, 900.0)

Body = Callable[["Net", Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Three layers of width 4 and a way to use them; the time comes in as [1, 4] or [B, 4]."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.table = nn.Parameter(torch.randn(4))
        self.embedding = nn.Embedding(3, 4)
        self.body = body

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        time = torch.as_tensor(timestep).to(sample).reshape(-1, 1) / 1000
        return self.body(self, sample, torch.cat([time, time.square(), time.sin(), time.cos()], 1))


def find(body: Body, times: int | None = 3, time: Any = 600.0) -> tuple[Net, TemporalBlock]:
    torch.manual_seed(0)
    model = Net(body).eval()
    return model, find_temporal_block(model, {"sample": noise(2, 4), "timestep": time}, times=times)


@torch.no_grad()
def check(model: nn.Module, block: TemporalBlock, *, sample: Tensor | None = None) -> None:
    """With its features in a table, and what is superseded broken, the model computes what it computed before."""
    sample = noise(2, 4, seed=9) if sample is None else sample
    times = torch.tensor(TIMES)
    computed = block.compute(model, times)
    expected = [model(sample, time) for time in times]
    table = FeatureTable(times, {name: Feature(value) for name, value in computed.items()})
    looked_up = copy.deepcopy(model)
    install_features(looked_up, table, block.superseded(), "timestep")
    for name in [*block.features, *block.superseded()]:
        for parameter in looked_up.get_submodule(name).parameters():
            parameter.fill_(torch.nan)
    for time, output in zip(times, expected, strict=True):
        torch.testing.assert_close(looked_up(sample, time), output)


def test_a_sum_in_place_depends_on_what_was_added() -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        made = net.first(time).repeat(len(sample) // len(time), 1)
        made += sample
        return net.last(made)

    model, block = find(body)
    assert list(block.features) == ["first"]
    assert block.depends == {"last": ("sample",)}
    check(model, block)


def test_a_view_that_was_taken_before_an_operator_in_place_changes_with_it() -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        made = net.first(time).repeat(len(sample) // len(time), 1)
        view = made.view(-1, 2, 2)[:, 1]
        made[:, 3] = sample[:, 0]
        return net.last(torch.cat([view, view], 1))

    model, block = find(body)
    assert list(block.features) == ["first"]
    assert block.depends == {"last": ("sample",)}
    check(model, block)


@pytest.mark.parametrize("times", [3, None])
def test_an_operator_in_place_after_a_feature_is_not_part_of_it(times: int | None) -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        return sample + torch.nn.functional.silu(net.second(net.first(time).mul_(3)), inplace=True)

    model, block = find(body, times)
    assert block.layers == ("first", "second")
    assert list(block.features) == ["second"]
    check(model, block)


@pytest.mark.parametrize("times", [3, None])
def test_what_is_written_through_views_is_on_the_tape(times: int | None) -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        made = torch.zeros(len(time), 4)
        made[:, :2] = net.first(time)[:, 2:]
        made.view(-1, 2, 2)[:, 1] = net.second(time)[:, :2]
        return sample + net.last(made)

    model, block = find(body, times)
    assert block.layers == ("first", "second", "last")
    assert list(block.features) == ["last"]
    check(model, block)


def test_a_time_that_the_model_changes_in_place_is_nobody_elses() -> None:
    class Scaling(Net):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            timestep /= 1000
            return sample + self.first(timestep.reshape(-1, 1).expand(-1, 4))

    model, given = Scaling(lambda *_: noise(1)).eval(), torch.tensor([600.0, 600.0])
    block = find_temporal_block(model, {"sample": noise(2, 4), "timestep": given}, times=None)
    times = torch.tensor(TIMES)
    computed = block.compute(model, times)["first"]
    assert given.tolist() == [600.0, 600.0]
    assert times.tolist() == list(TIMES)
    torch.testing.assert_close(computed, model.first((times / 1000).reshape(-1, 1).expand(-1, 4)))


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda value: value.flatten()[0].item(),
    "float": lambda value: float(value.sum()),
    "bool": lambda value: bool((value > 5).all()),
    "tolist": lambda value: value.tolist(),
    "numpy": lambda value: value.numpy(),
    "equal": lambda value: torch.equal(value, torch.zeros_like(value)),
    "nonzero": lambda value: value.nonzero().shape,
    "mask": lambda value: value[value > 0].shape,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_after_the_sample_was_read_nothing_counts(read: Callable[[Tensor], Any]) -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        made = net.second(net.first(time))
        read(sample)
        return sample + made + net.last(time)

    model, block = find(body)
    assert list(block.features) == ["second"]
    assert block.depends == {"last": ("sample",)}
    check(model, block)
    with pytest.raises(TdqError, match=r"last.*depends on `sample` as well as on the time"):
        block.only(["last"])


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_after_the_time_was_read_nothing_can_be_computed_for_another(read: Callable[[Tensor], Any]) -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        made = net.first(time)
        read(time)
        return sample + made + net.last(time)

    model, block = find(body)
    assert list(block.features) == ["first"]
    assert block.depends == {"last": ("timestep.item()",)}
    check(model, block)


def test_a_layer_whose_output_is_read_is_computed_from_what_it_needs() -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        hidden = net.first(time)
        made = net.last(hidden)
        return (sample + made) * (2.0 if float(net.second(hidden).sum()) > 0 else 1.0)

    model, block = find(body)
    assert set(block.features) == {"second", "last"}
    check(model, block)


def test_a_layer_that_also_sees_the_sample_runs_and_so_does_what_it_needs() -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        hidden = net.first(time)
        shared = net.second(hidden.sigmoid())
        return net.second(sample) * shared + net.last(hidden)

    model, block = find(body)
    assert list(block.features) == ["first", "last"]
    assert block.depends == {"second": ("sample",)}
    check(model, block)


def test_a_layer_that_also_sees_the_sample_on_the_way_to_a_feature_keeps_its_weights() -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        return net.second(sample) + net.last(net.second(net.first(time)))

    model, block = find(body)
    assert block.layers == ("first", "second", "last")
    assert list(block.features) == ["last"]
    assert block.kept == {"second"}
    assert list(block.superseded()) == ["first"]
    assert block.parameters == 2 * 20
    check(model, block)


def test_a_layer_that_runs_with_two_functions_of_the_time_is_refused() -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        return sample * net.first(time) + net.first(2 * time)

    model, block = find(body)
    with pytest.raises(TdqError, match=r"first.*runs several times in one call of the model, with different results"):
        block.compute(model, torch.tensor(TIMES))


def test_so_is_one_that_also_runs_on_a_time_of_zero() -> None:
    """Condition images and texts may have no noise; the call does not depend on the time, and its result is another."""

    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        still = torch.zeros(len(sample), 4, dtype=sample.dtype)
        return sample * net.first(time) + net.first(still)

    model, block = find(body)
    assert list(block.features) == ["first"]
    with pytest.raises(TdqError, match=r"first.*runs several times in one call of the model, with different results"):
        block.compute(model, torch.tensor(TIMES))


def test_what_is_added_to_an_embedded_time_of_zero_is_a_feature() -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        still = net.first(torch.zeros(1, 4, dtype=sample.dtype))
        return sample * net.last(net.second(time) + still)

    model, block = find(body)
    assert list(block.features) == ["last"]
    assert block.kept == {"first"}
    check(model, block)


def test_a_layer_that_runs_twice_on_the_same_is_one_feature() -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        return sample * net.first(time) + net.first(time)

    model, block = find(body)
    assert list(block.features) == ["first"]
    assert block.multiply_adds == 2 * 16
    check(model, block)


def test_flex_attention_of_the_samples_is_no_obstacle() -> None:
    """It takes functions, and compiles itself where nothing watches."""
    from torch.nn.attention import flex_attention as module

    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        tokens = sample.reshape(len(sample), 1, 1, 4).expand(-1, -1, 4, -1)
        attended = module.flex_attention(tokens, net.second(tokens), tokens)
        return attended.mean((1, 2)) * net.first(time)

    model, block = find(body)
    assert list(block.features) == ["first"]
    assert module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG is False
    check(model, block)


def test_a_model_that_uses_its_time_with_the_sample_only_has_no_block() -> None:
    with pytest.raises(TdqError, match=r"`timestep` alone; `first`, for one, also depends on sample.*\"tdq\""):
        find(lambda net, sample, time: net.first(sample + time))
    with pytest.raises(TdqError, match="it has no temporal block"):
        find(lambda net, sample, time: net.first(sample))


def test_without_the_argument_of_the_time() -> None:
    model = Net(lambda net, sample, time: sample + net.first(time))
    with pytest.raises(TdqError, match=r"sigma.*not among the arguments of the call"):
        find_temporal_block(model, {"sample": noise(2, 4), "timestep": 3}, "sigma")


def test_a_model_that_takes_one_time_for_the_batch() -> None:
    class OneTime(Net):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            if timestep.dim():
                raise ValueError("one time, please")
            return super().forward(sample, timestep)

    model = OneTime(lambda net, sample, time: sample + net.second(net.first(time)).expand(len(sample), 4)).eval()
    block = find_temporal_block(model, {"sample": noise(2, 4), "timestep": torch.tensor(600.0)}, times=3)
    assert (block.tape.times, block.tape.shape) == (1, ())
    check(model, block)


def test_an_output_without_a_batch_is_refused() -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        return sample + net.first(time[0])

    model, block = find(body)
    with pytest.raises(TdqError, match=r"first.*the first dimension of its output is not the batch"):
        block.compute(model, torch.tensor(TIMES))


def test_random_numbers_are_not_known_before() -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        return sample + net.second(torch.nn.functional.dropout(net.first(time)))

    _, block = find(body)
    assert list(block.features) == ["first"]
    assert block.depends == {"second": ("random numbers",)}


def test_parameters_and_layers_of_constants_on_the_way() -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        places = net.embedding(torch.arange(3)).sum(0)
        return sample + net.last(net.first(time) + net.table + places)

    model, block = find(body)
    assert list(block.features) == ["last"]
    assert block.tape.parameters == ("table",)
    assert block.kept == {"embedding"}
    assert list(block.superseded()) == ["first"]
    check(model, block)


def test_a_part_leaves_alone_what_the_other_features_need() -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        hidden = net.first(time)
        return sample * net.second(hidden) + net.last(hidden)

    model, block = find(body)
    part = block.only(["last"])
    assert part.layers == ("first", "last")
    assert part.superseded() == {}
    assert (part.parameters, part.multiply_adds) == (20, 16)
    assert (block.parameters, block.multiply_adds) == (60, 48)
    assert list(block.superseded()) == ["first"]
    check(model, part)
    check(model, block)
    with pytest.raises(TdqError, match=r"first.*no temporal feature of this model.*second, last"):
        block.only(["first"])


@functools.cache
def _of_a_unet() -> tuple[nn.Module, TemporalBlock, dict[str, Tensor]]:
    """A model, the block that a call as in its calibration gives, and what that computes at ``TIMES``."""
    torch.manual_seed(0)
    model = SMALL_UNET.make().eval()
    block = find_temporal_block(model, SMALL_UNET.data(times=(600.0,))[0])
    return model, block, block.compute(model, torch.tensor(TIMES))


@pytest.mark.parametrize("times", [1, 5, None])
@pytest.mark.parametrize(
    "time",
    [600, 600.5, torch.tensor(600), torch.tensor(600.5), torch.tensor([600.0]), torch.tensor([600.0, 600.0, 600.0])],
    ids=["int", "float", "[] int", "[]", "[1]", "[B]"],
)
def test_every_form_of_the_time_gives_the_same_block(time: Any, times: int | None) -> None:
    model, reference, rows = _of_a_unet()
    block = find_temporal_block(model, {"sample": noise(3, 3, 8, 8), "timestep": time}, times=times)
    assert block.layers == reference.layers
    assert block.features == reference.features
    assert (block.parameters, block.multiply_adds) == (reference.parameters, reference.multiply_adds)
    found = block.compute(model, torch.tensor(TIMES))
    assert found.keys() == rows.keys()
    for name, value in rows.items():
        torch.testing.assert_close(found[name], value)


def test_a_batch_of_one() -> None:
    for case in CASES.values():
        if case.arguments["timestep"] is not CASES["unet with classes"].arguments["timestep"]:
            continue
        one = {name: value[:1] for name, value in case.arguments.items()}
        model = case.model()
        for times in (4, None):
            assert len(find_temporal_block(model, one, times=times).features) == case.number


def test_the_weights_need_no_memory() -> None:
    with torch.device("meta"):
        model = CASES["stable diffusion"].make()
    block = find_temporal_block(model, CASES["stable diffusion"].arguments, times=50)
    assert len(block.features) == 8
    assert (block.parameters, block.multiply_adds) == (4776, 4608)


def test_weights_and_products_are_counted() -> None:
    heads, channels = (8, 16, 16, 16, 16, 16, 8, 8), 8
    hidden = 4 * channels
    products = channels * hidden + hidden * hidden + sum(hidden * width for width in heads)
    weights = products + 2 * hidden + sum(heads)
    block = find_temporal_block(CASES["unet"].model(), CASES["unet"].arguments, times=7)
    assert UNET["block_out_channels"][0] == channels
    assert list(block.features.values()) == [(width,) for width in heads]
    assert (block.parameters, block.multiply_adds) == (weights, products)


def test_a_shared_weight_is_counted_once() -> None:
    def body(net: Net, sample: Tensor, time: Tensor) -> Tensor:
        return sample + net.last(net.first(time))

    torch.manual_seed(0)
    model = Net(body).eval()
    model.last.weight = model.first.weight
    block = find_temporal_block(model, {"sample": noise(2, 4), "timestep": 3})
    assert block.parameters == 16 + 4 + 4
    assert block.multiply_adds == 32


def test_training_mode_and_quantizers_are_as_they_were() -> None:
    family = FAMILIES["unet"]
    model = mtq.quantize(family.make().eval(), fast_config(high_precision=()), family.forward_loop())
    model.train()
    model.mid_block.eval()
    data = family.data()[0]
    model(**data)
    before, enabled = picture(model), [m.is_enabled for m in model.modules() if isinstance(m, TensorQuantizer)]
    time = find_timestep(model)
    assert time is not None
    current = time.value
    block = find_temporal_block(model, data, times=2)
    with torch.no_grad():
        found = block.compute(model, torch.tensor([20.0, 600.0, 900.0]))
    assert time.value is current
    after = picture(model)
    assert all(same(before[name], after[name]) for name in before)
    assert any(enabled)
    # the layers run as they are: with their quantizers, each with its own time
    head = "mid_block.resnets.0.time_emb_proj"
    seen: list[Tensor] = []
    hook = model.get_submodule(head).register_forward_hook(lambda module, args, output: seen.append(output[0]))
    for each in (20.0, 600.0, 900.0):
        model(data["sample"], torch.tensor(each))
    hook.remove()
    torch.testing.assert_close(found[head], torch.stack(seen))


def test_gradients_reach_the_weights() -> None:
    model, block = find(lambda net, sample, time: sample + net.last(net.first(time).relu_()))
    block.compute(model, torch.tensor(TIMES))["last"].square().sum().backward()
    assert all(float(layer.weight.grad.abs().sum()) > 0 for layer in (model.first, model.last))
