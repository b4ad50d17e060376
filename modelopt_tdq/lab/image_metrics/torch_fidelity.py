"""Inception-v3 of FID and Inception Score through torch-fidelity."""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError, require

__all__ = ["TorchFidelityInception"]


class TorchFidelityInception:
    """The network of FID and Inception Score as torch-fidelity has it (torchmetrics uses the same).

    The weights (91 MB) are downloaded at first use into torch's hub folder; without a network, pass the file.
    torch-fidelity unpickles it, so a file is first checked to hold tensors only (``weights_only=True``).

    Args:
        weights: A local ``weights-inception-2015-12-05-6726825d.pth``; None downloads it.
        device: Where to run it.

    Raises:
        MissingExtraError: The extra ``fid`` is not installed.
        TdqError: The file is missing or holds something else, the download failed, or torchvision does not fit torch.
    """

    name = "FID Inception-v3"

    def __init__(self, weights: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu") -> None:
        try:
            module: Any = require("torch_fidelity.feature_extractor_inceptionv3", "fid")
        except RuntimeError as error:  # torchvision registers its operators when imported
            raise TdqError(
                "torch_fidelity",
                torch.__version__,
                f"it cannot be imported beside this torch ({error})",
                "Install the torchvision that was built for your torch",
            ) from error
        path = None if weights is None else os.fspath(weights)
        cure = "Pass weights=<weights-inception-2015-12-05-6726825d.pth>, or leave it out to download"
        try:
            if path is not None:
                torch.load(path, map_location="cpu", weights_only=True)
            network = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=path, verbose=False
            )
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise TdqError("weights", path, f"cannot be loaded ({error})", cure) from error
        self._network = network.to(device)
        self._device = torch.device(device)

    @torch.inference_mode()
    def _outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self._network(images.to(self._device))
        return features, logits

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [N, 2048] of uint8 images [N, 3, H, W]."""
        return self._outputs(images)[0]

    def logits(self, images: Tensor) -> Tensor:
        """Logits float32 [N, 1008], without the bias of the last layer, as the Inception Score takes them."""
        return self._outputs(images)[1]
