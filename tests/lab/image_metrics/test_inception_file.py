"""Inception-v3 from a file: what is loaded, what is refused, what the network is given."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from tiny_extractor import random_images
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.image_metrics import FeatureExtractor, InceptionFile, inception_score


class _Corners(nn.Module):
    """Features that show size and range of what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0, 0, 0], x[:, 1, -1, -1], torch.full_like(x[:, 0, 0, 0], x.shape[-1])], 1)


class _Map(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def _saved(path: Path, module: nn.Module) -> tuple[Path, str]:
    torch.jit.script(module).save(str(path))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_features_of_a_trusted_file(tmp_path: Path) -> None:
    extractor = InceptionFile(*_saved(tmp_path / "network.pt", _Corners()))
    images = random_images(3)
    features = extractor(images)
    assert isinstance(extractor, FeatureExtractor)
    assert features[:, 2].tolist() == [299.0] * 3
    torch.testing.assert_close(features[:, 0], (images[:, 0, 0, 0].float() - 128) / 128)
    torch.testing.assert_close(features[:, 1], (images[:, 1, -1, -1].float() - 128) / 128)
    with pytest.raises(TdqError, match="No logits"):
        inception_score(images, extractor)


def test_a_file_of_another_checksum_is_not_run(tmp_path: Path) -> None:
    path, digest = _saved(tmp_path / "network.pt", _Corners())
    with pytest.raises(TdqError, match=digest):
        InceptionFile(path)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(TdqError, match="cannot be read"):
        InceptionFile(tmp_path / "missing.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(TdqError, match="no TorchScript file"):
        InceptionFile(tmp_path / "text.pt", hashlib.sha256(b"no network").hexdigest())
    with pytest.raises(TdqError, match=r"no features \[N, D\]"):
        InceptionFile(*_saved(tmp_path / "map.pt", _Map()))(random_images(1))
