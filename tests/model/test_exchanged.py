"""A failed call of a quantized attention leaves PyTorch as it was."""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

import modelopt_tdq as tdq

FUNCTIONS = ((torch, "bmm"), (torch, "baddbmm"), (F, "scaled_dot_product_attention"))


class _Denoiser(nn.Module):
    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.attention = Attention(8, heads=2, dim_head=4, processor=processor)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.attention(sample)


def _state() -> list[Any]:
    return [(vars(package).get(name), vars(package).get(f"_{name}")) for package, name in FUNCTIONS]


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_functions_come_back_after_an_error(processor: type) -> None:
    torch.manual_seed(0)
    x, before = torch.randn(2, 5, 8), _state()

    def loop(model: nn.Module) -> None:
        for t in (900.0, 100.0):
            model(x, torch.tensor([t]))

    model = mtq.quantize(
        _Denoiser(processor()).eval(), tdq.make_config(protect_steps=False, correction="none", progress=False), loop
    )
    expected = model(x, torch.tensor([100.0]))
    assert _state() == before
    with pytest.raises(tdq.TdqError, match="timestep"):
        model.attention(x)  # its quantizers know no time
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 7), torch.tensor([100.0]))  # a width that no layer takes
    assert _state() == before
    assert torch.equal(model(x, torch.tensor([100.0])), expected)


def test_one_inside_another_of_the_same_name() -> None:
    from modelopt.torch.quantization.utils import replace_function

    before = _state()
    outer, inner = object(), object()
    with replace_function(torch, "bmm", outer):
        with replace_function(torch, "bmm", inner):
            assert torch.bmm is inner
            assert vars(torch)["_bmm"] is outer
        assert torch.bmm is outer
        assert vars(torch)["_bmm"] is before[0][0]
    assert _state() == before
