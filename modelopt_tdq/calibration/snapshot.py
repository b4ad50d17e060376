"""Everything that calibration may change, so that a failed one leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

__all__ = ["restored_on_error"]


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    copied = dict(attributes)
    copied["_buffers"] = {k: None if v is None else v.clone() for k, v in attributes["_buffers"].items()}
    copied["_parameters"] = dict(attributes["_parameters"])
    copied["_non_persistent_buffers_set"] = set(attributes["_non_persistent_buffers_set"])
    return copied


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Undo changes to the quantizers of ``model`` and to the hooks on its root, if the body raises."""
    quantizers = [(m, type(m), _copied(m.__dict__)) for m in model.modules() if isinstance(m, TensorQuantizer)]
    hooks = {name: dict(getattr(model, name)) for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")}
    try:
        yield
    except BaseException:
        for quantizer, kind, attributes in quantizers:
            quantizer.__class__ = kind
            quantizer.__dict__.clear()
            quantizer.__dict__.update(attributes)
        for name, saved in hooks.items():
            current = getattr(model, name)
            current.clear()
            current.update(saved)
        raise
