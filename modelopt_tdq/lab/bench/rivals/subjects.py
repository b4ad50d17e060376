"""The models that are compared on, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.demo.bundled import bundled_model
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.trajectories import load_scheduler

__all__ = ["SUBJECTS", "Subject", "subject"]


@dataclass(frozen=True, eq=False)
class Subject:
    """A full-precision model, and sizes that suit it.

    Attributes:
        name: Of the model.
        model: In eval mode.
        scheduler: Deterministic.
        samples: Calibration trajectories.
        held_out: Trajectories to judge on.
        steps: Of a trajectory.
        trains_on_cifar10: Whether QAT can train it on those images.
    """

    name: str
    model: nn.Module
    scheduler: Any
    samples: int = 16
    held_out: int = 8
    steps: int = 20
    trains_on_cifar10: bool = False

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the weights, the first 16 digits."""
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def _folder(name: str, folder: Path) -> Subject:
    return Subject(name, load_model(folder), load_scheduler(folder), trains_on_cifar10=True)


#: Name to what loads it.
SUBJECTS: dict[str, Callable[[], Subject]] = {
    "unet": lambda: _folder("unet", bundled_model()),
    "dit": lambda: _folder("dit", Path(__file__).resolve().parents[4] / "trt_examples/ddim_cifar10/dit"),
}


@cache
def subject(name: str) -> Subject:
    """One of :data:`SUBJECTS`.

    Raises:
        TdqError: There is none of that name.
    """
    if name not in SUBJECTS:
        raise TdqError("models", name, "no such model", f"Use some of {', '.join(SUBJECTS)}")
    return SUBJECTS[name]()
