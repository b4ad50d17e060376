"""ModelOpt's own ways to save and restore, each in a fresh process, with outputs equal to the last bit."""

from __future__ import annotations

import copy
from pathlib import Path

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import FAMILIES, SigmaDenoiser, TinyDenoiser, calls, fast_config, loop, noise, quantized
from support.processes import run_fresh
from support.tables import with_dequantization
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError

_TESTS = Path(__file__).parent

#: What every fresh process starts with. Nothing here allows torch.load to run code from a file.
_HEAD = f"""
import sys; sys.path[:0] = [{str(_TESTS)!r}, {str(_TESTS.parent)!r}]
import warnings; warnings.simplefilter("ignore")
import torch; torch.set_grad_enabled(False)
import modelopt.torch.opt as mto
assert "modelopt_tdq" not in sys.modules
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, diffusers_checkpoints: None) -> Path:
    """Everything saved once."""
    folder = tmp_path_factory.mktemp("saved")
    model = quantized(asymmetric=True)
    tdq.set_scale_table(model, with_dequantization(tdq.scale_table(model)))
    mto.save(model, folder / "model.pt")
    torch.save(mto.modelopt_state(model), folder / "state.pt")
    torch.save(model.state_dict(), folder / "weights.pt")
    with torch.no_grad():
        torch.save([model(sample, time) for sample, time in calls()], folder / "outputs.pt")
    family = FAMILIES["unet"]
    torch.manual_seed(0)
    unet = mtq.quantize(family.make().eval(), fast_config(asymmetric=True), family.forward_loop())
    tdq.set_scale_table(unet, with_dequantization(tdq.scale_table(unet)))
    unet.save_pretrained(folder / "unet")
    tdq.scale_table(unet).save(folder / "unet_table")
    with torch.no_grad():
        torch.save([unet(**a).sample for a in family.data()], folder / "unet_outputs.pt")
        half = unet.half()
        torch.save([half(a["sample"].half(), a["timestep"]).sample for a in family.data()], folder / "half_outputs.pt")
    return folder


def test_in_a_fresh_process_bit_for_bit_also_by_diffusers_and_in_half_precision(folder: Path, tmp_path: Path) -> None:
    script = f"""
import modelopt_tdq as tdq
from support.models import *
from diffusers import UNet2DModel
folder = {str(folder)!r}

expected = torch.load(folder + "/outputs.pt")
def same(model):
    assert all(torch.equal(model(s, t), e) for (s, t), e in zip(calls(), expected, strict=True))
    quantizers = list(tdq.temporal_quantizers(model).values())
    assert all(q.offset is not None for q in quantizers)
    assert [q.dequant_scale is not None for q in quantizers] == [False, True, True]
    assert [q.dequant_offset is not None for q in quantizers] == [False, False, True]

same(mto.restore(TinyDenoiser().eval(), folder + "/model.pt"))
model = mto.restore_from_modelopt_state(TinyDenoiser().eval(), torch.load(folder + "/state.pt"))
model.load_state_dict(torch.load(folder + "/weights.pt"))
same(model)
mto.save(model, folder + "/again.pt")
same(mto.restore(TinyDenoiser().eval(), folder + "/again.pt"))

mto.enable_huggingface_checkpointing()
table = tdq.ScaleTable.load(folder + "/unet_table")
def load(**kwargs):
    model = UNet2DModel.from_pretrained(folder + "/unet", **kwargs).eval()
    found = tdq.scale_table(model)
    for field in ("timesteps", "scale", "offset", "dequant_scale", "dequant_offset"):
        assert torch.equal(getattr(found, field), getattr(table, field)), (field, kwargs)
    return model

data, expected = FAMILIES["unet"].data(), torch.load(folder + "/unet_outputs.pt")
for kwargs in ({{}}, {{"low_cpu_mem_usage": False}}):
    model = load(**kwargs)
    assert all(torch.equal(model(**a).sample, e) for a, e in zip(data, expected, strict=True))
half, expected = load(torch_dtype=torch.float16), torch.load(folder + "/half_outputs.pt")
assert all(torch.equal(half(a["sample"].half(), a["timestep"]).sample, e) for a, e in zip(data, expected, strict=True))
load(torch_dtype=torch.float16, low_cpu_mem_usage=False)
load(torch_dtype=torch.bfloat16)
print("equal")
"""
    code, printed = run_fresh(_HEAD + script, tmp_path)
    assert code == 0, printed
    assert printed.strip().endswith("equal"), printed


def test_without_the_import_the_error_names_it(folder: Path, tmp_path: Path) -> None:
    script = f"""
import diffusers
for restore in (
    lambda: mto.restore(torch.nn.Linear(2, 2), {str(folder)!r} + "/model.pt"),
    lambda: (mto.enable_huggingface_checkpointing(), diffusers.UNet2DModel.from_pretrained({str(folder)!r} + "/unet")),
):
    try:
        restore()
    except KeyError as error:
        print(error)
assert "modelopt_tdq" not in sys.modules
"""
    code, printed = run_fresh(_HEAD + script, tmp_path)
    assert code == 0, printed
    assert printed.count("run `import modelopt_tdq` before restoring") == 2


def test_states_load_with_weights_only(folder: Path) -> None:
    for file in ("model.pt", "state.pt", "weights.pt", "unet/modelopt_state.pth"):
        torch.load(folder / file, weights_only=True)


def test_the_mode_is_known_under_its_plain_name_as_well(folder: Path) -> None:
    state = torch.load(folder / "state.pt")
    state["modelopt_state_dict"] = [(name.partition(" ")[0], entry) for name, entry in state["modelopt_state_dict"]]
    assert [name for name, _ in state["modelopt_state_dict"]] == ["quantize", "tdq_calibrate"]
    model = mto.restore_from_modelopt_state(TinyDenoiser().eval(), state)
    model.load_state_dict(torch.load(folder / "weights.pt"))
    sample, time = calls()[0]
    assert torch.equal(model(sample, time), torch.load(folder / "outputs.pt")[0])


def _restored(folder: Path) -> nn.Module:
    return mto.restore_from_modelopt_state(TinyDenoiser().eval(), torch.load(folder / "state.pt"))


def test_scales_that_were_not_loaded_are_noticed(folder: Path) -> None:
    model = _restored(folder)
    with pytest.raises(TdqError, match="scales were not loaded"):
        tdq.scale_table(model)
    quantizer = tdq.temporal_quantizers(model)["conv1.input_quantizer"]
    assert quantizer._timestep.value is None
    quantizer._timestep.begin(torch.tensor([20.0]))
    assert bool(quantizer(noise(1, 8, 8, 8)).isnan().all())


def test_a_missing_buffer_is_named(folder: Path) -> None:
    weights = torch.load(folder / "weights.pt")
    del weights["conv1.input_quantizer._scale_bits"]
    with pytest.raises(RuntimeError, match=r"Missing key.*conv1\.input_quantizer\._scale_bits"):
        _restored(folder).load_state_dict(weights)


def test_a_state_that_knows_no_offset_does_not_take_weights_that_have_one(folder: Path) -> None:
    state = torch.load(folder / "state.pt")
    buffers = state["modelopt_state_dict"][-1][1]["metadata"]["quantizer_state"]["conv1.input_quantizer"]
    del buffers["_pytorch_state_metadata"]["buffers"]["_offset_bits"]
    model = mto.restore_from_modelopt_state(TinyDenoiser().eval(), state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*conv1\.input_quantizer\._offset_bits"):
        model.load_state_dict(torch.load(folder / "weights.pt"))


def test_a_state_without_scales_says_so_when_called(folder: Path) -> None:
    state, weights = torch.load(folder / "state.pt"), torch.load(folder / "weights.pt")
    buffers = state["modelopt_state_dict"][-1][1]["metadata"]["quantizer_state"]["mix.input_quantizer"]
    del buffers["_pytorch_state_metadata"]["buffers"]["_scale_bits"]
    model = mto.restore_from_modelopt_state(TinyDenoiser().eval(), state)
    model.load_state_dict({name: v for name, v in weights.items() if name != "mix.input_quantizer._scale_bits"})
    with pytest.raises(TdqError, match="it has no scales yet"):
        model(*calls()[0])


@pytest.mark.parametrize("buffer", ["._scale_bits", "._dequant_offset_bits"])
def test_a_checkpoint_of_diffusers_that_lacks_scales_does_not_pass_for_calibrated(
    folder: Path, tmp_path: Path, diffusers_checkpoints: None, buffer: str
) -> None:
    import shutil

    from diffusers import UNet2DModel

    shutil.copytree(folder / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith(buffer))
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    model = UNet2DModel.from_pretrained(tmp_path / "unet")
    with pytest.raises(TdqError, match="scales were not loaded"):
        tdq.scale_table(model)


def test_a_named_argument_and_a_changed_table_are_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mtq.quantize(SigmaDenoiser().eval(), fast_config(timestep_argument="sigma"), loop(calls()))
    table = tdq.scale_table(model)
    tdq.set_scale_table(model, table.resample([1.0, 2.0, 800.0]))
    mto.save(model, tmp_path / "model.pt")
    restored = mto.restore(SigmaDenoiser().eval(), tmp_path / "model.pt")
    assert tdq.scale_table(restored).timesteps.tolist() == [1.0, 2.0, 800.0]
    assert torch.equal(restored(noise(1, 3, 8, 8), sigma=2), model(noise(1, 3, 8, 8), sigma=2))


def test_a_restored_model_can_be_calibrated_again_and_copied(folder: Path) -> None:
    model = mto.restore(TinyDenoiser().eval(), folder / "model.pt")
    before = tdq.scale_table(model)
    mtq.calibrate(model, fast_config(bins=1)["algorithm"], loop(calls()))
    assert bool(tdq.scale_table(model).is_static.all())
    assert not bool(before.is_static.any())
    copied = copy.deepcopy(model)
    sample, time = calls()[0]
    assert torch.equal(copied(sample, time), model(sample, time))
