"""Features that come and go after ``mtq.quantize``: what is saved is what the model has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
from support.models import fast_config
from test_tdq_temporal import FAST, UNET, equal, fields, listed, outputs, plain, restored, unet  # noqa: F401 - fixture
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq.temporal_features.runtime import has_features

LATER = {"method": "tdq", **FAST, "weights": "keep"}


@pytest.fixture(scope="module")
def earlier() -> nn.Module:
    """Its features are those of an algorithm that is not the last."""
    return listed({**FAST, **fields()}, LATER)


def removed(model: nn.Module) -> None:
    tdq.remove_features(model)


def exchanged(model: nn.Module) -> None:
    table = tdq.feature_table(model)
    tdq.remove_features(model)
    tdq.set_feature_table(model, tdq.FeatureTable(table.timesteps, table.features, "nearest", table.metadata))


def freed(model: nn.Module) -> None:
    tdq.free_modules(model)


@pytest.mark.parametrize("change", [removed, exchanged, freed])
def test_a_change_after_a_later_algorithm_is_saved(earlier: nn.Module, change: Callable[[nn.Module], None]) -> None:
    model = copy.deepcopy(earlier)
    change(model)
    again = restored(model)
    assert has_features(again) == (change is not removed)
    assert equal(outputs(again), outputs(model))
    assert equal(outputs(restored(again)), outputs(model))
    assert has_features(restored(earlier))


def test_a_table_in_a_model_that_was_quantized_without_is_saved(plain: nn.Module) -> None:  # noqa: F811
    source = mtq.quantize(unet(), fast_config(**fields()), UNET.forward_loop())
    model = copy.deepcopy(plain)
    tdq.set_feature_table(model, tdq.feature_table(source))
    assert not equal(outputs(model), outputs(plain))
    again = restored(model)
    assert equal(outputs(again), outputs(model))
    tdq.remove_features(again)
    assert equal(outputs(restored(again)), outputs(plain))


def test_a_model_that_modelopt_does_not_know_is_left_alone(plain: nn.Module) -> None:  # noqa: F811
    states: list[Any] = [mto.modelopt_state(plain)]
    model = unet()
    source = mtq.quantize(unet(), fast_config(**fields(maintenance="cache")), UNET.forward_loop())
    tdq.set_feature_table(model, tdq.feature_table(source))
    assert has_features(model)
    assert not hasattr(model, "_modelopt_state")
    assert states == [mto.modelopt_state(plain)]
