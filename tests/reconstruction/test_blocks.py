from __future__ import annotations

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import FAMILIES, fast_config
from support.slow import slow_but
from support.zoo import quantized_zoo
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.reconstruction.blocks import find_blocks
from modelopt_tdq.training.learned import learned_quantizers


def _names(family: str) -> list[str]:
    torch.manual_seed(0)
    made = FAMILIES[family]
    model = mtq.quantize(made.make().eval(), fast_config(method="tdq_qat", learn_weights=False), made.forward_loop())
    blocks = find_blocks(model)
    layers = [layer for block in blocks for layer in block.layers]
    assert len(layers) == len(set(layers))
    found = [name for block in blocks for name in block.quantizers(model)]
    assert sorted(found) == sorted(learned_quantizers(model))
    weights = [name for block in blocks for name in block.weights(model)]
    enabled = [n for n, m in model.named_modules() if n.endswith("weight_quantizer") and m.is_enabled]
    assert sorted(weights) == sorted(enabled)
    return [block.name for block in blocks]


def test_single_layers_where_nothing_repeats() -> None:
    assert _names("plain") == ["conv1", "mix", "conv2"]


def test_residual_and_attention_blocks_of_a_unet() -> None:
    names = _names("unet")
    assert {"down_blocks.0.resnets.0", "mid_block.resnets.1", "mid_block.attentions.0"} <= set(names)
    single = {"down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"}
    assert single <= set(names)
    assert {name.split(".")[-2] for name in set(names) - single} == {"resnets", "attentions"}


def test_transformer_blocks_inside_a_conditional_unet() -> None:
    names = _names("unet_condition")
    assert "mid_block.attentions.0.transformer_blocks.0" in names
    assert "mid_block.attentions.0.proj_in" in names
    assert not any("attn1" in name or ".ff" in name for name in names)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("dit", ["transformer_blocks.0", "transformer_blocks.1"]),
        ("sd3", ["transformer_blocks.0", "transformer_blocks.1"]),
        ("flux", ["transformer_blocks.0", "single_transformer_blocks.0"]),
    ],
)
def test_transformer_blocks(family: str, expected: list[str]) -> None:
    assert _names(family) == expected


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x).relu())


class _ByAttributes(nn.Module):
    """Blocks that are attributes rather than items of a list, and a layer of their parent."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.first, self.second = nn.Linear(4, 4), _Residual(), _Residual()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.second(self.first(self.start(sample) * (1 + timestep.reshape(-1, 1))))


def test_a_class_that_occurs_twice_is_a_block() -> None:
    def forward_loop(model: nn.Module) -> None:
        for time in (0.1, 0.5, 0.9):
            model(torch.randn(4, 4), torch.tensor(time))

    model = mtq.quantize(_ByAttributes().eval(), fast_config(method="tdq_qat", learn_weights=False), forward_loop)
    assert [block.name for block in find_blocks(model)] == ["start", "first", "second"]


def test_products_of_an_attention_belong_to_its_block() -> None:
    model = quantized_zoo(algorithm={"method": "tdq_qat", "learn_weights": False, "progress": False})
    blocks = {block.name: block for block in find_blocks(model)}
    assert {"attention", "attention_bmm", "images.plain", "tokens.linear3d"} <= set(blocks)
    assert len(blocks["attention"].quantizers(model)) == 3


@pytest.mark.parametrize("name", slow_but(("unet_condition", "dit", "flux_guidance"), "dit"))
def test_every_family_is_reconstructed(name: str) -> None:
    torch.manual_seed(0)
    family = FAMILIES[name]
    config = fast_config(
        weight_bits=3, activation_bits=6, method="tdq_reconstruct", iterations=8, samples=8, batch_size=4
    )
    model = mtq.quantize(family.make().eval(), config, family.forward_loop(4))
    report = tdq.reconstruction_report(model)
    assert report
    assert not any(block.note for block in report)
    assert sum(block.error_after for block in report) < sum(block.error_before for block in report)
