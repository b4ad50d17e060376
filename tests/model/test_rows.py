"""The row of a call is found once for all quantizers, and is that of each quantizer's own times."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import noise, quantized
from support.operators import Operators
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.core.schedule import row_index
from modelopt_tdq.model.model_table import temporal_quantizers
from modelopt_tdq.model.rows import TimesKey


@pytest.fixture
def model() -> Any:
    return quantized()


def _uncached(model: nn.Module, x: Tensor, t: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(TimesKey, "__call__", lambda self, bits: None)
        y: Tensor = model(x, t)
        return y


def test_found_once_for_all_quantizers(model: Any) -> None:
    assert len(temporal_quantizers(model)) == 3
    mtq.fold_weight(model)  # ModelOpt looks at the weights' scales
    for t in (torch.tensor([300.0]), torch.tensor([10.0, 900.0])):
        for _ in range(2):  # the first call reads the times from the device
            with torch.no_grad(), Operators() as operators:
                model(noise(2, 3, 8, 8), t)
        assert operators.names.count("aten.bucketize.Tensor") == 1
        assert "aten._local_scalar_dense.default" not in operators.names


@pytest.mark.parametrize("t", [torch.tensor([300.0]), torch.tensor([10.0, 900.0])])
def test_quantizers_with_other_times_read_their_own_rows(
    model: Any, t: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizers = list(temporal_quantizers(model).values())
    odd = quantizers[1]
    odd.set_rows(torch.tensor([5.0, 400.0, 950.0]), torch.tensor([0.5, 0.01, 0.1]))
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        model(x, t)
        assert torch.equal(model(x, t), _uncached(model, x, t, monkeypatch))


def test_rows_written_in_place_moved_or_loaded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = noise(2, 3, 8, 8), torch.tensor([300.0])
    other = copy.deepcopy(model)
    table = tdq.scale_table(other)
    tdq.set_scale_table(other, dataclasses.replace(table, timesteps=table.timesteps + 290.0))
    with torch.no_grad():
        before = model(x, t)
        expected = _uncached(other, x, t, monkeypatch)
        assert not torch.equal(before, expected)
        assert torch.equal(copy.deepcopy(model)(x, t), before)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x, t), expected)


def test_calls_inside_calls_and_modes(model: Any) -> None:
    """A call within a call has rows of its own; rows found without autograd serve no call with it."""
    x = noise(2, 3, 8, 8)
    early, late = torch.tensor([10.0]), torch.tensor([900.0])
    with torch.no_grad():
        expected, other = model(x, early), model(x, late)
    seen = []
    last = list(model.children())[-1]

    def inside(module: nn.Module, args: Any) -> None:
        if not seen:
            seen.append(None)
            seen[0] = model(x, late)

    with torch.no_grad():
        hook = last.register_forward_pre_hook(inside)
        assert torch.equal(model(x, early), expected)
        hook.remove()
    assert torch.equal(seen[0], other)
    with torch.inference_mode():
        assert torch.equal(model(x, early), expected)
    image = x.clone().requires_grad_()
    model(image, early).sum().backward()
    assert torch.isfinite(image.grad).all()


def test_key_follows_the_content() -> None:
    key, bits = TimesKey(), torch.tensor([1.0, 2.0]).view(torch.int32)
    first = key(bits)
    assert key(bits.clone()) == first == TimesKey()(bits) == key(bits)
    bits.copy_(torch.tensor([1.0, 3.0]).view(torch.int32))
    assert key(bits) != first
    assert key(torch.empty(2, dtype=torch.int32, device="meta")) is None
    assert row_index(torch.tensor([2.0]), bits.view(torch.float32)).tolist() == [0]
