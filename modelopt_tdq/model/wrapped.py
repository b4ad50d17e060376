"""Wrappers around a model: ``torch.compile``, data parallelism, sharding.

The model is what is inside: its ``forward`` takes the time, its modules have the names that a table knows, and it is
what ModelOpt converts. ModelOpt has a list of the wrappers that it takes off; ``torch.compile``'s is added to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from modelopt.torch.utils import unwrap_model
from modelopt.torch.utils.network import SUPPORTED_WRAPPERS
from torch import nn
from torch._dynamo import OptimizedModule

from modelopt_tdq.errors import TdqError

__all__ = ["eager", "register_wrappers", "require_plain_parts", "unwrapped"]

_Model = TypeVar("_Model")


def register_wrappers() -> None:
    """Let ModelOpt take off the wrapper of ``torch.compile(model)`` too; harmless when done before."""
    SUPPORTED_WRAPPERS.setdefault(OptimizedModule, "_orig_mod")


def unwrapped(model: _Model) -> _Model:
    """The model inside of its wrappers, in whatever order they were put on; anything else as it is."""
    while isinstance(model, nn.Module) and type(model) in SUPPORTED_WRAPPERS:
        model = unwrap_model(model, force_unwrap=True)
    return model


def require_plain_parts(model: nn.Module) -> None:
    """ModelOpt cannot calibrate weights inside of a part that ``torch.compile`` has wrapped.

    Raises:
        TdqError: There is such a part.
    """
    for name, module in model.named_modules():
        if isinstance(module, OptimizedModule):
            raise TdqError(
                "model",
                name,
                "this part is what torch.compile returned, and ModelOpt cannot look inside",
                f"Compile it in place instead, with model.{name}.compile(); or compile it after quantization",
            )


@contextmanager
def eager() -> Iterator[None]:
    """Run what was compiled as if it were not: calibration looks at every layer, and would be compiled with them."""
    with torch.compiler.set_stance("force_eager"):
        yield
