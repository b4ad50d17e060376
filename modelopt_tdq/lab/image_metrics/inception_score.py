"""Inception Score."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.image_metrics.extractor import FeatureExtractor, LogitExtractor
from modelopt_tdq.lab.image_metrics.images import batches, to_uint8

__all__ = ["InceptionScore", "inception_score", "inception_score_of_logits"]


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation over the splits, and the number of images."""

    mean: float
    std: float
    images: int


def inception_score_of_logits(logits: Tensor, splits: int = 10) -> InceptionScore:
    """Inception Score (Salimans et al. 2016): ``exp(E_x KL(p(y|x) || p(y)))``, over each of several splits.

    Images are shuffled first, with the permutation that torch-fidelity uses, so that results agree.

    Args:
        logits: [N, classes].
        splits: Parts of the set, each with a score of its own.

    Raises:
        TdqError: Another shape, NaN, or fewer images than splits.
    """
    if logits.dim() != 2 or not bool(logits.isfinite().all()):
        raise TdqError("logits", tuple(logits.shape), "not finite values [N, classes]", "Look at the images")
    if not 1 <= splits <= len(logits):
        raise TdqError("splits", splits, f"not between 1 and the {len(logits)} images", "Use 10, with 50,000 images")
    order = torch.from_numpy(np.random.RandomState(2020).permutation(len(logits)))
    log_p = logits.detach().cpu().double()[order].log_softmax(1)
    bounds = [i * len(log_p) // splits for i in range(splits + 1)]
    scores = []
    for start, end in pairwise(bounds):
        part = log_p[start:end]
        marginal = part.logsumexp(0) - np.log(len(part))
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    found = torch.stack(scores)
    return InceptionScore(float(found.mean()), float(found.std(correction=0)), len(logits))


def inception_score(
    images: Tensor, extractor: FeatureExtractor, splits: int = 10, batch_size: int = 64
) -> InceptionScore:
    """Inception Score of a set of images; published values use 50,000 images in 10 splits.

    Args:
        images: uint8 [N, 3, H, W] or floating point in [-1, 1].
        extractor: A network that also classifies, such as :class:`TorchFidelityInception`.
        splits: Parts of the set.
        batch_size: Images per call of the network.

    Raises:
        TdqError: The extractor has no logits; as in :func:`inception_score_of_logits`.
    """
    if not isinstance(extractor, LogitExtractor):
        raise TdqError("extractor", extractor.name, "No logits: it gives features only", "Use TorchFidelityInception")
    found = [extractor.logits(part).cpu() for part in batches(to_uint8(images), batch_size)]
    return inception_score_of_logits(torch.cat(found), splits)
