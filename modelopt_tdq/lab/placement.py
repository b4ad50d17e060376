"""Where a model computes, in which type, and where its weights wait meanwhile, as named on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.model.call import walk

__all__ = ["DTYPES", "OFFLOADS", "Placement"]

#: By the name that a user gives.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: What waits in CPU memory until it is needed: nothing; each layer (accelerate); each block (diffusers); and, of a
#: pipeline, each model.
OFFLOADS = ("none", "sequential", "group", "model")


@dataclass(frozen=True)
class Placement:
    """A device, a type and an offload.

    Attributes:
        device: Where the model computes.
        dtype: Of its weights and inputs.
        offload: One of :data:`OFFLOADS`.
    """

    device: torch.device
    dtype: torch.dtype
    offload: str = "none"

    @classmethod
    def of(cls, device: str = "auto", dtype: str = "fp32", offload: str = "none") -> Placement:
        """What the user names: ``cpu``, ``cuda``, ``cuda:1`` or ``auto``, a GPU if there is one; see :data:`DTYPES`.

        Raises:
            TdqError: There is no such device, type or offload here.
        """
        if dtype not in DTYPES:
            raise TdqError("dtype", dtype, "no such type", f"Use {', '.join(DTYPES)}")
        if offload not in OFFLOADS:
            raise TdqError("offload", offload, "no such offload", f"Use {', '.join(OFFLOADS)}")
        return cls(_device(device), DTYPES[dtype], offload)

    def place(self, model: nn.Module) -> nn.Module:
        """``model`` there; to be taken back by :meth:`take_back` before it is saved or exported.

        Raises:
            TdqError: It is a single model, and models are to be offloaded as a whole.
        """
        if self.offload == "model":
            raise TdqError("offload", "model", "it moves the models of a pipeline", "Use sequential or group")
        model.to(self.dtype)
        if self.offload == "sequential":
            require("accelerate", "diffusers").cpu_offload(model, self.device)
        elif self.offload == "group":
            hooks = require("diffusers.hooks", "diffusers")
            groups = {"offload_type": "block_level", "num_blocks_per_group": 1}
            hooks.apply_group_offloading(model, self.device, torch.device("cpu"), **groups)
        else:
            model.to(self.device)
        return model

    def take_back(self, model: nn.Module) -> None:
        """Without what :meth:`place` put around ``model``, and on the CPU."""
        if self.offload == "sequential":
            from accelerate.hooks import remove_hook_from_submodules

            remove_hook_from_submodules(model)
        elif self.offload == "group":
            from diffusers.hooks.hooks import HookRegistry

            HookRegistry.check_if_exists_or_initialize(model).remove_hook("group_offloading")
        model.to("cpu")

    def moved(self, value: Any) -> Any:
        """Tensors of the arguments of a call, there; floating-point ones in the model's type."""

        def move(_: str, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(self.device, self.dtype if leaf.is_floating_point() else None)

        return walk(value, move)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TdqError("device", name, "no such device", "Use cpu, cuda, cuda:1 or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise TdqError("device", name, "not a device that this runs on", "Use cpu, cuda, cuda:1 or auto")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available():
            reason = "this PyTorch is built for CPUs" if torch.version.cuda is None else "PyTorch sees no GPU"
            cure = "Use --device cpu; or install a PyTorch for CUDA, and see `modelopt-tdq doctor`"
            raise TdqError("device", name, reason, cure)
        if device.index is not None and device.index >= count:
            raise TdqError("device", name, f"there are {count} GPUs", f"Use cuda:0 to cuda:{count - 1}")
    return device
