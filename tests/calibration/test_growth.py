"""How ranges grow with samples: the mean over all halves, whatever the order, and a margin that follows from it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import calls, quantized

from modelopt_tdq.calibration.columns import columns
from modelopt_tdq.calibration.growth import LargestSamples, common_growth, mean_growth
from modelopt_tdq.calibration.statistics import StepStatistics
from modelopt_tdq.config import TdqCalibConfig
from modelopt_tdq.core.fake_quant import fake_quantize
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.timestep import CurrentTimestep

_magnitudes = st.lists(st.floats(2.0**-20, 2.0**20), min_size=2, max_size=9)


@given(_magnitudes)
def test_it_is_what_the_better_half_of_the_samples_lacks_on_average(magnitudes: list[float]) -> None:
    half = len(magnitudes) // 2
    halves = [max(chosen) for chosen in itertools.combinations(magnitudes, half)]
    lacking = math.log(max(magnitudes)) - sum(map(math.log, halves)) / len(halves)
    doublings = math.log2(len(magnitudes) / half)
    found = LargestSamples(len(magnitudes), magnitudes).growth()
    assert found == pytest.approx(lacking / doublings, rel=1e-9, abs=1e-12)


@given(st.lists(_magnitudes, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_order_grouping_and_processes_change_nothing(groups: list[list[float]], random: Any) -> None:
    everything = [magnitude for group in groups for magnitude in group]
    expected = LargestSamples(len(everything), everything).growth()
    random.shuffle(groups)
    together, parts = LargestSamples(), []
    for group in groups:
        together.add(group)
        parts.append(LargestSamples(len(group), group))
    assert together.growth() == expected
    assert mean_growth([parts]) == expected


def test_exponential_tails_grow_as_the_harmonic_numbers() -> None:
    """The largest of n values e^x, x exponential, has the logarithm 1 + 1/2 + ... + 1/n on average."""
    generator = torch.Generator().manual_seed(0)
    for samples in (4, 16, 256):
        rows = [torch.empty(samples).exponential_(generator=generator).exp().tolist() for _ in range(2000)]
        found = mean_growth([[LargestSamples(samples, row)] for row in rows])
        expected = sum(1 / n for n in range(samples // 2 + 1, samples + 1))
        assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("magnitudes", [[], [3.0], [2.0, 2.0, 2.0], [0.0, 0.0]])
def test_too_few_samples_or_equal_ones_ask_for_nothing(magnitudes: list[float]) -> None:
    assert mean_growth([[LargestSamples(len(magnitudes), magnitudes)]]) == 0.0


def _observed(batches: list[torch.Tensor]) -> Any:
    timestep = CurrentTimestep("timestep", 1)
    collector = StepStatistics("layer.input_quantizer", timestep, 10)
    for batch in batches:
        timestep.begin(torch.tensor([1.0]))
        collector.collect(batch)
    return collector.statistics([1.0])


def test_samples_are_the_entries_of_the_first_dimension_however_they_are_batched() -> None:
    x = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = LargestSamples(6, x.abs().amax((1, 2)).tolist()).growth()
    assert expected is not None
    for batches in ([x], list(x.split(2)), [x.flip(0)]):
        assert _observed(batches).growth == expected > 0.01


def test_auto_makes_room_where_few_samples_tell_the_range_and_none_where_all_tell_the_same() -> None:
    from modelopt_tdq.calibration.choose import Evidence

    generator = torch.Generator().manual_seed(1)
    sizes = (0.5 * torch.randn(204, 1, generator=generator)).exp()
    varied = sizes * torch.randn(204, 512, generator=generator)
    alike = torch.randn(4, 1, 512, generator=generator).clamp(-2, 2)
    config = {
        margin: TdqCalibConfig(statistic="max", bins=1, margin=margin, progress=False) for margin in (0.0, "auto")
    }

    def scales(x: torch.Tensor) -> list[float]:
        evidence = Evidence(_observed([x]), 8, False)
        return [float(columns(evidence, config[margin], True)[0][0]) for margin in (0.0, "auto")]

    plain, wide = scales(varied[:4])
    assert 1.1 < wide / plain < 2.0
    errors = [
        float((fake_quantize(varied[4:], torch.tensor(scale), None, 8) - varied[4:]).square().mean())
        for scale in (plain, wide)
    ]
    assert errors[1] < 0.5 * errors[0]
    plain, wide = scales(alike)
    assert wide == plain


def test_what_grows_is_taken_to_grow_as_the_mean_and_what_does_not_as_itself() -> None:
    found = common_growth({"a": 0.02, "b": 0.1, "c": 0.3, "embedding": 0.0, "almost": 1e-6})
    assert found == pytest.approx({"a": 0.14, "b": 0.14, "c": 0.14, "embedding": 0.0, "almost": 1e-6})
    assert common_growth({}) == {}
    assert common_growth({"embedding": 0.0}) == {"embedding": 0.0}


def test_the_table_has_one_margin_which_a_time_embedding_does_not_need() -> None:
    """Four samples per time: the largest two of four tell."""
    import modelopt_tdq as tdq

    plain, wide = (tdq.scale_table(quantized(data=calls(4), margin=margin)) for margin in (0.0, "auto"))
    ratio = wide.scale / plain.scale
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0.0)
    grown = ratio[0][ratio[0] > 1.001]
    assert len(grown) > 1
    torch.testing.assert_close(grown, grown[:1].expand_as(grown), rtol=1e-5, atol=0.0)


def test_another_word_is_refused() -> None:
    with pytest.raises(TdqError, match="margin"):
        quantized(margin="automatic")
