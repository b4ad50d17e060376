"""Inception-v3 through torch-fidelity, with random weights in a local file: nothing is downloaded."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from tiny_extractor import random_images, smooth_images

from modelopt_tdq.errors import MissingExtraError, TdqError
from modelopt_tdq.lab.image_metrics import (
    LogitExtractor,
    TorchFidelityInception,
    frechet_distance,
    inception_score_of_logits,
)
from modelopt_tdq.lab.image_metrics.resize import resize_like_tensorflow1

try:
    import_module("torch_fidelity")
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit this torch
    problem = f"torch-fidelity cannot be imported: {error}"
else:
    problem = ""

needs_torch_fidelity = pytest.mark.skipif(bool(problem), reason=problem)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the layout of the published file."""
    module = import_module("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"], verbose=False)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@needs_torch_fidelity
def test_features_and_logits_of_a_local_file(weights: Path) -> None:
    extractor = TorchFidelityInception(weights)
    assert isinstance(extractor, LogitExtractor)
    images = random_images(4)
    features, logits = extractor(images), extractor.logits(images)
    torch.testing.assert_close(features @ extractor._network.fc.weight.T, logits)
    assert (features.shape, logits.shape) == ((4, 2048), (4, 1008))


@needs_torch_fidelity
def test_frechet_distance_and_score_equal_those_of_the_library() -> None:
    fid, isc = (import_module(f"torch_fidelity.metric_{name}") for name in ("fid", "isc"))
    first, second = torch.randn(80, 12), torch.randn(60, 12) * 1.5 + 0.2
    first, second = first.double(), second.double()
    wanted = fid.fid_statistics_to_metric(
        fid.fid_features_to_statistics(first), fid.fid_features_to_statistics(second), False
    )["frechet_inception_distance"]
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-6)
    score = inception_score_of_logits(first, splits=7)
    wanted = isc.isc_features_to_metric(first, 7)
    assert score.mean == pytest.approx(wanted["inception_score_mean"], rel=1e-9)
    assert score.std == pytest.approx(wanted["inception_score_std"], rel=1e-9)


@needs_torch_fidelity
def test_resize_equals_that_of_the_library() -> None:
    library = import_module("torch_fidelity.interpolate_compat_tensorflow")
    images = smooth_images(2).float()
    wanted = library.interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
    torch.testing.assert_close(resize_like_tensorflow1(images, 299), wanted, rtol=1e-4, atol=1e-3)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this ran",)


@needs_torch_fidelity
def test_files_that_hold_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"fc.weight": _Code()}, tmp_path / "code.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("code.pth", "other.pth", "text.pth", "missing.pth"):
        with pytest.raises(TdqError, match="cannot be loaded"):
            TorchFidelityInception(tmp_path / name)
    assert "this ran" not in capsys.readouterr().out


@needs_torch_fidelity
def test_a_failed_download(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("torch_fidelity.feature_extractor_inceptionv3")

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(module, "load_state_dict_from_url", no_network)
    with pytest.raises(TdqError, match="no network"):
        TorchFidelityInception()


def test_a_torchvision_of_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torch_fidelity").mkdir()
    (tmp_path / "torch_fidelity/__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TdqError, match=r"operator nms does not exist.*Install the torchvision"):
        TorchFidelityInception()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(MissingExtraError, match=r"modelopt-tdq\[fid\]"):
        TorchFidelityInception()
