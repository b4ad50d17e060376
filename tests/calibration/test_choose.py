"""What each statistic chooses, against an exhaustive search over the samples themselves."""

from __future__ import annotations

import pytest
import torch
from support.evidence import evidence, statistics

from modelopt_tdq.calibration.candidates import affine_offset
from modelopt_tdq.calibration.choose import choose_rows
from modelopt_tdq.calibration.entropy import entropy_amax
from modelopt_tdq.calibration.statistics import BINS
from modelopt_tdq.core.fake_quant import NumBits, code_range, fake_quantize, quantize


def _rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 4000, generator=generator) * width for width in (1.0, 2.0, 5.0)]


@pytest.mark.parametrize("num_bits", [8, 4, 3, (4, 3)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_mse_is_within_a_tenth_of_a_decibel_of_the_best_scale(num_bits: NumBits, asymmetric: bool) -> None:
    rows = [torch.nn.functional.silu(x) for x in _rows()] if asymmetric else _rows()
    if asymmetric and not isinstance(num_bits, int):
        pytest.skip("FP8 has a sign of its own")
    known = evidence(rows, num_bits, asymmetric)
    scale, offset = choose_rows(known, torch.eye(3), "mse", 99.9)
    for row, x in enumerate(rows):

        def error(s: torch.Tensor, o: torch.Tensor, x: torch.Tensor = x) -> float:
            return float((fake_quantize(x, s, o, num_bits) - x).double().square().sum())

        grid = torch.logspace(-1, 0.3, 150) * scale[row] * 2
        if asymmetric:
            best = min(
                error(s, affine_offset(s, torch.tensor(-f * 0.2785), num_bits)) for s in grid for f in (1, 0.5, 0)
            )
        else:
            best = min(error(s, torch.tensor(0.0)) for s in grid)
        assert 10 * torch.log10(torch.tensor(error(scale[row], offset[row]) / best)) < (
            0.2 if num_bits == (4, 3) else 0.1
        )


def test_max_is_the_exact_range_and_pools_as_an_envelope() -> None:
    rows = _rows()
    known = evidence(rows, 8, False)
    scale, _ = choose_rows(known, torch.eye(3), "max", 99.9)
    assert torch.equal(scale, torch.stack([x.abs().max() for x in rows]) / 127)
    pooled, _ = choose_rows(known, torch.ones(1, 3), "max", 99.9)
    assert pooled.item() == scale.max().item()


def test_percentile_leaves_its_share_outside() -> None:
    rows = _rows()
    for percentile in (90.0, 99.0, 99.9):
        scale, _ = choose_rows(evidence(rows, 8, False), torch.eye(3), "percentile", percentile)
        for row, x in enumerate(rows):
            outside = float((x.abs() > scale[row] * 127).float().mean())
            assert outside <= 1 - percentile / 100
            assert outside >= (1 - percentile / 100) * 0.8 - 4 / x.numel()


def test_asymmetric_covers_the_range_and_keeps_zero_exact() -> None:
    rows = [torch.nn.functional.silu(x) for x in _rows()]
    for num_bits in (8, 4, 3):
        for statistic in ("max", "percentile", "entropy", "mse"):
            scale, offset = choose_rows(evidence(rows, num_bits, True), torch.eye(3), statistic, 99.9)
            steps = -offset / scale
            torch.testing.assert_close(steps, steps.round(), rtol=1e-6, atol=0.0)
            low, high = code_range(num_bits)
            assert ((steps >= low) & (steps <= high)).all()
            zero = fake_quantize(torch.zeros(3), scale, offset, num_bits)
            assert torch.equal(zero, torch.zeros(3))
    scale, offset = choose_rows(evidence(rows, 8, True), torch.eye(3), "max", 99.9)
    for row, x in enumerate(rows):
        codes = quantize(x, scale[row], offset[row], 8)
        assert codes.min() == -128
        assert codes.max() >= 126


def test_entropy_clips_outliers_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.rand(200_000, generator=generator) * 2 - 1
    spiked = torch.randn(200_000, generator=generator)
    spiked[:4] = 60.0
    plain = statistics([flat])
    assert float(entropy_amax(plain.counts, float(plain.width), torch.tensor([128]))) == pytest.approx(1.0, rel=0.1)
    outliers = statistics([spiked])
    assert float(entropy_amax(outliers.counts, float(outliers.width), torch.tensor([8]))) < 20.0
    assert torch.isinf(entropy_amax(torch.zeros(1, BINS, dtype=torch.float64), 1.0, torch.tensor([128]))).all()


def test_constant_zero_activation_gets_a_usable_scale() -> None:
    known = evidence([torch.zeros(2, 8), torch.zeros(2, 8)], 8, False)
    for statistic in ("max", "mse", "percentile", "entropy"):
        scale, _ = choose_rows(known, torch.eye(2), statistic, 99.9)
        assert (scale > 0).all()
        assert torch.isfinite(scale).all()
