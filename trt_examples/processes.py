"""Several processes of one command, as torchrun and accelerate launch start them: each with a GPU, and some prompts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import modelopt.torch.opt as mto
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from modelopt_tdq.errors import TdqError


def join(options: argparse.Namespace) -> None:
    """Begin torch.distributed if a launcher has started this process; its device is the GPU of its number."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        on_gpu = options.device.startswith("cuda")
        if on_gpu:
            options.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(options.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several and options.step != ["quantize"]:
        raise TdqError("step", options.step, "only quantize runs in several processes", "Run the others in one")
    if options.shard and not several:
        raise TdqError("shard", True, "there is one process", "Start several: torchrun --nproc-per-node 4 ...")


def is_first() -> bool:
    """Whether this process writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def shard(denoiser: torch.nn.Module) -> None:
    """Spread the blocks of a denoiser over the processes, and what is left of it."""
    for child in denoiser.children():
        if isinstance(child, torch.nn.ModuleList):
            for block in child:
                fully_shard(block)
    fully_shard(denoiser)


def gathered(denoiser: torch.nn.Module, fresh: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """The same in one process, the first: ``fresh`` makes it as it was before it was quantized."""
    state = mto.modelopt_state(denoiser)
    weights = get_model_state_dict(denoiser, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not is_first():
        return denoiser
    whole: Any = mto.restore_from_modelopt_state(fresh(), state)
    whole.load_state_dict(weights)
    return whole
