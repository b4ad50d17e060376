"""Everything about a model, before and after something that must not change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn

from support.models import TinyDenoiser, calls, fast_config


def _value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (dict, list, set, tuple)) or type(value).__module__.startswith("modelopt"):
        inner = vars(value) if hasattr(value, "__dict__") and not isinstance(value, nn.Module) else value
        if isinstance(inner, dict):
            return {k: _value(v) if not isinstance(v, nn.Module) else id(v) for k, v in inner.items()}
        return [_value(v) for v in inner] if isinstance(inner, (list, tuple)) else repr(inner)
    return id(value) if isinstance(value, nn.Module) else repr(value)


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything about every module: class, attributes, hooks, buffers, what calibrators hold."""
    picture: dict[str, Any] = {}
    for name, module in model.named_modules():
        picture[name] = (id(module), type(module), {k: _value(v) for k, v in vars(module).items()})
    return picture


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def converted() -> nn.Module:
    """A model that ModelOpt has converted; nothing is calibrated."""
    torch.manual_seed(0)
    return mtq.quantize(TinyDenoiser().eval(), {**fast_config(), "algorithm": None})


@torch.no_grad()
def unchanged_by(model: nn.Module, failing: Callable[[], Any]) -> None:
    sample, time = calls()[0]
    model(sample, time)
    modes = repr(mto.modelopt_state(model)["modelopt_state_dict"])
    before = picture(model)
    output = model(sample, time)
    failing()
    assert repr(mto.modelopt_state(model)["modelopt_state_dict"]) == modes
    after = picture(model)
    assert after.keys() == before.keys()
    for name in before:
        assert same(before[name], after[name]), name
    assert torch.equal(model(sample, time), output)
