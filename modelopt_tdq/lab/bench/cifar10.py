"""CIFAR-10 images, from a local file or through ``datasets``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError, require

__all__ = ["load_cifar10"]

_KEYS = {"train": ("X", "y"), "test": ("T", "yt")}


def load_cifar10(source: str | os.PathLike[str] | None = None, split: str = "train") -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N].

    Args:
        source: A ``cifar10.npz`` with the arrays ``X`` uint8 [50000, 32, 32, 3], ``y``, ``T`` and ``yt`` (or its
            folder); None downloads ``uoft-cs/cifar10`` through the package ``datasets``.
        split: ``"train"`` or ``"test"``.

    Raises:
        TdqError: The file is missing or holds something else; there is no such split.
        MissingExtraError: ``datasets`` is not installed.
    """
    if split not in _KEYS:
        raise TdqError("split", split, "CIFAR-10 has no such part", f"Use one of {sorted(_KEYS)}")
    if source is None:
        return _download(split)
    path = Path(source)
    path = path / "cifar10.npz" if path.is_dir() else path
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = (arrays[key] for key in _KEYS[split])
    except (OSError, KeyError, ValueError) as error:
        cure = "Pass a cifar10.npz with X, y, T, yt, or leave it out to download"
        raise TdqError("data", str(path), f"it is no CIFAR-10 file ({error})", cure) from error
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
        raise TdqError("data", (images.dtype, images.shape), "not uint8 [N, 32, 32, 3]", "Pass a CIFAR-10 file")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))


def _download(split: str) -> tuple[Tensor, Tensor]:
    datasets: Any = require("datasets", "train")
    data = datasets.load_dataset("uoft-cs/cifar10", split=split).with_format("numpy")
    images = torch.from_numpy(np.stack(data["img"])).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(np.asarray(data["label"], dtype=np.int64))
