"""What waits for the device: reads of a tensor's values by Python. On the CPU they cost nothing, and count the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Besides ``item``, ``bool``, ``float`` and ``int``, which are one operator.
_METHODS = ("tolist", "cpu", "numpy")


class _Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[_Reads]:
    """Counts them in the body."""
    with pytest.MonkeyPatch.context() as patch, _Reads() as reads:
        for name in _METHODS:
            original = getattr(Tensor, name)

            def counted(self: Tensor, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
                reads.count += 1
                return _original(self, *args, **kwargs)

            patch.setattr(Tensor, name, counted)
        yield reads
