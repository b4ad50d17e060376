"""How much of a model is quantized, against numbers that were worked out by hand; and why the rest is not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import onnx
import onnxruntime
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from support.models import FAMILIES, fast_config, loop, noise
from torch import Tensor, nn

import modelopt_tdq as tdq


class _Denoiser(nn.Module):
    """One layer of each kind, of a batch of 2: channels 4, 8 × 8 places, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(10, 4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.attention = Attention(4, heads=2, dim_head=2, processor=AttnProcessor2_0())
        self.norm1 = nn.Module()
        self.norm1.linear = nn.Linear(4, 8)
        self.grow = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.mix = nn.Linear(4, 4, bias=False)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.conv(sample)
        scale, shift = self.norm1.linear(self.classes.weight[:2] * (1 + timestep / 100)).chunk(2, 1)
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        tokens = h.flatten(2).movedim(1, 2)  # [2, 64, 4]
        tokens = tokens + self.attention(tokens) + self.mix(tokens) + self.classes(torch.tensor([[1], [2]]))
        out: Tensor = self.grow(tokens.movedim(1, 2).reshape(2, 4, 8, 8))
        return out


DATA = [(noise(2, 4, 8, 8, seed=int(time)), torch.tensor(time)) for time in (20.0, 900.0)]

#: Of one call, worked out: outputs times what each of them adds up.
PRODUCTS = {
    "conv": 2 * 4 * 64 * (4 * 9),
    "norm1.linear": 2 * 8 * 4,
    "attention": 2 * 2 * 64 * 64 * (2 + 2),
    "attention.to_q": 2 * 64 * 4 * 4,
    "attention.to_k": 2 * 64 * 4 * 4,
    "attention.to_v": 2 * 64 * 4 * 4,
    "attention.to_out.0": 2 * 64 * 4 * 4,
    "mix": 2 * 64 * 4 * 4,
    "grow": 2 * 64 * 4 * 4 * 4,
    "classes": 0,
}

#: float32.
WEIGHTS = {"conv": 4 * 144, "norm1.linear": 4 * 32, "mix": 4 * 16, "grow": 4 * 64, "classes": 4 * 40} | {
    f"attention.{name}": 4 * 16 for name in ("to_q", "to_k", "to_v", "to_out.0")
}


def _quantized(*rules: dict[str, Any], **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    config = fast_config(**fields)
    config["quant_cfg"] += rules
    return mtq.quantize(_Denoiser().eval(), config, loop(DATA))


def _parts(found: tdq.Coverage) -> dict[str, Any]:
    return {part.name: part for part in found.parts if part.kind != "biases, norms and other parameters"}


def test_every_product_and_every_weight_is_counted() -> None:
    found = tdq.coverage(_quantized())
    parts = _parts(found)
    assert {name: part.multiply_adds for name, part in parts.items()} == PRODUCTS
    assert {name: part.weight_bytes for name, part in parts.items() if part.weight_bytes} == WEIGHTS
    assert found.multiply_adds == sum(PRODUCTS.values())
    assert found.weight_bytes == sum(4 * parameter.numel() for parameter in _Denoiser().parameters())
    quantized = {"conv", "mix", "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"}
    assert {name for name, part in parts.items() if part.quantized} == quantized
    products = sum(PRODUCTS[name] for name in quantized)
    assert found.quantized_multiply_adds == pytest.approx(products / sum(PRODUCTS.values()))
    assert found.quantized_weights == pytest.approx(sum(WEIGHTS[name] for name in quantized) / found.weight_bytes)
    assert found.in_low_precision("openvino") == found.quantized_multiply_adds
    without = (products - PRODUCTS["conv"]) / sum(PRODUCTS.values())
    assert found.in_low_precision("onnxruntime") == pytest.approx(without)  # convolutions are float there
    with pytest.raises(tdq.TdqError, match="not a known backend"):
        found.in_low_precision("tvm")


def test_what_is_not_quantized_has_its_reason() -> None:
    found = tdq.coverage(_quantized({"quantizer_name": "mix.*", "enable": False}))
    parts = _parts(found)
    reasons = {name: part.reason for name, part in parts.items() if not part.quantized}
    assert set(reasons) == {"mix", "grow", "classes", "norm1.linear", "attention"}
    assert reasons["mix"] == "left out by the rule 'mix.*'"
    assert "OpenVINO alone" in reasons["grow"]
    assert "read, not multiplied" in reasons["classes"]
    assert reasons["norm1.linear"] == "the presets leave it out"
    assert parts["norm1.linear"].role == "modulation"
    assert "products with weights" in reasons["attention"]
    text = str(found)
    assert "left out by the rule 'mix.*' (mix)" in text
    assert repr(dict(found.rules[0])) in text


def test_what_is_switched_off_or_did_not_run_says_so() -> None:
    model: Any = _quantized()
    mtq.disable_quantizer(model, "mix.*")
    model.spare = nn.Linear(4, 4)
    parts = _parts(tdq.coverage(model))
    assert parts["mix"].reason == "switched off after quantization"
    assert parts["spare"].reason == "added after quantization"
    assert parts["spare"].multiply_adds == 0


def test_products_of_attention_and_transposed_convolutions_count_when_they_are_quantized() -> None:
    cfg = {"num_bits": 8, "axis": None}
    found = tdq.coverage(_quantized({"quantizer_name": "*_bmm_quantizer", "cfg": cfg}, conv_transpose=True))
    parts = _parts(found)
    assert parts["attention"].quantized
    assert parts["grow"].quantized
    total = sum(PRODUCTS.values())
    assert found.quantized_multiply_adds == pytest.approx(1 - PRODUCTS["norm1.linear"] / total)
    gap = PRODUCTS["grow"] / total
    assert found.in_low_precision("openvino") == pytest.approx(found.in_low_precision("tensorrt_rtx") + gap)
    assert "TensorRT-RTX has no low-precision kernel for ConvTranspose" in str(found)


@pytest.mark.parametrize("name", ["unet", "sd3", "flux"])
def test_families(name: str) -> None:
    family = FAMILIES[name]
    model = mtq.quantize(family.make().eval(), fast_config(), family.forward_loop())
    found = tdq.coverage(model)
    parameters = {id(p): p for p in model.parameters()}.values()
    assert found.weight_bytes == sum(p.numel() * p.element_size() for p in parameters)
    first = family.data()[0]
    samples = max(len(v) for n, v in first.items() if isinstance(v, Tensor) and v.dim() and "ids" not in n)

    def products(coverage: tdq.Coverage) -> dict[str, int]:
        return {part.name: part.multiply_adds for part in coverage.parts if part.multiply_adds}

    # what calibration counted is a sample's
    assert products(found)
    assert products(tdq.coverage(model, first)) == {name: samples * own for name, own in products(found).items()}
    assert ("modulation" in {part.role for part in found.parts}) == (name != "unet")
    assert bool(found.rules) == (name != "unet")
    assert not [part.name for part in found.parts if "a module's own" in part.kind and (part.multiply_adds or 0) > 1000]


def test_a_restored_model_counts_from_a_call() -> None:
    model = _quantized()
    restored = mto.restore_from_modelopt_state(_Denoiser(), mto.modelopt_state(model))
    restored.load_state_dict(model.state_dict())
    found = tdq.coverage(restored)
    assert (found.multiply_adds, found.quantized_multiply_adds, found.in_low_precision("openvino")) == (None,) * 3
    assert found.quantized_weights == tdq.coverage(model).quantized_weights
    inputs = dict(zip(("sample", "timestep"), DATA[0], strict=True))
    assert tdq.coverage(restored, inputs) == tdq.coverage(model)
    with torch.inference_mode():
        assert tdq.coverage(restored, inputs) == tdq.coverage(model)
    with pytest.raises(tdq.TdqError, match="not quantized"):
        tdq.coverage(_Denoiser())


def test_layers_that_are_looked_up_are_neither_quantized_nor_float() -> None:
    family = FAMILIES["plain"]
    config = fast_config(method="tdq_temporal", maintenance="cache")
    model = mtq.quantize(family.make().eval(), config, family.forward_loop())
    assert _parts(tdq.coverage(model))["time_embedding"].reason == "looked up by time (tdq_temporal)"


def test_quantization_tells_what_it_covers(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="modelopt_tdq.modes"):
        model = _quantized(progress=True)
    assert str(tdq.coverage(model)) in caplog.text
    assert tdq.coverage(model).headline in capsys.readouterr().err


def test_modulation_is_stored_in_few_bits_by_the_rules_that_are_offered(tmp_path: Path) -> None:
    """Its weights are rounded, in torch and in the graphs of both lowerings, whose numbers are torch's."""
    before = tdq.coverage(_quantized())
    model: Any = _quantized(*(dict(rule) for rule in before.rules))
    found = tdq.coverage(model)
    part = _parts(found)["norm1.linear"]
    assert part.quantized_weights
    assert not part.quantized
    assert found.quantized_weights == pytest.approx(before.quantized_weights + part.weight_bytes / found.weight_bytes)
    assert not found.rules
    inputs = dict(zip(("sample", "timestep"), DATA[1], strict=True))
    with torch.no_grad():
        expected = model(**inputs)
    layer = model.norm1.linear
    paths = [tmp_path / "ratio.onnx", tmp_path / "reference.onnx"]
    tdq.export_onnx(model, paths[0], inputs, reference_path=paths[1])
    for path in paths:
        stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
        codes = onnx.numpy_helper.to_array(stored["norm1.linear.weight_quantizer/codes"])
        assert codes.dtype == "int8"
        scale = layer.weight_quantizer.amax / 127
        torch.testing.assert_close(torch.tensor(codes) * scale, layer.weight_quantizer(layer.weight))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        feeds = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
        torch.testing.assert_close(torch.tensor(session.run(None, feeds)[0]), expected, rtol=1e-4, atol=1e-4)
