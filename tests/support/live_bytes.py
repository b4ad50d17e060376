"""How much memory of tensors is alive at once: counted where operators make it, so the same on every machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that operators return in the body, as long as they live.

    Attributes:
        most: Bytes that were alive at once, without what was there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[StorageWeakRef, int] = {}
        self._total = 0
        self._before: set[StorageWeakRef] = set()
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)}
        self._before |= given - self._alive.keys()
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if _has_storage(leaf):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference not in self._before and reference not in self._alive:
                    self._alive[reference] = storage.nbytes()
                    self._total += storage.nbytes()
        if self._total > self.most:
            self._alive = {reference: size for reference, size in self._alive.items() if not reference.expired()}
            self._before = {reference for reference in self._before if not reference.expired()}
            self._total = sum(self._alive.values())
            self.most = max(self.most, self._total)
        return output


def _has_storage(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type != "meta" and leaf.layout is torch.strided
