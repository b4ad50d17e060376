"""Metrics of generated images: Fréchet distance (FID), Inception Score, PSNR and a perceptual distance.

extractor = EfficientNetLite0()                                # or TorchFidelityInception(), InceptionFile(path)
    real = feature_statistics(real_images, extractor)              # uint8 [N, 3, H, W]; save() keeps it
    image_report(full_precision_images, quantized_images, extractor, real)

``FID`` is the Fréchet distance with the Inception network of 2015 only (``name`` "FID Inception-v3"); with another
network it is called by that network's name.

Read ``report`` first, then ``extractor`` and ``statistics``.
"""

from modelopt_tdq.lab.image_metrics.efficientnet import EfficientNetLite0
from modelopt_tdq.lab.image_metrics.extractor import FeatureExtractor, LogitExtractor, StageExtractor
from modelopt_tdq.lab.image_metrics.frechet import frechet_distance, frechet_name, gaussian_frechet_distance
from modelopt_tdq.lab.image_metrics.images import to_uint8
from modelopt_tdq.lab.image_metrics.inception_file import InceptionFile
from modelopt_tdq.lab.image_metrics.inception_score import InceptionScore, inception_score, inception_score_of_logits
from modelopt_tdq.lab.image_metrics.perceptual import perceptual_distance, perceptual_name
from modelopt_tdq.lab.image_metrics.report import ImageReport, image_report
from modelopt_tdq.lab.image_metrics.statistics import FeatureStatistics, feature_statistics
from modelopt_tdq.lab.image_metrics.torch_fidelity import TorchFidelityInception

__all__ = [
    "EfficientNetLite0",
    "FeatureExtractor",
    "FeatureStatistics",
    "ImageReport",
    "InceptionFile",
    "InceptionScore",
    "LogitExtractor",
    "StageExtractor",
    "TorchFidelityInception",
    "feature_statistics",
    "frechet_distance",
    "frechet_name",
    "gaussian_frechet_distance",
    "image_report",
    "inception_score",
    "inception_score_of_logits",
    "perceptual_distance",
    "perceptual_name",
    "to_uint8",
]
