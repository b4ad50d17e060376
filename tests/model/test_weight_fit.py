"""Weights that change after calibration: which changes are noticed, which are not, and who warns of them."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import FAMILIES, TinyDenoiser, calls, fast_config, loop, noise, quantized
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.model.weight_fit import changed_weights, plain_weights, warn_of_changed_weights, weight_change

#: Those of TinyDenoiser that the preset quantizes.
LAYERS = ["conv1", "mix", "conv2"]

FORMATS = [(8, "max"), (8, "mse"), (4, "max"), (4, "mse"), ((4, 3), "max")]


def _quantized(bits: Any = 8, method: str = "max", **fields: Any) -> nn.Module:
    return quantized(weight_bits=bits, weights=method, **fields)


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: model.get_submodule(name)._parameters["weight"] for name in LAYERS}


@torch.no_grad()
def add_low_rank(weight: torch.Tensor, size: float, seed: int = 5) -> None:
    """As a fused LoRA of rank 4 does; ``size`` relative to the weight."""
    rows, columns = weight.shape[0], weight[0].numel()
    delta = (noise(rows, 4, seed=seed) @ noise(4, columns, seed=seed + 1)).reshape(weight.shape)
    weight.add_(delta * (size * weight.norm() / delta.norm()))


def _names(model: nn.Module) -> list[str]:
    return [change.name.removesuffix(".weight_quantizer") for change in changed_weights(model)]


def _restored(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    mto.save(model, file)
    file.seek(0)
    return mto.restore(TinyDenoiser().eval(), file)


UNCHANGED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it is": lambda m: m,
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "there and back": lambda m: m.half().float(),
    "copied": copy.deepcopy,
    "saved": _restored,
    "saved in half": lambda m: _restored(m.half()),
    "own state": lambda m: (m.load_state_dict(copy.deepcopy(m.state_dict())), m)[1],
}


@pytest.mark.parametrize(("bits", "method"), FORMATS)
def test_no_alarm_without_a_change(bits: Any, method: str) -> None:
    for what, made in UNCHANGED.items():
        model = made(_quantized(bits, method))
        assert len(list(plain_weights(model))) == 3, what
        assert _names(model) == [], what


@pytest.mark.parametrize(("bits", "method"), FORMATS)
@pytest.mark.parametrize("factor", [3.0, 1.2, 1 / 1.2])
def test_a_scaled_weight_is_named_with_its_size(factor: float, bits: Any, method: str) -> None:
    model = _restored(_quantized(bits, method))
    with torch.no_grad():
        weights(model)["mix"].mul_(factor)
    (change,) = changed_weights(model)
    assert change.name == "mix.weight_quantizer"
    assert change.size == pytest.approx(factor, rel=1e-5)
    assert change.is_resized
    assert change.misfits or factor < 3.0  # values out of range cost more at once


@pytest.mark.parametrize(("bits", "method"), FORMATS)
def test_a_fused_lora_is_noticed_and_the_noise_is_what_it_costs(bits: Any, method: str) -> None:
    model = _quantized(bits, method)
    for weight in weights(model).values():
        add_low_rank(weight, 0.5)
    assert _names(model) == LAYERS
    for change, (name, weight) in zip(changed_weights(model), weights(model).items(), strict=True):
        assert change.misfits
        values = model.get_submodule(name).weight_quantizer(weight.detach())
        expected = float((values - weight).square().sum() / weight.square().sum())
        assert change.noise == pytest.approx(expected, rel=1e-3)


def test_weights_of_another_model_are_noticed() -> None:
    model = _quantized()
    torch.manual_seed(99)
    other = {f"{name}.weight": torch.randn_like(w) * w.std() for name, w in weights(model).items()}
    model.load_state_dict(other, strict=False)
    assert _names(model) == LAYERS


def test_a_weight_that_was_zero() -> None:
    torch.manual_seed(0)
    model = TinyDenoiser().eval()
    nn.init.zeros_(model.mix.weight)
    model = quantized(model)
    assert _names(model) == []
    with torch.no_grad():
        model.mix.weight.add_(0.1)
    assert _names(model) == ["mix"]


def _train(model: nn.Module, steps: int = 30, lr: float = 3e-3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for step in range(steps):
        loss = (model(noise(4, 3, 8, 8, seed=step), torch.tensor(300.0)) - noise(4, 3, 8, 8, seed=step + 1)).square()
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("seen", ["evaluated", "exported at once", "saved at once"])
def test_training_with_the_quantizers_in_the_loop_is_no_change(seen: str) -> None:
    model = _quantized()
    before = {name: weight.detach().clone() for name, weight in weights(model).items()}
    _train(model)
    assert all(float((w.detach() - before[n]).norm() / before[n].norm()) > 0.05 for n, w in weights(model).items())
    assert any(weight_change(*entry).misfits for entry in plain_weights(model))  # by its numbers alone
    if seen == "evaluated":
        with torch.no_grad():
            model(noise(1, 3, 8, 8), torch.tensor(300.0))
            assert _names(model) == []
            weights(model)["mix"].mul_(1.5)
        assert _names(model) == ["mix"]  # what happens later is noticed
    elif seen == "saved at once":
        assert _names(_restored(model)) == []
    else:
        assert _names(model) == []


def test_adapters_that_are_trained_do_not_hide_a_change_of_the_weights() -> None:
    model = _quantized()
    for weight in weights(model).values():
        weight.requires_grad_(False)
    _train(model)
    with torch.no_grad():
        weights(model)["mix"].mul_(1.5)
    assert _names(model) == ["mix"]


@pytest.mark.parametrize("bits", [8, 4])
def test_learned_scales_follow_their_weights_in_training_alone(bits: int) -> None:
    config = tdq.make_config(bits, bits, method="tdq_qat", statistic="max", weights="max", progress=False)
    torch.manual_seed(0)
    model = mtq.quantize(TinyDenoiser(), config, loop(calls()))
    assert _names(model) == []
    _train(model)
    assert _names(model) == []
    with torch.no_grad():
        weights(model)["mix"].mul_(4.0)
    assert _names(model) == ["mix"]
    trained = model.state_dict()
    _train(model)
    assert _names(model) == []
    model.load_state_dict(trained)  # with the scales that belong to the weights
    assert _names(model) == []


def test_rounding_that_was_learned_is_no_change() -> None:
    config = tdq.make_config(
        3, 8, method="tdq_reconstruct", statistic="max", weights="mse", iterations=8, samples=8, progress=False
    )
    torch.manual_seed(0)
    model = mtq.quantize(TinyDenoiser().eval(), config, loop(calls()))
    changes = [weight_change(*entry) for entry in plain_weights(model)]
    folded = [c.name.removesuffix(".weight_quantizer") for c in changes if c.noise < 1e-10]
    assert folded  # these weights are their quantized values now
    assert _names(copy.deepcopy(model).half()) == _names(model) == []
    add_low_rank(weights(model)[folded[0]], 0.3)
    assert _names(model) == folded[:1]  # the rounding is lost


def test_scales_that_another_algorithm_set_are_not_compared_with_ours() -> None:
    model = _quantized(4, "mse")
    mtq.calibrate(model, "max", loop(calls()))
    assert _names(model) == []


def test_the_warning_names_the_layers_and_the_cures() -> None:
    model = _quantized()
    with torch.no_grad():
        weights(model)["mix"].mul_(3.0)
    add_low_rank(weights(model)["conv2"], 0.5)
    with pytest.warns(tdq.TdqWarning, match="2 layers") as caught:
        warn_of_changed_weights(model)
    text = str(caught[0].message)
    assert "mix (3.00 times as large, SQNR 4." in text
    assert "conv2 (SQNR " in text
    assert "conv1" not in text
    assert "modelopt_tdq.recalibrate_weights(model)" in text
    assert "mtq.quantize(model, config, forward_loop)" in text


def _warnings(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if w.category is tdq.TdqWarning]


def test_export_and_comparison_warn_once_and_only_then(tmp_path: Path) -> None:
    from modelopt_tdq.compare import compare_model

    model = _quantized()
    inputs = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(300.0)}
    uses: dict[str, Callable[[], Any]] = {
        "export": lambda: tdq.export_onnx(model, tmp_path / "m.onnx", inputs),
        "compare": lambda: compare_model(model, [inputs], backends=("torch",), layers=False, progress=False),
    }
    for run in uses.values():
        assert _warnings(run) == []
    with torch.no_grad():
        weights(model)["mix"].mul_(3.0)
    for run in uses.values():
        (text,) = _warnings(run)
        assert "mix (3.00 times" in text


def test_saving_a_folder_warns(tmp_path: Path, diffusers_checkpoints: None) -> None:
    from modelopt_tdq.lab.model_folder import save_quantized

    family = FAMILIES["dit"]
    torch.manual_seed(0)
    model = mtq.quantize(family.make().eval(), fast_config(), family.forward_loop())
    assert _warnings(lambda: save_quantized(model, tmp_path / "before", {}, {})) == []
    with torch.no_grad():
        model.transformer_blocks[0].attn1.to_q.weight.mul_(3.0)
    (text,) = _warnings(lambda: save_quantized(model, tmp_path / "after", {}, {}))
    assert "transformer_blocks.0.attn1.to_q (3.00 times" in text


def test_a_number_format_set_after_calibration_is_refused() -> None:
    model = _quantized()
    mtq.set_quantizer_attributes_partial(model, "mix.input_quantizer", {"num_bits": 4})
    for use in (lambda: model(*calls()[0]), lambda: tdq.scale_table(model)):
        with pytest.raises(TdqError, match=r"the scales of mix\.input_quantizer were made for 8"):
            use()
    config = fast_config()
    config["quant_cfg"] += [{"quantizer_name": "mix.input_quantizer", "cfg": {"num_bits": 4, "axis": None}}]
    mtq.quantize(model, config, loop(calls()))
    torch.manual_seed(0)
    fresh = mtq.quantize(TinyDenoiser().eval(), config, loop(calls()))
    assert torch.equal(model(*calls()[0]), fresh(*calls()[0]))
