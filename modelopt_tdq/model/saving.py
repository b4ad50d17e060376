"""Ways to save a quantized model that lose its scales or fail, refused with those that work.

``export_hf_checkpoint`` of ModelOpt writes one scale per layer. pickle, and so ``torch.save(model)``, cannot find the
classes that ModelOpt makes at run time.
"""

from __future__ import annotations

import copy
from typing import Any

from modelopt_tdq.errors import TdqError

__all__ = ["SAVING", "NotPickled", "no_checkpoint"]

#: A cure.
SAVING = (
    "Save it with modelopt.torch.opt.save(model, path), or a diffusers model with save_pretrained after "
    "modelopt.torch.opt.enable_huggingface_checkpointing(); deploy it with modelopt_tdq.export_onnx"
)


def no_checkpoint() -> TdqError:
    """The error for a checkpoint with one scale per layer."""
    return TdqError(
        "export_hf_checkpoint",
        "one scale per layer",
        "the scales of this model depend on time, and such a checkpoint would forget them",
        f"{SAVING}. modelopt_tdq.write_static_checkpoint(model, folder) writes such a one with the table beside it",
    )


class NotPickled:
    """For what stands in the root of a quantized model: can be copied, and tells who pickles the model what to do."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NotPickled:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TdqError(
            "model",
            "pickle",
            "a quantized model cannot be pickled, nor saved by torch.save(model): ModelOpt makes the classes of its "
            "layers at run time",
            SAVING,
        )
