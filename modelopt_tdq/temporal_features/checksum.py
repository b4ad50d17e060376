"""Which weights temporal features were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["block_checksum"]


def block_checksum(model: nn.Module, layers: Sequence[str], tensors: Sequence[str] = ()) -> str:
    """SHA-256 of weights, the first 16 digits: of float32, whatever their dtype.

    Args:
        model: Has them.
        layers: Names of modules whose parameters count.
        tensors: Names of further parameters and buffers.
    """
    digest = hashlib.sha256()

    def update(name: str, value: Tensor) -> None:
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())

    for name in layers:
        for key, parameter in model.get_submodule(name).named_parameters():
            if "quantizer." not in key:
                update(f"{name}.{key}", parameter)
    for name in tensors:
        path, _, own = name.rpartition(".")
        update(name, getattr(model.get_submodule(path), own))
    return digest.hexdigest()[:16]
