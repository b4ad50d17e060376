"""The report: each number is that of its own function, and mistakes are refused before any work."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_extractor import FeaturesOnly, TinyExtractor, random_images, with_noise

from modelopt_tdq.core.metrics import psnr_db
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.image_metrics import feature_statistics, frechet_distance, image_report, perceptual_distance


def test_numbers_are_those_of_the_metrics() -> None:
    reference, extractor = random_images(12), TinyExtractor()
    images = with_noise(reference, 20)
    report = image_report(reference, images, extractor, batch_size=5)
    assert (report.images, report.population, report.extractor) == (12, 12, "tiny")
    assert report.psnr_db == psnr_db(reference, images, 255.0)
    assert report.perceptual == pytest.approx(float(perceptual_distance(reference, images, extractor).mean()))
    assert report.frechet == pytest.approx(frechet_distance(extractor(reference), extractor(images)), rel=1e-6)


def test_against_another_population() -> None:
    reference, extractor = random_images(6), TinyExtractor()
    real = feature_statistics(random_images(30, seed=3), extractor)
    report = image_report(reference, reference, extractor, real)
    assert (report.population, report.psnr_db, report.perceptual) == (30, float("inf"), 0.0)
    assert report.frechet == pytest.approx(frechet_distance(real, extractor(reference)), rel=1e-6)
    with pytest.raises(TdqError, match="the other set comes from 'tiny'"):
        image_report(reference, reference, FeaturesOnly(), real)


def test_json_holds_no_infinity() -> None:
    images = random_images(4)
    data = json.loads(image_report(images, images, FeaturesOnly()).to_json())
    assert data["psnr_db"] == "inf"
    assert data["perceptual"] is None
    assert data["extractor"] == "features only"
    assert float(data["frechet"]) == pytest.approx(0.0, abs=1e-4)


def test_floats_are_compared_as_floats_and_seen_as_bytes() -> None:
    reference = random_images(4).float() / 127.5 - 1
    images = reference + 1e-3  # less than half a byte
    report = image_report(reference, images, TinyExtractor())
    assert report.perceptual == 0.0
    assert report.psnr_db == pytest.approx(psnr_db(reference, images.clamp(-1, 1)))


def test_mistakes() -> None:
    images, extractor = random_images(3), TinyExtractor()
    with pytest.raises(TdqError, match="unlike the reference"):
        image_report(images, images[:2], extractor)
    with pytest.raises(TdqError, match="unlike the reference"):
        image_report(images, images.float(), extractor)
    with pytest.raises(TdqError, match="at least two"):
        image_report(images[:1], images[:1], extractor)
    with pytest.raises(TdqError, match="holds NaN"):
        image_report(images.float(), torch.full(images.shape, float("nan")), extractor)
