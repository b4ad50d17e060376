"""Temporal features of a model whose other weights are rounded by what they read, and whose outputs are corrected."""

from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import SMALL_UNET, fast_config
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.core.metrics import sqnr_db
from modelopt_tdq.lab.maintenance import with_maintenance
from modelopt_tdq.model.call import first_output

UNET = SMALL_UNET
TIMES = (900.0, 300.0, 0.0)
BETTER = {"rounding": "compensated", "correction": "per_step"}


def quantized(high_precision: tuple[str, ...] | None = None, **algorithm: Any) -> nn.Module:
    torch.manual_seed(0)
    kept = {} if high_precision is None else {"high_precision": high_precision}
    fields = {"method": "tdq_temporal", "maintenance": "cache", "weight_bits": 4, **algorithm}
    return mtq.quantize(UNET.make().eval(), fast_config(**fields, **kept), UNET.forward_loop(8))


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return quantized()


@pytest.fixture(scope="module")
def better() -> nn.Module:
    return quantized(**BETTER)


@torch.no_grad()
def outputs(model: nn.Module) -> list[Tensor]:
    return [first_output(model(**UNET.inputs(4, torch.tensor(time), 70))) for time in TIMES]


def test_the_other_layers_predict_better(plain: nn.Module, better: nn.Module) -> None:
    torch.manual_seed(0)
    exact = outputs(UNET.make().eval())
    before, after = ([sqnr_db(z, y) for z, y in zip(exact, outputs(m), strict=True)] for m in (plain, better))
    assert sum(after) > sum(before) + 3 * 0.5, (before, after)


def test_the_temporal_layers_and_what_they_give_stay(plain: nn.Module, better: nn.Module) -> None:
    """Even where the rules of the config quantize them, too."""
    every = quantized(high_precision=(), **BETTER)
    layers = tdq.feature_table(plain).metadata["layers"]
    assert layers
    for model in (better, every):
        correction = tdq.layer_correction(model)
        assert correction is not None
        assert not set(layers) & set(correction.names)
        found, expected = tdq.feature_table(model), tdq.feature_table(plain)
        assert all(torch.equal(f.dense(), expected.features[name].dense()) for name, f in found.features.items())
        for name in layers:
            one, other = (m.get_submodule(name).weight for m in (model, plain))
            assert torch.equal(one, other)
        changed = [name for name, module in model.named_modules() if _differs(module, plain, name)]
        assert changed


def _differs(module: nn.Module, plain: nn.Module, name: str) -> bool:
    weight, other = (m._parameters.get("weight") for m in (module, plain.get_submodule(name)))
    return weight is not None and other is not None and not torch.equal(weight, other)


def test_saved_and_restored(better: nn.Module) -> None:
    torch.manual_seed(1)
    made: Any = mto.restore_from_modelopt_state(UNET.make().eval(), mto.modelopt_state(better))
    made.load_state_dict(better.state_dict())
    assert all(map(torch.equal, outputs(made.eval()), outputs(better)))
    assert tdq.layer_correction(made) is not None


def test_scales_that_are_kept_keep_the_corrections(better: nn.Module) -> None:
    """Nothing is fitted without a calibration."""
    model = copy.deepcopy(better)
    fields = {"method": "tdq_temporal", "maintenance": "cache", "cache_bits": 16, "recalibrate": False}
    mtq.calibrate(model, {**fields, "progress": False}, UNET.forward_loop(8))
    before, after = tdq.layer_correction(better), tdq.layer_correction(model)
    assert before is not None
    assert after is not None
    assert all(torch.equal(after.gain[name], gain) for name, gain in before.gain.items())
    assert tdq.feature_table(model).metadata["cache_bits"] == 16


def test_a_recipe_with_corrections_can_be_maintained() -> None:
    config = tdq.make_config(correction="static", rounding="auto", channel_smoothing="auto")
    algorithm = with_maintenance(config, "cache")["algorithm"]
    made = tdq.make_config(**algorithm)["algorithm"]
    assert (made["method"], made["correction"], made["rounding"]) == ("tdq_temporal", "static", "auto")
    with pytest.raises(TdqError, match="correction"):
        tdq.make_config(method="tdq_temporal", correction="always")


def test_corrections_afterwards_leave_the_temporal_layers_alone() -> None:
    """Though the rules of the config quantize them, and their quantizers are off."""
    model = quantized(high_precision=())
    mtq.calibrate(model, {"method": "tdq_correct", "correction": "per_step", "progress": False}, UNET.forward_loop(8))
    correction = tdq.layer_correction(model)
    assert correction is not None
    assert not set(tdq.feature_table(model).metadata["layers"]) & set(correction.names)
