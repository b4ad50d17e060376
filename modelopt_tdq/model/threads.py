"""Which threads are calling quantized models, since ModelOpt's layers cannot be shared by all of them.

A layer of ModelOpt that quantizes its weight on the fly sets a flag on itself while it runs, and an attention that is
quantized exchanges a function of PyTorch for the whole process. A second thread would compute with weights that are not
quantized, or with the quantizers of another layer, and nothing would tell. So it is refused.
"""

from __future__ import annotations

import threading

from modelopt.torch.quantization.plugins.custom import _QuantFunctionalMixin
from torch import nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.select import weight_quantizers

__all__ = ["enter", "leave"]

#: (thread, id of the root) to (the root, how many calls of it are in flight there).
_RUNNING: dict[tuple[int, int], tuple[nn.Module, int]] = {}


def _exchanges_functions(model: nn.Module) -> bool:
    return any(
        isinstance(module, _QuantFunctionalMixin) and next(iter(module.functionals_to_replace), None) is not None
        for module in model.modules()
    )


def enter(model: nn.Module) -> None:
    """A call of ``model`` begins in this thread.

    Raises:
        TdqError: Another thread is in the middle of a call, and the two would disturb each other.
    """
    own = threading.get_ident()
    for (thread, _), (other, _) in list(_RUNNING.items()):
        if thread == own:
            continue
        problem = ""
        if other is model and any(getattr(quantizer, "is_enabled", True) for quantizer in weight_quantizers(model)):
            problem = "its weights are quantized on the fly, which marks the layer while it runs"
            cure = "Call mtq.fold_weight(model) first, copy the model for each thread, or take turns with a lock"
        elif _exchanges_functions(model) or _exchanges_functions(other):
            problem = "a quantized attention exchanges a function of PyTorch for all threads while it runs"
            cure = "Take turns with a lock, or use processes"
        if problem:
            raise TdqError(
                "model", type(model).__name__, f"another thread is calling {type(other).__name__}, and {problem}", cure
            )
    count = _RUNNING.get((own, id(model)), (model, 0))[1]
    _RUNNING[own, id(model)] = model, count + 1


def leave(model: nn.Module) -> None:
    """The innermost call of ``model`` in this thread is over, or was refused."""
    key = threading.get_ident(), id(model)
    count = _RUNNING.get(key, (model, 0))[1]
    if count > 1:
        _RUNNING[key] = model, count - 1
    else:
        _RUNNING.pop(key, None)
