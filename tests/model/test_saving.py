"""Ways to save a quantized model that would lose its scales or fail: refused, with those that work."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.export import export_hf_checkpoint
from support.models import SMALL_UNET, SMALL_UNET_CONDITION, TinyDenoiser, calls, fast_config, loop, noise, quantized
from support.unchanged import unchanged_by
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.model.timestep import find_timestep

_CURES = r"modelopt\.torch\.opt\.save.*enable_huggingface_checkpointing.*export_onnx"


@pytest.mark.parametrize("method", ["tdq", "tdq_qat"])
@pytest.mark.parametrize("save", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())], ids=["pickle", "torch"])
def test_pickling_a_model_says_how_to_save_it(method: str, save: Callable[[nn.Module], Any]) -> None:
    model = mtq.quantize(TinyDenoiser().eval(), fast_config(method=method), loop(calls()))
    with pytest.raises(TdqError, match=rf"cannot be pickled.*{_CURES}"):
        save(model)
    with pytest.raises(TdqError, match="cannot be pickled"):
        save(nn.ModuleDict({"inside": model}))


def test_what_it_says_works(tmp_path: Path) -> None:
    model = quantized()
    mto.save(model, tmp_path / "m.pt")
    restored = mto.restore(TinyDenoiser().eval(), tmp_path / "m.pt")
    assert torch.equal(restored(*calls()[0]), model(*calls()[0]))


def test_copies_are_made_as_ever() -> None:
    model = quantized()
    copied, shallow = copy.deepcopy(model), copy.copy(model)
    for time in (900, 20):
        sample = noise(1, 3, 8, 8)
        assert torch.equal(copied(sample, time), model(sample, time))
        assert torch.equal(shallow(sample, time), model(sample, time))
    assert find_timestep(copied) is not find_timestep(model)
    assert {id(q._timestep) for q in tdq.temporal_quantizers(copied).values()} == {id(find_timestep(copied))}


def _unet() -> nn.Module:
    return mtq.quantize(SMALL_UNET.make().eval(), fast_config(), SMALL_UNET.forward_loop())


def _refused(model: Any, folder: Path) -> None:
    with pytest.raises(TdqError, match=_CURES):
        export_hf_checkpoint(model, export_dir=folder)
    assert not list(folder.rglob("*.safetensors"))


def test_a_checkpoint_with_one_scale_per_layer_is_refused(tmp_path: Path) -> None:
    model = _unet()
    table, state = tdq.scale_table(model), {k: v.clone() for k, v in model.state_dict().items()}
    _refused(model, tmp_path)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(tdq.scale_table(model).scale, table.scale)


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_also_where_modelopt_would_first_give_q_k_and_v_one_scale(recipe: str, tmp_path: Path) -> None:
    """In the model itself, before it writes anything."""
    family = SMALL_UNET_CONDITION
    config = fast_config() if recipe == "int8" else copy.deepcopy(tdq.TDQ_FP8_CFG)
    config["algorithm"] |= {"statistic": "max", "weights": "max", "protect_steps": False, "progress": False}
    if recipe == "fp8":  # per tensor, for which ModelOpt asks no activation quantizer for its scale
        config["quant_cfg"].append({"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}})
    torch.manual_seed(0)
    model = mtq.quantize(family.make().eval(), config, family.forward_loop())
    before = tdq.scale_table(model)
    assert not bool(before.is_static.all())
    _refused(model, tmp_path)
    assert torch.equal(tdq.scale_table(model).scale, before.scale)


def test_modelopts_own_models_are_exported_as_ever(tmp_path: Path) -> None:
    model = SMALL_UNET.make().eval()
    model = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, SMALL_UNET.forward_loop())
    export_hf_checkpoint(model, export_dir=tmp_path)
    assert list(tmp_path.glob("*.safetensors"))


def test_a_quantizer_keeps_its_table_when_one_scale_is_set() -> None:
    model = quantized()
    quantizer = tdq.temporal_quantizers(model)["conv1.input_quantizer"]

    def failing() -> None:
        with pytest.raises(TdqError, match="4 scales over time by one"):
            quantizer.amax = torch.tensor(1.0)

    unchanged_by(model, failing)


def test_a_calibration_of_modelopts_own_may_replace_it() -> None:
    model = quantized()
    assert not bool(tdq.scale_table(model).is_static.any())
    mtq.calibrate(model, "max", loop(calls()))
    found = tdq.scale_table(model)
    torch.manual_seed(0)  # the weights of `quantized`
    plain = mtq.quantize(TinyDenoiser().eval(), mtq.INT8_DEFAULT_CFG, loop(calls()))
    assert found.timesteps.numel() == 1
    for name, quantizer in tdq.temporal_quantizers(model).items():
        expected = plain.get_submodule(name).amax
        if expected is not None:
            assert torch.allclose(quantizer.amax, expected, rtol=1e-6)
