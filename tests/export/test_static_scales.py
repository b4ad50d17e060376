"""One scale per layer for programs that know no time: right numbers, the table beside them, or a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from safetensors.torch import load_file
from support.models import SMALL_UNET, TinyDenoiser, calls, fast_config, loop, quantized
from support.pipelines import FAMILIES as PIPELINES
from torch import nn
from typer.testing import CliRunner

import modelopt_tdq as tdq
from modelopt_tdq.cli import app
from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.static_scales import TABLE_FILE
from modelopt_tdq.lab.model_folder import describe_inputs, save_quantized

FP8 = (4, 3)


def test_the_largest_scale_of_every_quantizer(tmp_path: Path) -> None:
    model = quantized()
    table = tdq.scale_table(model)
    assert not bool(table.is_static.all())
    found = json.loads(tdq.write_static_json(model, tmp_path / "scales.json").read_text())
    for number, name in enumerate(table.names):
        scale = found[name.removesuffix(".input_quantizer")]["input_scale"]
        assert scale == pytest.approx(float(table.scale[:, number].max()), rel=1e-6)
    weights = found["conv1"]["weight_scale"]
    layer: Any = model.conv1
    expected = layer.weight_quantizer._amax.flatten() / 127
    torch.testing.assert_close(torch.tensor(weights), expected)


def test_fp8_weights_have_one_number(tmp_path: Path) -> None:
    model = quantized(weight_bits=FP8, activation_bits=FP8)
    found = tdq.static_scales(model)
    layer: Any = model.conv1
    assert layer.weight_quantizer._amax.numel() > 1
    assert found["conv1"]["weight_scale"] == pytest.approx(float(layer.weight_quantizer._amax.max()) / 448)
    assert set(found["conv1"]) == {"input_scale", "weight_scale"}


def test_products_of_attention_have_theirs() -> None:
    config = fast_config()
    config["quant_cfg"].append({"quantizer_name": "*bmm_quantizer", "cfg": {"num_bits": 8, "axis": None}})

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from diffusers.models.attention_processor import Attention, AttnProcessor

            self.attention = Attention(8, heads=2, dim_head=4, processor=AttnProcessor())

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> Any:
            return self.attention(sample.flatten(2).transpose(1, 2) * (1 + timestep / 500))

    def forward_loop(model: nn.Module) -> None:
        for time in (900.0, 100.0):
            model(torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(time))

    found = tdq.static_scales(mtq.quantize(Attention().eval(), config, forward_loop))
    assert {"q_bmm_scale", "k_bmm_scale", "v_bmm_scale"} <= set(found["attention"])


def _unet(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return mtq.quantize(SMALL_UNET.make().eval(), fast_config(**fields), SMALL_UNET.forward_loop())


def _transformer(bits: Any = 8) -> nn.Module:
    config = fast_config(weight_bits=bits, activation_bits=bits)
    if bits == FP8:  # readers of static scales take one per weight
        config["quant_cfg"].append({"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": FP8, "axis": None}})
    pipeline = PIPELINES["sd3"].tiny()
    tdq.quantize_pipeline(pipeline, config, calls=[PIPELINES["sd3"].tiny_call(0)], steps=3, progress=False)
    return pipeline.transformer


@pytest.mark.parametrize(("bits", "algorithm"), [(FP8, "FP8"), (8, "W8A8_SQ_PER_CHANNEL")], ids=["fp8", "int8"])
def test_a_checkpoint_has_static_scales_and_the_table_beside_them(bits: Any, algorithm: str, tmp_path: Path) -> None:
    model = _transformer(bits)
    table, state = tdq.scale_table(model), {name: value.clone() for name, value in model.state_dict().items()}
    folder = tdq.write_static_checkpoint(model, tmp_path / "checkpoint")
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert described["quant_algo"] == algorithm
    assert described["modelopt_tdq"] == {
        "scales": TABLE_FILE,
        "static_scales": "the largest over time",
        "timestep_argument": "timestep",
    }
    beside = tdq.ScaleTable.load(folder / TABLE_FILE)
    assert beside.names == table.names
    assert torch.equal(beside.scale, table.scale)
    assert not bool(table.is_static.all())
    (weights,) = folder.glob("diffusion_pytorch_model*.safetensors")
    stored = load_file(weights)
    for number, name in enumerate(table.names):
        layer = name.removesuffix(".input_quantizer")
        largest = float(table.scale[:, number].max())
        assert float(stored[f"{layer}.input_scale"]) == pytest.approx(largest, rel=1e-6)
        codes, scale = stored[f"{layer}.weight"], stored[f"{layer}.weight_scale"].float()
        original = model.get_submodule(layer).weight
        restored = codes.float() * scale.reshape(-1, *(1,) * (original.dim() - 1))
        error = (restored - original).abs().max() / original.abs().max()
        assert float(error) < (0.07 if bits == FP8 else 0.01)
    # the model is what it was
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(tdq.scale_table(model).scale, table.scale)


def test_what_single_scales_cannot_say_is_refused(tmp_path: Path) -> None:
    smoothed = _unet(channel_smoothing=0.5)
    cases: list[tuple[nn.Module, str]] = [
        (quantized(asymmetric=True), r"offsets need a zero point.*asymmetric=False"),
        (quantized(activation_bits=4), r"formats other than INT8.*8 bits"),
        (smoothed, r"channels are smoothed.*channel_smoothing='none'"),
    ]
    for model, says in cases:
        with pytest.raises(TdqError, match=says):
            tdq.write_static_json(model, tmp_path / "scales.json")
    shifted = quantized()
    rows, quantizer = torch.ones(1, 8), tdq.temporal_quantizers(shifted)["mix.input_quantizer"]
    quantizer.set_channels(None, rows)
    with pytest.raises(TdqError, match=r"channels are shifted.*channel_shift='none'"):
        tdq.write_static_json(shifted, tmp_path / "scales.json")
    with pytest.raises(TdqError, match=r"no diffusers model.*write_static_json"):
        tdq.write_static_checkpoint(quantized(), tmp_path / "checkpoint")
    with pytest.raises(TdqError, match=r"leave out \d+ of its \d+ quantizers.*write_static_json"):
        tdq.write_static_checkpoint(_unet(), tmp_path / "checkpoint")
    corrected = _transformer()
    layer = "transformer_blocks.0.attn.to_q"
    rows = torch.ones(1, corrected.get_submodule(layer).weight.shape[0])
    times = tdq.scale_table(corrected).timesteps
    tdq.set_layer_correction(corrected, tdq.LayerCorrection(times, {layer: rows}, {layer: 0 * rows}))
    with pytest.raises(TdqError, match=r"outputs of 1 layers are corrected.*set_layer_correction\(model, None\)"):
        tdq.write_static_checkpoint(corrected, tmp_path / "checkpoint")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(TdqError, match="not empty"):
        tdq.write_static_checkpoint(_transformer(), tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_model_that_is_not_calibrated() -> None:
    model = mtq.quantize(TinyDenoiser().eval(), fast_config(), loop(calls()))
    for quantizer in tdq.temporal_quantizers(model).values():
        quantizer.reset_amax()
    with pytest.raises(TdqError, match="not calibrated"):
        tdq.static_scales(model)


def test_the_command_line(tmp_path: Path) -> None:
    model = _transformer()
    folder = tmp_path / "quantized"
    save_quantized(model, folder, describe_inputs(model, (torch.zeros(2, 4, 8, 8),), {}), {})
    table = tdq.scale_table(model)
    for form, written in (("table", TABLE_FILE), ("static-json", "scales.json"), ("checkpoint", "checkpoint")):
        target = tmp_path / "out" / written
        done = CliRunner().invoke(app, ["table", str(folder), "--to", form, "--output", str(target)])
        assert done.exit_code == 0, done.output
        assert f"{len(table.names)} quantizers" in done.stdout
        assert target.exists()
        assert ("largest of its scales" in done.stdout) == (form != "table")
    assert json.loads((tmp_path / "out" / "scales.json").read_text()) == tdq.static_scales(model)
