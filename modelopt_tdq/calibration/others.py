"""Activation quantizers that ModelOpt calibrates itself: per channel, per block, with a constant range."""

from __future__ import annotations

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn
from torch import distributed as dist

from modelopt_tdq.core.distributed import gather, processes
from modelopt_tdq.errors import TdqError

__all__ = ["load_amax"]


def load_amax(model: nn.Module, quantizers: list[TensorQuantizer]) -> None:
    """Give each quantizer the largest magnitude that its calibrator saw in any process of its data-parallel group.

    ModelOpt's own ``sync_amax_across_distributed_group`` is a collective that a process skips whose calibrator saw
    nothing, and that only warns where it fails; so the numbers are exchanged here, all at once.

    Raises:
        TdqError: The processes saw different numbers of channels or blocks.
    """
    found = [None if q._calibrator is None else q._calibrator.compute_amax() for q in quantizers]
    everyone = gather([None if amax is None else amax.detach().cpu() for amax in found])
    groups = _groups(model)
    names = {id(module): name for name, module in model.named_modules()}
    for number, (quantizer, own) in enumerate(zip(quantizers, found, strict=True)):
        ranks = groups.get(id(quantizer), range(processes()))
        seen: dict[int, Tensor] = {r: everyone[r][number] for r in ranks if everyone[r][number] is not None}
        shapes = {rank: tuple(amax.shape) for rank, amax in seen.items()}
        if len(set(shapes.values())) > 1:
            raise TdqError(
                "forward_loop",
                names[id(quantizer)],
                f"its activation has other sizes in other processes: amax of shapes {shapes}, by rank",
                "Quantize it per tensor, or pass inputs of one size",
            )
        if seen:
            device = next(model.parameters()).device if own is None else own.device
            quantizer.amax = torch.stack(list(seen.values())).amax(0).to(device)


def _groups(model: nn.Module) -> dict[int, list[int]]:
    """Ranks of the data-parallel group that ModelOpt knows for a quantizer, by its id, where it is not all of them."""
    groups: dict[int, list[int]] = {}
    if processes() == 1:
        return groups
    for module in model.modules():
        state = getattr(module, "parallel_state", None)
        group = None if state is None else state.data_parallel_group.group
        if group is None:
            continue
        ranks = [dist.get_rank()] if group == -1 else dist.get_process_group_ranks(group)
        groups |= {id(q): ranks for q in module.modules() if isinstance(q, TensorQuantizer)}
    return groups
