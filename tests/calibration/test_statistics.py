"""Histograms per time: exact whatever the order and the grouping, of bounded size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modelopt.torch.quantization.calib import MaxCalibrator
from torch import Tensor

from modelopt_tdq import TdqError
from modelopt_tdq.calibration.statistics import BINS, ActivationStatistics, StepStatistics
from modelopt_tdq.model.timestep import CurrentTimestep

#: Zero, or of a magnitude that stays a normal float32 number under any scaling that a histogram does.
_value = st.just(0.0) | st.floats(2.0**-60, 2.0**30, width=32).flatmap(lambda v: st.sampled_from([v, -v]))
_chunk = st.lists(_value, min_size=1, max_size=20)


def _collector(max_steps: int = 100) -> tuple[StepStatistics, CurrentTimestep]:
    timestep = CurrentTimestep("timestep", 1)
    return StepStatistics("layer.input_quantizer", timestep, max_steps), timestep


def _collected(chunks: list[tuple[float, list[float]]]) -> ActivationStatistics:
    collector, timestep = _collector()
    for time, chunk in chunks:
        timestep.begin(torch.tensor([time]))
        collector.collect(torch.tensor(chunk))
    return collector.statistics(sorted(collector.times))


def _same(one: ActivationStatistics, other: ActivationStatistics) -> bool:
    return all(
        torch.equal(torch.as_tensor(getattr(one, field)), torch.as_tensor(getattr(other, field)))
        for field in ("counts", "exponent", "low", "high")
    )


@given(st.lists(_chunk, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_order_and_grouping_change_nothing(chunks: list[list[float]], random: np.random.Generator) -> None:
    """A histogram that was widened step by step equals one that had its width from the start."""
    everything = [value for chunk in chunks for value in chunk]
    expected = _collected([(0.0, everything)])
    random.shuffle(chunks)
    assert _same(_collected([(0.0, chunk) for chunk in chunks]), expected)
    assert _same(_collected([(0.0, [value]) for value in everything]), expected)


@given(_chunk)
def test_each_value_is_in_its_exact_bin(values: list[float]) -> None:
    found = _collected([(5.0, values)])
    exponent = int(torch.as_tensor(found.exponent).max())
    bins = np.floor(np.array(values, dtype=np.float64) * 2.0 ** (np.log2(BINS) - 1 - exponent)).astype(int) + BINS // 2
    np.testing.assert_array_equal(found.counts[0].numpy(), np.bincount(bins, minlength=BINS))
    assert float(found.low[0]) == min(values)
    assert float(found.high[0]) == max(values)


def test_times_do_not_mix() -> None:
    found = _collected([(3.0, [1.0, 2.0]), (1.0, [-8.0]), (3.0, [0.5])])
    assert found.counts.sum(1).tolist() == [1, 3]
    assert found.amax.tolist() == [8.0, 2.0]
    assert found.low.tolist() == [-8.0, 0.5]


def test_counts_beyond_what_float32_can_count() -> None:
    """More equal values in one batch than torch.histc counts: 2^24."""
    collector, timestep = _collector()
    timestep.begin(torch.tensor([1.0]))
    number = (1 << 24) + 4096
    collector.collect(torch.full((1, 1), 0.25).expand(1, number))
    assert float(collector.statistics([1.0]).counts.sum()) == number


def test_memory_is_that_of_the_times() -> None:
    def kept(samples: int) -> int:
        collector, timestep = _collector()
        for i in range(samples):
            timestep.begin(torch.tensor([float(i % 3)]))
            collector.collect(torch.randn(4, 10))
        rows = [{**vars(row), **vars(row.histogram)}.values() for row in collector._rows.values()]
        return sum(value.numel() if isinstance(value, Tensor) else 1 for row in rows for value in row)

    assert kept(3) == kept(60)


@given(st.lists(_chunk, min_size=1, max_size=4))
def test_the_maximum_is_that_of_modelopts_calibrator(chunks: list[list[float]]) -> None:
    collector, timestep = _collector()
    theirs = MaxCalibrator()
    for time, chunk in enumerate(chunks):
        timestep.begin(torch.tensor([float(time)]))
        collector.collect(torch.tensor(chunk))
        theirs.collect(torch.tensor(chunk))
    found = collector.compute_amax()
    assert found is not None
    assert torch.equal(found, theirs.compute_amax())
    assert torch.equal(collector.statistics(sorted(collector.times)).amax.max(), found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_collected_as_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 50).to(dtype)
    results = []
    for value in (x, x.float()):
        collector, timestep = _collector()
        timestep.begin(torch.tensor([1.0]))
        collector.collect(value)
        results.append(collector.statistics([1.0]))
    assert _same(*results)


def test_a_time_per_sample_is_each_sample_by_itself() -> None:
    x, times = torch.randn(6, 7), [5.0, 2.0, 5.0]  # two rows of x for every time
    together, timestep = _collector()
    timestep.begin(torch.tensor(times))
    together.collect(x)
    apart, timestep = _collector()
    for i, time in enumerate(times):
        timestep.begin(torch.tensor([time]))
        apart.collect(x[2 * i : 2 * i + 2])
    assert together.times == apart.times == {2.0, 5.0}
    assert _same(together.statistics([2.0, 5.0]), apart.statistics([2.0, 5.0]))


@pytest.mark.parametrize("shape", [(3, 4), ()])
def test_times_that_do_not_fit_are_refused_as_the_quantizer_will_refuse_them(shape: tuple[int, ...]) -> None:
    collector, timestep = _collector()
    timestep.begin(torch.tensor([2.0, 2.0]))
    collector.collect(torch.ones(shape))  # one time for all
    assert collector.times == {2.0}
    timestep.begin(torch.tensor([1.0, 2.0]))
    with pytest.raises(TdqError, match=r"layer\.input_quantizer") as error:
        collector.collect(torch.ones(shape))
    assert error.value.field == "timestep"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    collector, timestep = _collector()
    timestep.begin(torch.tensor([40.0]))
    with pytest.raises(TdqError, match=r"layer\.input_quantizer held NaN or infinity at time 40|at time 40"):
        collector.collect(torch.tensor([1.0, value]))


@pytest.mark.parametrize("sample", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_sample_of_a_batch_that_is_not_finite(value: float, sample: int) -> None:
    collector, timestep = _collector()
    timestep.begin(torch.tensor([40.0]))
    batch = torch.randn(3, 4)
    batch[sample, 1] = value
    with pytest.raises(TdqError, match=r"held NaN or infinity at time 40"):
        collector.collect(batch)


def test_more_times_than_allowed() -> None:
    collector, timestep = _collector(max_steps=2)
    for time in (1.0, 2.0, 1.0):
        timestep.begin(torch.tensor([time]))
        collector.collect(torch.ones(1))
    timestep.begin(torch.tensor([3.0]))
    with pytest.raises(TdqError, match="max_steps"):
        collector.collect(torch.ones(1))


def test_outside_of_any_call() -> None:
    collector, _ = _collector()
    with pytest.raises(TdqError, match="outside of any call"):
        collector.collect(torch.ones(1))
    assert collector.compute_amax() is None


def test_zeros_and_the_smallest_numbers() -> None:
    found = _collected([(1.0, [0.0, 0.0]), (2.0, [1e-44, -1e-44, 3e38])])
    assert found.counts.sum(1).tolist() == [2, 3]
    assert found.amax.tolist() == [0.0, pytest.approx(3e38)]


def test_reset_forgets_everything() -> None:
    collector, timestep = _collector()
    timestep.begin(torch.tensor([1.0]))
    collector.collect(torch.ones(1))
    collector.reset()
    assert collector.times == set()
