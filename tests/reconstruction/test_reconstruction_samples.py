"""Which samples are taken, and whether they are enough."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import reconstructed
from support.models import SMALL_UNET_CONDITION, TIMES, TinyDenoiser, at, calls, fast_config, noise
from torch import nn

from modelopt_tdq import TdqError
from modelopt_tdq.model.timestep import deliver_timestep
from modelopt_tdq.reconstruction.observe import observe, probe
from modelopt_tdq.reconstruction.samples import Samples, SpreadReplay


def _recorded(data: Any, total: int) -> Samples:
    model = TinyDenoiser().eval()
    replay = SpreadReplay(model, deliver_timestep(model, "timestep"), total)

    def forward_loop(model: nn.Module) -> None:
        for sample, time in data:
            model(sample, time)
            held = sum(len(heap) for heap in replay._heaps.values())
            assert held <= total + len(replay._heaps)

    with torch.no_grad():
        replay.recorded(forward_loop)(model)
    assert not [h for h in model._forward_pre_hooks.values() if "record" in repr(h)]
    return replay.chosen()


@given(total=st.integers(1, 40), times=st.integers(1, 9), each=st.integers(1, 6))
def test_spread_evenly_over_the_times(total: int, times: int, each: int) -> None:
    data = [(noise(each, 3, 8, 8, seed=i), torch.tensor(float(10 * i))) for i in range(times)]
    samples = _recorded(data, total)
    counts = [int((samples.times == 10.0 * i).sum()) for i in range(times)]
    assert len(samples) == sum(counts) <= total
    if total <= times * each and total % times == 0:
        assert set(counts) == {total // times}
    share = total / times
    assert all(int(share) <= c <= -(-total // times) for c in counts if share <= each)
    if total < times:
        chosen = samples.times.div(10).tolist()
        gaps = [b - a for a, b in pairwise(chosen)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_the_same_samples_whatever_the_order_and_the_batch() -> None:
    one = _recorded(calls(4, 2), 8)
    other = _recorded(calls(4, 4, order=[3, 1, 0, 2])[::-1], 8)
    assert torch.equal(one.times, other.times)
    for a, b in zip(one.calls, other.calls, strict=True):
        assert torch.equal(a["sample"], b["sample"])


def test_batches_keep_each_time_apart_unless_the_model_takes_several() -> None:
    scalar = _recorded(calls(4, 2), 16)
    batches = list(scalar.batches(range(16), 3))
    assert [len(numbers) for numbers, _ in batches] == [3, 1] * 4
    vector = _recorded([(x, t.expand(len(x))) for x, t in calls(4, 2)], 16)
    mixed = list(vector.batches(range(16), 6))
    assert [len(numbers) for numbers, _ in mixed] == [6, 6, 4]
    for numbers, call in mixed:
        assert torch.equal(call["timestep"], vector.times[numbers])
        assert torch.equal(call["sample"], torch.cat([vector.calls[i]["sample"] for i in numbers]))


@pytest.mark.parametrize("fields", [{"intervals": "table"}, {"intervals": "table", "bins": 3}, {"intervals": "thin"}])
def test_too_few_samples_for_the_times(fields: dict[str, Any]) -> None:
    few = 1 if fields["intervals"] == "thin" else 2
    with pytest.raises(TdqError, match="without enough samples for its times") as error:
        reconstructed(samples=few, **fields)
    assert error.value.field == "samples"
    assert error.value.value == few
    assert "static" in error.value.cure
    reconstructed(samples=4, iterations=5, **fields)
    reconstructed(samples=1, iterations=5, intervals="static")


def test_says_which_interval_has_none() -> None:
    with pytest.raises(TdqError, match=r"conv1.input_quantizer at time 20, nor for those of 2 others"):
        reconstructed(samples=2, intervals="table")


def test_inputs_of_a_block_sample_by_sample() -> None:
    """A block inside a transformer: hidden states, text, keyword arguments, and what is no tensor."""
    torch.manual_seed(0)
    family = SMALL_UNET_CONDITION
    model = mtq.quantize(family.make().eval(), fast_config(), family.forward_loop(2))
    replay = SpreadReplay(model, deliver_timestep(model, "timestep"), 8)
    replay.recorded(family.forward_loop(2))(model)
    samples = replay.chosen()
    name = "mid_block.attentions.0.transformer_blocks.0"
    io = probe(model, name, samples)
    assert len(io.shapes) == 2  # hidden states and text
    numbers, call = next(samples.batches(range(8), 2))
    leaves, _, outputs = observe(model, name, call, outputs=True)
    assert outputs is not None
    inputs = io.input_samples(leaves, len(numbers))
    expected = io.output_samples(outputs, len(numbers))
    assert [len(v) for v in inputs] == [2, 2]
    with torch.no_grad(), at(model, call["timestep"]):
        again = io.run(model.get_submodule(name), inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert io.bytes_per_sample(1) == sum(v[0].numel() * 4 for v in inputs + expected)


def test_times() -> None:
    assert sorted(TIMES) == sorted(set(_recorded(calls(), 16).times.tolist()))
