"""Inception Score: its two extremes, by hand, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_extractor import FeaturesOnly, TinyClassifier, random_images

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.image_metrics import inception_score, inception_score_of_logits


def test_certain_and_diverse_gives_the_number_of_classes() -> None:
    logits = 1000.0 * torch.eye(10).repeat(30, 1)
    assert inception_score_of_logits(logits, splits=1).mean == pytest.approx(10.0)


def test_one_class_or_no_idea_gives_one() -> None:
    for logits in (torch.zeros(40, 10), 1000.0 * torch.eye(10)[:1].repeat(40, 1)):
        score = inception_score_of_logits(logits, splits=4)
        assert (score.mean, score.std, score.images) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-9), 40)


def test_by_hand() -> None:
    # p = (3/4, 1/4) and (1/4, 3/4), marginal (1/2, 1/2)
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    expected = math.exp(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert inception_score_of_logits(logits, splits=1).mean == pytest.approx(expected)


def test_sorted_classes_are_shuffled_before_they_are_split() -> None:
    logits = 1000.0 * torch.eye(4).repeat_interleave(250, 0)
    assert inception_score_of_logits(logits, splits=4).mean == pytest.approx(4.0, rel=0.02)


def test_of_images() -> None:
    images, extractor = random_images(9), TinyClassifier()
    assert inception_score(images, extractor, splits=3, batch_size=4) == inception_score_of_logits(
        extractor.logits(images), splits=3
    )


def test_mistakes() -> None:
    with pytest.raises(TdqError, match="No logits"):
        inception_score(random_images(9), FeaturesOnly())
    with pytest.raises(TdqError, match="splits = 10: not between 1 and the 9 images"):
        inception_score(random_images(9), TinyClassifier())
    with pytest.raises(TdqError, match="not finite"):
        inception_score_of_logits(torch.full((4, 2), float("nan")), splits=1)
