"""What is measured of one row: its temporal features, its noise predictions, its images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.core.metrics import json_numbers
from modelopt_tdq.lab.features import compute_features
from modelopt_tdq.lab.image_metrics.extractor import FeatureExtractor
from modelopt_tdq.lab.image_metrics.frechet import frechet_distance
from modelopt_tdq.lab.image_metrics.images import to_uint8
from modelopt_tdq.lab.image_metrics.statistics import FeatureStatistics, feature_statistics
from modelopt_tdq.lab.judge import Reference, judge
from modelopt_tdq.temporal_features.errors import relative_squared_error
from modelopt_tdq.temporal_features.report import error_db
from modelopt_tdq.temporal_features.runtime import feature_table, has_features

__all__ = ["Yardstick", "measure"]


@dataclass(frozen=True)
class Yardstick:
    """What rows are measured against: full precision.

    Attributes:
        scheduler: That the trajectories are sampled with.
        references: Trajectories, by their number of steps; of the shortest, images are compared too.
        times: [K] float32 ascending: all times of those.
        features: [K, ...] temporal features, by name.
        extractor: For the Fréchet distance; None: it is left out.
        images: Statistics of the images of the shortest trajectories; None without an extractor.
    """

    scheduler: Any
    references: Mapping[int, Reference]
    times: Tensor
    features: Mapping[str, Tensor]
    extractor: FeatureExtractor | None
    images: FeatureStatistics | None

    @property
    def ticks(self) -> int:
        """That one call of :func:`measure` makes."""
        return 2 * sum(self.references)


def measure(model: nn.Module, yardstick: Yardstick, tick: Callable[[], None]) -> dict[str, Any]:
    """Plain data for JSON; errors of the temporal features in dB, by feature and time.

    Args:
        model: Quantized.
        yardstick: What to measure against.
        tick: Called after every step.
    """
    errors = relative_squared_error(yardstick.features, compute_features(model, yardstick.times))
    every = torch.stack(list(errors.values()))
    found: dict[str, Any] = {
        "times": yardstick.times.tolist(),
        "feature_error_db": {name: [round(error_db(v), 2) for v in values.tolist()] for name, values in errors.items()},
        "mean_feature_error_db": error_db(float(every.mean())),
        "worst_feature_error_db": error_db(float(every.max())),
        "table_bytes": feature_table(model).nbytes if has_features(model) else None,
        "judged": {},
        "frechet": None,
    }
    for steps, reference in yardstick.references.items():
        judgement = judge(model, yardstick.scheduler, reference, tick)
        decibels = judgement.sqnr_db
        found["judged"][str(steps)] = {
            "timesteps": [float(t) for t in reference.timesteps],
            "sqnr_db": [round(v, 3) for v in decibels],
            "mean_sqnr_db": math.fsum(decibels) / len(decibels),
            "worst_sqnr_db": min(decibels),
            "psnr_db": judgement.psnr_db,
        }
        if steps == min(yardstick.references) and yardstick.extractor is not None and yardstick.images is not None:
            statistics = feature_statistics(to_uint8(judgement.images), yardstick.extractor)
            found["frechet"] = frechet_distance(yardstick.images, statistics)
    numbers: dict[str, Any] = json_numbers(found)
    return numbers
