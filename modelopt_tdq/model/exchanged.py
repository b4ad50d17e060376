"""PyTorch's functions that a quantized attention exchanges while it runs: given back when the attention fails.

ModelOpt 0.47 puts functions of its own in the place of ``torch.bmm``, ``torch.baddbmm`` and
``scaled_dot_product_attention``, and gives them back only when the forward returns. After an error inside one (a call
without its time, memory that runs out, Ctrl-C), every later product of the whole process went through the quantizers
of that one layer, or failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

from modelopt.torch.quantization.utils import core_utils

__all__ = ["give_back_exchanged_functions"]

_NAME = "replace_function"


def _giving_back(exchange: Callable[..., AbstractContextManager[None]]) -> Callable[..., Any]:
    @contextmanager
    def replace_function(
        package: Any, name: str, new_func: Callable[..., Any], og_func_cache_name: str | None = None
    ) -> Iterator[None]:
        """ModelOpt's, with both attributes as they were afterwards, whatever happens inside."""
        keys = name, og_func_cache_name or f"_{name}"
        before = {key: vars(package)[key] for key in keys if key in vars(package)}
        try:
            with exchange(package, name, new_func, og_func_cache_name):
                yield
        finally:
            for key in keys:
                if key in before:
                    setattr(package, key, before[key])
                elif key in vars(package):
                    delattr(package, key)

    replace_function.__module__ = __name__
    return replace_function


def give_back_exchanged_functions() -> None:
    """Let every module of ModelOpt use the context that gives back; harmless when done before."""
    theirs = getattr(core_utils, _NAME)
    if theirs.__module__ == __name__:
        return
    ours = _giving_back(theirs)
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and vars(module).get(_NAME) is theirs:
            setattr(module, _NAME, ours)
