"""Blocks that run again in the backward pass see the time of their own call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import SMALL_UNET
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError


def _model() -> nn.Module:
    family = SMALL_UNET
    torch.manual_seed(0)
    model = family.make()
    config = tdq.make_config(4, 4, method="tdq_qat", intervals="table", statistic="max", weights="max", progress=False)
    return mtq.quantize(model, config, family.forward_loop()).train()


def _gradients(model: nn.Module, times: list[float]) -> dict[str, Tensor]:
    """Of the sum over one call per time, with a single backward pass."""
    family = SMALL_UNET
    total = torch.zeros(())
    for seed, time in enumerate(times):
        total = total + model(**family.inputs(2, torch.tensor(time), seed)).sample.square().mean()
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _checkpointed(times: list[float], function: Callable[[nn.Module], Any] | None) -> dict[str, Tensor]:
    model: Any = _model()
    model.enable_gradient_checkpointing(*([] if function is None else [function(model)]))
    return _gradients(model, times)


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_one_call_per_backward_pass_needs_nothing() -> None:
    assert _equal(_checkpointed([300.0], None), _gradients(_model(), [300.0]))


def test_several_calls_need_the_checkpoint_function() -> None:
    expected = _gradients(_model(), [900.0, 20.0])
    assert _equal(_checkpointed([900.0, 20.0], tdq.checkpoint), expected)
    # what it is for: whose time a block has that runs again is not known without it
    with pytest.raises(TdqError, match="the call that it belongs to is not known") as raised:
        _checkpointed([900.0, 20.0], None)
    assert "modelopt_tdq.checkpoint(model)" in raised.value.cure


def test_a_training_loop_needs_nothing() -> None:
    """Call, backward, step, and again; the loss of the step before is still referred to."""
    trained = {}
    for checkpointing in (False, True):
        model: Any = _model()
        if checkpointing:
            model.enable_gradient_checkpointing()
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for seed, time in enumerate((900.0, 20.0, 300.0)):
            model(**SMALL_UNET.inputs(2, torch.tensor(5.0), seed))  # looked at, and never learned from
            loss = model(**SMALL_UNET.inputs(2, torch.tensor(time), seed)).sample.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trained[checkpointing] = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert _equal(trained[True], trained[False])
