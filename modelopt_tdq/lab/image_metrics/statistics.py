"""Mean and covariance of feature vectors, one batch at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from modelopt_tdq.core.files import read_arrays, write_arrays
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.image_metrics.extractor import FeatureExtractor
from modelopt_tdq.lab.image_metrics.images import batches, to_uint8

__all__ = ["FeatureStatistics", "feature_statistics"]

_SCHEMA_VERSION = 1
_KIND = "FeatureStatistics"


class FeatureStatistics:
    """Streaming mean and covariance, in float64, whatever the number of samples.

    Batches are combined by the parallel update of Chan, Golub and LeVeque (1979), which does not lose digits
    where the mean is large against the spread.

    Args:
        extractor: Name of the network the features come from; ``""`` if unknown.

    Attributes:
        count: Samples seen.
        mean: [D] float64; empty before the first batch.
        scatter: [D, D] float64, sum of the outer products of the centered samples.
    """

    def __init__(self, extractor: str = "") -> None:
        self.extractor = extractor
        self.count = 0
        self.mean = torch.empty(0, dtype=torch.float64)
        self.scatter = torch.empty(0, 0, dtype=torch.float64)

    def update(self, features: Tensor) -> FeatureStatistics:
        """Add feature vectors [N, D] of any real dtype.

        Raises:
            TdqError: Another shape, another width than before, or values that are NaN or infinite. Nothing
                is added then.
        """
        if features.dim() != 2 or features.numel() == 0:
            raise TdqError("features", tuple(features.shape), "not [samples, width]", "Pass one row per sample")
        if self.count and features.shape[1] != self.mean.numel():
            raise TdqError(
                "features",
                tuple(features.shape),
                f"not as wide as those before, {self.mean.numel()}",
                "Use one extractor for one set",
            )
        values = features.detach().to("cpu", torch.float64)
        if not bool(values.isfinite().all()):
            raise TdqError("features", tuple(features.shape), "NaN or infinite", "Look at the images they come from")
        mean = values.mean(0)
        centered = values - mean
        self._combine(len(values), mean, centered.T @ centered)
        return self

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Add the samples of another part of the same set, such as that of another process.

        Raises:
            TdqError: The widths or the extractors differ.
        """
        same_set(self, other)
        if other.count:
            self._combine(other.count, other.mean, other.scatter)
        return self

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean.clone(), scatter.clone()
            return
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(shift, shift, alpha=self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """[D, D] float64, unbiased (divided by ``count - 1``).

        Raises:
            TdqError: Fewer than two samples.
        """
        if self.count < 2:
            raise TdqError("samples", self.count, "a covariance needs at least two", "Pass more images")
        return self.scatter / (self.count - 1)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to one safetensors file, so that a reference set is run through the network only once.

        Raises:
            TdqError: There is nothing to save.
        """
        if self.count == 0:
            raise TdqError("samples", 0, "there is nothing to save", "Update with features first")
        arrays = {"mean": self.mean, "scatter": self.scatter}
        fields = {"extractor": self.extractor, "count": self.count}
        return write_arrays(path, _KIND, _SCHEMA_VERSION, arrays, fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            TdqError: The file is missing, is something else, or was written by a newer version.
        """
        arrays, description = read_arrays(path, _KIND, "set of feature statistics", _SCHEMA_VERSION)
        try:
            loaded = cls(str(description["extractor"]))
            loaded._combine(int(description["count"]), arrays["mean"], arrays["scatter"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TdqError(
                "path", str(path), f"it holds no feature statistics ({error!r})", "Pass a file that save() wrote"
            ) from error
        return loaded


def same_set(first: FeatureStatistics, second: FeatureStatistics) -> None:
    """Check that two sets of features can be put together or compared.

    Raises:
        TdqError: They come from different networks, or their widths differ.
    """
    if first.extractor and second.extractor and first.extractor != second.extractor:
        raise TdqError(
            "extractor", second.extractor, f"the other set comes from {first.extractor!r}", "Use one extractor for both"
        )
    if first.count and second.count and first.mean.shape != second.mean.shape:
        raise TdqError(
            "features",
            second.mean.numel(),
            f"not as wide as those of the other set, {first.mean.numel()}",
            "Use one extractor for both",
        )


def feature_statistics(
    images: Tensor | Iterable[Tensor],
    extractor: FeatureExtractor,
    batch_size: int = 64,
    progress: bool = False,
) -> FeatureStatistics:
    """Statistics of a set of images.

    Args:
        images: uint8 [N, 3, H, W] or floating point in [-1, 1]; or batches of them, which need not fit in memory.
        extractor: The network.
        batch_size: Images per call of the network, where ``images`` is one tensor.
        progress: Show a progress bar.

    Raises:
        TdqError: As in :func:`to_uint8` and :meth:`FeatureStatistics.update`.
    """
    statistics = FeatureStatistics(extractor.name)
    parts = batches(images, batch_size) if isinstance(images, Tensor) else images
    for part in tqdm(parts, extractor.name, disable=not progress, unit="batch"):
        statistics.update(extractor(to_uint8(part)))
    return statistics
