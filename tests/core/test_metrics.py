import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_tdq.core.metrics import db_text, decibels, json_number, json_numbers, psnr_db, sqnr_db
from modelopt_tdq.errors import TdqError

seeds = st.integers(0, 2**31 - 1)
factors = st.floats(1e-3, 1e3)


def _pair(seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    return reference, reference + noise * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)


@given(seeds, factors)
@settings(max_examples=50, deadline=None)
def test_sqnr_does_not_change_when_both_are_scaled(seed: int, factor: float) -> None:
    reference, value = _pair(seed, 0.1)
    assert sqnr_db(reference * factor, value * factor) == pytest.approx(sqnr_db(reference, value), abs=1e-6)


@given(seeds, factors)
@settings(max_examples=50, deadline=None)
def test_ten_times_the_noise_costs_20_db(seed: int, noise: float) -> None:
    reference, value = _pair(seed, noise)
    louder = reference + 10.0 * (value - reference)
    assert sqnr_db(reference, value) - sqnr_db(reference, louder) == pytest.approx(20.0, abs=1e-6)
    assert psnr_db(reference, value) - psnr_db(reference, louder) == pytest.approx(20.0, abs=1e-6)


@given(seeds, factors)
@settings(max_examples=50, deadline=None)
def test_psnr_follows_the_data_range(seed: int, data_range: float) -> None:
    reference, value = _pair(seed, 0.1)
    gain = psnr_db(reference, value, 10.0 * data_range) - psnr_db(reference, value, data_range)
    assert gain == pytest.approx(20.0, abs=1e-6)


def test_values_from_the_definitions() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert sqnr_db(reference, torch.tensor([3.0, 3.5])) == pytest.approx(20.0)  # 25 / 0.25
    assert psnr_db(torch.zeros(4), torch.full((4,), 0.2)) == pytest.approx(20.0)  # 4 / 0.04
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_perfect_agreement_is_infinite_and_survives_json(seed: int) -> None:
    reference, _ = _pair(seed, 0.0)
    for value in (sqnr_db(reference, reference.clone()), psnr_db(reference, reference.clone())):
        assert value == math.inf
        assert db_text(value) == "inf"
        assert float(json.loads(json.dumps(json_number(value), allow_nan=False))) == math.inf


def test_nan_stays_nan() -> None:
    broken = torch.tensor([1.0, math.nan])
    assert math.isnan(sqnr_db(torch.ones(2), broken))
    assert math.isnan(psnr_db(torch.ones(2), broken))
    assert json_number(math.nan) == "nan"
    assert json_numbers({"a": [(1.0, math.inf)], "b": math.nan}) == {"a": [[1.0, "inf"]], "b": "nan"}


def test_texts() -> None:
    assert [db_text(v) for v in (39.249, None, -math.inf)] == ["39.2", "-", "-inf"]
    assert db_text(1.005, 2) == "1.00"


def test_user_errors() -> None:
    with pytest.raises(TdqError, match="shape"):
        sqnr_db(torch.ones(2), torch.ones(3))
    with pytest.raises(TdqError, match="data_range"):
        psnr_db(torch.ones(2), torch.ones(2), 0.0)
    with pytest.raises(TdqError, match="empty"):
        psnr_db(torch.ones(0), torch.ones(0))


@given(factors, factors)
@settings(max_examples=50, deadline=None)
def test_decibels_of_powers(signal: float, noise: float) -> None:
    assert 10.0 ** (decibels(signal, noise) / 10.0) == pytest.approx(signal / noise)
    assert decibels(signal, noise) == pytest.approx(-decibels(noise, signal), abs=1e-9)


def test_decibels_at_the_ends() -> None:
    assert decibels(100.0, 1.0) == pytest.approx(20.0)
    assert (decibels(1.0, 0.0), decibels(0.0, 1.0)) == (math.inf, -math.inf)
    assert math.isnan(decibels(math.nan, 1.0))
    assert math.isnan(decibels(1.0, math.nan))
