"""mtq.quantize with the preset as it is, on a model of every family; and which layers it leaves alone."""

from __future__ import annotations

import copy
import re

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from support.models import FAMILIES, SMALL_UNET_CONDITION, TIMES, Family, fast_config, noise
from support.slow import slow_but
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.model.call import first_output
from modelopt_tdq.model.output_correction import OutputCorrection

#: Where the data enters and leaves each family: high precision by section 4.1 of TDQ. Everything else that is
#: not a function of the time, the text or the class alone is to be quantized.
ENDS = {
    "plain": {"conv_in", "conv_out"},
    "unet": {"conv_in", "conv_out"},
    "unet_condition": {"conv_in", "conv_out"},
    "dit": {"pos_embed.proj", "proj_out_2"},
    "sd3": {"pos_embed.proj", "context_embedder", "proj_out"},
    "flux": {"x_embedder", "context_embedder", "proj_out"},
    "flux_guidance": {"x_embedder", "context_embedder", "proj_out"},
    "cogvideox": {"patch_embed.proj", "proj_out"},
}


@pytest.fixture(
    scope="module", params=slow_but(FAMILIES, *(name for name in FAMILIES if name not in ("flux", "unet_condition")))
)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def family(name: str) -> Family:
    return SMALL_UNET_CONDITION if name == "unet_condition" else FAMILIES[name]


@pytest.fixture(scope="module")
def original(family: Family) -> nn.Module:
    torch.manual_seed(0)
    model = family.make().eval()
    with torch.no_grad():  # some families start with zeros, behind which nothing shows
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def quantized(original: nn.Module, family: Family) -> nn.Module:
    return mtq.quantize(copy.deepcopy(original), tdq.TDQ_CONFIG, family.forward_loop())


def _layers(model: nn.Module) -> dict[str, QuantModule]:
    """The layers with quantizers for input and weight that can be enabled; embeddings are not among them."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantModule) and isinstance(module, (nn.Linear, nn.Conv2d))
    }


def test_outputs_stay_close_and_depend_on_the_quantizers(
    original: nn.Module, quantized: nn.Module, family: Family
) -> None:
    for arguments in family.data(batch=3, seed=50):
        exact, found = first_output(original(**arguments)), first_output(quantized(**arguments))
        ratio = float((found - exact).square().sum() / exact.square().sum())
        assert 0 < ratio < 1e-2


def test_has_a_row_per_time_of_the_family(original: nn.Module, quantized: nn.Module, family: Family) -> None:
    expected = sorted(float(call["timestep"].flatten()[0]) for call in family.data())
    assert tdq.scale_table(quantized).timesteps.tolist() == expected
    # without the fall-back to static scales, which random weights may call for in every row
    unprotected = mtq.quantize(copy.deepcopy(original), fast_config(), family.forward_loop())
    assert tdq.scale_table(unprotected).timesteps.tolist() == expected
    assert not bool(tdq.scale_table(unprotected).is_static.all())


def test_input_and_weight_of_a_layer_are_quantized_together(quantized: nn.Module) -> None:
    for name, layer in _layers(quantized).items():
        assert layer.input_quantizer.is_enabled == layer.weight_quantizer.is_enabled, name
    enabled = {n: m for n, m in quantized.named_modules() if isinstance(m, TensorQuantizer) and m.is_enabled}
    outputs = {n: m for n, m in enabled.items() if not re.search(r"(input|weight)_quantizer$", n)}
    # a correction quantizes nothing, it stands where the quantizer of the output would
    assert all(n.endswith(".output_quantizer") and isinstance(m, OutputCorrection) for n, m in outputs.items())


def test_weights_have_a_scale_per_output_channel(quantized: nn.Module) -> None:
    for name, layer in _layers(quantized).items():
        if layer.weight_quantizer.is_enabled:
            shape = (layer.weight.shape[0], *(1,) * (layer.weight.dim() - 1))
            assert layer.weight_quantizer._amax.shape == shape, name


def _inputs(model: nn.Module, arguments: dict[str, object]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def hook(name: str) -> None:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0].detach().clone()

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            hook(name)
    model(**arguments)
    for handle in handles:
        handle.remove()
    return found


def test_the_preset_leaves_out_the_ends_and_what_depends_on_time_or_condition_alone(
    name: str, original: nn.Module, quantized: nn.Module, family: Family
) -> None:
    """Found by running: an input that stays the same for another latent is a function of the rest alone."""
    arguments = family.data(times=TIMES[:1])[0]
    latent = next(iter(arguments))
    one = _inputs(original, arguments)
    other = _inputs(original, {**arguments, latent: noise(*arguments[latent].shape, seed=77)})
    fixed = {layer for layer, x in one.items() if torch.equal(x, other[layer])}
    # keys and values of a cross attention are functions of the text alone, but large products: quantized
    text = {layer for layer in fixed if re.search(r"attn2?\.(to_[kv]|add_[qkv]_proj)$", layer)}
    off = {layer for layer, module in _layers(quantized).items() if not module.input_quantizer.is_enabled}
    assert off == (fixed - text) | ENDS[name]


def test_another_batch_size_and_a_single_sample(quantized: nn.Module, family: Family) -> None:
    arguments = family.data(batch=1, times=TIMES[1:2], seed=9)[0]
    assert torch.isfinite(first_output(quantized(**arguments))).all()
