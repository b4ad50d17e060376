"""Caches of diffusers: hooks that let layers skip a call, and give what an earlier call computed instead."""

from __future__ import annotations

from torch import nn

from modelopt_tdq.errors import TdqError

__all__ = ["require_no_cache"]


def require_no_cache(model: nn.Module, doing: str) -> None:
    """For what looks at calls of a model: in each of them, every layer has to compute what it is given.

    A calibration would see nothing of a layer at the times at which a cache skips it, and what is judged by running
    single calls again, in another order and in other batches, would get what other calls have left behind.

    Args:
        model: The root.
        doing: What is to be done with it, as in "the model cannot ...".

    Raises:
        TdqError: A hook of diffusers keeps something from one call for the next.
    """
    for name, module in model.named_modules():
        registry = vars(module).get("_diffusers_hook")
        hooks = {} if registry is None else registry.hooks
        kinds = [type(hook).__name__ for hook in hooks.values() if getattr(hook, "_is_stateful", False)]
        if kinds:
            raise TdqError(
                "model",
                f"{name or type(model).__name__}: {', '.join(kinds)}",
                f"the model cannot {doing} while a cache skips layers",
                "Call model.disable_cache() before, and model.enable_cache(config) again afterwards",
            )
