"""Streaming statistics against those of all samples at once, and their file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_extractor import TinyExtractor, random_images
from torch import Tensor

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.image_metrics import FeatureStatistics, feature_statistics


def _same(found: FeatureStatistics, features: Tensor) -> None:
    assert found.count == len(features)
    torch.testing.assert_close(found.mean, features.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.covariance, features.T.cov(), rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**31 - 1), st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(2, 5))
def test_batches_give_what_all_samples_give(seed: int, sizes: list[int], width: int) -> None:
    features = torch.randn(sum(sizes), width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    streamed, merged = FeatureStatistics(), FeatureStatistics()
    for part in features.split(sizes):
        streamed.update(part)
        merged.merge(FeatureStatistics().update(part))
    _same(streamed, features)
    _same(merged, features)


def test_a_large_mean_loses_no_digits() -> None:
    features = torch.randn(400, 3, dtype=torch.float64) * 1e-3 + 1e6
    streamed = FeatureStatistics()
    for part in features.split(7):
        streamed.update(part)
    torch.testing.assert_close(streamed.covariance, features.T.cov(), rtol=1e-4, atol=1e-9)


def test_what_is_passed_in_is_not_shared() -> None:
    part = FeatureStatistics().update(torch.randn(4, 2, dtype=torch.float64))
    before = part.scatter.clone()
    FeatureStatistics().merge(part).update(torch.randn(4, 2))
    assert torch.equal(part.scatter, before)


def test_a_refused_batch_changes_nothing() -> None:
    statistics = FeatureStatistics().update(torch.randn(5, 3))
    mean, scatter = statistics.mean.clone(), statistics.scatter.clone()
    for wrong in (torch.tensor([[1.0, 2.0, float("inf")]]), torch.ones(2, 4), torch.ones(3), torch.ones(0, 3)):
        with pytest.raises(TdqError):
            statistics.update(wrong)
    assert statistics.count == 5
    assert torch.equal(statistics.mean, mean)
    assert torch.equal(statistics.scatter, scatter)


def test_images_as_one_tensor_or_in_batches() -> None:
    images, extractor = random_images(10), TinyExtractor()
    whole = feature_statistics(images, extractor, batch_size=4)
    # in the same parts: a convolution rounds differently in batches of another size
    _same(whole, torch.cat([extractor(part) for part in images.split(4)]).double())
    parts = images.split(3)
    _same(feature_statistics(iter(parts), extractor), torch.cat([extractor(part) for part in parts]).double())
    assert whole.extractor == "tiny"
    with pytest.raises(TdqError, match="batch_size = 0: not positive"):
        feature_statistics(images, extractor, batch_size=0)


def test_file(tmp_path: Path) -> None:
    statistics = FeatureStatistics("tiny").update(torch.randn(6, 3))
    loaded = FeatureStatistics.load(statistics.save(tmp_path / "real.safetensors"))
    assert (loaded.extractor, loaded.count) == ("tiny", 6)
    assert torch.equal(loaded.mean, statistics.mean)
    assert torch.equal(loaded.scatter, statistics.scatter)
    assert [file.name for file in tmp_path.iterdir()] == ["real.safetensors"]


def test_file_mistakes(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no statistics")
    with pytest.raises(TdqError, match="not readable as a set of feature statistics"):
        FeatureStatistics.load(tmp_path / "text.safetensors")
    with pytest.raises(TdqError, match="no such file"):
        FeatureStatistics.load(tmp_path / "missing")
    with pytest.raises(TdqError, match="nothing to save"):
        FeatureStatistics().save(tmp_path / "empty")
    with pytest.raises(TdqError, match="the other set comes from 'one'"):
        FeatureStatistics("one").merge(FeatureStatistics("two"))
