"""Offsets: never worse than none, whole multiples of the scale, judged exactly as they are used."""

from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.evidence import evidence, squared_error, statistics
from support.models import TinyDenoiser, calls, fast_config, loop
from torch import Tensor

import modelopt_tdq as tdq
from modelopt_tdq.calibration.candidates import candidate_grid, histogram_error
from modelopt_tdq.calibration.choose import Evidence, choose_rows
from modelopt_tdq.calibration.columns import columns, worth_an_offset
from modelopt_tdq.calibration.pooling import bin_pooling, smoothing_pooling, uniform_bins
from modelopt_tdq.calibration.statistics import BINS
from modelopt_tdq.config import TdqCalibConfig
from modelopt_tdq.core.fake_quant import code_range, fake_quantize

K = 6

#: Shapes of activations, of one number for the time in [0, 1].
_SHAPES = {
    "shifted": lambda x, t: x + 1.0,
    "drifting": lambda x, t: x + 3.0 - 6.0 * t,
    "silu": lambda x, t: torch.nn.functional.silu(2.0 * x),
    "negative": lambda x, t: -torch.nn.functional.gelu(2.0 * x),
    "positive": lambda x, t: x.abs() + 0.2,
    "symmetric": lambda x, t: x,
    "heavy": lambda x, t: x**3 + 0.3,
}


def _activations(shape: str, ratio: float, seed: int = 0) -> list[Tensor]:
    """K rows of 4096 values whose range moves by ``ratio``."""
    generator = torch.Generator().manual_seed(seed)
    times = [i / (K - 1) for i in range(K)]
    return [_SHAPES[shape](torch.randn(4096, generator=generator), t) * ratio**t for t in times]


_decibels = 10.0 ** (0.1 / 10.0)
_POOLINGS = {
    "per row": torch.eye(K).double(),
    "smoothed": smoothing_pooling(K, 0.2),
    "bins": bin_pooling(uniform_bins(K, 3)),
    "static": torch.ones(K, K).double(),
}


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from(sorted(_SHAPES)),
    st.sampled_from([1.0, 4.0, 24.0, 300.0]),
    st.sampled_from([8, 6, 4, 3, 2]),
    st.integers(0, 1000),
)
def test_no_row_fares_worse_with_an_offset_than_without(shape: str, ratio: float, num_bits: int, seed: int) -> None:
    """Rows share their evidence as ``pooling`` says: what is never worse is the error that the rows share."""
    rows = _activations(shape, ratio, seed)
    plain, moved = evidence(rows, num_bits, False), evidence(rows, num_bits, True)
    for statistic in ("mse", "max", "percentile", "entropy"):
        for name, pooling in _POOLINGS.items():
            errors = []
            for known in (plain, moved):
                scale, offset = choose_rows(known, pooling, statistic, 99.9)
                each = histogram_error(known.statistics, scale, offset, num_bits).error
                errors.append((pooling * each.T).sum(1))
            assert (errors[1] <= errors[0] * 1.001).all(), (statistic, name)
            if name == "per row":  # of the activations themselves, not of their histograms
                scale, offset = choose_rows(moved, pooling, statistic, 99.9)
                own, old = squared_error(rows, scale, offset, num_bits), choose_rows(plain, pooling, statistic, 99.9)
                assert (own <= squared_error(rows, *old, num_bits) * _decibels).all(), statistic


def test_rows_of_small_range_keep_their_resolution_beside_large_ones() -> None:
    """The same activation, 24 times as large at the end: every row is within a quarter of a dB of what it is alone."""
    rows = _activations("shifted", 24.0)
    for num_bits in (8, 4):
        scale, offset = columns(evidence(rows, num_bits, True), TdqCalibConfig(smoothing=0.0), True)
        found = squared_error(rows, scale, offset, num_bits)
        for row, x in enumerate(rows):
            alone = choose_rows(evidence([x], num_bits, True), torch.ones(1, 1), "mse", 99.9)
            assert found[row] <= squared_error([x], *alone, num_bits) * 10**0.025


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(_SHAPES)), st.sampled_from([1.0, 30.0]), st.sampled_from([8, 5, 4, 2]))
def test_every_offset_is_a_whole_number_of_steps_and_represents_zero(shape: str, ratio: float, num_bits: int) -> None:
    scale, offset = candidate_grid(statistics(_activations(shape, ratio)), num_bits, True)
    low, high = code_range(num_bits)
    exact = -offset / scale
    code = exact.round()
    torch.testing.assert_close(exact, code, rtol=1e-6, atol=0.0)
    assert ((code >= low) & (code <= high)).all()
    assert torch.equal(fake_quantize(torch.zeros(len(scale)), scale, offset, num_bits), torch.zeros(len(scale)))


def test_candidates_are_bounded_however_many_rows_differ_in_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(64, generator=generator) * 1.01**i + 3 * torch.rand(1, generator=generator) for i in range(700)]
    found = statistics(rows)
    scale, _ = candidate_grid(found, 8, True)
    plain, _ = candidate_grid(found, 8, False)
    assert len(scale) - len(plain) <= BINS


def _judged(shape: str, ratio: float, num_bits: int, asymmetric: bool, **fields: Any) -> bool:
    """Whether ``keep_static_below`` lets the scales follow time."""
    known = evidence(_activations(shape, ratio), num_bits, asymmetric)
    scale, _ = columns(known, TdqCalibConfig(smoothing=0.0, **fields), True)
    return bool((scale != scale[0]).any())


@pytest.mark.parametrize("statistic", ["mse", "max", "percentile"])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("shape", "ratio"), [("silu", 3.0), ("shifted", 10.0), ("symmetric", 2.0)])
def test_keep_static_below_judges_the_gain_of_what_is_used(
    shape: str, ratio: float, asymmetric: bool, statistic: str
) -> None:
    rows, num_bits = _activations(shape, ratio), 4
    known = evidence(rows, num_bits, asymmetric)
    total = []
    for fields in ({"bins": 1}, {"bins": "per_step"}):
        config = TdqCalibConfig(smoothing=0.0, statistic=statistic, **fields)
        total.append(squared_error(rows, *columns(known, config, True), num_bits).sum())
    gain = float(10 * torch.log10(total[0] / total[1]))
    assert gain > 0.3
    for threshold in (gain - 0.2, gain + 0.2):
        follows = _judged(shape, ratio, num_bits, asymmetric, statistic=statistic, keep_static_below=threshold)
        assert follows == (threshold < gain)


@pytest.mark.parametrize("fields", [{"statistic": "max"}, {"bins": 1}, {"statistic": "mse", "smoothing": 0.0}])
def test_auto_takes_an_offset_where_what_is_used_gains_a_decibel(fields: dict[str, Any]) -> None:
    decided = set()
    for shift in (0.0, 0.3, 0.6, 0.9, 1.5, 3.0):
        rows = [torch.cat([x, -x]) + shift for x in _activations("symmetric", 2.0)]
        known, config = evidence(rows, 4, True), TdqCalibConfig(**fields)
        errors = [squared_error(rows, *columns(e, config, True), 4).sum() for e in (known, known.symmetric())]
        gain = float(10 * torch.log10(errors[1] / errors[0]))
        if abs(gain - 1.0) > 0.1:
            assert worth_an_offset(known, config, True) == (gain > 1.0)
            decided.add(gain > 1.0)
    assert decided == {False, True}


def test_the_symmetric_part_of_the_evidence_is_the_evidence_without_offsets() -> None:
    rows = _activations("silu", 5.0)
    plain, part = evidence(rows, 8, False), evidence(rows, 8, True).symmetric()
    assert isinstance(part, Evidence)
    assert torch.equal(plain.curves.scale, part.curves.scale)
    assert torch.equal(plain.curves.error, part.curves.error)
    assert not part.asymmetric


@pytest.mark.parametrize("shape", sorted(_SHAPES))
def test_output_error_is_never_worse_with_an_offset(shape: str) -> None:
    """The error of the layer's output, over its real inputs; range and shape of its input move with time."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(16, 16)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.layer(_SHAPES[shape](sample, timestep) * 20**timestep)

    torch.manual_seed(0)
    base = Layer()
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(32, 16, generator=generator), torch.tensor(t)) for t in (0.0, 0.5, 1.0)]
    noise = {}
    for asymmetric in (False, True):
        config = tdq.make_config(
            8, 4, statistic="output", asymmetric=asymmetric, smoothing=0.0, replay_samples=32, weights="max"
        )
        config["algorithm"] |= {"protect_steps": False, "correction": "none", "progress": False}
        model = mtq.quantize(copy.deepcopy(base), config, loop(data))
        noise[asymmetric] = torch.stack([(model(x, t) - base(x, t)).double().square().sum() for x, t in data])
    assert (noise[True] <= noise[False] * _decibels).all()


def test_auto_of_the_output_statistic_is_decided_by_the_output() -> None:
    """Calibrates, and gives the outputs of SiLU an offset."""
    torch.manual_seed(0)
    config = fast_config(statistic="output", asymmetric="auto", activation_bits=4)
    model = mtq.quantize(TinyDenoiser().eval(), config, loop(calls()))
    table = tdq.scale_table(model)
    assert table.offset is not None
    assert bool(table.offset.any())


@settings(deadline=None, max_examples=12)
@given(st.sampled_from(sorted(_SHAPES)), st.sampled_from([8, 4]), st.floats(0.0, 1.0), st.booleans())
def test_a_margin_widens_scales_and_keeps_offsets_whole_steps(
    shape: str, bits: int, margin: float, temporal: bool
) -> None:
    observed = evidence(_activations(shape, 4.0), bits, True)
    plain, wide = (
        columns(observed, TdqCalibConfig(asymmetric=True, margin=m, progress=False), temporal) for m in (0.0, margin)
    )
    torch.testing.assert_close(wide[0], plain[0] * (1 + margin), rtol=1e-6, atol=0.0)
    assert (wide[1] is None) == (plain[1] is None)
    if wide[1] is not None and plain[1] is not None:
        steps = wide[1] / wide[0]
        torch.testing.assert_close(steps, steps.round(), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(steps.round(), (plain[1] / plain[0]).round(), rtol=0.0, atol=0.0)


def test_a_margin_pays_on_values_that_few_samples_did_not_show() -> None:
    seen, others = (torch.randn(n, 4096, generator=torch.Generator().manual_seed(n)) ** 3 for n in (2, 200))
    observed = evidence(list(seen), 8, False)
    errors = []
    for margin in (0.0, 0.25):
        scale, offset = columns(observed, TdqCalibConfig(statistic="max", bins=1, margin=margin, progress=False), True)
        errors.append(float((fake_quantize(others, scale[0], None, 8) - others).square().mean()))
        assert offset is None
    assert errors[1] < 0.8 * errors[0]
